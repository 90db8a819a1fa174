"""SFT, DPO, GRPO and GRPOz: what each collects before an update, and the loss of that update.

On-policy work is "make a richer batch": `collect` turns a batch into what the loss needs (for SFT nothing is missing),
`loss` is a pure function of the variables and of what was collected. One loop in train.py serves all four.
GRPOz is GRPO with `gold=True`: the curated trajectory joins the group.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ambijax import losses, metrics, reasoning, rewards, sharding
from ambijax.agent import Judged, Setting, grade, judge
from ambijax.structs import Batch, Completions, Group, Preferences, Prompt, Rollout

# --- SFT -------------------------------------------------------------------------------------------------------------


def collect_nothing(setting: Setting, variables: dict, batch: Batch, key: jax.Array) -> tuple[Batch, dict, list]:
    """SFT learns from the batch as it is."""
    batch = batch.replace(gold=setting.pack(batch.prompt, batch.gold))
    return sharding.place(batch, setting.mesh), {}, []


def sft_loss(setting: Setting, variables: dict, batch: Batch, rngs: dict) -> tuple[jax.Array, dict]:
    """Equation 3: lambda_ce CE of the curated trajectory + lambda_kl KL of the read-out after it. [B] and metrics."""
    c = setting.config.loss
    scores = setting.score(variables, batch.prompt, batch.gold, rngs)
    ce = losses.cross_entropy(scores.logp, batch.ce_mask)[:, 0]
    kl = setting.soft_label_kl(batch.target, scores.readout[:, 0])
    return c.lambda_ce * ce + c.lambda_kl * kl, {"loss/ce": ce, "loss/kl": kl}


# --- DPO -------------------------------------------------------------------------------------------------------------


def collect_preferences(
    setting: Setting, variables: dict, batch: Batch, key: jax.Array
) -> tuple[Preferences, dict, list]:
    """Rolls out, and rejects what reads out too far from the votes: JS(p, phat) > tau."""
    c = setting.config.dpo
    placed = sharding.place(batch, setting.mesh)
    rolled = sharding.fetch(setting.rollout(variables, placed.prompt, key, c.samples, c.temperature))
    judged = judge(setting, rolled, batch.target)

    chosen, pairs = _negatives(c.negatives, judged.js, c.tau, key, batch.prompt.example)
    pairs &= batch.ce_mask.any(axis=-1)  # no curated trajectory, nothing to prefer
    rejected = jax.tree.map(lambda x: _take(x, chosen), rolled.completions)
    completions = sharding.place(setting.pack(batch.prompt, _join(batch.gold, rejected)), setting.mesh)
    reference = setting.score({"params": variables["params"]}, placed.prompt, completions, {})
    collected = Preferences(
        prompt=placed.prompt,
        completions=completions,
        ce_mask=placed.ce_mask,
        pairs=sharding.place(pairs, setting.mesh),
        logp_ref=reference.logp,
        target=placed.target,
    )
    is_rejected = np.zeros(judged.js.shape, bool)
    np.put_along_axis(is_rejected, chosen, pairs, axis=1)
    return collected, judged.metrics() | {"dpo/pairs": pairs.mean()}, judged.samples({"rejected": is_rejected})


def _negatives(
    how: str, js: np.ndarray, tau: float, key: jax.Array, example: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which roll-outs are rejected: indices [B, R] and whether each is bad enough [B, R]."""
    js = np.where(np.isnan(js), -1, js)  # argmax would prefer a read-out that is no number
    if how == "all":
        chosen = np.broadcast_to(np.arange(js.shape[1]), js.shape)
    elif how == "worst":
        chosen = js.argmax(axis=1)[:, None]
    else:  # one at random among those above tau; the draw depends on seed, step and example
        seed = jax.random.key_data(key).tolist()
        draws = np.stack([np.random.default_rng((*seed, int(e))).random(js.shape[1]) for e in example])
        chosen = np.where(js > tau, draws, -1).argmax(axis=1)[:, None]
    return chosen, np.take_along_axis(js, chosen, axis=1) > tau


def dpo_loss(setting: Setting, variables: dict, collected: Preferences, rngs: dict) -> tuple[jax.Array, dict]:
    """Equation 4: L_DPO + lambda_kl KL + lambda_ce CE, both on the curated trajectory. [B] and metrics.

    A completion that is no pair has a `dpo/margin` of 0: over `dpo/pairs` it is the mean over pairs.
    """
    c = setting.config
    scores = setting.score(variables, collected.prompt, collected.completions, rngs)
    total, reference = scores.logp.sum(-1), collected.logp_ref.sum(-1)  # [B, 1 + R], padding is zero
    shape = collected.pairs.shape
    preferred = [jnp.broadcast_to(x[:, :1], shape) for x in (total, reference)]
    dpo = losses.dpo(preferred[0], total[:, 1:], preferred[1], reference[:, 1:], c.dpo.beta)
    dpo = jnp.sum(jnp.where(collected.pairs, dpo, 0.0), axis=1) / jnp.maximum(collected.pairs.sum(axis=1), 1)
    ce = losses.cross_entropy(scores.logp[:, :1], collected.ce_mask)[:, 0]
    kl = setting.soft_label_kl(collected.target, scores.readout[:, 0])
    margin = jnp.where(collected.pairs, preferred[0] - preferred[1] - (total - reference)[:, 1:], 0.0).mean(axis=1)
    aux = {"loss/dpo": dpo, "loss/ce": ce, "loss/kl": kl, "dpo/margin": c.dpo.beta * margin}
    return dpo + c.loss.lambda_kl * kl + c.loss.lambda_ce * ce, aux


