"""The one shape of every corpus: a manifest beside its audio, one utterance a line (docs/corpora/manifest.md).

    {"id": "1001_IEO_ANG_HI", "audio": "wav/1001_IEO_ANG_HI.wav", "transcript": "It's eleven o'clock.",
     "speaker": "1001", "fold": 0, "group": "1001", "votes": {"anger": 7, "neutral": 2}, "cot": "Keywords: ...",
     "gender": "female"}

`manifest.jsonl` holds such lines; `manifest.csv` holds the same fields as columns, the votes as `votes.anger`,
`votes.neutral`, ... A third corpus needs one of these files and no code.

`audio` is relative to the manifest's directory, or to the `audio_root` that a `corpus.json` beside the manifest
names, so that the manifest of a read-only release can lie elsewhere. `cot` is the reasoning without the answer line;
an empty one keeps the utterance for the KL alone.
"""

import collections
import csv
import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ambijax import lfs
from ambijax.audio import namesake
from ambijax.emotions import soft_label
from ambijax.errors import ConfigError, DataError
from ambijax.workdir import replace

SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One clip, what is said in it, and how its annotators voted."""

    id: str
    audio: str  # path relative to the corpus' audio root
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

    root: Path  # where the manifest lies
    utterances: tuple[Utterance, ...]
    audio_root: Path | None = None  # where the audio paths start; None = root
    description: str = ""  # which release and which votes these are
    labels: tuple[str, ...] = ()  # its classes; () = every emotion that has a vote

    def path(self, utterance: Utterance) -> Path:
        """Where the utterance's audio lies; never outside the audio root."""
        return self.sound(utterance.id, utterance.audio)

    def sound(self, name: str, audio: str) -> Path:
        """`path` by what a record of `name` says."""
        root = self.audio_root or self.root
        path = (root / audio).resolve()
        if not path.is_relative_to(root.resolve()):
            raise DataError(f"{name}: audio path '{audio}' leaves the corpus root {root}, by itself or by a link")
        return path

    def classes(self) -> tuple[str, ...]:
        """The classes it is labelled with."""
        return self.labels or tuple(sorted({e for u in self.utterances for e, n in u.votes.items() if n}))


def write(corpus: Corpus) -> None:
    """Writes `corpus.root/manifest.jsonl`, whole or not at all, and `corpus.json` about it.

    Whoever ends the process in between leaves a manifest with its own `corpus.json` or without one, never another's.
    """
    corpus.root.mkdir(parents=True, exist_ok=True)
    elsewhere = corpus.audio_root is not None and corpus.audio_root.resolve() != corpus.root.resolve()
    about = {
        "description": corpus.description,
        "audio_root": str(corpus.audio_root.resolve()) if elsewhere else "",
        "labels": list(corpus.labels),
    }
    told, path = json.dumps(about, ensure_ascii=False) + "\n", corpus.root / "corpus.json"
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != told:
        path.unlink(missing_ok=True)
    write_utterances(corpus)
    if not path.is_file():
        replace(path, told)


def write_utterances(corpus: Corpus) -> None:
    """Writes `corpus.root/manifest.jsonl` alone, whole or not at all."""
    lines = (json.dumps(dataclasses.asdict(utterance), ensure_ascii=False) for utterance in corpus.utterances)
    replace(corpus.root / "manifest.jsonl", "".join(f"{line}\n" for line in lines))


