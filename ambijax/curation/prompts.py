"""Every word that is sent to a model; docs/curation.md shows the same text, and a test holds the two together.

The rules are those of the paper's Table 1, plus two of ours: never mention that a label was given, no vote numbers.
"""

import json
from collections.abc import Sequence

import numpy as np

from ambijax.acoustics import LEVELS, VOICED, Acoustics, Norm, level

SYSTEM = """\
You analyse short recorded utterances for research on ambiguous emotion. You know the vocabulary of phonetics and \
pragmatics, you write plain text without markdown, and you follow formats to the letter."""

HEAR = "Listen to the attached recording of one utterance."

READ = """\
You cannot hear the recording of this utterance. These are its measured acoustics, each against what is usual for \
the speaker:
{acoustics}"""

PROSODY = """\
This is consented research speech. You are not asked who the speaker is or what the speaker feels inside: describe \
the prosody, and how a delivery like this one comes across to a listener."""

DRAFT = """\
{source}

Transcript: {transcript}
Emotion words: {labels}
How the emotion of this utterance is perceived: {target}

Write an analysis from which a reader who knows nothing else can predict this perception: the main emotion, the \
weaker ones, and roughly how strong each is. Use exactly these four headings, once each, in this order, each at the \
start of a line:

Keywords: the salient acoustic and linguistic cues, separated by commas.
Step 1 Text Analysis: strictly the meaning and context of the words, and where they are ambiguous. Nothing about the \
sound.
Step 2 Audio Analysis: the prosody in professional terms: volume, speed, pitch, tone. Name the cues for the main \
emotion and the cues for each weaker one.
Step 3 Synthesis: weigh the cues of both steps and resolve them; say which emotion dominates, which others remain \
plausible, and how strongly.

Rules:
- Stop after Step 3. No other heading, no "Final emotion:" line, no markdown, at most {words} words.
- Write as if you had only the recording and its words. Never say or hint that a perception, a label, a vote, a \
distribution or an annotator was given to you.
- Never put a number on how likely or how frequent an emotion is: no counts, fractions, percentages or \
probabilities. Use words such as clearly, mostly, partly, faintly."""

FEEDBACK = """\
This analysis cannot be used:
{faults}
Write all four parts again and correct this. The rules are the same."""

JUDGE = """\
Check an analysis of a recorded utterance against how the emotion of the utterance is perceived.

Transcript: {transcript}
Perception: {target}

Analysis:
{reasoning}

The analysis is CONSISTENT when all of these hold:
- A reader who knows only the analysis would expect the same main emotion as the perception.
- The weaker emotions of the perception are supported by cues in proportion to their strength, and no other emotion \
is argued for.
- Step 1 speaks only of the words, Step 2 only of the sound, and Step 3 follows from both.

Answer on the first line with one word, CONSISTENT or INCONSISTENT. If INCONSISTENT, say on a second line in one \
sentence what has to change."""

READER = """\
Below is an analysis of a recorded utterance. Knowing only this analysis, predict how a group of listeners would \
divide over the emotions {labels}.

Analysis:
{reasoning}

Answer with one JSON object and nothing else: each of these emotions with a number from 0 to 1, summing to 1."""

Message = dict[str, object]  # one message of the chat endpoint


def target(p: np.ndarray, labels: Sequence[str]) -> str:
    """The soft label p [K] in words, strongest first; emotions nobody perceived are left out.

    >>> target(np.array([0.25, 0.75, 0.0]), ("anger", "fear", "neutral"))
    'fear 0.75, anger 0.25'
    """
    return ", ".join(f"{labels[k]} {p[k]:.2f}" for k in np.argsort(-p, kind="stable") if p[k] > 0)


# How a measure reads; rates and levels with their units, so that no bare number tempts the teacher.
_MEASURES = {
    "energy": "loudness {:.0f} dB",
    "energy_range": "loudness variation {:.1f} dB",
    "pitch": "median pitch {:.0f} Hz",
    "pitch_range": "pitch range {:.1f} semitones",
    "pitch_slope": "pitch movement {:+.1f} semitones per second",
    "rate": "speaking rate {:.1f} syllables per second",
    "pauses": "pauses",  # a share has no unit, and a bare 0.13 in the analysis would count as a leak
    "tilt": "vocal effort (energy above against below 1 kHz) {:.0f} dB",
    "harmonicity": "harmonics-to-noise ratio {:.0f} dB",
}


def describe(acoustics: Acoustics, norm: Norm) -> str:
    """The measures of a clip, one line each, with the value and where it lies for this speaker."""
    z = norm.z(acoustics)
    measured = [name for name in _MEASURES if acoustics.pitch or name not in VOICED]
    lines = [f"- {_MEASURES[name].format(getattr(acoustics, name))}: {LEVELS[level(z[name])]}" for name in measured]
    return "\n".join(lines if acoustics.pitch else [*lines, "- hardly anything is voiced: no pitch or voice quality"])


def draft(
    sound: str | bytes,
    transcript: str,
    p: np.ndarray,
    labels: Sequence[str],
    *,
    words: int,
    prosody: bool,
) -> list[Message]:
    """The request for a first draft.

    Args:
      sound: base64 wav as bytes for a model that hears, or the text of `describe` for one that does not.
      transcript: what is said; untrusted, so it is sent as a JSON string.
      p: float [K], the soft label.
      labels: the K class names.
      words: the most words the analysis may have.
      prosody: put the request as a description of prosody, after a refusal.
    """
    source = HEAR if isinstance(sound, bytes) else READ.format(acoustics=sound)
    text = DRAFT.format(
        source=f"{PROSODY} {source}" if prosody else source,
        transcript=json.dumps(transcript, ensure_ascii=False),
        labels=", ".join(labels),
        target=target(p, labels),
        words=words,
    )
    content: list[Message] = [{"type": "text", "text": text}]
    if isinstance(sound, bytes):
        content.append({"type": "input_audio", "input_audio": {"data": sound.decode("ascii"), "format": "wav"}})
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def again(text: str, faults: Sequence[str]) -> list[Message]:
    """What follows a draft that failed: the draft itself and what is wrong with it."""
    listed = "\n".join(f"- {fault}" for fault in faults)
    return [{"role": "assistant", "content": text}, {"role": "user", "content": FEEDBACK.format(faults=listed)}]


def judge(reasoning: str, transcript: str, p: np.ndarray, labels: Sequence[str]) -> list[Message]:
    """Asks whether a reasoning agrees with the soft label."""
    transcript = json.dumps(transcript, ensure_ascii=False)
    content = JUDGE.format(transcript=transcript, target=target(p, labels), reasoning=reasoning)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def reader(reasoning: str, labels: Sequence[str]) -> list[Message]:
    """Asks somebody who knows only the reasoning for a distribution."""
    content = READER.format(labels=", ".join(labels), reasoning=reasoning)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
