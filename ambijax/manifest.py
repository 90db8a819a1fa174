"""The one shape of every corpus: a manifest.jsonl beside its audio, one utterance a line.

    {"id": "1001_IEO_ANG_HI", "audio": "wav/1001_IEO_ANG_HI.wav", "transcript": "It's eleven o'clock.",
     "speaker": "1001", "fold": 0, "group": "1001", "votes": {"anger": 7, "neutral": 2}, "cot": "Keywords: ...",
     "gender": "female"}

`audio` is relative to the manifest's directory. `cot` is the reasoning without the answer line; an empty one keeps
the utterance for the KL alone. A third corpus needs this file and no code.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ambijax.emotions import soft_label
from ambijax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One clip, what is said in it, and how its annotators voted."""

    id: str
    audio: str  # path relative to the corpus root
    transcript: str
    speaker: str
    fold: int  # the fold in which this utterance is a test utterance
    votes: dict[str, float]  # emotion -> number of annotators
    group: str = ""  # utterances of a group never part (dialog, duplicate pair); '' = the speaker
    cot: str = ""  # reasoning without the answer line; '' = none
    gender: str = ""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The utterances under one directory, in manifest order."""

    root: Path
    utterances: tuple[Utterance, ...]

    def path(self, utterance: Utterance) -> Path:
        """Where the utterance's audio lies; never outside the corpus root."""
        path = (self.root / utterance.audio).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise DataError(f"{utterance.id}: audio path '{utterance.audio}' leaves the corpus root {self.root}")
        return path


def write(corpus: Corpus) -> None:
    """Writes `corpus.root/manifest.jsonl`, whole or not at all."""
    corpus.root.mkdir(parents=True, exist_ok=True)
    partial = corpus.root / "manifest.jsonl.partial"
    with partial.open("w", encoding="utf-8") as file:
        for utterance in corpus.utterances:
            file.write(json.dumps(dataclasses.asdict(utterance), ensure_ascii=False) + "\n")
    partial.rename(corpus.root / "manifest.jsonl")


_FIELDS = {field.name: field for field in dataclasses.fields(Utterance)}
_REQUIRED = [name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING]
_TYPES = {"fold": int, "votes": dict}  # every other field is a string


def _utterance(record: object, where: str) -> Utterance:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if missing := [name for name in _REQUIRED if name not in record]:
        raise DataError(f"{where}: missing {', '.join(missing)}")
    if unknown := sorted(set(record) - set(_FIELDS)):
        raise DataError(f"{where}: unknown field {', '.join(unknown)}; the fields are {', '.join(_FIELDS)}")
    for name, value in record.items():
        kind = _TYPES.get(name, str)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{where}: {name} must be {kind.__name__}, got {value!r}")
    if "://" in record["audio"]:
        raise DataError(f"{where}: audio must be a path under the manifest's directory, not the URL {record['audio']}")
    return Utterance(**record)


def read(root: str | Path) -> Corpus:
    """Reads and checks `root/manifest.jsonl`.

    Raises:
      ConfigError: there is no manifest.
      DataError: a line is not an utterance, or two lines share an id; names the line.
    """
    root = Path(root)
    path = root / "manifest.jsonl"
    if not path.is_file():
        raise ConfigError(f"no manifest at {path}; write one with python -m ambijax.prepare")
    utterances, seen = [], {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        utterance = _utterance(record, where)
        if utterance.id in seen:
            raise DataError(f"{where}: id {utterance.id} already stands in line {seen[utterance.id]}")
        seen[utterance.id] = number
        utterances.append(utterance)
    if not utterances:
        raise DataError(f"{path} holds no utterance")
    return Corpus(root, tuple(utterances))


def soft_labels(utterances: Iterable[Utterance], labels: Sequence[str]) -> np.ndarray:
    """The soft labels p, float32 [N, K]; a bad vote table names its utterance."""
    rows = []
    for utterance in utterances:
        try:
            rows.append(soft_label(utterance.votes, labels))
        except DataError as error:
            raise DataError(f"{utterance.id}: {error}") from None
    return np.stack(rows) if rows else np.zeros((0, len(labels)), np.float32)


def split(corpus: Corpus, fold: int, dev: str) -> dict[str, list[Utterance]]:
    """Speaker-independent train, dev and test utterances for one cross-validation fold.

    Args:
      corpus: the corpus.
      fold: utterances of this fold are the test set.
      dev: 'next_fold' takes the following fold (mod the number of folds); 'groups' takes every tenth group of the
        rest, so that with few speakers (IEMOCAP) none is lost to the dev set.

    Returns:
      {'train': [...], 'dev': [...], 'test': [...]}, in manifest order.

    Raises:
      ConfigError: there is no such fold.
      DataError: a speaker stands in train and test, or a group in two splits.
    """
    folds = sorted({utterance.fold for utterance in corpus.utterances})
    if fold not in folds:
        raise ConfigError(f"data.fold={fold} is not one of the folds {folds} in {corpus.root}")
    test = [u for u in corpus.utterances if u.fold == fold]
    rest = [u for u in corpus.utterances if u.fold != fold]
    if dev == "next_fold":
        following = folds[(folds.index(fold) + 1) % len(folds)]
        in_dev = {u.id for u in rest if u.fold == following}
    elif dev == "groups":
        chosen = set(sorted({u.group or u.speaker for u in rest})[::10])
        in_dev = {u.id for u in rest if (u.group or u.speaker) in chosen}
    else:
        raise ConfigError(f"data.dev={dev!r} must be 'next_fold' or 'groups'")
    splits = {
        "train": [u for u in rest if u.id not in in_dev],
        "dev": [u for u in rest if u.id in in_dev],
        "test": test,
    }
    _assert_no_leak(splits, corpus.root)
    return splits


def _assert_no_leak(splits: dict[str, list[Utterance]], root: Path) -> None:
    for a in ("train", "dev"):
        if shared := {u.speaker for u in splits[a]} & {u.speaker for u in splits["test"]}:
            raise DataError(f"{root}: speakers {', '.join(sorted(shared)[:5])} stand in {a} and in test")
    where = collections.defaultdict(set)
    for name, utterances in splits.items():
        for u in utterances:
            where[u.group or u.speaker].add(name)
    if parted := sorted(group for group, names in where.items() if len(names) > 1):
        raise DataError(f"{root}: groups {', '.join(parted[:5])} stand in more than one split")