# --- GRPO and GRPOz --------------------------------------------------------------------------------------------------


def collect_group(
    setting: Setting, variables: dict, batch: Batch, key: jax.Array, *, gold: bool
) -> tuple[Group, dict, list]:
    """Rolls out K completions of each prompt, rewards them (equation 6), and with `gold` adds the curated one."""
    c = setting.config.grpo
    placed = sharding.place(batch, setting.mesh)
    rolled = setting.rollout(variables, placed.prompt, key, c.samples, c.temperature, c.keep_activations)
    known, rolled = rolled.known, sharding.fetch(rolled.replace(known=None))
    judged = judge(setting, rolled, batch.target)
    credit = _format_credit(setting, rolled, judged)
    reward = rewards.reward(judged.js, credit, **_weights(setting))
    completions, loss_mask, gold_reward = rolled.completions, rolled.completions.mask, None
    if gold:
        completions = _join(completions, batch.gold)
        loss_mask = np.concatenate([loss_mask, batch.ce_mask & c.gold_in_loss], axis=1)
        gold_reward = _gold_reward(setting, variables, batch, placed)
    advantages = rewards.group_advantages(
        reward, gold_reward, scale=c.scale, ddof=c.ddof, eps=c.eps, min_std=c.min_std, gold_adv_clip=c.gold_adv_clip
    )
    collected = _group(setting, variables, batch.prompt, placed, completions, rolled.logp, loss_mask, advantages)
    collected = collected.replace(known=known)
    spread = rewards.group_std(reward, c.ddof)
    measured = judged.metrics() | {
        "reward/mean": reward.mean(),
        "reward/std": spread.mean(),
        "reward/degenerate": (spread < 1e-6).mean(),
    }
    records = judged.samples({"credit": credit, "reward": reward, "advantage": advantages[:, : c.samples]})
    if gold:
        for group, r, a in zip(records, gold_reward, advantages[:, -1], strict=True):
            group.append({"gold": True, "reward": None if np.isnan(r) else float(r), "advantage": float(a)})
    return collected, measured, records


def _weights(setting: Setting) -> dict[str, float]:
    return {"w_js": setting.config.reward.w_js, "w_fmt": setting.config.reward.w_fmt}


def _format_credit(setting: Setting, rolled: Rollout, judged: Judged) -> np.ndarray:
    """What the format earns each completion, [B, K]: all or nothing, or a share for each requirement that is met."""
    if setting.config.reward.format == "exact":
        return judged.fmt
    return grade(setting, reasoning.format_credit, judged.texts, rolled)


def _gold_reward(setting: Setting, variables: dict, batch: Batch, placed: Batch) -> np.ndarray:
    """The reward of each prompt's curated trajectory [B], NaN where there is none."""
    present = batch.ce_mask.any(axis=(1, 2))
    js = np.zeros(len(present))
    if setting.config.grpo.gold_reward == "measured":
        after = sharding.fetch(setting.score(variables, placed.prompt, placed.gold, {}).readout)[:, 0]
        js = metrics.js(batch.target, setting.distribution(after))
    return rewards.gold_reward(setting.config.grpo.gold_reward, js, present, **_weights(setting))


def _group(
    setting: Setting,
    variables: dict,
    asked: Prompt,
    placed: Batch,
    completions: Completions,
    logp_drawn: np.ndarray,
    loss_mask: np.ndarray,
    advantages: np.ndarray,
) -> Group:
    """Puts a rewarded group on the devices, with what the old and the reference policy say of it where it is asked."""
    c = setting.config.grpo
    host = {"loss_mask": loss_mask, "advantages": advantages.astype(np.float32), "logp_drawn": logp_drawn}
    on_device = sharding.place(setting.pack(asked, completions), setting.mesh)
    logp_old = logp_ref = None
    if c.updates > 1:
        logp_old = setting.score(variables, placed.prompt, on_device, {}, c.temperature).logp
    if c.beta_kl > 0:  # to the reference, of what was sampled
        sampled = jax.tree.map(lambda x: x[:, : c.samples], completions)
        given = sharding.place(setting.pack(asked, sampled), setting.mesh)
        logp_ref = setting.score({"params": variables["params"]}, placed.prompt, given, {}, c.temperature).logp
    mine = sharding.place(host, setting.mesh)
    return Group(
        prompt=placed.prompt,
        completions=on_device,
        tokens=_tokens_a_prompt(mine["loss_mask"]),
        ce_mask=placed.ce_mask,
        logp_old=logp_old,
        logp_ref=logp_ref,
        target=placed.target,
        **mine,
    )


