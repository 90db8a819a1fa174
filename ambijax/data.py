"""Utterances and their sounds -> Batch, a pure function of (seed, step): there is nothing to save in order to resume.

Shapes come from a small declared set, so that nothing compiles after warm-up: an audio window for each configured
length, and with it the longest prompt of the split whose clip fits into it; one completion length.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tqdm

from ambijax import audio, kept, manifest, reasoning
from ambijax.errors import ConfigError
from ambijax.prompt import Vocabulary, encode_gold, encode_prompt
from ambijax.structs import Batch, Completions, Prompt

ROUND = 16  # prompt slots are rounded up to a multiple of this, so that similar corpora share compiled programs


@dataclasses.dataclass(frozen=True)
class Sound:
    """What the model hears of one clip: tower output [A, D] while the tower is frozen, else log-mel [M, F]."""

    frames: int  # valid mel frames
    values: np.ndarray | kept.Kept  # in memory, or on the disk until it is asked for

    @property
    def tokens(self) -> int:
        return audio.tokens(self.frames)


@dataclasses.dataclass(frozen=True)
class Example:
    """One utterance, tokenised."""

    prompt: np.ndarray  # int32 ids with this clip's number of <|AUDIO|> tokens
    gold: np.ndarray  # int32 ids: reasoning, anchor, class word, end
    anchor: int  # index in `gold` of the anchor's last token
    target: np.ndarray  # float32 [K] soft label
    reasoned: bool  # the gold trajectory has a chain of thought


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A split, ready to be batched."""

    split: str  # train | dev | test
    root: Path  # where the utterances' audio paths start
    utterances: tuple[manifest.Utterance, ...]
    examples: tuple[Example, ...]
    sounds: tuple[Sound, ...]
    first: int  # index of the first utterance among all splits': examples are numbered across the corpus
    live_tower: bool  # sounds are log-mel
    windows: tuple[int, ...]  # declared mel lengths
    slots: tuple[int, ...]  # of a prompt in each window, see `prompt_slots`
    max_tokens: int  # completion length
    pad: int
    label_in_ce: bool  # cross entropy covers the class word

    def __len__(self) -> int:
        return len(self.utterances)

    def spread(self, size: int) -> "Dataset":
        """`spread` of the utterances."""
        fields = ("utterances", "examples", "sounds")
        return dataclasses.replace(self, **{name: tuple(spread(getattr(self, name), size)) for name in fields})

    @property
    def target(self) -> np.ndarray:
        """All soft labels, float32 [N, K]."""
        return np.stack([example.target for example in self.examples])

    def at(self, example: int) -> manifest.Utterance:
        """The utterance with this number across the corpus, as in `Prompt.example`."""
        return self.utterances[example - self.first]

    def prompts(self, indices: Sequence[int]) -> Prompt:
        """The prompts of some utterances as numpy arrays, in the smallest window that holds them all."""
        return prompts(
            [self.examples[i].prompt for i in indices],
            [self.sounds[i] for i in indices],
            [self.first + i for i in indices],
            windows=self.windows,
            slots=self.slots,
            pad=self.pad,
            live_tower=self.live_tower,
        )

    def batch(self, indices: Sequence[int]) -> Batch:
        """Prompts with their gold trajectories (G = 1) and soft labels, numpy arrays."""
        examples = [self.examples[i] for i in indices]
        gold = completions([(e.gold, e.anchor) for e in examples], self.max_tokens, self.pad)
        ce_mask = gold.mask & np.array([e.reasoned for e in examples])[:, None, None]
        if not self.label_in_ce:
            steps, last = np.arange(self.max_tokens), gold.mask.sum(axis=-1, keepdims=True) - 1
            ce_mask &= (steps <= gold.anchor[..., None]) | (steps >= last)  # the class word stands before the end
        return Batch(
            prompt=self.prompts(indices),
            gold=gold,
            ce_mask=ce_mask,
            target=np.stack([e.target for e in examples]),
        )

    def indices_at(self, seed: int, step: int, size: int) -> np.ndarray:
        """Which utterances step `step` trains on: every epoch is a fresh permutation, no utterance is left out."""
        positions = step * size + np.arange(size)
        return np.array([_order(len(self), seed, p // len(self))[p % len(self)] for p in positions.tolist()])

    def batch_at(self, seed: int, step: int, size: int) -> Batch:
        """The batch of step `step`; depends on nothing else."""
        return self.batch(self.indices_at(seed, step, size))


def prompts(
    tokens: Sequence[np.ndarray],
    sounds: Sequence[Sound],
    numbers: Sequence[int],
    *,
    windows: Sequence[int],
    slots: Sequence[int],
    pad: int,
    live_tower: bool,
) -> Prompt:
    """Tokenised prompts and their sounds as one batch of numpy arrays, in the smallest window that holds the sounds.

    Args:
      tokens: int32 ids of each prompt.
      sounds: of each prompt.
      numbers: of each prompt; they seed the sampling.
      windows: declared mel lengths.
      slots: of a prompt in each window, see `prompt_slots`; the window alone says how wide the batch is.
      pad: token id of empty slots.
      live_tower: sounds are log-mel.

    Raises:
      ConfigError: a prompt is longer than the slots of the window: it was not among those that they were made for.
    """
    window = audio.window(max(s.frames for s in sounds), windows)
    length = dict(zip(windows, slots, strict=True))[window]
    lengths = np.array([len(ids) for ids in tokens])
    if lengths.max() > length:
        raise ConfigError(
            f"a prompt of {lengths.max()} tokens is longer than the {length} slots that were declared for windows of "
            f"{window} mel frames; declare slots for all prompts that will be asked (`prompt_slots` of ambijax/data.py)"
        )
    if live_tower:
        mel = np.stack([_in_window(s.values, window) for s in sounds])
        heard = {"mel": mel, "frames": np.array([s.frames for s in sounds], np.int32)}
    else:
        heard = {"audio": _pad([np.asarray(s.values) for s in sounds], window // 4, 0)}
    return Prompt(
        tokens=_pad(tokens, length, pad),
        mask=np.arange(length) < lengths[:, None],
        example=np.array(numbers, np.int32),
        **heard,
    )


def _in_window(mel: np.ndarray, window: int) -> np.ndarray:
    """Log-mel [frames, bins] in a window, float32 [window, bins]; beyond its end is the silence that it ends with."""
    mel = mel[:window]
    return np.pad(mel, ((0, window - len(mel)), (0, 0)), mode="edge")


def completions(written: Sequence[tuple[np.ndarray, int]], length: int, pad: int) -> Completions:
    """Token ids and their anchors, one a prompt (G = 1), as numpy arrays."""
    lengths = np.array([len(ids) for ids, _ in written])
    return Completions(
        tokens=_pad([ids for ids, _ in written], length, pad)[:, None],
        mask=(np.arange(length) < lengths[:, None])[:, None],
        anchor=np.array([anchor for _, anchor in written], np.int32)[:, None],
    )


def prompt_slots(lengths: Sequence[int], frames: Sequence[int], windows: Sequence[int]) -> tuple[int, ...]:
    """How wide a batch of prompts is in each window: as the longest prompt whose clip fits into it, rounded up.

    A short clip may lie in a batch with a long one, so all that fit count. A window into which no clip fits gets none.

    Args:
      lengths: tokens of each prompt, audio included.
      frames: valid mel frames of each prompt's clip.
      windows: declared mel lengths.

    >>> prompt_slots([100, 130], [200, 300], (256, 512, 1024))
    (112, 144, 144)
    """
    needed = [audio.window(n, windows) for n in frames]
    longest = {w: max((p for p, n in zip(lengths, needed, strict=True) if n <= w), default=0) for w in windows}
    return tuple(round_up(longest[w]) for w in windows)


def spread(items: Sequence, size: int) -> list:
    """At most `size` of them, evenly spaced; -1: all. What a manifest lists one after another is often alike."""
    if not 0 <= size < len(items):
        return list(items)
    return [items[i * len(items) // size] for i in range(size)]


def round_up(tokens: int) -> int:
    """A number of tokens to the next declared one."""
    return -(-tokens // ROUND) * ROUND


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def _pad(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Stacks arrays of unequal length, padded at the end."""
    out = np.full((len(rows), length, *rows[0].shape[1:]), value, rows[0].dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def build(
    splits: dict[str, list[manifest.Utterance]],
    names: Sequence[str],
    sounds: dict[str, Sound],
    vocabulary: Vocabulary,
    *,
    root: Path,
    windows: Sequence[int],
    max_tokens: int,
    style: str,
    gold_label: str,
    seed: int,
    label_in_ce: bool,
    live_tower: bool,
) -> dict[str, Dataset]:
    """Tokenises the splits in `names`. Nothing of a split depends on which others are built beside it.

    Args:
      splits: name -> utterances; examples are numbered across all of them, whichever are built.
      names: those to build.
      sounds: utterance id -> sound, of these.
      vocabulary: the checkpoint's tokenizer, its ids and the K class names.
      windows: declared mel lengths.
      max_tokens: completion length T. An utterance whose chain of thought is longer, or breaks the format, is kept
        for its votes alone; how many these are is said.
      style: how the model reasons before it answers, one of `reasoning.STYLES`; 'answer': it does not.
      gold_label: class word of the gold trajectory: 'argmax' of the votes, or 'sample' from them.
      seed: for 'sample'.
      label_in_ce: whether cross entropy covers the class word.
      live_tower: sounds are log-mel because the audio tower is being trained.
      root: where the utterances' audio paths start.
    """
    if gold_label not in ("argmax", "sample"):
        raise ConfigError(f"data.gold_label={gold_label!r} must be 'argmax' or 'sample'")
    examples, firsts = {}, dict(zip(splits, np.cumsum([0, *map(len, splits.values())]).tolist(), strict=False))
    for name in names:
        utterances, first = splits[name], firsts[name]
        targets = manifest.soft_labels(utterances, vocabulary.labels)
        examples[name] = []
        for i, (u, p) in enumerate(zip(utterances, targets, strict=True)):
            k = p.argmax()
            if gold_label == "sample":
                k = np.random.default_rng((seed, first + i)).choice(len(p), p=p / p.sum())
            label = vocabulary.labels[int(k)]
            examples[name].append(_example(u, sounds[u.id].tokens, p, label, vocabulary, style, max_tokens))
    if style != "answer":
        _say_unfit([(u, e) for n in names for u, e in zip(splits[n], examples[n], strict=True)], max_tokens)
    return {
        name: Dataset(
            split=name,
            root=root,
            utterances=tuple(splits[name]),
            examples=tuple(examples[name]),
            sounds=tuple(sounds[u.id] for u in splits[name]),
            first=firsts[name],
            live_tower=live_tower,
            windows=tuple(windows),
            slots=prompt_slots(
                [len(example.prompt) for example in examples[name]],
                [sounds[utterance.id].frames for utterance in splits[name]],
                windows,
            ),
            max_tokens=max_tokens,
            pad=vocabulary.endoftext,
            label_in_ce=label_in_ce,
        )
        for name in names
    }


def _say_unfit(built: Sequence[tuple[manifest.Utterance, Example]], max_tokens: int) -> None:
    curated = [(u, e) for u, e in built if u.cot]
    if unfit := [u.id for u, e in curated if not e.reasoned]:
        tqdm.tqdm.write(
            f"{len(unfit)} of {len(curated)} chains of thought break the format or exceed data.max_tokens={max_tokens};"
            f" these utterances are kept for the read-out alone: {', '.join(unfit[:3])}"
        )


def _example(
    utterance: manifest.Utterance,
    audio_tokens: int,
    p: np.ndarray,
    label: str,
    vocabulary: Vocabulary,
    style: str,
    max_tokens: int,
) -> Example:
    cot = style != "answer"
    prompt = encode_prompt(vocabulary, utterance.transcript, audio_tokens, style=style)
    gold, anchor = encode_gold(vocabulary, utterance.cot if cot else "", label)
    reasoned = not cot or (not reasoning.problems(utterance.cot) and len(gold) <= max_tokens)
    if not reasoned:
        gold, anchor = encode_gold(vocabulary, "", label)
    return Example(np.array(prompt, np.int32), np.array(gold, np.int32), anchor, p, reasoned)
