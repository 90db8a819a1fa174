"""The offline teacher: measured acoustics, words and votes put into the paper's chain of thought. No API, no chance.

It is a template, and reads like one: a closed vocabulary, the same clauses in the same order, about sixty words. What
it says is true of the clip all the same: the levels are measured, and a cue stands as evidence for an emotion only as
far as the literature ties the two together (`PROFILE`). It is written knowing p, as any gold trajectory is.
"""

import re
from collections.abc import Sequence

import numpy as np

from ambijax.acoustics import Acoustics, Norm, level
from ambijax.errors import ConfigError
from ambijax.reasoning import Reasoning

# How each emotion moves the voice away from the speaker's middle, in standard deviations
# (directions after Banse & Scherer 1996, Juslin & Laukka 2003; the sizes are ours).
_MEASURES = ("energy", "rate", "pitch", "pitch_range", "pitch_slope", "pauses", "tilt", "harmonicity")
_ROWS = {
    "anger": (1.5, 0.8, 0.7, 1.0, -0.6, -0.4, 1.5, -0.4),
    "happiness": (0.8, 0.7, 1.2, 1.2, 1.2, -0.4, 0.2, 0.8),
    "sadness": (-1.4, -1.1, -0.8, -0.9, -0.6, 1.2, -1.1, -0.3),
    "neutral": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "disgust": (-0.2, -0.9, -1.1, 0.4, -1.1, 0.2, 0.6, -1.3),
    "fear": (-0.2, 1.2, 1.5, -0.9, 0.2, 0.4, -0.4, -0.8),
}
PROFILE = {emotion: dict(zip(_MEASURES, row, strict=True)) for emotion, row in _ROWS.items()}

# The cues by name, and how their five levels are called.
_CUES = {
    "energy": ("volume", ("very soft", "soft", "moderate", "loud", "very loud")),
    "rate": ("speed", ("very slow", "slow", "moderate", "fast", "very fast")),
    "pitch": ("pitch", ("very low", "low", "moderate", "high", "very high")),
    "pitch_range": ("melody", ("very flat", "flat", "moderate", "lively", "very lively")),
    "pitch_slope": ("contour", ("steeply falling", "falling", "level", "rising", "steeply rising")),
    "tilt": ("tone", ("very breathy", "breathy", "even", "tense", "very tense")),
    "harmonicity": ("voice", ("very rough", "rough", "plain", "clear", "very clear")),
    "pauses": ("flow", ("fluent", "fluent", "steady", "halting", "very halting")),
}
_DESCRIBED = ("energy", "rate", "pitch", "tilt")  # volume, speed, pitch, tone: always stated

# Words that carry a feeling by themselves. Whatever is not here is called neutral.
_LEXICON = {
    "anger": "angry furious hate mad stupid sick annoying outrageous damn ridiculous shut liar unfair",
    "happiness": "happy great wonderful love glad fun beautiful amazing excited perfect delighted congratulations",
    "sadness": "sad sorry miss lost alone lonely died cry crying hopeless gone goodbye",
    "disgust": "disgusting gross filthy awful nasty rotten stinks dirty",
    "fear": "afraid scared terrified danger dangerous frightened careful worried help",
}
_EMOTION_OF = {word: emotion for emotion, words in _LEXICON.items() for word in words.split()}
_NEGATIONS = {"not", "no", "never", "dont", "isnt", "wasnt", "cant"}


def lexical_cues(transcript: str) -> list[tuple[str, str]]:
    """The (word, emotion) pairs of a transcript in order, each word once; negated words are left out.

    >>> lexical_cues("I'm so glad, I was never sad!")
    [('glad', 'happiness')]
    """
    words = re.findall("[a-z]+", transcript.lower().replace("'", ""))
    pairs = [
        (word, _EMOTION_OF[word])
        for before, word in zip(["", *words], words, strict=False)
        if word in _EMOTION_OF and before not in _NEGATIONS
    ]
    return list(dict.fromkeys(pairs))