_FIELDS = {field.name: field for field in dataclasses.fields(Utterance)}
_REQUIRED = [name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING]
_FILLED = ("id", "audio", "speaker")  # an empty one would name nothing
_VOTES_MAX = 1e9  # more annotators than any corpus has; keeps NaN, infinity and absurd integers out
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
    if empty := [name for name in _FILLED if not record[name].strip()]:
        raise DataError(f"{where}: {', '.join(empty)} must not be empty")
    for name in ("speaker", "group"):  # 'Anna ' and 'Anna' in two folds would be a leak that nobody sees
        if (value := record.get(name, "")) != value.strip():
            raise DataError(f"{where}: {name} is {value!r}; a name has no blanks around it")
    for emotion, count in record["votes"].items():
        if not isinstance(count, int | float) or isinstance(count, bool) or not 0 <= count <= _VOTES_MAX:
            raise DataError(f"{where}: the votes for {emotion!r} must be a number of annotators, got {count!r}")
        if not emotion or emotion != emotion.strip():
            raise DataError(f"{where}: votes are for {emotion!r}; an emotion has a name, without blanks around it")
    if record["fold"] < 0:
        raise DataError(f"{where}: fold must be 0 or more, got {record['fold']}")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half a character ({error.reason}); write its text anew") from None
    audio = PurePosixPath(record["audio"])
    for name in ("id", "audio", "speaker", "group"):
        if any(unicodedata.category(character) == "Cc" for character in record.get(name, "")):
            raise DataError(f"{where}: {name} holds a control character, {record[name]!r}")
    if "://" in record["audio"]:
        raise DataError(f"{where}: audio must be a path under the manifest's directory, not the URL {record['audio']}")
    if audio.is_absolute() or ".." in audio.parts:
        raise DataError(f"{where}: audio must be relative and stay under the audio root, got {record['audio']}")
    names = {name: unicodedata.normalize("NFC", record[name]) for name in ("speaker", "group") if name in record}
    return Utterance(**record | names)  # José is one speaker, however his accent is written


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    """(file:line, record) of every line that is not blank."""
    with path.open(encoding="utf-8-sig") as file:  # editors write a byte-order mark
        for number, line in enumerate(file, 1):  # not str.splitlines, which parts transcripts at U+2028
            where = f"{path}:{number}"
            try:
                if line.strip():
                    yield where, json.loads(line, object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON: {error}") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(record := dict(pairs)) < len(pairs):
        raise ValueError(f"a key stands twice in {', '.join(key for key, _ in pairs)}")
    return record


def _csv(path: Path) -> Iterator[tuple[str, object]]:
    """(file:line, record) of every row, each as the JSON line it stands for."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = reader.fieldnames or []
            if len(header) == 1 and (other := next((c for c in ";\t" if c in header[0]), "")):
                raise DataError(f"{path}: its columns are separated by {other!r}; save it with commas")
            if "votes" in header:
                raise DataError(f"{path}: votes is no column of a table; give each emotion its own, votes.anger say")
            if "" in header:
                raise DataError(f"{path}: a column has no name; leave it out, in pandas by index=False")
            if len(set(header)) < len(header):
                raise DataError(f"{path}: a column stands twice in {', '.join(header)}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                yield where, _from_row(row, where)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num + 1}: not CSV: {error}") from None


def _from_row(row: dict, where: str) -> dict:
    """A CSV row as the record its JSON line would hold; an empty vote cell is no vote."""
    if None in row or None in row.values():
        raise DataError(f"{where}: the row has another number of cells than the header")
    votes = {name.removeprefix("votes."): cell for name, cell in row.items() if name.startswith("votes.")}
    record = {name: cell for name, cell in row.items() if not name.startswith("votes.")}
    try:
        if "_" in "".join((*votes.values(), record.get("fold", ""))):  # which Python leaves out of numbers
            raise ValueError("one has a _ in it")
        record["votes"] = {emotion: float(cell) for emotion, cell in votes.items() if cell.strip()}
        if "fold" in record:
            fold = float(record["fold"])  # 2.0, as pandas writes a column with gaps
            record["fold"] = int(fold) if fold.is_integer() else fold
    except ValueError as error:
        raise DataError(f"{where}: fold and votes must be numbers: {error}") from None
    return record


def read(root: str | Path, *, renames: bool = False) -> Corpus:
    """Reads and checks the manifest in a directory, `manifest.jsonl` or `manifest.csv`.

    Args:
      root: the directory, or the manifest in it.
      renames: emotion words will be renamed, and may be spelled in two ways until then.

    Raises:
      ConfigError: there is no manifest, or two, or one of another name, or the audio root is gone.
      DataError: a line is not an utterance, two lines share an id (names the line), or an emotion has two spellings.
    """
    path = _find(Path(root), directory(root))
    records = _csv(path) if path.suffix == ".csv" else _jsonl(path)
    utterances: dict[str, Utterance] = {}
    try:
        for where, record in records:
            utterance = _utterance(record, where)
            if utterance.id in utterances:
                raise DataError(f"{where}: id {utterance.id} stands in the manifest already")
            utterances[utterance.id] = utterance
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}; save it as UTF-8") from None
    if not utterances:
        raise DataError(f"{path} holds no utterance")
    if not renames:
        assert_one_spelling(path, utterances.values())
    return Corpus(path.parent, tuple(utterances.values()), *_about(path.parent))


def assert_one_spelling(path: Path, utterances: Iterable[Utterance]) -> None:
    """Raises DataError: votes for one emotion stand under two words, and would be two classes."""
    spelled: dict[str, str] = {}
    for word in dict.fromkeys(word for u in utterances for word in u.votes):
        if (other := spelled.setdefault(word.strip().casefold(), word)) != word:
            raise DataError(
                f"{path}: votes on {other!r} and on {word!r} would be two classes; spell them alike, with python -m "
                f"ambijax.prepare --corpus=manifest --rename={word}:{other} say"
            )


_NAMES = ("manifest.jsonl", "manifest.csv")


def directory(root: str | Path) -> Path:
    """Where a corpus lies, given its directory or the manifest in it."""
    return Path(root).parent if Path(root).name in _NAMES else Path(root)


def _find(given: Path, root: Path) -> Path:
    if root.is_file():  # its results would go by the name of whatever else lies there
        raise ConfigError(f"{given}: a manifest is called {' or '.join(_NAMES)}; give it a directory of its own")
    if given != root and not given.is_file():
        raise ConfigError(f"no manifest at {given}")
    found = [path for name in _NAMES if (path := root / name).is_file()]
    if not found and root.is_dir() and (near := [p for p in root.iterdir() if p.name.lower() in _NAMES]):
        raise ConfigError(f"{near[0]}: a manifest is called {near[0].name.lower()}, in small letters; rename it")
    if not found:
        raise ConfigError(f"no manifest at {root / 'manifest.jsonl'}; write one with python -m ambijax.prepare")
    if len(found) > 1:
        raise ConfigError(f"{root} holds a manifest.jsonl and a manifest.csv; keep one")
    return found[0]


def _about(root: Path) -> tuple[Path | None, str, tuple[str, ...]]:
    """(audio root or None, description, classes) from `corpus.json`, which need not exist nor name the classes."""
    path = root / "corpus.json"
    if not path.is_file():
        return None, "", ()
    try:
        about = json.loads(path.read_text(encoding="utf-8-sig"))
        audio_root, description, labels = about["audio_root"], about["description"], about.get("labels", [])
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise TypeError
        audio = root / audio_root if audio_root else None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f'{path} must look like {{"description": "...", "audio_root": "..."}}') from None
    if audio is not None and not audio.is_dir():
        raise ConfigError(f"{path}: audio_root {audio_root} is no directory; name the one where the audio lies now")
    return audio, description, tuple(labels)


def check_sounds(corpus: Corpus) -> None:
    """Finds sounds that are not there, or are git-lfs pointers, without reading any.

    Raises:
      DataError: names the first and counts the others.
    """
    missing, pointers = [], []
    for utterance in corpus.utterances:
        path = corpus.path(utterance)
        if not path.is_file():
            missing.append(path)
        elif lfs.is_pointer(path):
            pointers.append(path)
    of = f"of {len(corpus.utterances)} sounds in {corpus.root}"
    wrong = [f"{len(missing)} {of} are missing, such as {missing[0]}{namesake(missing[0])}"] if missing else []
    if pointers:
        wrong.append(f"{len(pointers)} {of} are git-lfs pointers, such as {pointers[0]}; run `git lfs pull` there")
    if wrong:
        raise DataError("; ".join(wrong))


def digest(corpus: Corpus) -> str:
    """The identity of a corpus: sha256 over every field of every utterance and every byte of its sounds.

    Raises:
      DataError: a sound file is missing.
    """
    sha = hashlib.sha256()
    for utterance in corpus.utterances:
        sha.update(json.dumps(dataclasses.asdict(utterance), sort_keys=True).encode())
        try:
            sha.update(corpus.path(utterance).read_bytes())
        except OSError as error:
            raise DataError(f"{utterance.id}: cannot read {utterance.audio}: {error.strerror}") from None
    return sha.hexdigest()


def assert_classes(corpus: Corpus, labels: Sequence[str]) -> None:
    """Raises DataError: its annotators could not choose one of these classes, by what `corpus.json` says."""
    if strange := [label for label in labels if label not in corpus.labels] if corpus.labels else []:
        there = f"nobody could choose {', '.join(strange)} there, the classes are {', '.join(corpus.labels)}"
        raise DataError(f"{corpus.root}: {there}; set labels, or take the configuration of that corpus")


def soft_labels(utterances: Iterable[Utterance], labels: Sequence[str]) -> np.ndarray:
    """The soft labels p, float32 [N, K]; a bad vote table names its utterance."""
    rows = []
    for utterance in utterances:
        try:
            rows.append(soft_label(utterance.votes, labels))
        except DataError as error:
            raise DataError(f"{utterance.id}: {error}") from None
    return np.stack(rows) if rows else np.zeros((0, len(labels)), np.float32)


def voted(utterances: Iterable[Utterance], labels: Sequence[str]) -> list[Utterance]:
    """The utterances with a vote inside `labels`: what is left of a corpus when another one's classes are asked for."""
    return [u for u in utterances if any(u.votes.get(label, 0) > 0 for label in labels)]


def split(corpus: Corpus, fold: int, dev: str) -> dict[str, list[Utterance]]:
    """Speaker-independent train, dev and test utterances for one cross-validation fold.

    Args:
      corpus: the corpus.
      fold: utterances of this fold are the test set; -1: all are, of a corpus that nothing is trained on.
      dev: 'next_fold' takes the following fold (mod the number of folds); 'groups' takes every tenth group of the
        rest, so that with few speakers (IEMOCAP) none is lost to the dev set.

    Returns:
      {'train': [...], 'dev': [...], 'test': [...]}, in manifest order.

    Raises:
      ConfigError: there is no such fold.
      DataError: a speaker stands in train and test, or a group in two splits.
    """
    if fold == -1:
        return {"train": [], "dev": [], "test": list(corpus.utterances)}
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
