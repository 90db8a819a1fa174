"""CREMA-D from its official layout: 7,442 clips of 91 actors, each heard by 4 to 12 voters (docs/corpora/cremad.md).

    AudioWAV/<clip>.wav   processedResults/tabulatedVotes.csv   VideoDemographics.csv
    finishedResponses.csv   finishedEmoResponses.csv            (raw votes only)

Only votes of people who heard the clip without seeing it are used. Cao et al. 2014, doi:10.1109/TAFFC.2014.2336244;
https://github.com/CheyneyComputerScience/CREMA-D
"""

import bisect
import collections
import csv
import re
from collections.abc import Iterator
from pathlib import Path

from ambijax.corpora.release import Release, audio_files
from ambijax.emotions import CREMAD
from ambijax.errors import ConfigError, DataError
from ambijax.manifest import Utterance

EMOTIONS = {"A": "anger", "D": "disgust", "F": "fear", "H": "happiness", "N": "neutral", "S": "sadness"}
SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
KNOWN_BAD = {"1076_MTI_SAD_XX": "known: the released clip has no sound"}
FOLD_STARTS = (1001, 1019, 1037, 1055, 1073)  # the first test actor of each fold; the last fold ends with 1091
LAST_ACTOR = 1091

_VOICE = 1  # queryType: 1 voice only, 2 face only, 3 both
_TEN_SECONDS = 10_000  # ms, the unit of ttr
_CLIP = re.compile(rf"(\d{{4}})_({'|'.join(SENTENCES)})_(ANG|DIS|FEA|HAP|NEU|SAD)_(LO|MD|HI|XX)")

Votes = dict[str, dict[str, float]]  # clip -> emotion -> number of voters, none of them zero


def read(root: Path, *, votes: str, ten_second_rule: bool) -> Release:
    """Reads the release in `root`.

    Args:
      root: the directory that holds AudioWAV.
      votes: 'tabulated' for processedResults/tabulatedVotes.csv (68,568 votes), which the ten-second rule has already
        been applied to, or 'raw' for finishedResponses.csv (73,254 votes).
      ten_second_rule: whether to drop raw votes whose first click took over 10 s; then they equal the tabulated ones.

    Raises:
      ConfigError: a file of the layout is not there.
      DataError: a table is not what it should be; names the line.
    """
    if votes == "tabulated":
        counts, source = tabulated_votes(root), "tabulatedVotes.csv"
    elif votes == "raw":
        counts, source = raw_votes(root, ten_second_rule)
    else:
        raise ConfigError(f"votes={votes!r} must be 'tabulated' or 'raw'")
    genders = _genders(root)
    utterances = tuple(_utterance(clip, counts[clip], genders) for clip in sorted(counts))
    return Release(
        description=f"CREMA-D, voice-only votes of {source}",
        labels=CREMAD,
        utterances=utterances,
        known_bad={clip: defect for clip, defect in KNOWN_BAD.items() if clip in counts},
        unlabelled=tuple(file for file in audio_files(root, "AudioWAV/*.wav") if Path(file).stem not in counts),
        notes=(_acted(counts),),
    )


def _utterance(clip: str, votes: dict[str, float], genders: dict[str, str]) -> Utterance:
    actor, sentence = clip.split("_")[:2]
    return Utterance(
        id=clip,
        audio=f"AudioWAV/{clip}.wav",
        transcript=SENTENCES[sentence],
        speaker=actor,
        fold=bisect.bisect(FOLD_STARTS, int(actor)) - 1,
        votes=votes,
        # Three pairs of clips of one actor are the same recording under two acted labels (1006_TIE_HAP = NEU,
        # 1013_WSI_DIS = SAD, 1017_IWW_ANG = FEA). An actor never parts, hence neither does a pair.
        group=actor,
        gender=genders.get(actor, ""),
    )


