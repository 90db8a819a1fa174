"""Controls that must make a model worse: if one does not, the model does not use what the control takes away.

Each gives an utterance what belongs to another one, half a split away, and leaves votes and curated reasoning alone.
"""

import dataclasses

from ambijax.manifest import Utterance


def swap_audio(utterances: list[Utterance]) -> list[Utterance]:
    """Every utterance with the sound of another."""
    return [dataclasses.replace(u, audio=other.audio) for u, other in _pairs(utterances)]


def swap_transcript(utterances: list[Utterance]) -> list[Utterance]:
    """Every utterance with the words of another, which says something else wherever there is such a one."""
    return [dataclasses.replace(u, transcript=other.transcript) for u, other in _pairs(utterances)]


def _pairs(utterances: list[Utterance]) -> list[tuple[Utterance, Utterance]]:
    half = len(utterances) // 2
    return list(zip(utterances, utterances[half:] + utterances[:half], strict=True))
