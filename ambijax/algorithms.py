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
import scipy.special
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ambijax import losses, metrics, policy, prompt, reasoning, rewards, sharding
from ambijax.model.qwen2_audio import Qwen2Audio
from ambijax.structs import Batch, Completions, Group, Preferences, Rollout


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What an algorithm works with and never changes."""

    model: Qwen2Audio
    vocabulary: prompt.Vocabulary
    mesh: Mesh
    config: FrozenConfigDict

    @functools.cached_property
    def tokens(self) -> policy.Tokens:
        v = self.vocabulary
        return policy.Tokens(v.im_end, v.endoftext, v.class_ids, v.anchor, v.forced_anchor, v.newline[-1])

    @functools.cached_property
    def ends_line(self) -> np.ndarray:
        """bool [V] with a row for every embedding, also those no token uses."""
        rows = self.model.config.text.vocab_size
        return np.pad(self.vocabulary.ends_line, (0, rows - len(self.vocabulary.ends_line)))

    def score(self, variables: dict, asked: object, completions: Completions, rngs: dict) -> object:
        """`policy.score` with this run's settings."""
        return policy.score(
            self.model,
            variables,
            asked,
            completions,
            class_ids=self.tokens.classes,
            temperature=1.0,
            chunk=self.config.loss.chunk,
            rngs=rngs,
        )

    def rollout(self, variables: dict, asked: object, key: jax.Array, samples: int, temperature: float) -> Rollout:
        """`policy.rollout` with this run's settings."""
        return policy.rollout(
            self.model,
            variables,
            asked,
            key,
            self.ends_line,
            tokens=self.tokens,
            samples=samples,
            max_tokens=self.config.data.max_tokens,
            temperature=temperature,
        )

    def distribution(self, logits: np.ndarray) -> np.ndarray:
        """Class logits [..., K] to float64 phat [..., K], on the host."""
        return scipy.special.softmax(logits.astype(np.float64) / self.config.readout.temperature, axis=-1)

    def soft_label_kl(self, target: jax.Array, readout: jax.Array) -> jax.Array:
        """L_KL at the read-out temperature, [B]."""
        return losses.soft_label_kl(target, readout / self.config.readout.temperature)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A roll-out on the host, read and rewarded; arrays [B, G]."""

    texts: list[list[str]]
    readout: np.ndarray  # [B, G, K] distribution
    js: np.ndarray  # bits
    fmt: np.ndarray  # format reward
    forced: np.ndarray
    lengths: np.ndarray  # tokens

    def metrics(self) -> dict[str, float]:
        return {
            "rollout/js": self.js.mean(),
            "rollout/format": self.fmt.mean(),
            "rollout/forced": self.forced.mean(),
            "rollout/tokens": self.lengths.mean(),
        }

    def samples(self, extra: dict[str, np.ndarray]) -> list[list[dict]]:
        """One JSON-ready record for each completion; `extra` holds further arrays [B, G]."""
        arrays = {"js": self.js, "format": self.fmt, "forced": self.forced, **extra}
        return [
            [
                {"text": text, "readout": self.readout[b, g].tolist(), **{k: v[b, g].item() for k, v in arrays.items()}}
                for g, text in enumerate(texts)
            ]
            for b, texts in enumerate(self.texts)
        ]


def read(setting: Setting, rolled: Rollout) -> tuple[list[list[str]], np.ndarray]:
    """A roll-out on the host as texts [B][G] and distributions [B, G, K]."""
    texts = [[prompt.decode(setting.vocabulary, ids) for ids in group] for group in rolled.completions.tokens]
    return texts, setting.distribution(rolled.readout)


def judge(setting: Setting, rolled: Rollout, target: np.ndarray) -> Judged:
    """Decodes a roll-out and measures what its rewards are made of. Arguments are host arrays."""
    labels = setting.vocabulary.labels
    texts, readout = read(setting, rolled)
    fmt = [
        [reasoning.format_reward(t, labels, ended=bool(e)) for t, e in zip(group, ended, strict=True)]
        for group, ended in zip(texts, rolled.ended, strict=True)
    ]
    return Judged(
        texts=texts,
        readout=readout,
        js=metrics.js(target[:, None], readout),
        fmt=np.array(fmt),
        forced=rolled.forced,
        lengths=rolled.completions.mask.sum(-1),
    )


# --- SFT -------------------------------------------------------------------------------------------------------------


def collect_nothing(setting: Setting, variables: dict, batch: Batch, key: jax.Array) -> tuple[Batch, dict, list]:
    """SFT learns from the batch as it is."""
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

    chosen, pairs = _negatives(c.negatives, judged.js, c.tau, batch.prompt.example)
    pairs &= batch.ce_mask.any(axis=-1)  # no curated trajectory, nothing to prefer
    rejected = jax.tree.map(lambda x: _take(x, chosen), rolled.completions)
    completions = sharding.place(_join(batch.gold, rejected), setting.mesh)
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


def _negatives(how: str, js: np.ndarray, tau: float, example: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which roll-outs are rejected: indices [B, R] and whether each is bad enough [B, R]."""
    if how == "all":
        chosen = np.broadcast_to(np.arange(js.shape[1]), js.shape)
    elif how == "worst":
        chosen = js.argmax(axis=1)[:, None]
    else:  # one at random among those above tau; the draw depends on the example alone
        draws = np.stack([np.random.default_rng(int(e)).random(js.shape[1]) for e in example])
        chosen = np.where(js > tau, draws, -1).argmax(axis=1)[:, None]
    return chosen, np.take_along_axis(js, chosen, axis=1) > tau


