"""Losses as pure functions of log-probabilities; results are per example, the caller takes the mean.

Axes: B prompts, G completions of one prompt (a group), T tokens, D model width, V vocabulary, K classes.
A completion is scored once, [B, G, T], and every algorithm reads the same numbers:

    logp, entropy = token_log_probs(hidden, head, targets, temperature=1.0, chunk=16)
    SFT    cross_entropy(logp, mask) + soft_label_kl(p, class_logits)
    DPO    dpo(logp_w, logp_l, ref_w, ref_l, beta), each the masked sum over T of one completion
    GRPO   aggregate(grpo(logp, logp_old, advantages, eps_low, eps_high) + beta_kl * k3(logp, logp_ref),
                     mask, "sequence_mean", tokens=batch_tokens_per_prompt, max_length=max_length)

GRPOz is GRPO with the gold completion as the last of G. One update a batch: logp_old is logp; several: it is
what logp was before the first of them. Log-probabilities are natural, finite and float32, those of padding too;
masks are 1 (or True) where a token counts.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from ambijax.errors import ConfigError

# exp(20) = 5e8: far outside every clipping range, and finite in float32 for a padding token or a
# runaway policy, whose infinite ratio would turn a masked gradient (0 * inf) into NaN.
_MAX_LOG_RATIO = 20.0


def soft_label_kl(p: jax.Array, logits: jax.Array) -> jax.Array:
    """Forward KL from the annotators' votes to the read-out (paper, equation 2).

    L = sum_k p_k log(p_k / phat_k), phat = softmax(logits), 0 log 0 = 0. Its gradient by the logits is phat - p.

    Args:
      p: soft labels [..., K], rows sum to one; a constant.
      logits: of the K class words [..., K].

    Returns:
      nats [...].
    """
    chex.assert_equal_shape([p, logits])
    p = jax.lax.stop_gradient(p)
    log_phat = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_p = jnp.log(jnp.where(p > 0, p, 1))
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_phat), 0), axis=-1)


def reverse_soft_label_kl(p: jax.Array, logits: jax.Array, floor: float) -> jax.Array:
    """Reverse KL from the read-out to the votes: it seeks one mode of p where the forward one covers all.

    L = sum_k phat_k log(phat_k / q_k), q = (1 - floor) p + floor / K: a class without a vote would cost infinity.

    Args:
      p: soft labels [..., K], rows sum to one; a constant.
      logits: of the K class words [..., K].
      floor: share of the uniform distribution in q, in (0, 1].

    Returns:
      nats [...].
    """
    chex.assert_equal_shape([p, logits])
    q = (1 - floor) * jax.lax.stop_gradient(p) + floor / p.shape[-1]
    log_phat = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_phat) * (log_phat - jnp.log(q)), axis=-1)


def cross_entropy(logp: jax.Array, mask: jax.Array) -> jax.Array:
    """Negative log-likelihood of a trajectory, mean over its tokens (paper, equation 3).

    L = -(1 / |r|) sum_t log pi(r_t | x, r_<t)

    Args:
      logp: log-probabilities of the target tokens [..., T].
      mask: which of them count [..., T].

    Returns:
      nats per token [...]; 0 for a sequence without a token that counts.
    """
    return -masked_mean(logp, mask, axis=-1)


def dpo(logp_w: jax.Array, logp_l: jax.Array, ref_w: jax.Array, ref_l: jax.Array, beta: float) -> jax.Array:
    """Direct preference optimisation (paper, equation 5; Rafailov et al., arXiv 2305.18290, equation 7).

    L = -log sigmoid(beta [log pi(yw|x) / ref(yw|x) - log pi(yl|x) / ref(yl|x)])

    Args:
      logp_w: policy's log-probability of the preferred completion [...], summed over its tokens.
      logp_l: the same of the rejected completion [...].
      ref_w: reference's log-probability of the preferred completion [...].
      ref_l: the same of the rejected completion [...].
      beta: how strongly the policy is held to the reference.

    Returns:
      nats [...]; ln 2 where policy and reference agree. A pair that is none is the caller's to mask.
    """
    chex.assert_equal_shape([logp_w, logp_l, ref_w, ref_l])
    return -jax.nn.log_sigmoid(beta * ((logp_w - ref_w) - (logp_l - ref_l)))


def k3(logp: jax.Array, logp_ref: jax.Array) -> jax.Array:
    """Per-token estimate of KL(pi || ref), never negative (paper, equation 7; Schulman, "Approximating KL").

    k3 = exp(d) - d - 1, d = log ref - log pi

    Args:
      logp: policy's log-probabilities of sampled tokens [...].
      logp_ref: reference's log-probabilities of the same tokens [...].

    Returns:
      nats [...].
    """
    chex.assert_equal_shape([logp, logp_ref])
    d = _log_ratio(logp_ref, logp)
    return jnp.exp(d) - d - 1


def grpo(
    logp: jax.Array,
    logp_old: jax.Array,
    advantages: jax.Array,
    eps_low: float,
    eps_high: float,
) -> jax.Array:
    """Clipped surrogate per token, negated: to be minimised (paper, equation 7; arXiv 2402.03300, equation 3).

    L_t = -min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A), rho = pi / pi_old

    Args:
      logp: policy's log-probabilities [..., T].
      logp_old: those of the policy that sampled [..., T]; a constant.
      advantages: one a completion [...]; a constant.
      eps_low: how far below one the ratio still learns.
      eps_high: how far above.

    Returns:
      [..., T].
    """
    chex.assert_equal_shape([logp, logp_old])
    chex.assert_shape(advantages, logp.shape[:-1])
    rho = jnp.exp(_log_ratio(logp, jax.lax.stop_gradient(logp_old)))
    a = jax.lax.stop_gradient(advantages)[..., None]
    return -jnp.minimum(rho * a, jnp.clip(rho, 1 - eps_low, 1 + eps_high) * a)


def shaped_imitation(logp: jax.Array, advantages: jax.Array, gamma: float) -> jax.Array:
    """Surrogate per token for a completion nobody sampled: the gold one, in place of `grpo`.

    L_t = -A pi / (pi + gamma); gamma in (0, 1) lifts the gradient of tokens the policy finds unlikely
    (arXiv 2504.14945, equation 6, "policy shaping").

    Args:
      logp: policy's log-probabilities [..., T].
      advantages: one a completion [...]; a constant.
      gamma: probability below which a token counts as unlikely.

    Returns:
      [..., T].
    """
    chex.assert_shape(advantages, logp.shape[:-1])
    a = jax.lax.stop_gradient(advantages)[..., None]
    return -a * jax.nn.sigmoid(logp - jnp.log(gamma))  # pi / (pi + gamma), without leaving log space


def aggregate(per_token: jax.Array, mask: jax.Array, how: str, *, tokens: jax.Array, max_length: int) -> jax.Array:
    """A group's tokens to one number a group, of which the mean over the batch's prompts is the loss.

    'sequence_mean'    mean over the tokens of a completion, then over the completions (paper, equation 7)
    'token_mean'       sum over the tokens of the group by `tokens`: over the batch, the mean over all its tokens,
                       whichever group they are in (DAPO, arXiv 2503.14476)
    'constant_length'  sum over the tokens of the group by its completions times max_length (Dr. GRPO, arXiv 2503.20783)

    A completion without a token that counts is no member of the group, as a prompt without a gold trajectory has none.

    Args:
      per_token: [..., G, T].
      mask: which tokens count [..., G, T].
      how: one of the three.
      tokens: how many tokens count, a prompt, mean over the whole batch and not over the part of it that is at hand
        [...]; only 'token_mean' reads it.
      max_length: the longest completion a roll-out may write, in tokens; only 'constant_length' reads it.

    Returns:
      [...].

    Raises:
      ConfigError: `how` is none of them.
    """
    chex.assert_equal_shape([per_token, mask])
    members = jnp.maximum(jnp.sum(jnp.any(mask, axis=-1), axis=-1), 1)
    if how == "sequence_mean":
        return jnp.mean(masked_mean(per_token, mask, axis=-1), axis=-1) * (per_token.shape[-2] / members)
    total = jnp.sum(jnp.where(mask, per_token, 0), axis=(-2, -1))
    if how == "token_mean":
        return total / jnp.where(tokens > 0, tokens, 1)
    if how == "constant_length":
        return total / (members * max_length)
    raise ConfigError(f"loss aggregation '{how}' is unknown; choose sequence_mean, token_mean or constant_length")


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Mean over the entries that count; 0 where none does."""
    chex.assert_equal_shape([x, mask])
    mask = mask.astype(bool)
    return jnp.sum(jnp.where(mask, x, 0), axis) / jnp.maximum(jnp.sum(mask, axis), 1)


