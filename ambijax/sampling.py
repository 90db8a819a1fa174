"""Drawing tokens by inverting their distribution, with keys that depend on (seed, step, example, sample) alone.

B prompts   G completions of one prompt   V vocabulary
"""

import jax
import jax.numpy as jnp

from ambijax import sharding

_BLOCK = 256  # words of the vocabulary that are summed before one is drawn from them


def completion_keys(key: jax.Array, example: jax.Array, samples: int) -> jax.Array:
    """One PRNG key per completion, [B, G], from (seed and step in `key`, example, sample): batching changes nothing."""
    one = lambda e, g: jax.random.fold_in(jax.random.fold_in(key, e), g)  # noqa: E731
    return jax.vmap(lambda e: jax.vmap(lambda g: one(e, g))(jnp.arange(samples)))(example)


def draw(logits: jax.Array, keys: jax.Array | None, t: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """One token a completion, and its log-probability at the sampling temperature.

    Args:
      logits: of the next word, float32 [B, G, V].
      keys: of each completion, [B, G], see `completion_keys`; not read at temperature 0.
      t: which token of the completion this is; folded into the keys.
      temperature: divides the logits; 0 takes the likeliest word.

    Returns:
      int32 [B, G], float32 [B, G].
    """
    if temperature == 0.0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
    else:
        logits = logits / temperature
        pair = jax.vmap(jax.vmap(lambda key: 1.0 - jax.random.uniform(jax.random.fold_in(key, t), (2,))))
        token, log_sum = categorical(logits, pair(keys))
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return token, chosen - log_sum


def categorical(logits: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverts the cumulative distribution, first over blocks of the vocabulary, then within one block.

    Two uniform numbers a token, where Gumbel noise takes one for every word of the vocabulary: on a CPU that was half
    of a roll-out. Two and not one, because the 2^-23 steps of a single one are coarser than the rarest words.

    Args:
      logits: [..., V].
      u: uniform in (0, 1], [..., 2].

    Returns:
      int32 tokens [...], and log sum exp of the logits [...].
    """
    size = logits.shape[-1]
    parts = sharding.split("vocab")  # each holds whole blocks, or all would gather the logits to cut them into blocks
    blocks = -(-size // (_BLOCK * parts)) * parts
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.pad(jnp.exp(logits - top), [(0, 0)] * (logits.ndim - 1) + [(0, blocks * _BLOCK - size)])
    weights = weights.reshape(*logits.shape[:-1], blocks, _BLOCK)
    masses = weights.sum(axis=-1)
    block = _first_reaching(masses, u[..., 0])
    within = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    token = block * _BLOCK + _first_reaching(within, u[..., 1])
    return token, top[..., 0] + jnp.log(masses.sum(axis=-1))


def _first_reaching(weights: jax.Array, u: jax.Array) -> jax.Array:
    """The first index at which the running sum of weights [..., N] reaches the share u [...] in (0, 1] of the whole.

    An entry of weight zero reaches nothing that was not reached before it, so it is never taken.
    """
    running = jnp.cumsum(weights, axis=-1)
    return jnp.argmax(running >= u[..., None] * running[..., -1:], axis=-1).astype(jnp.int32)
