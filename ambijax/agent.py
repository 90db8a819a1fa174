"""A run's model as an agent: it scores completions and rolls them out, and its roll-outs are read and graded."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
import scipy.special
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from ambijax import losses, metrics, policy, prompt, reasoning, sharding
from ambijax.activations import Known
from ambijax.model.qwen2_audio import Qwen2Audio
from ambijax.packing import packing
from ambijax.structs import Completions, Prompt, Rollout, Scores

TITLES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "grpoz": "GRPOz"}


def title(config: FrozenConfigDict) -> str:
    """What a run's model is called in tables."""
    return TITLES[config.algorithm] if config.steps else "start"


def style(config: FrozenConfigDict) -> str:
    """How a model is asked to answer, one of `reasoning.STYLES`."""
    return config.prompt.style if config.data.cot else "answer"


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
        ends = (v.im_end, v.endoftext)
        return policy.Tokens(ends, v.endoftext, v.class_ids, v.anchor, v.forced_anchor, v.newline[-1])

    @property
    def style(self) -> str:
        return style(self.config)

    @functools.cached_property
    def ends_line(self) -> np.ndarray:
        """bool [V] with a row for every embedding, also those no token uses."""
        rows = self.model.config.text.vocab_size
        return np.pad(self.vocabulary.ends_line, (0, rows - len(self.vocabulary.ends_line)))

    def pack(self, asked: Prompt, completions: Completions) -> Completions:
        """Completions of prompts, both on the host, as they are scored: with `data.pack` without padding."""
        if not self.config.data.pack:
            return completions
        return completions.replace(packing=packing(asked.mask, completions.mask, sharding.round_up(1, self.mesh)))

    def score(
        self,
        variables: dict,
        asked: Prompt,
        completions: Completions,
        rngs: dict,
        temperature: float = 1.0,
        known: Known | None = None,
    ) -> Scores:
        """`policy.score` with this run's settings."""
        return policy.score(
            self.model,
            variables,
            asked,
            completions,
            class_ids=self.tokens.classes,
            words=self.vocabulary.class_words if self.vocabulary.split else (),
            temperature=temperature,
            chunk=self.config.loss.chunk,
            rngs=rngs,
            known=known,
        )

    def rollout(
        self, variables: dict, asked: Prompt, key: jax.Array, samples: int, temperature: float, keeps: bool = False
    ) -> Rollout:
        """`policy.rollout` with this run's settings; class words of several tokens are scored after it."""
        rolled = policy.rollout(
            self.model,
            variables,
            asked,
            key,
            self.ends_line,
            tokens=self.tokens,
            samples=samples,
            max_tokens=self.config.data.max_tokens,
            temperature=temperature,
            keeps=keeps,
        )
        return self._whole_words(variables, asked, rolled)

    def stream(self, variables: dict, asked: Prompt, chunk: int) -> Iterator[Rollout]:
        """`policy.stream` with this run's settings."""
        rolls = policy.stream(
            self.model,
            variables,
            asked,
            self.ends_line,
            tokens=self.tokens,
            max_tokens=self.config.data.max_tokens,
            chunk=chunk,
        )
        return (self._whole_words(variables, asked, rolled) for rolled in rolls)

    def _whole_words(self, variables: dict, asked: Prompt, rolled: Rollout) -> Rollout:
        if not self.vocabulary.split:
            return rolled
        anchored = policy.anchored(rolled, self.tokens)
        return rolled.replace(readout=self.score(variables, asked, anchored, {}).readout)

    def distribution(self, logits: np.ndarray) -> np.ndarray:
        """Class logits [..., K] to float64 phat [..., K], on the host."""
        return scipy.special.softmax(logits.astype(np.float64) / self.config.readout.temperature, axis=-1)

    def soft_label_kl(self, target: jax.Array, readout: jax.Array) -> jax.Array:
        """L_KL at the read-out temperature, [B]."""
        logits, c = readout / self.config.readout.temperature, self.config.loss
        if c.kl_direction == "reverse":
            return losses.reverse_soft_label_kl(target, logits, c.reverse_floor)
        return losses.soft_label_kl(target, logits)


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
    texts, readout = read(setting, rolled)
    fmt = grade(setting, reasoning.format_reward, texts, rolled)
    return Judged(
        texts=texts,
        readout=readout,
        js=metrics.js(target[:, None], readout),
        fmt=fmt,
        forced=rolled.forced,
        lengths=rolled.completions.mask.sum(-1),
    )


def grade(setting: Setting, how: Callable[..., float], texts: list[list[str]], rolled: Rollout) -> np.ndarray:
    """`reasoning.format_reward` or `format_credit` of every completion, [B, G]."""
    known = {"labels": setting.vocabulary.labels, "style": setting.style}
    return np.array(
        [
            [how(text, ended=bool(e), forced=bool(f), **known) for text, e, f in zip(*group, strict=True)]
            for group in zip(texts, rolled.ended, rolled.forced, strict=True)
        ]
    )