def dpo_loss(setting: Setting, variables: dict, collected: Preferences, rngs: dict) -> tuple[jax.Array, dict]:
    """Equation 4: L_DPO + lambda_kl KL + lambda_ce CE, both on the curated trajectory. [B] and metrics."""
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
    rolled = sharding.fetch(setting.rollout(variables, placed.prompt, key, c.samples, c.temperature))
    judged = judge(setting, rolled, batch.target)
    weights = dict(setting.config.reward)
    reward = rewards.reward(judged.js, judged.fmt, **weights)
    completions, gold_reward, present = rolled.completions, None, np.zeros(len(reward), bool)
    if gold:
        completions = _join(completions, batch.gold)
        present = batch.ce_mask.any(axis=(1, 2))
        js = np.zeros(len(reward))
        if c.gold_reward == "measured":
            after = sharding.fetch(setting.score(variables, placed.prompt, placed.gold, {}).readout)[:, 0]
            js = metrics.js(batch.target, setting.distribution(after))
        gold_reward = rewards.gold_reward(c.gold_reward, js, present, **weights)
    advantages = rewards.group_advantages(
        reward, gold_reward, scale=c.scale, ddof=c.ddof, eps=c.eps, min_std=c.min_std, gold_adv_clip=c.gold_adv_clip
    )
    sampled = np.arange(advantages.shape[1]) < np.full((len(reward), 1), c.samples)
    loss_mask = rolled.completions.mask
    if gold:
        loss_mask = np.concatenate([loss_mask, batch.ce_mask & c.gold_in_loss], axis=1)

    on_device = sharding.place(completions, setting.mesh)
    logp_old = logp_ref = sharding.place(np.zeros(completions.mask.shape, np.float32), setting.mesh)
    if c.updates > 1:
        logp_old = setting.score(variables, placed.prompt, on_device, {}).logp
    if c.beta_kl > 0:
        logp_ref = setting.score({"params": variables["params"]}, placed.prompt, on_device, {}).logp
    host = {
        "loss_mask": loss_mask,
        "advantages": advantages.astype(np.float32),
        "sampled": sampled,
    }
    collected = Group(
        prompt=placed.prompt,
        completions=on_device,
        logp_old=logp_old,
        logp_ref=logp_ref,
        target=placed.target,
        **sharding.place(host, setting.mesh),
    )
    spread = rewards.group_std(reward, c.ddof)
    measured = judged.metrics() | {
        "reward/mean": reward.mean(),
        "reward/std": spread.mean(),
        "reward/degenerate": (spread < 1e-6).mean(),
    }
    records = judged.samples({"reward": reward, "advantage": advantages[:, : c.samples]})
    if gold:
        for group, r, a in zip(records, gold_reward, advantages[:, -1], strict=True):
            group.append({"gold": True, "reward": None if np.isnan(r) else float(r), "advantage": float(a)})
    return collected, measured, records


def group_loss(setting: Setting, variables: dict, collected: Group, rngs: dict) -> tuple[jax.Array, dict]:
    """Equation 7, and with gold in the group L_KL of the read-out after it. [B] and metrics."""
    c = setting.config
    scores = setting.score(variables, collected.prompt, collected.completions, rngs)
    # With one update a batch the policy that sampled is the one being updated: the ratio is exactly one.
    old = collected.logp_old if c.grpo.updates > 1 else jax.lax.stop_gradient(scores.logp)
    per_token = losses.grpo(scores.logp, old, collected.advantages, c.grpo.eps_low, c.grpo.eps_high)
    aux = {"entropy": losses.aggregate(scores.entropy, collected.loss_mask, "token_mean", 1)}
    if c.grpo.gold_gamma > 0:
        shaped = losses.shaped_imitation(scores.logp, collected.advantages, c.grpo.gold_gamma)
        per_token = jnp.where(collected.sampled[..., None], per_token, shaped)
    if c.grpo.beta_kl > 0:
        to_reference = jnp.where(collected.sampled[..., None], losses.k3(scores.logp, collected.logp_ref), 0.0)
        aux["kl_to_reference"] = losses.aggregate(to_reference, collected.loss_mask, "token_mean", 1)
        per_token += c.grpo.beta_kl * to_reference
    loss = losses.aggregate(per_token, collected.loss_mask, c.grpo.aggregate, c.data.max_tokens)
    aux["loss/surrogate"] = loss
    if collected.completions.tokens.shape[1] > c.grpo.samples:  # gold is the last of the group
        kl = setting.soft_label_kl(collected.target, scores.readout[:, -1])
        ce = losses.cross_entropy(scores.logp[:, -1], collected.loss_mask[:, -1])
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
