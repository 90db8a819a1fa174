"""The offline teacher: measured acoustics, words and votes put into the paper's chain of thought. No API, no chance.

It is a template, and reads like one: a closed vocabulary, the same clauses in the same order, about sixty words. What
it says is true of the clip all the same: the levels are measured, and a cue stands as evidence for an emotion only as
far as the literature ties the two together (`PROFILE`). It is written knowing p, as any gold trajectory is.
"""

import re
from collections.abc import Sequence

import numpy as np

from ambijax.acoustics import MODERATE, Acoustics, Norm, level
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

# Where one word of the synthesis gives way to the next, in shares of p.
_CLEAR, _MUCH, _SOME, _TRACE = 0.75, 0.3, 0.15, 0.05
_CLOSE = 0.12  # shares nearer than this are called even
_AUDIBLE = 0.3  # squared standard deviations by which a cue must be nearer to one emotion to be evidence

# Words that carry a feeling by themselves. Whatever is not here is called neutral.
_LEXICON = {
    "anger": "angry furious hate mad stupid sick annoying outrageous damn ridiculous shut liar unfair",
    "happiness": "happy great wonderful love glad fun beautiful amazing excited perfect delighted congratulations",
    "sadness": "sad sorry miss lost alone lonely died cry crying hopeless gone goodbye",
    "disgust": "disgusting gross filthy awful nasty rotten stinks dirty",
    "fear": "afraid scared terrified danger dangerous frightened careful worried help",
}
_EMOTION_OF = {word: emotion for emotion, words in _LEXICON.items() for word in words.split()}
_NEGATION = re.compile(
    r"not?|never|cannot|aint|(?:do|does|did|is|are|was|were|wo|would|ca|could|should|must|have|has|had)nt"
)


def lexical_cues(transcript: str) -> list[tuple[str, str]]:
    """The (word, emotion) pairs of a transcript in order, each word once; negated words are left out.

    >>> lexical_cues("I'm so glad, I was never sad!")
    [('glad', 'happiness')]
    """
    words = re.findall("[a-z]+", re.sub("['\N{RIGHT SINGLE QUOTATION MARK}]", "", transcript.lower()))
    pairs = [
        (word, _EMOTION_OF[word])
        for before, word in zip(["", *words], words, strict=False)
        if word in _EMOTION_OF and not _NEGATION.fullmatch(before)
    ]
    return list(dict.fromkeys(pairs))


def _phrase(cue: str, z: float) -> str:
    noun, adjectives = _CUES[cue]
    return f"{adjectives[level(z)]} {noun}"


def _evidence(z: dict[str, float], emotion: str, rival: str) -> str:
    """At most two cues that speak for `emotion` rather than for `rival`.

    A moderate cue speaks for neutral; any other for emotions that move the voice in its direction, and as far as it
    lies nearer to their profile than to the rival's: (z - rival)^2 - (z - emotion)^2.
    """
    own, other = PROFILE[emotion], PROFILE[rival]
    gain = {c: (z[c] - other[c]) ** 2 - (z[c] - own[c]) ** 2 for c in _CUES}
    moderate = {c: level(z[c]) == MODERATE for c in _CUES}
    fits = moderate if emotion == "neutral" else {c: not moderate[c] and z[c] * own[c] > 0 for c in _CUES}
    best = sorted((c for c in _CUES if fits[c] and gain[c] > _AUDIBLE), key=lambda c: -gain[c])[:2]
    return " with ".join(_phrase(c, z[c]) for c in _CUES if c in best) or "little in the voice"


def _keywords(z: dict[str, float], cues: list[tuple[str, str]]) -> str:
    salient = sorted((c for c in _CUES if level(z[c]) != MODERATE), key=lambda c: -abs(z[c]))[:3]
    heard = [_phrase(c, z[c]) for c in _CUES if c in salient] or ["moderate voice"]
    said = [word for word, _ in cues] or ["neutral words"]
    return ", ".join(heard + said)


def _text(cues: list[tuple[str, str]]) -> str:
    if not cues:
        return "The words are neutral, so the voice decides."
    said = " and ".join(f"the word '{word}' suggests {emotion}" for word, emotion in cues)
    return f"{said[0].upper()}{said[1:]}, but the voice may differ."


def _audio(z: dict[str, float], majority: str, minority: str) -> str:
    volume, speed, pitch, tone = (_CUES[c][1][level(z[c])] for c in _DESCRIBED)
    described = f"Volume is {volume}, speed is {speed}, pitch is {pitch}, tone is {tone}."
    strong, weak = _evidence(z, majority, minority), _evidence(z, minority, majority)
    return f"{described} {strong.capitalize()} suggests {majority}; {weak} hints at {minority}."


def _synthesis(order: list[str], p: np.ndarray) -> str:
    """The shape of p in words, largest first: whoever reads it can tell which emotions are heard, and how much."""
    first, second, third = (*order, "")[:3]
    top, next_, rest = (*p.tolist(), 0.0)[:3]
    if top - rest < _CLOSE and rest > 0:
        return f"The whole is mixed between {first}, {second} and {third}."
    if top - next_ < _CLOSE:
        verdict, traces = f"The whole is split between {first} and {second}", [(third, rest)]
    else:
        verdict = f"The whole {'clearly shows' if top >= _CLEAR else 'leans to'} {first}"
        traces = [(second, next_), (third, rest)]
    named = [f"{_degree(share)} {emotion}" for emotion, share in traces if share >= _TRACE]
    return f"{verdict}, with {' and '.join(named)}." if named else f"{verdict} and nothing else."


def _degree(share: float) -> str:
    return "much" if share >= _MUCH else "some" if share >= _SOME else "a trace of"


def _ranked(p: np.ndarray, labels: Sequence[str], z: dict[str, float]) -> list[int]:
    """Class indices, most likely first; of equal shares, the one whose profile is nearer to the voice."""
    distance = [sum((z[c] - PROFILE[label][c]) ** 2 for c in _CUES) for label in labels]
    return sorted(range(len(labels)), key=lambda k: (-p[k], distance[k]))


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
    z = norm.z(acoustics)
    ranked = _ranked(p, labels, z)
    order = [labels[k] for k in ranked]
    cues = [(word, emotion) for word, emotion in lexical_cues(transcript) if emotion in labels][:2]
    return Reasoning(
        keywords=_keywords(z, cues),
        text=_text(cues),
        audio=_audio(z, order[0], order[1]),
        synthesis=_synthesis(order, np.asarray(p)[ranked]),
    )
