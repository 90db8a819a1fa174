"""What an answer must pass before it becomes gold: format, leaks, refusals, and the validator's verdict.

A fault is one line, `category: what is wrong`. It is fed back to the teacher, and the summary counts categories.
"""

import json
import re
from collections.abc import Sequence

import numpy as np

from ambijax import reasoning
from ambijax.curation.ledger import Answer

# Words that give away that the teacher knew the answer. The same word in the transcript is the speaker's own.
_TELLS = re.compile(
    r"\bannotat\w*|\brespondents?\b|\bconsensus\b|\bparticipants? (?:agree|feel|felt|hear|judge|perceive|rate|think)"
    r"|\braters?\b|\bratings?\b|\bevaluators?\b|\bvot(?:e|es|ed|ing|ers?)\b|\blabel\w*|\bground[- ]truth"
    r"|\bprobabilit\w+|\b(?:emotion(?:al)?|perception|target|given|soft) distribution|\bdistribution (?:of|over) "
    r"(?:the )?(?:emotion|perception|listener|opinion)s?|\b(?:given|provided|stated|target|known) "
    r"(?:perception|emotion|target|answer)|\b(?:majority|minority) (?:opinion|emotion|class|perception|view)"
    r"|\b(?:was|were|been|am) (?:told|instructed|asked to)\b|\bthe prompt\b|\bas an ai\b",
    re.IGNORECASE,
)

_WORD = r"(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
_COUNT = rf"(?:\d+|{_WORD})"
_SHARE, _AGAINST = r"(?:half|a third|a quarter|a fifth)", r"\s*(?:-|–|to|against)\s*"
_PEOPLE = r"(?:listeners|people|persons|hearers|humans|observers|judges|participants)"
# A decimal with a unit is a measurement, without one it reads as a share. Ranges such as "0.3 to 0.5 s" count as well.
_UNIT = (
    r"(?:[\s-]*(?:to|–|-)\s*\d*\.?\d+)?[\s-]*(?:k?hz|db|m?s\b|m?sec|milli|semitone|syllable|word|octave|st\b|times\b)"
)
_NUMBERS = re.compile(
    rf"(?<!\d)\d+(?:\.\d+)?\s*%|\bper ?cent(?:age)?\b|\b\d+\s*/\s*\d+"
    rf"|\b{_COUNT} out of (?:the )?{_COUNT}\b|\b\d+ of (?:the )?{_COUNT}\b|\b(?!one of){_COUNT} (?:of|in) {_COUNT}\b"
    rf"|(?<![\d.])(?:0?\.\d+|1\.0+)(?!\d)(?!{_UNIT})|\b(?:one|two|three)[- ](?:third|quarter|fifth)s?\b"
    rf"|\b{_COUNT} {_PEOPLE}\b|\b{_SHARE} (?:of )?(?:all |the |those )*(?:{_PEOPLE}|them|hears?|heard)\b"
    rf"|\b{_COUNT}{_AGAINST}{_COUNT} (?:split|majority|margin)\b|\bsplit {_COUNT}{_AGAINST}{_COUNT}\b",
    re.IGNORECASE,
)

_REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able)\b|\bI (?:can(?:no|')t|won't|must decline)\b|\bas an ai\b"
    r"|\b(?:unable|cannot|can't) (?:to )?(?:assist|help|comply|determine|infer|identify|analy[sz]e|process|hear)\b",
    re.IGNORECASE,
)
_OPENING = 300  # characters in which a refusal shows itself

# Strings that a tokenizer could take for a control token.
_HALF = re.compile("[\ud800-\udfff]")  # JSON can hold the half of a pair, UTF-8 cannot
_CONTROL = re.compile(r"<\|.*?\|>|</?s>|\[/?INST\]")


def plain(text: str) -> str:
    """An answer in whole characters, with one kind of line break, without the markdown that models add to headings."""
    text = _HALF.sub("\N{REPLACEMENT CHARACTER}", text)
    text = "\n".join(text.splitlines())  # also U+2028 and the like
    text = re.sub(r"^```\w*$|^#+ *|\*\*", "", text, flags=re.MULTILINE)
    return text.strip()


def refused(answer: Answer) -> bool:
    """Whether the model declined: the endpoint says so, or an answer without our headings opens with an excuse."""
    if answer.refusal or answer.finish == "content_filter":
        return True
    opening = answer.text[:_OPENING].replace("’", "'")
    return reasoning.HEADINGS[0] not in answer.text and bool(_REFUSAL.search(opening))


def faults(text: str, transcript: str, labels: Sequence[str], max_chars: int) -> list[str]:
    """What keeps a reasoning from being gold; empty when nothing does.

    Args:
      text: the reasoning without answer line, from `plain` or a file.
      transcript: what is said; its own words and numbers are no leak.
      labels: the class names.
      max_chars: the longest reasoning to accept.
    """
    found = [f"format: {problem}" for problem in reasoning.problems(text)]
    if len(text) > max_chars:
        return [*found, f"length: {len(text)} characters, at most {max_chars} are allowed"]
    if control := _CONTROL.search(text):
        found.append(f"format: contains the control token {control.group()!r}")
    if half := _HALF.search(text):
        found.append(f"format: contains half a character, {half.group()!r}")
    names = "|".join(map(re.escape, labels))
    number = rf"\d+(?:\.\d+)?(?![.]?\d)(?!{_UNIT})"
    beside = re.compile(rf"\b(?:{names})\b\W{{0,3}}{number}|(?<![.\d])\d+ (?:{names})\b", re.IGNORECASE)  # "anger: 7"
    leaks = [m.group() for pattern in (_TELLS, _NUMBERS, beside) for m in pattern.finditer(text)]
    if leaks := [leak for leak in dict.fromkeys(leaks) if not _spoken(leak, transcript)]:
        found.append("leak: it must not contain " + ", ".join(repr(leak) for leak in leaks[:5]))
    return found


def _spoken(words: str, transcript: str) -> bool:
    """Whether the speaker says these very words."""
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", transcript, re.IGNORECASE))


def verdict(text: str) -> str:
    """The judge's fault, '' when a line begins with CONSISTENT; a judge without a verdict has not agreed."""
    match = re.search(r"^\W*(?:verdict\W+)?(in)?consistent\b", text, re.IGNORECASE | re.MULTILINE)
    if match is None:
        return "judge: gave no verdict"
    if match.group(1) is None:
        return ""
    why = " ".join(text[match.end() :].split()).lstrip(" .:*-")
    return f"judge: {why[:300] or 'inconsistent with the perception'}"


def prediction(text: str, labels: Sequence[str]) -> np.ndarray | None:
    """The blind reader's distribution, float64 [K]; None when there is none to be read."""
    match = re.search(r"\{[^{}]*\}", text)
    try:
        values = json.loads(match.group()) if match else {}
        q = np.array([float(values.get(label, 0)) for label in labels])
    except (ValueError, TypeError, OverflowError, RecursionError):  # it is a stranger's text
        return None
    if not np.isfinite(q).all() or (q < 0).any() or q.sum() == 0:
        return None
    return q / q.sum()
