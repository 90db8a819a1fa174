"""Controls that must make a model worse: if one does not, the model does not use what the control takes away.

Each gives an utterance what belongs to another one, drawn once and for all, and leaves everything else alone: the
votes, the curated reasoning, and the other two of sound, words and the model's own reasoning. Drawn, because a corpus
is often a table of speakers by sentences: a fixed distance away the same is said in the same way.
"""

import dataclasses

import numpy as np

from ambijax.errors import DataError
from ambijax.manifest import Utterance


def swap_audio(utterances: list[Utterance]) -> list[Utterance]:
    """Every utterance with the sound of another."""
    others = exchanged(utterances)
    return [dataclasses.replace(u, audio=other.audio) for u, other in zip(utterances, others, strict=True)]


def swap_transcript(utterances: list[Utterance]) -> list[Utterance]:
    """Every utterance with other words: those of its counterpart, or the next one's that says something else.

    Raises:
      DataError: all of them say the same.
    """
    if len({u.transcript for u in utterances}) < 2:
        raise DataError("all utterances of the split say the same words; there are none to swap")
    others = exchanged(utterances)
    swapped = []
    for i, u in enumerate(utterances):
        words = next(o.transcript for o in others[i:] + others[:i] if o.transcript != u.transcript)
        swapped.append(dataclasses.replace(u, transcript=words))
    return swapped


def exchanged(items: list) -> list:
    """Each item's counterpart, never itself: one round through all of them in a random order that is always the same.

    Raises:
      DataError: there is only one.
    """
    if len(items) < 2:
        raise DataError("a control needs a split of at least two utterances, to swap something between them")
    order = np.random.default_rng(0).permutation(len(items))
    following = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))
    return [items[following[i]] for i in range(len(items))]
