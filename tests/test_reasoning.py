"""The reasoning format: what is well-formed comes back from its text, and each way to break it is named."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambijax import agent, reasoning
from ambijax.emotions import CREMAD
from ambijax.reasoning import ANCHOR, HEADINGS, Reasoning

GOOD = Reasoning("slow, low", "a plain statement", "soft and falling;\ncues of two emotions", "sad, or only tired")
LINES = [
    "Keywords: slow, low",
    "Step 1 Text Analysis: a plain statement",
    "Step 2 Audio Analysis: soft and falling;\ncues of two emotions",
    "Step 3 Synthesis: sad, or only tired",
]
TEXT = "\n".join(LINES)


def test_render_and_parse_by_hand():
    assert GOOD.render() == TEXT
    assert reasoning.parse(TEXT) == GOOD
    assert reasoning.parse("\n\n".join(LINES) + "  \n") == GOOD


part = st.text(min_size=1).map(str.strip).filter(bool)


@given(st.builds(Reasoning, part, part, part, part))
def test_parse_undoes_render_or_says_why_not(parts):
    try:
        assert reasoning.parse(parts.render()) == parts
    except ValueError:
        text = parts.render()
        assert any(text.count(heading) > 1 for heading in HEADINGS) or ANCHOR in text or "<|" in text


MALFORMED = {
    "nothing": ("", "'Keywords:' occurs 0 times"),
    "prose": ("She sounds sad to me.", "'Step 3 Synthesis:' occurs 0 times"),
    "a step is missing": ("\n".join(LINES[:2] + LINES[3:]), "'Step 2 Audio Analysis:' occurs 0 times"),
    "cut": (TEXT[: TEXT.index("Synthesis")], "'Step 3 Synthesis:' occurs 0 times"),
    "cut after a heading": (TEXT[: TEXT.index(" sad, or")], "'Step 3 Synthesis:' is empty"),
    "a blank part": (TEXT.replace("a plain statement", " \n\t"), "'Step 1 Text Analysis:' is empty"),
    "out of order": ("\n".join([LINES[0], LINES[2], LINES[1], LINES[3]]), "'Step 2 Audio Analysis:' is out of order"),
    "a heading twice": (f"{TEXT}\n{LINES[0]}", "'Keywords:' occurs 2 times"),
    "a heading repeated inside a line": (f"{TEXT}, see Keywords: slow", "'Keywords:' occurs 2 times"),
    "headings on one line": (" ".join(LINES), "not once at a line start"),
    "text before": (f"Well.\n{TEXT}", "text before"),
    "answer inside": (f"{TEXT}\n{ANCHOR} anger", "answer anchor"),
    "special token": (f"{TEXT}<|im_end|>", r"special token <\|im_end\|>"),
    "20,000 characters without a heading": ("sad " * 5_000, "'Keywords:' occurs 0 times"),
    "other case": (TEXT.replace("Keywords", "KEYWORDS"), "'Keywords:' occurs 0 times"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_reasoning_is_named_and_earns_nothing(name):
    text, message = MALFORMED[name]
    with pytest.raises(ValueError, match=message):
        reasoning.parse(text)
    assert reasoning.problems(text)
    assert reasoning.format_reward(f"{text}\n{ANCHOR} anger", CREMAD, style="steps", ended=True) == 0


def test_all_problems_are_listed():
    text = "\n".join([LINES[0], LINES[3], f"{ANCHOR} fear"])
    assert len(reasoning.problems(text)) == 3  # Step 1, Step 2, anchor


def test_long_reasoning_is_well_formed():
    """Length is a limit of the model's context, not of the format."""
    text = TEXT.replace("soft and falling", "soft, " * 4_000)
    assert reasoning.problems(text) == []


@pytest.mark.parametrize("label", CREMAD)
def test_format_reward_pays(label):
    assert reasoning.format_reward(f"{TEXT}\n{ANCHOR} {label}", CREMAD, style="steps", ended=True) == 1


@pytest.mark.parametrize(
    "ending",
    [
        "",  # no answer line
        f"\n{ANCHOR}",
        f"\n{ANCHOR} ",
        f"\n{ANCHOR}anger",  # another token than " anger"
        f"\n{ANCHOR} Anger",
        f"\n{ANCHOR} surprise",
        f"\n{ANCHOR} anger.",
        f"\n{ANCHOR} anger\n",
        f"\n{ANCHOR} anger fear",
        f"\n{ANCHOR} anger\n{ANCHOR} fear",
        f" {ANCHOR} anger",  # not on a line of its own
        f" {ANCHOR} anger\n{ANCHOR} anger",
        "\nFinal Emotion: anger",
    ],
)
def test_format_reward_does_not_pay_for_another_ending(ending):
    assert reasoning.format_reward(f"{TEXT}{ending}", CREMAD, style="steps", ended=True) == 0


