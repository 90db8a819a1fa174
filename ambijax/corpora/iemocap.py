"""IEMOCAP from its official layout: 10,039 turns of 10 actors in 151 dialogs (docs/corpora/iemocap.md).

    Session{1..5}/dialog/EmoEvaluation/<dialog>.txt   votes and consensus
    Session{1..5}/dialog/transcriptions/<dialog>.txt  what is said
    Session{1..5}/sentences/wav/<dialog>/<turn>.wav   the clips

Licensed by USC: nothing of it may be passed on. Busso et al. 2008, doi:10.1007/s10579-008-9076-6;
https://sail.usc.edu/iemocap/
"""

import collections
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from ambijax.corpora.release import Release, audio_files
from ambijax.emotions import IEMOCAP
from ambijax.errors import ConfigError, DataError
from ambijax.manifest import Utterance

# An annotator's tag, and the code of the consensus, to the emotion. 'Neutral state' is the tag's name in Categorical/.
TAGS = {
    "Anger": "anger", "Happiness": "happiness", "Excited": "happiness", "Sadness": "sadness", "Neutral": "neutral",
    "Neutral state": "neutral", "Frustration": "frustration", "Fear": "fear", "Surprise": "surprise",
    "Disgust": "disgust", "Other": "other",
}  # fmt: skip
CODES = {
    "ang": "anger", "hap": "happiness", "exc": "happiness", "sad": "sadness", "neu": "neutral", "fru": "frustration",
    "fea": "fear", "sur": "surprise", "dis": "disgust", "oth": "other", "xxx": "no majority",
}  # fmt: skip

