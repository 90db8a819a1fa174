"""Predictions of finished runs -> numbers with intervals.

A unit is one utterance, its measures averaged over the runs (seeds) that predicted it. Folds are pooled: each utterance
is tested in one of them. Intervals and tests draw whole speakers, since what one speaker says is alike.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from ambijax import metrics, predictions, runs, significance
from ambijax.published import METRICS
from ambijax.runs import Run
from ambijax.typeset import Estimate, Line


@dataclasses.dataclass(frozen=True)
class Units:
    """Measured utterances."""

    ids: tuple[str, ...]
    speakers: np.ndarray  # [N]
    values: np.ndarray  # [N, M], in the order of METRICS


def measured(run: Run) -> Units:
    """The predictions of one run."""
    records = predictions.read(run.evaluation)
    p, q = (np.array([record[key] for record in records]) for key in ("target", "readout"))
    values = np.stack([getattr(metrics, name)(p, q) for name in METRICS], axis=1)
    speakers = np.array([record["speaker"] for record in records])
    return Units(tuple(record["id"] for record in records), speakers, values)


def commit(run: Run) -> str | None:
    """The commit that made the run's evaluation."""
    return json.loads((run.evaluation / "summary.json").read_text())["commit"]


def units(finished: Sequence[Run]) -> Units:
    """The utterances that any of these runs predicted, each once."""
    gathered: dict[str, list[np.ndarray]] = {}
    speakers: dict[str, str] = {}
    for run in finished:
        found = measured(run)
        speakers |= zip(found.ids, found.speakers.tolist(), strict=True)
        for name, values in zip(found.ids, found.values, strict=True):
            gathered.setdefault(name, []).append(values)
    means = [np.mean(values, axis=0) for values in gathered.values()]
    return Units(tuple(gathered), np.array([speakers[name] for name in gathered]), np.array(means))


def line(row: str, mine: Sequence[Run], paper: tuple[float | None, ...], bootstrap: Mapping) -> Line:
    """A row of a table from those of its runs that are done.

    Args:
      row: its label.
      mine: all its runs.
      paper: what is published, in the order of METRICS.
      bootstrap: seed, samples and level of `significance.interval`.
    """
    finished = [run for run in mine if runs.done(run)]
    found = units(finished) if finished else None
    return Line(
        label=row,
        paper=paper,
        ours=tuple(estimate(found.values[:, m], found.speakers, bootstrap) for m in range(len(METRICS)) if found),
        clips=len(found.ids) if found else 0,
        seeds=len({run.seed for run in finished}),
        runs=len(finished),
        planned=len(mine),
    )


def bound(name: str, mine: Sequence[Run]) -> Line:
    """A row of `bounds` (a floor or the human ceiling): the mean over the folds of these runs that are done."""
    summaries = [json.loads((run.evaluation / "summary.json").read_text()) for run in mine if runs.done(run)]
    by_fold = {summary["fold"]: summary["bounds"][name] for summary in summaries if name in summary["bounds"]}
    clips = [found["clips"] for found in by_fold.values()]
    means = [float(np.average([found[m] for found in by_fold.values()], weights=clips)) for m in METRICS if clips]
    ours = tuple(Estimate(mean) for mean in means)
    return Line(name, (None,) * len(METRICS), ours, sum(clips), seeds=0, runs=len(by_fold), planned=0)


def estimate(values: np.ndarray, speakers: np.ndarray, bootstrap: Mapping) -> Estimate:
    """Mean of [N] and its interval over speakers; none when there is only one."""
    ends = significance.interval(values, clusters=speakers, **bootstrap)
    return Estimate(float(values.mean()), *(ends or ()))
