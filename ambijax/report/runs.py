"""A run directory as the report reads it. It may be somebody else's: nothing of it is executed, all of it is checked.

Run       one run directory: settings, curves, predictions of the split, roll-outs
System    what is compared: the base or a trained model, and its predictions
Report    the runs, the systems in the order of every legend, the clips they were asked about
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import FrozenConfigDict

from ambijax import manifest, metrics, settings
from ambijax.agent import title
from ambijax.errors import AmbijaxError, ConfigError, DataError
from ambijax.workdir import read_object

BASE = "base"
_NUMBERS = ("js", "format", "forced", "tokens")  # fields of a prediction that must be one
_AGAIN = "evaluate the run again"
ROLLOUTS = 24  # groups shown, spread evenly over the training


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run directory."""

    directory: Path
    title: str  # GRPOz
    config: FrozenConfigDict
    environment: dict
    curves: list[dict]  # a logged step each
    root: Path  # of the corpus that was asked about
    labels: tuple[str, ...]  # the classes of the predictions; on another corpus fewer than in the settings
    rollouts: list[dict]  # a group each, some of all
    after: list[dict]  # predictions of the trained model
    before: list[dict]  # of its base; empty where the base itself was trained
    bounds: dict[str, dict[str, float]]  # what needs no model, as the evaluation wrote it down


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """Predictions under one name."""

    name: str
    base: bool
    records: list[dict]

    @functools.cached_property
    def target(self) -> np.ndarray:
        """Soft labels [N, K]."""
        return np.array([record["target"] for record in self.records], np.float64)

    @functools.cached_property
    def readout(self) -> np.ndarray:
        """Read-outs [N, K]."""
        return np.array([record["readout"] for record in self.records], np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """All that the page shows."""

    runs: list[Run]
    systems: list[System]  # bases first
    labels: tuple[str, ...]
    split: str
    corpus: manifest.Corpus | None  # None: not on this machine

    @functools.cached_property
    def clips(self) -> dict[str, dict]:
        """id -> a record of the clip, the first system's that has it."""
        found: dict[str, dict] = {}
        for system in self.systems:
            for record in system.records:
                found.setdefault(record["id"], record)
        return found

    @property
    def before_after(self) -> list[tuple[Run, System, System]]:
        """(run, its base, what it trained) of each run that has both, about the same clips in the same order."""
        trained = [system for system in self.systems if not system.base]
        bases = [system for system in self.systems if system.base]
        found = []
        for run, system in zip(self.runs, trained, strict=True):
            if base := next((base for base in bases if base.records == run.before), None):
                if [r["id"] for r in base.records] != [r["id"] for r in system.records]:
                    raise DataError(
                        f"{run.directory}: base and trained model were asked about other clips; evaluate both"
                    )
                found.append((run, base, system))
        return found


def read(directories: Sequence[Path], split: str, corpus: Path | None) -> Report:
    """Reads run directories that answer for the same classes.

    Args:
      directories: written by ambijax.train.
      split: which of their evaluations: test, dev, or the name of another corpus.
      corpus: where the manifest lies now; None: where the first run says.

    Raises:
      ConfigError: no run directory, or not evaluated yet, or of different classes.
      DataError: a file of it is broken; names the line.
    """
    runs = [_run(directory, split) for directory in directories]
    first = runs[0]
    for run in runs[1:]:
        if {r["id"] for r in run.after} != {r["id"] for r in first.after}:
            raise DataError(
                f"{run.directory} was tested on other clips than {first.directory}, and a table of both would rank "
                "nothing; give each its own report, or compare the same folds"
            )
        if run.labels != first.labels:
            raise ConfigError(
                f"{run.directory} predicts {', '.join(run.labels)}, but {first.directory} {', '.join(first.labels)}; "
                "give each its own report"
            )
    votes: dict[str, list[float]] = {}
    for run in runs:
        for record in (*run.before, *run.after):
            if not np.allclose(votes.setdefault(record["id"], record["target"]), record["target"]):
                raise DataError(f"{run.directory}: {record['id']} was measured against other votes; evaluate again")
    return Report(runs, _systems(runs), first.labels, split, _corpus(first, corpus))


def _run(directory: Path, split: str) -> Run:
    config = settings.load(directory)
    after = directory / "eval" / split / "predictions.jsonl"
    before = directory / "eval" / f"{split}-base" / "predictions.jsonl"
    if not after.is_file():
        which = f"--split {split}" if split in manifest.SPLITS else "--corpus the manifest of another corpus"
        raise ConfigError(
            f"{directory} is not evaluated yet: {after} does not exist; let its training finish, "
            f"or python -m ambijax.evaluate --run {directory} {which}"
        )
    if not after.stat().st_size:
        raise DataError(f"{after} holds no prediction; evaluate the run again")
    summary = after.with_name("summary.json")
    told = read_object(summary)
    labels = _labels(summary, told, config)
    k = len(labels)
    # Of its own corpus the settings know more than the evaluation, which may have been made on another machine.
    own = split.split("-")[0] in manifest.SPLITS
    root = config.data.root if own else str(told.get("corpus", told.get("root", config.data.root)))
    environment = read_object(directory / "env.json")
    return Run(
        directory=directory,
        title=_title(directory, config, told),
        config=config,
        environment=environment,
        curves=[
            _numbers(line) for _, line in _lines(directory / "metrics.jsonl", "remove it") if finite(line.get("step"))
        ],
        root=Path(root),
        labels=labels,
        rollouts=_spread(directory / "samples.jsonl", len(config.data.labels)),
        after=[_prediction(line, where, k) for where, line in _lines(after, _AGAIN)],
        before=[_prediction(line, where, k) for where, line in _lines(before, _AGAIN)] if before.is_file() else [],
        bounds=_bounds(summary, told),
    )


def _title(directory: Path, config: FrozenConfigDict, summary: dict) -> str:
    """GRPOz; of a bare checkpoint, in which nothing was trained, the name of its directory."""
    return directory.name if summary.get("algorithm") == "base" else title(config)


def _numbers(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if finite(value)}


def _labels(summary: Path, told: dict, config: FrozenConfigDict) -> tuple[str, ...]:
    """The classes an evaluation was read out over."""
    labels = told.get("labels", list(config.data.labels))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels) or len(labels) < 2:
        raise DataError(f"{summary}: labels must be two class words or more, got {labels!r:.60}")
    return tuple(labels)


