"""The offline teacher: true to the clip and to p, well-formed whatever comes in, and short."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ambijax import metrics, reasoning, teacher
from ambijax.acoustics import MEASURES, Acoustics, Norm
from ambijax.emotions import CREMAD, IEMOCAP
from ambijax.errors import ConfigError

# With mean 0 (100 Hz where pitch is measured) and spread 1 the clip's numbers are its z-scores.
NORM = Norm(dict.fromkeys(MEASURES, 0.0) | {"pitch": 12 * np.log2(100)}, dict.fromkeys(MEASURES, 1.0))
EVEN = dict.fromkeys(MEASURES, 0.0)
NEUTRAL_SENTENCE = "The kettle stands in the kitchen."


def voice(**z: float) -> Acoustics:
    values = {**EVEN, **z}
    return Acoustics(**{**values, "pitch": 100 * 2 ** (values["pitch"] / 12)})


def say(p: dict[str, float], transcript: str = NEUTRAL_SENTENCE, labels=CREMAD, **z: float) -> reasoning.Reasoning:
    return teacher.reason(transcript, voice(**z), NORM, np.array([p.get(label, 0.0) for label in labels]), labels)


ANGRY = {"energy": 2.0, "rate": 1.0, "pitch": 0.6, "tilt": 1.6, "pitch_range": 0.9}


def test_a_whole_reasoning():
    assert say({"anger": 0.7, "neutral": 0.2, "fear": 0.1}, **ANGRY).render() == (
        "Keywords: very loud volume, fast speed, very tense tone, neutral words\n"
        "Step 1 Text Analysis: The words are neutral, so the voice decides.\n"
        "Step 2 Audio Analysis: Volume is very loud, speed is fast, pitch is high, tone is very tense. "
        "Very loud volume with very tense tone suggests anger; level contour hints at neutral.\n"
        "Step 3 Synthesis: The whole leans to anger, with some neutral and a trace of fear."
    )


@pytest.mark.parametrize("emotion", CREMAD)
def test_a_typical_voice_gives_evidence_for_its_emotion(emotion):
    rival = "anger" if emotion == "neutral" else "neutral"
    audio = say({emotion: 0.8, rival: 0.2}, **teacher.PROFILE[emotion]).audio
    assert re.search(rf"\. [A-Z][a-z ]+ suggests {emotion};", audio)
    assert f"Little in the voice suggests {emotion}" not in audio
    assert audio.endswith(f"little in the voice hints at {rival}.")


def test_evidence_follows_the_voice_and_the_votes():
    tense_but_soft = {"tilt": 2.0, "energy": -2.0}
    audio = say({"anger": 0.6, "sadness": 0.4}, **tense_but_soft).audio
    assert "Very tense tone suggests anger; very soft volume hints at sadness." in audio
    turned = say({"anger": 0.4, "sadness": 0.6}, **tense_but_soft).audio
    assert "Very soft volume suggests sadness; very tense tone hints at anger." in turned
    assert "Little in the voice suggests anger" in say({"anger": 0.6, "sadness": 0.4}, energy=-2, tilt=-2).audio


@pytest.mark.parametrize(
    ("cue", "low", "high"),
    [
        ("energy", "Volume is very soft", "Volume is very loud"),
        ("rate", "speed is very slow", "speed is very fast"),
        ("pitch", "pitch is very low", "pitch is very high"),
        ("tilt", "tone is very breathy", "tone is very tense"),
    ],
)
def test_volume_speed_pitch_and_tone_are_always_named(cue, low, high):
    assert low in say({"neutral": 1.0}, **{cue: -2.0}).audio
    assert high in say({"neutral": 1.0}, **{cue: 2.0}).audio


@pytest.mark.parametrize(
    ("p", "synthesis"),
    [
        ({"fear": 1.0}, "The whole clearly shows fear and nothing else."),
        ({"fear": 0.8, "anger": 0.2}, "The whole clearly shows fear, with some anger."),
        ({"fear": 0.6, "anger": 0.4}, "The whole leans to fear, with much anger."),
        ({"fear": 0.5, "anger": 0.4}, "The whole is split between fear and anger and nothing else."),
        ({"fear": 0.36, "anger": 0.33, "disgust": 0.31}, "The whole is mixed between fear, anger and disgust."),
    ],
)  # fmt: skip
def test_the_synthesis_says_the_shape_of_p(p, synthesis):
    assert say(p).synthesis == synthesis


SHARE = {"much": 0.36, "some": 0.21, "a trace of": 0.09}


def reader(synthesis: str) -> np.ndarray:
    """What someone who sees Step 3 alone would guess for p."""
    p = dict.fromkeys(CREMAD, 0.01)
    p |= {emotion: SHARE[word] for word, emotion in re.findall("(much|some|a trace of) ([a-z]+)", synthesis)}
    if mixed := re.search("mixed between ([a-z]+), ([a-z]+) and ([a-z]+)", synthesis):
        p |= dict.fromkeys(mixed.groups(), 0.3)
    elif split := re.search("split between ([a-z]+) and ([a-z]+)", synthesis):
        p |= dict.fromkeys(split.groups(), (1 - sum(p[e] for e in CREMAD if e not in split.groups())) / 2)
    else:
        first = re.search("(?:leans to|clearly shows) ([a-z]+)", synthesis)[1]
        p[first] = 1 - sum(share for emotion, share in p.items() if emotion != first)
    guess = np.array(list(p.values()))
    return guess / guess.sum()


def test_a_reader_can_tell_the_distribution_from_the_synthesis_alone():
    rng = np.random.default_rng(0)
    p = np.stack([rng.multinomial(9, rng.dirichlet(np.full(6, 0.4))) / 9 for _ in range(500)])
    guesses = np.stack([reader(say(dict(zip(CREMAD, row, strict=True))).synthesis) for row in p])
    assert metrics.js(p, guesses).mean() < 0.06  # the mean prior is at 0.4 here, the plain majority at 0.17
    assert metrics.js(p, guesses).max() < 0.25


def test_among_equals_the_voice_decides_who_is_named_first():
    tie = {"anger": 0.5, "sadness": 0.5}
    assert "split between sadness and anger" in say(tie, **teacher.PROFILE["sadness"]).synthesis
    assert "split between anger and sadness" in say(tie, **teacher.PROFILE["anger"]).synthesis


def test_words_of_feeling_are_named_and_neutral_sentences_called_neutral():
    assert say({"neutral": 1.0}).text == "The words are neutral, so the voice decides."
    happy = say({"neutral": 1.0}, "What a wonderful day!")
    assert happy.text == "The word 'wonderful' suggests happiness, but the voice may differ."
    assert happy.keywords.endswith(", wonderful")
    # disgust is no class of IEMOCAP
    assert "neutral words" in say({"neutral": 1.0}, "That is disgusting.", labels=IEMOCAP).keywords


def test_lexical_cues():
    assert teacher.lexical_cues("I HATE it, it's so sad; I hate it") == [("hate", "anger"), ("sad", "sadness")]
    assert teacher.lexical_cues("I'm not happy and I don't love it") == []
    assert (
        teacher.lexical_cues("She doesn't hate you. I won\N{RIGHT SINGLE QUOTATION MARK}t cry. I DIDNT love it") == []
    )
    assert teacher.lexical_cues("I want love") == [("love", "happiness")]
    assert teacher.lexical_cues("") == []


def test_an_unknown_class_is_a_configuration_error():
    with pytest.raises(ConfigError, match="surprise"):
        teacher.reason("Oh.", voice(), NORM, np.array([0.5, 0.5]), ("anger", "surprise"))


LEAKS = re.compile(r"\d|label|annotat|vote|rater|listener|percent|majority|minority|ground truth", re.IGNORECASE)


@settings(deadline=None)
@given(
    z=st.lists(st.floats(-5, 5), min_size=len(MEASURES), max_size=len(MEASURES)),
    counts=st.lists(st.integers(0, 9), min_size=6, max_size=6).filter(any),
    transcript=st.one_of(
        st.text(),
        st.sampled_from(["Final emotion: anger", "Keywords: Step 1 Text Analysis: happy", "<|im_end|>7 votes for sad"]),
    ),
)
def test_whatever_comes_in_the_format_holds_and_nothing_leaks(z, counts, transcript):
    p = dict(zip(CREMAD, np.array(counts) / sum(counts), strict=True))
    r = say(p, transcript, **dict(zip(MEASURES, z, strict=True)))
    assert reasoning.problems(r.render()) == []
    parts = [r.keywords, r.text, r.audio, r.synthesis]
    assert not LEAKS.search(" ".join(parts))
    assert "<|" not in r.render()
    assert 40 <= len(" ".join(parts).split()) <= 72


def test_the_vocabulary_is_small_and_closed():
    rng = np.random.default_rng(0)
    words = set()
    for labels, _ in itertools.product((CREMAD, IEMOCAP), range(400)):
        p = dict(zip(labels, rng.dirichlet(np.full(len(labels), 0.5)), strict=True))
        words |= set(say(p, labels=labels, **dict(zip(MEASURES, rng.normal(0, 1.5, 9), strict=True))).render().split())
    assert len(words) < 150
