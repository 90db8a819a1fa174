"""Controls that must make a model worse: if one does not, the model does not use what the control takes away.

Each gives an utterance what belongs to another one, half a split away, and leaves everything else alone: the votes, the
curated reasoning, and the other two of sound, words and the model's own reasoning.
"""

import dataclasses

from ambijax.errors import DataError
from ambijax.manifest import Utterance


def swap_audio(utterances: list[Utterance]) -> list[Utterance]:
    """Every utterance with the sound of another."""
    return [dataclasses.replace(u, audio=other.audio) for u, other in zip(utterances, rotated(utterances), strict=True)]


def swap_transcript(utterances: list[Utterance]) -> list[Utterance]:
    """Every utterance with other words: those of the next one, from half a split away on, that says something else.

    Raises:
      DataError: all of them say the same.
    """
    if len({u.transcript for u in utterances}) < 2:
        raise DataError("all utterances of the split say the same words; there are none to swap")
    others = rotated(utterances)
    swapped = []
    for i, u in enumerate(utterances):
        words = next(o.transcript for o in others[i:] + others[:i] if o.transcript != u.transcript)
        swapped.append(dataclasses.replace(u, transcript=words))
    return swapped


def rotated(items: list) -> list:
    """Each item's counterpart half the list away.

    Raises:
      DataError: there is only one.
    """
    if len(items) < 2:
        raise DataError("a control needs a split of at least two utterances, to swap something between them")
    half = len(items) // 2
    return items[half:] + items[:half]