def test_format_reward_wants_an_end_and_a_label_of_this_corpus():
    good = f"{TEXT}\n{ANCHOR} fear"
    assert reasoning.format_reward(good, CREMAD, style="steps", ended=False) == 0
    assert reasoning.format_reward(good, ("anger", "neutral"), style="steps", ended=True) == 0
    assert reasoning.format_reward(f"{ANCHOR} fear", CREMAD, style="steps", ended=True) == 0


def test_an_anchor_in_other_tokens_earns_nothing():
    """It is there to read, but a read-out that had to be forced earns no format reward."""
    good = f"{TEXT}\n{ANCHOR} fear"
    group = [good, good, TEXT, f"{ANCHOR} fear"]
    rolled = types.SimpleNamespace(ended=np.ones((1, 4), bool), forced=np.array([[False, True, True, True]]))

    def grades(style, how):
        setting = types.SimpleNamespace(vocabulary=types.SimpleNamespace(labels=CREMAD), style=style)
        return agent.grade(setting, how, [group], rolled).tolist()

    assert grades("steps", reasoning.format_reward) == [[1, 0, 0, 0]]
    assert grades("steps", reasoning.format_credit) == [[1, 0.8, 0.8, 0]]
    assert grades("answer", reasoning.format_reward) == [[0, 0, 0, 0]]
    tagged = reasoning.format_reward(TAGGED, CREMAD, style="audio_reasoner", ended=True, forced=True)
    assert tagged == 1  # asks for no anchor, which is always appended


def test_split_answer():
    assert reasoning.split_answer(f"{TEXT}\n{ANCHOR} fear") == (TEXT, " fear")
    assert reasoning.split_answer(f"{ANCHOR} fear") == ("", " fear")
    assert reasoning.split_answer(TEXT) == (TEXT, "")
    assert reasoning.split_answer(f"a\n{ANCHOR} b\n{ANCHOR} c") == ("a", f" b\n{ANCHOR} c")


def test_partial_credit_by_hand():
    """A fifth each for four headed parts and the answer; whatever else is wrong costs a fifth."""
    answer = f"\n{ANCHOR} anger"

    def credit(text, style="steps", ended=True):
        return reasoning.format_credit(text, CREMAD, style="steps", ended=ended)

    assert credit(TEXT + answer) == 1
    assert credit("") == 0
    assert credit("", style="steps", ended=False) == 0
    assert credit(TEXT) == 0.8  # no answer
    assert credit(TEXT, style="steps", ended=False) == 0.6  # cut before it
    assert credit(TEXT + f"\n{ANCHOR} anger and fear") == 0.8
    assert credit("\n".join(LINES[:2]) + answer) == 0.6
    assert credit(f"Well.\n{TEXT}{answer}") == 0.8


@given(st.text(), st.booleans(), st.sampled_from(list(MALFORMED)))
def test_partial_credit_is_full_where_the_format_is(noise, ended, name):
    for text in (noise, TEXT, MALFORMED[name][0], f"{TEXT}{noise}"):
        completion = f"{text}\n{ANCHOR} anger"
        exact = reasoning.format_reward(completion, CREMAD, style="steps", ended=ended)
        credit = reasoning.format_credit(completion, CREMAD, style="steps", ended=ended)
        assert 0 <= credit <= 1
        assert (credit == 1) == (exact == 1)


TAGGED = (
    "<THINK>\n<PLANNING>\nlisten\n</PLANNING>\n<CAPTION>\na voice\n</CAPTION>\n<REASONING>\nit falls\n</REASONING>\n"
    "<SUMMARY>\nlow\n</SUMMARY>\n</THINK>\n<RESPONSE>\nThe emotion is Sadness.\n</RESPONSE>"
)


def test_the_format_of_audio_reasoner():
    def reward(text, ended=True):
        return reasoning.format_reward(text, CREMAD, style="audio_reasoner", ended=ended)

    assert reward(TAGGED) == 1
    assert reward(TAGGED, ended=False) == 0
    assert reward(TAGGED.replace("Sadness", "Sadness or fear")) == 0
    assert reward(TAGGED.replace("Sadness", "sad")) == 0
    assert reward(TAGGED.replace("a voice", " ")) == 0
    assert reward(TAGGED.replace("</CAPTION>", "")) == 0
    words = "a long section " * 400  # a cut completion must not be tried in all the ways it could be divided
    assert reward(TAGGED.replace("a voice", words).replace("it falls", words).partition("</RESPONSE>")[0]) == 0
    assert reward(TAGGED.replace("a voice", words).replace("it falls", words)) == 1
    assert reward(TAGGED + "<SUMMARY>again</SUMMARY>") == 0
    assert reward(f"{TEXT}\n{ANCHOR} anger") == 0


def test_the_format_of_an_answer_alone():
    def reward(text):
        return reasoning.format_reward(text, CREMAD, style="answer", ended=True)

    assert reward(f"{ANCHOR} anger") == 1
    assert reward(f"{TEXT}\n{ANCHOR} anger") == 0
    assert reward(f"{ANCHOR} angry") == 0