@jax.jit
def _tokens_a_prompt(*masks: jax.Array) -> jax.Array:
    """Masks [B, G, T], the parts of one batch, to [B]: how many entries are True a row, mean over all parts."""
    return jnp.full(masks[0].shape[0], jnp.mean(jnp.array([jnp.mean(mask.sum(axis=(1, 2))) for mask in masks])))


def group_loss(setting: Setting, variables: dict, collected: Group, rngs: dict) -> tuple[jax.Array, dict]:
    """Equation 7, and with gold in the group L_KL of the read-out after it. [B] and metrics.

    pi is the policy at the temperature that sampled, here as in `collect_group`; the read-out has its own.
    """
    c = setting.config
    scores = setting.score(
        variables, collected.prompt, collected.completions, rngs, c.grpo.temperature, collected.known
    )
    # With one update a batch the policy that sampled is the one being updated: the ratio is exactly one.
    old = collected.logp_old if c.grpo.updates > 1 else jax.lax.stop_gradient(scores.logp)
    per_token = losses.grpo(scores.logp, old, collected.advantages, c.grpo.eps_low, c.grpo.eps_high)
    k = c.grpo.samples  # gold, which nobody sampled, is in none of the means below
    mean = functools.partial(losses.masked_mean, mask=collected.loss_mask[:, :k], axis=(-2, -1))
    aux = {"entropy": mean(scores.entropy[:, :k]), "logp_gap": mean(jnp.abs(old[:, :k] - collected.logp_drawn))}
    if c.grpo.updates > 1:
        rho = jnp.exp(scores.logp - old)[:, :k]
        a = collected.advantages[:, :k, None]
        clipped = jnp.where(a > 0, rho > 1 + c.grpo.eps_high, rho < 1 - c.grpo.eps_low) & (a != 0)
        aux["clipped"] = mean(clipped)  # tokens whose gradient that stops
    if c.grpo.gold_gamma > 0:
        shaped = losses.shaped_imitation(scores.logp[:, k:], collected.advantages[:, k:], c.grpo.gold_gamma)
        per_token = jnp.concatenate([per_token[:, :k], shaped], axis=1)
    if c.grpo.beta_kl > 0:
        k3 = losses.k3(scores.logp[:, :k], collected.logp_ref)
        aux["kl_to_reference"] = mean(k3)
        per_token += c.grpo.beta_kl * jnp.pad(k3, ((0, 0), (0, per_token.shape[1] - k), (0, 0)))
    loss = losses.aggregate(
        per_token, collected.loss_mask, c.grpo.aggregate, tokens=collected.tokens, max_length=c.data.max_tokens
    )
    aux["loss/surrogate"] = loss
    if collected.completions.tokens.shape[1] > k:  # gold is the last of the group
        kl = setting.soft_label_kl(collected.target, scores.readout[:, -1])
        ce = losses.cross_entropy(scores.logp[:, -1:], collected.ce_mask)[:, 0]
        aux |= {"loss/kl": kl, "loss/gold_ce": ce}
        loss += c.loss.lambda_kl * kl + c.grpo.gold_ce * ce
    return loss, aux


def _take(x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """x [B, G, ...] at indices [B, R] -> [B, R, ...]."""
    return np.take_along_axis(x, chosen.reshape(*chosen.shape, *(1,) * (x.ndim - 2)), axis=1)


def _join(a: Completions, b: Completions) -> Completions:
    """Two sets of completions as one group."""
    return jax.tree.map(lambda x, y: np.concatenate([x, y], axis=1), a, b)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """collect(setting, variables, host batch, key) -> (collected, metrics, samples [B][G]);
    loss(setting, variables, collected, rngs) -> (loss [B], metrics [B])."""

    collect: Callable
    loss: Callable


ALGORITHMS = {
    "sft": Algorithm(collect_nothing, sft_loss),
    "dpo": Algorithm(collect_preferences, dpo_loss),
    "grpo": Algorithm(functools.partial(collect_group, gold=False), group_loss),
    "grpoz": Algorithm(functools.partial(collect_group, gold=True), group_loss),
}


def collect(setting: Setting, variables: dict, batch: Batch, key: jax.Array) -> tuple[tuple, dict, list]:
    """What the configured algorithm collects for a batch, in `optim.accumulate` equal parts, one after another.

    A part's roll-out and scoring take the memory of its prompts alone; what is collected does not depend on the parts,
    for a completion's key comes from its example.

    Returns:
      the parts, to be updated on together; the batch's metrics; samples [B][G].
    """
    n = setting.config.optim.accumulate
    of_part = lambda i: jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:])[i], batch)  # noqa: E731
    algorithm = ALGORITHMS[setting.config.algorithm]
    parts, measured, samples = zip(
        *(algorithm.collect(setting, variables, of_part(i), key) for i in range(n)), strict=True
    )
    if isinstance(parts[0], Group):  # a mean over all tokens of the batch is none of its parts' means
        tokens = _tokens_a_prompt(*(part.loss_mask for part in parts))
        parts = tuple(part.replace(tokens=tokens) for part in parts)
    means = {name: np.mean([m[name] for m in measured]) for name in measured[0]}
    return parts, means, [group for part in samples for group in part]