_SUMMARY = re.compile(r"\[[^\]]*\]\t(?P<turn>\S+)\t(?P<code>\w+)\t")
_TURN = re.compile(r"(?P<dialog>Ses0(?P<session>[1-5])[FM]_\w+)_(?P<speaker>[FM])\d+")
_TRANSCRIPTION = re.compile(r"(?P<turn>\S+) \[[^\]]*\]:(?P<text>.*)")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One block of an EmoEvaluation file."""

    id: str
    dialog: str
    session: int  # 1 to 5
    speaker: str  # F | M, from the turn's name: that of the dialog tells who wore the markers
    consensus: str  # the summary code, a key of CODES
    tags: tuple[tuple[str, ...], ...]  # each external annotator's emotions, distinct, excited as happiness


def read(root: Path, *, keep: str, fractional: bool) -> Release:
    """Reads the release in `root`.

    Args:
      root: IEMOCAP_full_release, the directory that holds Session1 to Session5.
      keep: 'consensus' keeps the turns whose consensus is one of the four merged classes (5,531); 'all_votes' those
        whose every vote is (about 4,400).
      fractional: whether an annotator's several emotions share one vote; else each of them counts one.

    Raises:
      ConfigError: a file of the layout is not there.
      DataError: a file is not what it should be; names the line.
    """
    if keep not in _KEEP:
        raise ConfigError(f"keep={keep!r} must be one of {', '.join(_KEEP)}")
    sessions = sorted(root.glob("Session[1-5]"))
    if not sessions:
        raise ConfigError(f"no Session1 to Session5 in {root}; --root must be IEMOCAP_full_release")
    turns: dict[str, Turn] = {}
    transcripts: dict[str, str] = {}
    for session in sessions:
        for name in audio_files(session / "dialog" / "EmoEvaluation", "*.txt"):  # not into its subdirectories
            for where, turn in _turns(session / "dialog" / "EmoEvaluation" / name):
                if turn.id in turns:
                    raise DataError(f"{where}: a second block for {turn.id}")
                turns[turn.id] = turn
            transcripts |= _transcripts(session / "dialog" / "transcriptions" / name)
    kept = [turn for turn in turns.values() if _KEEP[keep](turn)]
    wavs = audio_files(root, "Session[1-5]/sentences/wav/*/*.wav")
    return Release(
        description=f"IEMOCAP, {keep} filter, one vote per annotator{'' if fractional else ' and emotion'}",
        labels=IEMOCAP,
        utterances=tuple(_utterance(turn, transcripts, fractional) for turn in kept),
        known_bad={},
        unlabelled=tuple(wav for wav in wavs if Path(wav).stem not in turns),
        notes=_notes(turns.values(), kept),
    )


_KEEP = {
    "consensus": lambda turn: CODES[turn.consensus] in IEMOCAP,
    "all_votes": lambda turn: bool(turn.tags) and all(set(emotions) <= set(IEMOCAP) for emotions in turn.tags),
}


def _utterance(turn: Turn, transcripts: dict[str, str], fractional: bool) -> Utterance:
    return Utterance(
        id=turn.id,
        audio=f"Session{turn.session}/sentences/wav/{turn.dialog}/{turn.id}.wav",
        transcript=transcripts.get(turn.id, ""),
        speaker=f"Ses0{turn.session}{turn.speaker}",
        fold=turn.session - 1,
        votes=_votes(turn.tags, fractional),
        group=turn.dialog,
        gender={"F": "female", "M": "male"}[turn.speaker],
    )


def _votes(tags: tuple[tuple[str, ...], ...], fractional: bool) -> dict[str, float]:
    """Emotion -> votes, those outside the four classes included."""
    votes: collections.Counter = collections.Counter()
    for emotions in tags:
        for emotion in emotions:
            votes[emotion] += 1 / len(emotions) if fractional else 1
    return dict(votes)


def _turns(path: Path) -> list[tuple[str, Turn]]:
    """(file:line, turn) of each block of an EmoEvaluation file.

    A block is a summary line, then the annotators' categories (C-*) and attributes (A-*). Columns are split at tabs:
    the comments in the last one hold spaces, semicolons and emotion words.
    """
    blocks: list[tuple[str, str, list[tuple[str, ...]]]] = []
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        if line.startswith("["):
            blocks.append((where, line, []))
        elif line.startswith("C-E"):  # the actors' ratings of themselves are C-F1 and C-M1
            if not blocks:
                raise DataError(f"{where}: a vote before the first turn: {line!r}")
            blocks[-1][2].append(_emotions(line, where))
    return [(where, _turn(line, tags, where)) for where, line, tags in blocks]


def _turn(line: str, tags: list[tuple[str, ...]], where: str) -> Turn:
    summary = _SUMMARY.match(line)
    name = _TURN.fullmatch(summary["turn"]) if summary else None
    if not name or summary["code"] not in CODES:
        raise DataError(f"{where}: expected '[start - end] turn consensus [v, a, d]' between tabs, got {line!r}")
    tags = tuple(emotions for emotions in tags if emotions)  # an annotator may have left the field empty
    return Turn(summary["turn"], name["dialog"], int(name["session"]), name["speaker"], summary["code"], tags)


def _emotions(line: str, where: str) -> tuple[str, ...]:
    """'C-E2:\tHappiness; Excited; Anger;\t(a comment)' -> ('happiness', 'anger')."""
    cells = line.split("\t")
    tags = [tag for part in cells[1].split(";") if (tag := part.strip())] if len(cells) > 1 else [line]
    if unknown := [tag for tag in tags if tag not in TAGS]:
        raise DataError(f"{where}: {unknown[0]!r} is no tag of IEMOCAP; they are {', '.join(TAGS)}")
    return tuple(dict.fromkeys(TAGS[tag] for tag in tags))


def _transcripts(path: Path) -> dict[str, str]:
    """Turn -> text. Lines of another form, and turns named ..XX.., which have neither wav nor votes, do no harm."""
    matches = (_TRANSCRIPTION.match(line) for line in _lines(path))
    return {match["turn"]: match["text"].strip() for match in matches if match}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"no {path}; --root must be IEMOCAP_full_release as USC distributes it")
    # Some comments are not UTF-8; no tag or transcript depends on those bytes.
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def _notes(turns: Iterable[Turn], kept: list[Turn]) -> tuple[str, ...]:
    codes = collections.Counter(turn.consensus for turn in turns)
    consensus = collections.Counter(CODES[turn.consensus] for turn in kept)
    return (
        f"{sum(codes.values())} turns: " + ", ".join(f"{code} {n}" for code, n in codes.most_common()),
        "consensus of those kept: " + ", ".join(f"{emotion} {n}" for emotion, n in consensus.most_common()),
    )