def token_log_probs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, temperature: float, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """log pi(target) and entropy of every position, without an array of [..., T, V].

    A slice of time steps at a time is multiplied with the head in hidden's dtype, accumulated and normalised in
    float32. Its size is B * G * chunk * V. The gradient by `hidden` is formed in the same pass, since
    d log pi_y / d h = W (e_y - pi) is known up to a scalar a token; so scoring with gradient costs two products with
    the head, not three. The gradient by `head` recomputes the slices, and costs nothing where nobody asks for it
    under jit: its loop is dead code.

    Args:
      hidden: final hidden states [..., T, D].
      head: the language model's [V, D], a row for each word. Turned around, it would be copied before it is read.
      targets: token ids [..., T].
      temperature: the logits are divided by it.
      chunk: most time steps in a slice.

    Returns:
      log-probabilities [..., T] and entropies [..., T], float32, nats. The entropies carry no gradient.
    """
    chex.assert_shape(hidden, (*targets.shape, head.shape[1]))
    time = targets.ndim - 1
    logp, entropy = _sliced_log_probs(
        _slices(hidden, time, chunk), head.astype(hidden.dtype), _slices(targets, time, chunk), temperature
    )
    shape = (*targets.shape[:-1], -1)
    logp, entropy = (jnp.moveaxis(x, 0, time).reshape(shape) for x in (logp, entropy))
    return logp[..., : targets.shape[-1]], entropy[..., : targets.shape[-1]]


