"""Systems on the same utterances: how much each differs from the first, with intervals and paired tests.

    python -m ambijax.compare runs/sft_tiny runs/tiny [--evaluation test]
    python -m ambijax.compare runs/sft_0,runs/sft_1 runs/dpo_0,runs/dpo_1

A system is a run, or several with commas between: its folds, whose utterances are pooled, or its seeds, which are
averaged utterance by utterance. Where every system has as many runs, two or more, their means are compared as well, in
the order given: a test with few units, but one that does not take utterances of one training for independent.

p values are of two-sided sign-flip tests, and corrected by Holm over all measures and systems that are printed.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import FrozenConfigDict

from ambijax import errors, metrics, predictions, settings, significance
from ambijax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class System:
    """What one system predicted."""

    name: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]  # the classes it predicted
    speakers: np.ndarray  # [N]
    targets: np.ndarray  # [N, K]
    values: dict[str, np.ndarray]  # measure -> [N]
    runs: dict[str, np.ndarray]  # measure -> mean of each run
    asked: tuple[frozenset[str], ...]  # the utterances of each run


@dataclasses.dataclass(frozen=True)
class Difference:
    """One measure of one system, less the first system's."""

    system: str
    measure: str
    mean: float
    low: float
    high: float
    p: float
    adjusted: float  # by Holm
    p_runs: float | None  # over the runs' means; None with one run


def read(runs: Sequence[Path], evaluation: str) -> System:
    """The predictions of a system's runs.

    Raises:
      DataError: a run has none, or not all, or they are of different classes.
    """
    values: dict[str, list[dict[str, float]]] = {}
    speakers, targets, means, labels, asked = {}, {}, [], set(), []
    for run in runs:
        records, classes = _finished(run, evaluation)
        labels.add(classes)
        asked.append(frozenset(record["id"] for record in records))
        p, q = (np.array([record[key] for record in records]) for key in ("target", "readout"))
        found = metrics.per_utterance(p, q)
        means.append({name: value.mean() for name, value in found.items()})
        for i, record in enumerate(records):
            speakers[record["id"]] = record["speaker"]
            if not np.allclose(targets.setdefault(record["id"], p[i]), p[i]):
                raise DataError(f"{run} was measured against other votes, for one {record['id']}; evaluate again")
            values.setdefault(record["id"], []).append({name: value[i] for name, value in found.items()})
    if len(labels) > 1:
        raise DataError(f"{', '.join(map(str, runs))} predict different classes: {' and '.join(map(str, labels))}")
    return System(
        name=",".join(run.name for run in runs),
        ids=tuple(sorted(values)),
        labels=labels.pop(),
        speakers=np.array([speakers[i] for i in sorted(values)]),
        targets=np.array([targets[i] for i in sorted(values)]),
        values={m: np.array([np.mean([v[m] for v in values[i]]) for i in sorted(values)]) for m in means[0]},
        runs={m: np.array([mean[m] for mean in means]) for m in means[0]},
        asked=tuple(asked),
    )


def _finished(run: Path, evaluation: str) -> tuple[list[dict], tuple[str, ...]]:
    """The records of a run's evaluation, and its classes, once it is sure that they are all there."""
    directory, again = run / "eval" / evaluation, f"python -m ambijax.evaluate --run {run}"
    records = predictions.read(directory)
    if not run.is_dir():
        raise ConfigError(f"no run directory {run}")
    if not records:
        raise DataError(f"no predictions in {directory}; {again}")
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        clips, labels = summary["clips"], tuple(summary["labels"])
        fit = all(len(r["target"]) == len(r["readout"]) == len(labels) for r in records)
        fit &= all(isinstance(r[key], str) for r in records for key in ("id", "speaker"))
        metrics.js(*(np.array([r[key] for r in records], np.float64) for key in ("target", "readout")))  # distributions
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{directory}: not finished, or not an evaluation ({error!r}); {again}") from None
    if clips != len(records) or not fit:
        raise DataError(f"{directory}: {len(records)} predictions of {clips} clips, or of other classes; {again}")
    return records, labels