def _bounds(summary: Path, told: dict) -> dict[str, dict[str, float]]:
    """The rows of an evaluation that need no model; {} where it has none."""
    rows = told.get("bounds", {})
    if not isinstance(rows, dict) or not all(
        isinstance(row, dict) and all(finite(value) for value in row.values()) for row in rows.values()
    ):
        raise DataError(f"{summary}: bounds must be rows of numbers; evaluate the run again")
    return rows


def _lines(path: Path, advice: str) -> Iterator[tuple[str, dict]]:
    """(file:line, object) of every line; a last line that is cut, as a kill leaves it, ends the file.

    Raises:
      DataError: a line holds something else; ends with the advice.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith("\n"):
                    return
                raise DataError(f"{where}: not JSON ({error}); {advice}") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}; {advice}")
            if "\\ud" in line.lower():  # half a character cannot be written to any file
                record = json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
            yield where, record


def _prediction(record: dict, where: str, k: int) -> dict:
    """The record, once it is sure that everything the report reads is there and is what it should be."""
    for name in ("id", "speaker", "reasoning", "gender"):
        if not isinstance(record.get(name), str) and (name != "gender" or record.get(name) is not None):
            raise DataError(f"{where}: {name} must be text, got {record.get(name)!r:.60}; evaluate the run again")
    for name in _NUMBERS:
        if not finite(record.get(name)):
            raise DataError(f"{where}: {name} must be a number, got {record.get(name)!r:.60}; evaluate the run again")
    for name in ("target", "readout"):
        _distribution(record.get(name), f"{where}: {name}", k)
    if record.setdefault("js_gold") is not None and not finite(record["js_gold"]):
        raise DataError(f"{where}: js_gold must be a number or null, got {record['js_gold']!r:.60}")
    votes = record.get("votes")
    if not isinstance(votes, dict) or not all(finite(count) for count in votes.values()):
        raise DataError(f"{where}: votes must be counts of annotators, got {votes!r:.60}; evaluate the run again")
    return record


def finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _distribution(value: object, what: str, k: int) -> None:
    if not isinstance(value, list) or len(value) != k or not all(finite(p) and p >= 0 for p in value):
        raise DataError(f"{what} must be {k} probabilities, got {value!r:.60}; evaluate the run again")
    if abs(sum(value) - 1) > metrics.NORMALISED:
        raise DataError(f"{what} sums to {sum(value):.4f}, not to one; evaluate the run again")


def _spread(path: Path, k: int) -> list[dict]:
    """Some groups of roll-outs, the first and the last among them; a file of gigabytes is read line by line."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        count = sum(line.endswith(b"\n") for line in file)  # a cut last line is none
    wanted = set(np.linspace(0, count - 1, min(ROLLOUTS, count)).astype(int).tolist())
    groups = []
    for number, (where, record) in enumerate(_lines(path, "remove it")):
        if number not in wanted:
            continue
        if not isinstance(record.get("id"), str) or not isinstance(record.get("group"), list):
            raise DataError(f"{where}: a group of roll-outs has an id and a group")
        for member in record["group"]:
            if not isinstance(member, dict):
                raise DataError(f"{where}: a member of a group must be an object")
            if "readout" in member:
                _distribution(member["readout"], f"{where}: readout", k)
        groups.append(record)
    return groups


def _systems(runs: list[Run]) -> list[System]:
    """What to compare: the bases, alike ones once, then what was trained from them."""
    titles = [run.title for run in runs]
    names = [
        title if titles.count(title) == 1 else f"{title} {run.directory.name}"
        for title, run in zip(titles, runs, strict=True)
    ]
    if len(set(names)) < len(names):
        names = [f"{name} ({run.directory})" for name, run in zip(names, runs, strict=True)]
    names = [f"{name} ({run.directory})" if name == BASE else name for name, run in zip(names, runs, strict=True)]
    bases: list[System] = []
    for name, run in zip(names, runs, strict=True):
        if run.before and all(run.before != base.records for base in bases):
            bases.append(System(f"{BASE} of {name}" if bases else BASE, True, run.before))
    return bases + [System(name, False, run.after) for name, run in zip(names, runs, strict=True)]


def _corpus(run: Run, given: Path | None) -> manifest.Corpus | None:
    """The corpus with its sound, where this machine has it."""
    try:
        return manifest.read(given or run.root)
    except AmbijaxError:
        if given:
            raise
        return None