def _slices(x: jax.Array, axis: int, chunk: int) -> jax.Array:
    """[..., T, ...] -> [slices, ..., t, ...]: only time is cut, so the axes before it keep their sharding."""
    length = x.shape[axis]
    slices = -(-length // chunk)
    width = -(-length // slices)  # even slices: 257 steps in chunks of 256 are two of 129
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, slices * width - length)
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], slices, width, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sliced_log_probs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """hidden [S, ..., t, D], head [V, D], targets [S, ..., t] -> log-probabilities, entropies [S, ..., t]."""
    return jax.lax.map(lambda x: _score(x[0], head, x[1], temperature)[:2], (hidden, targets))


def _sliced_forward(hidden, head, targets, temperature):
    def score(x):
        logp, entropy, by_logits = _score(x[0], head, x[1], temperature)
        by_hidden = jnp.dot(by_logits.astype(hidden.dtype), head, preferred_element_type=jnp.float32)
        return logp, entropy, by_hidden.astype(hidden.dtype)

    logp, entropy, by_hidden = jax.lax.map(score, (hidden, targets))
    return (logp, entropy), (hidden, head, targets, by_hidden)


def _sliced_backward(temperature, saved, cotangents):
    hidden, head, targets, by_hidden = saved
    g = cotangents[0][..., None]  # the entropy's is dropped: it is a diagnostic

    def accumulate(total, x):
        by_logits = x[2] * _score(x[0], head, x[1], temperature)[2]
        axes = tuple(range(x[0].ndim - 1))
        return total + jnp.tensordot(
            by_logits.astype(hidden.dtype), x[0], (axes, axes), preferred_element_type=jnp.float32
        ), None

    zero = jnp.zeros(head.shape, jnp.float32)
    by_head, _ = jax.lax.scan(accumulate, zero, (hidden, targets, g))
    return (g * by_hidden).astype(hidden.dtype), by_head.astype(head.dtype), None


_sliced_log_probs.defvjp(_sliced_forward, _sliced_backward)


def _score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One slice: log pi_y [..., t], entropy [..., t], and d log pi_y / d logits = (e_y - pi) / temperature.

    Written so that the logits are stored once and exp(logits) once: a shifted copy of them, as in log_softmax, costs as
    much as a quarter of the product. The logits are a plain matrix, because sums over an array with an axis of size one
    take XLA on a CPU forty times as long (docs/log.md).
    """
    shape, hidden, targets = targets.shape, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    logits = jnp.tensordot(hidden, head, (1, 1), preferred_element_type=jnp.float32) / temperature
    top = logits.max(axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = exp.sum(axis=-1)
    log_total = top[..., 0] + jnp.log(total)
    hit = jax.nn.one_hot(targets, len(head), dtype=bool)
    logp = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - log_total
    entropy = log_total - jnp.sum(exp * logits, axis=-1) / total
    by_logits = (hit - exp / total[..., None]) / temperature
    return logp.reshape(shape), entropy.reshape(shape), by_logits.reshape(*shape, -1)


def _log_ratio(logp: jax.Array, logp_other: jax.Array) -> jax.Array:
    return jnp.clip(logp - logp_other, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
