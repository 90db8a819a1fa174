"""The paper's chain of thought as text: render, parse, and the format reward.

    Keywords: ...
    Step 1 Text Analysis: ...
    Step 2 Audio Analysis: ...
    Step 3 Synthesis: ...
    Final emotion: anger

The last line is the answer anchor followed by one class word; everything above it is the reasoning. What a model
or a file says here is untrusted text: nothing in this module can turn it into a special token.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

HEADINGS = ("Keywords:", "Step 1 Text Analysis:", "Step 2 Audio Analysis:", "Step 3 Synthesis:")
ANCHOR = "Final emotion:"


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """The four parts of a chain of thought, without headings and without the answer."""

    keywords: str
    text: str
    audio: str
    synthesis: str

    def render(self) -> str:
        """The reasoning as the model writes it: four headed lines, no answer line, no final newline."""
        return "\n".join(f"{heading} {part}" for heading, part in zip(HEADINGS, dataclasses.astuple(self), strict=True))


def split_answer(completion: str) -> tuple[str, str]:
    """A completion cut at its first anchor: (reasoning, what follows the anchor); ('...', '') without one."""
    reasoning, _, answer = completion.partition(ANCHOR)
    return reasoning.rstrip("\n"), answer


def problems(reasoning: str) -> list[str]:
    """What keeps a reasoning (without answer line) from the format; empty when it is well-formed."""
    found = []
    position = -1
    for heading in HEADINGS:
        count = len(re.findall(rf"^{re.escape(heading)}", reasoning, flags=re.MULTILINE))
        if count != 1 or reasoning.count(heading) != 1:
            found.append(f"'{heading}' occurs {reasoning.count(heading)} times, not once at a line start")
        elif reasoning.index(heading) < position:
            found.append(f"'{heading}' is out of order")
        else:
            position = reasoning.index(heading)
    if ANCHOR in reasoning:
        found.append(f"the answer anchor '{ANCHOR}' occurs inside the reasoning")
    if special := re.search(r"<\|\w+\|>", reasoning):  # as `prompt.decode` spells the special tokens a model wrote
        found.append(f"the special token {special.group()} occurs inside the reasoning")
    if not found:
        parts = re.split("|".join(map(re.escape, HEADINGS)), reasoning)
        if parts[0].strip():
            found.append("there is text before 'Keywords:'")
        found += [f"'{h}' is empty" for h, part in zip(HEADINGS, parts[1:], strict=True) if not part.strip()]
    return found


def parse(reasoning: str) -> Reasoning:
    """The four parts of a well-formed reasoning.

    Raises:
      ValueError: it is not well-formed; the message lists the problems.
    """
    if found := problems(reasoning):
        raise ValueError("; ".join(found))
    parts = re.split("|".join(map(re.escape, HEADINGS)), reasoning)[1:]
    return Reasoning(*(part.strip() for part in parts))


@dataclasses.dataclass(frozen=True)
class Style:
    """A way to ask for an answer, and what it must look like."""

    system: str  # the system turn
    task: str  # ends the question, before the class words
    faults: Callable[[str, Sequence[str]], list[str]]  # (completion, labels) -> what keeps it from the format
    anchored: bool = True  # whether it asks for the answer anchor


def _faults_of_steps(completion: str, labels: Sequence[str]) -> list[str]:
    reasoning, answer = split_answer(completion)
    found = problems(reasoning)
    if f"\n{ANCHOR}" not in completion or answer not in {f" {label}" for label in labels}:
        found.append(f"'{ANCHOR}' and one class word do not stand on the last line")
    return found


def _faults_of_answer(completion: str, labels: Sequence[str]) -> list[str]:
    exact = completion in {f"{ANCHOR} {label}" for label in labels}
    return [] if exact else [f"it is not '{ANCHOR}' and one class word"]


_TAGS = ("THINK", "PLANNING", "CAPTION", "REASONING", "SUMMARY")  # the first around the others


def _faults_of_audio_reasoner(completion: str, labels: Sequence[str]) -> list[str]:
    # Each tag once, and nothing asked of a section but to end: a pattern that could try more ends would try them all.
    once = all(completion.count(mark) == 1 for tag in (*_TAGS, "RESPONSE") for mark in (f"<{tag}>", f"</{tag}>"))
    inner = r"\s*".join(rf"<{tag}>(.*)</{tag}>" for tag in _TAGS[1:])
    whole = once and re.fullmatch(
        rf"\s*<THINK>\s*{inner}\s*</THINK>\s*<RESPONSE>(.*)</RESPONSE>\s*", completion, re.DOTALL
    )
    if not whole or not all(section.strip() for section in whole.groups()[:-1]):
        return ["its tags are not each there once, in order and filled"]
    said = [label for label in labels if re.search(rf"\b{re.escape(label)}\b", whole[5], re.IGNORECASE)]
    return [] if len(said) == 1 else [f"its response names {len(said)} of the class words, not one"]


_SYSTEM = "You are a helpful assistant."
_STEPS = ", ".join(heading.rstrip(":") for heading in HEADINGS)
STYLES = {
    # The paper's, which everything is trained in.
    "steps": Style(_SYSTEM, f'Write {_STEPS}, then "{ANCHOR}" and one of', _faults_of_steps),
    # Without a chain of thought (Table 3 of the paper): what data.cot=False asks for.
    "answer": Style(_SYSTEM, f'Write "{ANCHOR}" and one of', _faults_of_answer),
    # Of the published Audio-Reasoner (arXiv 2503.02318), whose system turn this is. It knows no anchor of ours, so its
    # distribution is always read out after an appended one.
    "audio_reasoner": Style(
        "You are an audio deep-thinking model. Upon receiving a question, please respond in two parts: <THINK> and "
        "<RESPONSE>. The <THINK> section should be further divided into four parts: <PLANNING>, <CAPTION>, "
        "<REASONING>, and <SUMMARY>.",
        "Answer with one of",
        _faults_of_audio_reasoner,
        anchored=False,
    ),
}


def faults(completion: str, labels: Sequence[str], *, style: str, ended: bool, forced: bool = False) -> list[str]:
    """What keeps a completion from the format of its style; empty when nothing does.

    Args:
      completion: the decoded tokens without EOS.
      labels: the class words.
      style: one of `STYLES`.
      ended: whether the model itself ended the completion with EOS.
      forced: whether its tokens never came to the answer anchor; its text may have it all the same, in other tokens.
    """
    found = STYLES[style].faults(completion, labels) + ([] if ended else ["the completion was cut"])
    if forced and not found and STYLES[style].anchored:
        return [f"'{ANCHOR}' stands there in other tokens than those that are read out"]
    return found


def format_reward(completion: str, labels: Sequence[str], *, style: str, ended: bool, forced: bool = False) -> float:
    """format(r) of equation 6: 1 when the completion follows the format to the letter, else 0. See `faults`."""
    return float(not faults(completion, labels, style=style, ended=ended, forced=forced))


def format_credit(completion: str, labels: Sequence[str], *, style: str, ended: bool, forced: bool = False) -> float:
    """format(r) with partial credit: a fifth for each of the four headed parts and the answer, a fifth less for any
    other of the `faults`; 1 exactly where `format_reward` is, 0 for an empty completion. Styles of fewer parts: all or
    nothing.
    """
    found = faults(completion, labels, style=style, ended=ended, forced=forced)
    return max(0, 5 - len(found)) / 5 if style == "steps" else float(not found)