def _phrase(cue: str, z: float) -> str:
    noun, adjectives = _CUES[cue]
    return f"{adjectives[level(z)]} {noun}"


def _evidence(z: dict[str, float], emotion: str, rival: str) -> list[str]:
    """The cues that speak for `emotion` rather than for `rival`, best first, and no more than two.

    A cue speaks for an emotion as far as it lies nearer to its profile: (z - rival)^2 - (z - emotion)^2.
    """
    gain = {c: (z[c] - PROFILE[rival][c]) ** 2 - (z[c] - PROFILE[emotion][c]) ** 2 for c in _CUES}
    return [c for c in sorted(_CUES, key=lambda c: -gain[c]) if gain[c] > 0.3][:2]


def _text(cues: list[tuple[str, str]]) -> str:
    if not cues:
        return "The words are neutral, so the voice decides."
    return " and ".join(f"'{word}' suggests {emotion}" for word, emotion in cues[:2]).capitalize() + " in words."


def _audio(z: dict[str, float], majority: str, minority: str) -> str:
    volume, speed, pitch, tone = (_CUES[c][1][level(z[c])] for c in _DESCRIBED)
    described = f"Volume is {volume}, speed is {speed}, pitch is {pitch}, tone is {tone}."
    strong = " with ".join(_phrase(c, z[c]) for c in _evidence(z, majority, minority)) or "little in the voice"
    weak = " with ".join(_phrase(c, z[c]) for c in _evidence(z, minority, majority)) or "little in the voice"
    return f"{described} {strong.capitalize()} suggests {majority}; {weak} hints at {minority}."


def _synthesis(order: list[str], p: np.ndarray) -> str:
    """p, largest first, in words: a reader can tell the distribution's shape and order from them."""
    first, second, third = (*order, "", "")[:3]
    top, next_, rest = (*p.tolist(), 0.0, 0.0)[:3]
    if top >= 0.75:
        verdict = f"The whole clearly shows {first}"
    elif top - next_ < 0.12 and next_ - rest < 0.12 and rest > 0:
        return f"The whole is mixed between {first}, {second} and {third}."
    elif top - next_ < 0.12:
        verdict = f"The whole is split between {first} and {second}"
        second, next_, third, rest = third, rest, "", 0.0
    else:
        verdict = f"The whole leans to {first}"
    traces = [f"{_degree(share)} {name}" for name, share in ((second, next_), (third, rest)) if share > 0.05]
    return f"{verdict}, with {' and '.join(traces)}." if traces else f"{verdict}."


def _degree(share: float) -> str:
    return "much" if share >= 0.3 else "some" if share >= 0.15 else "a trace of"


def reason(transcript: str, acoustics: Acoustics, norm: Norm, p: np.ndarray, labels: Sequence[str]) -> Reasoning:
    """The gold chain of thought of one clip.

    Args:
      transcript: what is said.
      acoustics: what was measured.
      norm: what is usual for this speaker, or in this corpus.
      p: float [K], the soft label.
      labels: the K class names.

    Raises:
      ConfigError: a class has no profile here.
    """
    if unknown := [label for label in labels if label not in PROFILE]:
        raise ConfigError(f"the offline teacher knows {', '.join(PROFILE)}, not {', '.join(unknown)}; use a chat model")
    by_share = np.argsort(-np.asarray(p), kind="stable")
    order = [labels[k] for k in by_share]
    z = norm.z(acoustics)
    cues = lexical_cues(transcript)
    majority, minority = order[0], order[1]
    salient = sorted((c for c in _CUES if level(z[c]) != 2), key=lambda c: -abs(z[c]))[:3]
    keywords = [_phrase(c, z[c]) for c in salient] or ["moderate voice"]
    keywords += [word for word, _ in cues[:2]] or ["neutral words"]
    return Reasoning(
        keywords=", ".join(keywords),
        text=_text(cues),
        audio=_audio(z, majority, minority),
        synthesis=_synthesis(order, np.asarray(p)[by_share]),
    )