def tabulated_votes(root: Path) -> Votes:
    """The voice-only rows of processedResults/tabulatedVotes.csv.

    The unnamed first column is queryType * 100000 + clipNum; a file name stands in three rows, one a queryType.
    """
    counts: Votes = {}
    path = root / "processedResults" / "tabulatedVotes.csv"
    for where, row in _rows(path, ("", *EMOTIONS, "fileName", "numResponses")):
        if _number(row[""], where) // 100_000 != _VOICE:
            continue
        clip = _clip(row["fileName"], where)
        if clip in counts:
            raise DataError(f"{where}: a second voice-only row for {clip}")
        votes = {letter: max(_number(row[letter], where), 0) for letter in EMOTIONS}  # -1 is no vote
        if sum(votes.values()) != _number(row["numResponses"], where):
            raise DataError(f"{where}: the votes {votes} do not add up to numResponses={row['numResponses']}")
        counts[clip] = {EMOTIONS[letter]: n for letter, n in votes.items() if n}
    return counts


def raw_votes(root: Path, ten_second_rule: bool) -> tuple[Votes, str]:
    """The voice-only rows of finishedResponses.csv, one a vote, and what they are in words.

    The authors' rule looks at the first click, which finishedEmoResponses.csv times; where that file is absent, the
    time of the final response stands in for it.
    """
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    path, clicks = root / "finishedResponses.csv", root / "finishedEmoResponses.csv"
    timed = clicks if clicks.is_file() else path
    slow = _slow_questions(timed) if ten_second_rule else frozenset()
    for where, row in _rows(path, ("queryType", "questNum", "sessionNums", "clipName", "respEmo", "ttr")):
        if _number(row["queryType"], where) != _VOICE or row["clipName"].endswith("_practice"):
            continue
        clip = _clip(row["clipName"], where)
        if row["respEmo"] not in EMOTIONS:
            raise DataError(f"{where}: respEmo {row['respEmo']!r} is none of {', '.join(EMOTIONS)}")
        if _question(row) not in slow:
            counts[clip][EMOTIONS[row["respEmo"]]] += 1
    source = f"{path.name}, no response dropped"
    if ten_second_rule:
        source = f"{path.name}, those over 10 s dropped (ttr of {timed.name})"
    return {clip: dict(votes) for clip, votes in counts.items()}, source


def _question(row: dict[str, str]) -> tuple[str, str, str]:
    """What links a response to its first click."""
    return row["sessionNums"], row["queryType"], row["questNum"]


def _slow_questions(path: Path) -> frozenset[tuple[str, str, str]]:
    slow = set()
    for _, row in _rows(path, ("sessionNums", "queryType", "questNum", "ttr")):
        try:
            if float(row["ttr"]) > _TEN_SECONDS:
                slow.add(_question(row))
        except ValueError:  # R's NA: never timed, hence not slow
            continue
    return frozenset(slow)


def _genders(root: Path) -> dict[str, str]:
    """Actor -> male | female; empty without VideoDemographics.csv, on which no vote depends."""
    path = root / "VideoDemographics.csv"
    if not path.is_file():
        return {}
    return {row["ActorID"]: row["Sex"].lower() for _, row in _rows(path, ("ActorID", "Sex"))}


def _acted(counts: Votes) -> str:
    """How often the crowd heard what the actor was asked to play."""
    heard = 0
    for clip, votes in counts.items():
        acted = EMOTIONS[clip.split("_")[2][0]]
        others = [n for emotion, n in votes.items() if emotion != acted]
        heard += votes.get(acted, 0) > max(others, default=0)
    return f"the acted emotion is the unique majority in {100 * heard / len(counts):.1f} %" if counts else "no votes"


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, row) of a table that must have these columns, in whatever order."""
    if not path.is_file():
        raise ConfigError(f"no {path}; --root must be a checkout of github.com/CheyneyComputerScience/CREMA-D")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file, restval="")
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(
                f"{path}: no column {', '.join(map(repr, missing))}; not the table of that name in the release"
            )
        for row in reader:
            yield f"{path}:{reader.line_num}", row


def _clip(name: str, where: str) -> str:
    match = _CLIP.fullmatch(name)
    if not match or not FOLD_STARTS[0] <= int(match[1]) <= LAST_ACTOR:
        raise DataError(f"{where}: {name!r} is no clip name <actor>_<sentence>_<emotion>_<level> of CREMA-D")
    return name


def _number(cell: str, where: str) -> int:
    try:
        return int(cell)
    except ValueError:
        raise DataError(f"{where}: expected a whole number, got {cell!r}") from None