def differences(systems: Sequence[System], config: FrozenConfigDict) -> list[Difference]:
    """Every measure of every system against the first.

    Args:
      systems: two or more.
      config: whose `eval` says how to resample.

    Raises:
      DataError: they did not predict the same utterances and classes.
    """
    first, e = systems[0], config.eval
    several = len({len(next(iter(system.runs.values()))) for system in systems}) == 1 and len(first.runs["js"]) > 1
    found = []
    for system in systems[1:]:
        if first.labels != system.labels:
            both = " and ".join(", ".join(s.labels) for s in (first, system))
            raise DataError(f"{first.name} and {system.name} predict different classes, {both}")
        if odd := set(first.ids) ^ set(system.ids):
            raise DataError(
                f"{first.name} and {system.name} predict different utterances, {len(odd)} stand in one alone, for one "
                f"{min(odd)}; compare the same folds"
            )
        if several and system.asked != first.asked:
            raise DataError(
                f"the runs of {first.name} and {system.name} were not asked about the same utterances one by one; give "
                "both in the same order of folds"
            )
        votes = np.isclose(first.targets, system.targets).all(axis=1)
        if not votes.all():
            raise DataError(
                f"{first.name} and {system.name} were measured against other votes, for one "
                f"{first.ids[votes.argmin()]}; evaluate again"
            )
        clusters = first.speakers if e.cluster == "speaker" else None
        if clusters is not None and len(set(clusters.tolist())) < 2:
            raise DataError(
                f"{first.name} was tested on one speaker, which gives no interval over speakers; set eval.cluster to "
                "utterance in its config.json"
            )
        if len(first.ids) < 2:
            raise DataError(f"{first.name} was tested on one utterance, which gives no interval")
        how = {"seed": 0, "samples": e.resamples, "clusters": clusters}
        for measure, a in first.values.items():
            b = system.values[measure]
            over_runs = None
            if several:
                over_runs = significance.paired(system.runs[measure], first.runs[measure], seed=0, samples=e.resamples)
            low, high = significance.interval(b - a, level=e.level, **how)
            p = significance.paired(b, a, **how)
            found.append(Difference(system.name, measure, float(np.mean(b - a)), low, high, p, p, over_runs))
    adjusted = significance.holm(np.array([d.p for d in found]))
    return [dataclasses.replace(d, adjusted=float(p)) for d, p in zip(found, adjusted, strict=True)]


def table(systems: Sequence[System], found: Sequence[Difference]) -> str:
    """Differences as an aligned text table, under the first system's means."""
    first = systems[0]
    width = max(len(d.system) for d in found) + 2
    means = ", ".join(f"{measure} {value.mean():.3f}" for measure, value in first.values.items())
    lines = [f"{first.name}: {len(first.ids)} utterances, {means}", ""]
    lines.append(
        f"{'less ' + first.name:<{width}}{'':10}{'difference':>12}{'interval':>20}{'p':>9}{'Holm':>9}{'runs':>9}"
    )
    for d in found:
        interval, over_runs = f"{d.low:+.4f} to {d.high:+.4f}", "" if d.p_runs is None else f"{d.p_runs:.4f}"
        lines.append(
            f"{d.system:<{width}}{d.measure:10}{d.mean:>+12.4f}{interval:>20}{d.p:>9.4f}{d.adjusted:>9.4f}{over_runs:>9}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ambijax.compare", description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="+", help="run directory, or several of one system with commas between")
    parser.add_argument("--evaluation", default="test", help="which directory under eval/; test by default")
    args = parser.parse_args()
    if len(args.systems) < 2:
        raise ConfigError("give two systems or more; each is compared with the first")
    if wrong := [system for system in args.systems if "" in system.split(",")]:
        raise ConfigError(f"{wrong[0]!r} names a run '': put commas without blanks between the runs of one system")
    systems = [read([Path(run) for run in system.split(",")], args.evaluation) for system in args.systems]
    if len({system.name for system in systems}) < len(systems):  # the last parts of their paths are alike
        systems = [dataclasses.replace(s, name=given) for s, given in zip(systems, args.systems, strict=True)]
    config = settings.load(args.systems[0].split(",")[0])
    print(table(systems, differences(systems, config)))
    print(
        f"\n{config.eval.level:.0%} intervals and tests over {config.eval.cluster}s, {config.eval.resamples} resamples"
    )


if __name__ == "__main__":
    errors.run(main)
