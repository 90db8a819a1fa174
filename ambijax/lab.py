"""What the lab says about the paper's orderings: paired differences in JS with intervals and Holm-corrected tests."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ambijax import results, runs, significance, typeset
from ambijax.published import METRICS
from ambijax.runs import Run
from ambijax.typeset import OURS, PAPER, Estimate, Sheet

JS = METRICS.index("js")


@dataclasses.dataclass(frozen=True)
class Ordering:
    """One claim of the paper and what was found: the difference in JS, `low` row minus `high` row."""

    claim: str
    corpus: str
    low: str
    high: str
    close: bool  # claims that the difference is small, not that it is negative
    difference: Estimate | None = None  # bits; None while runs are missing
    p: float | None = None  # two-sided, Holm-corrected over all orderings
    agreeing: int = 0  # seeds in which the claim holds by the mean alone
    seeds: int = 0
    clips: int = 0

    def verdict(self, bound: float, alpha: float) -> str:
        """'holds', 'does not hold' or 'undecided'.

        An ordering holds when the difference is negative and the corrected test says so, and does not when it is
        positive and the test says so. 'Close' holds when the whole interval lies within `bound`, and does not when it
        lies outside.
        """
        if self.difference is None:
            return "no runs yet"
        d = self.difference
        if self.close:
            if d.low is None:
                return "undecided"  # one speaker has no interval
            inside = -bound < d.low and d.high < bound
            return "holds" if inside else "does not hold" if d.low > bound or d.high < -bound else "undecided"
        if self.p >= alpha:
            return "undecided"
        return "holds" if d.mean < 0 else "does not hold"


def orderings(stated: Sequence[tuple], everything: Sequence[Run], close: float, bootstrap: Mapping) -> list[Ordering]:
    """The stated orderings with what the finished runs say.

    Args:
      stated: (claim, row with the lower JS, row with the higher JS, close, corpora), see configs/tables.py.
      everything: all runs of the lab.
      close: bits below which two rows are close.
      bootstrap: seed, samples and level of the intervals.
    """
    found = [
        _compared(Ordering(claim, corpus, low, high, is_close), everything, close, bootstrap)
        for claim, low, high, is_close, corpora in stated
        for corpus in corpora
    ]
    tested = [i for i, ordering in enumerate(found) if ordering.p is not None]
    if tested:
        corrected = significance.holm(np.array([found[i].p for i in tested]))
        for i, p in zip(tested, corrected.tolist(), strict=True):
            found[i] = dataclasses.replace(found[i], p=p)
    return found


def _compared(ordering: Ordering, everything: Sequence[Run], close: float, bootstrap: Mapping) -> Ordering:
    """The ordering with its difference and its test, before correction; over the seeds that have both rows."""
    pair = []
    for row in (ordering.low, ordering.high):
        mine = [run for run in everything if (run.corpus, run.row) == (ordering.corpus, row) and runs.done(run)]
        pair.append({run.seed: run for run in mine})
    seeds = sorted(pair[0].keys() & pair[1].keys())
    if not seeds:
        return ordering
    low, high = (results.units([by_seed[seed] for seed in seeds]) for by_seed in pair)
    if low.ids != high.ids:
        raise ValueError(f"{ordering.low} and {ordering.high} were tested on different utterances")
    a, b = low.values[:, JS], high.values[:, JS]
    each = [np.subtract(*(results.measured(by_seed[s]).values[:, JS].mean() for by_seed in pair)) for s in seeds]
    return dataclasses.replace(
        ordering,
        difference=results.estimate(a - b, low.speakers, bootstrap),
        p=significance.paired(a, b, seed=bootstrap["seed"], samples=bootstrap["samples"], clusters=low.speakers),
        agreeing=sum(abs(d) < close if ordering.close else d < 0 for d in each),
        seeds=len(seeds),
        clips=len(low.ids),
    )


def markdown(
    sheets: Sequence[Sheet], found: Sequence[Ordering], close: float, alpha: float, footer: Sequence[str]
) -> str:
    """The lab's tables and its verdicts."""
    head = ["the paper's claim", "corpus", "difference in JS", "seeds", "p (Holm)", "verdict"]
    rows = [head, ["---", "---", "---:", "---:", "---:", "---"]]
    for o in found:
        p = "–" if o.p is None else f"{o.p:.4f}"
        difference = "–" if o.difference is None else str(o.difference)
        claim = f"{o.claim}: {o.low} {'≈' if o.close else '<'} {o.high}"
        seeds = f"{o.agreeing} of {o.seeds}"
        rows.append([claim, o.corpus, difference, seeds, p, f"**{o.verdict(close, alpha)}**"])
    verdicts = [o.verdict(close, alpha) for o in found]
    count = ", ".join(f"{verdicts.count(v)} {v}" for v in ("holds", "does not hold", "undecided") if v in verdicts)
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    explained = (
        f"Of {len(found)} orderings: {count or 'nothing run yet'}. Differences are JS in bits, first row minus second, "
        "paired by utterance; the interval and the sign-flip test draw whole speakers; p is corrected by Holm over all "
        f"orderings and read at {alpha}. '≈' claims less than {close} bits: its interval decides, its p does not. "
        "'seeds' counts those whose mean agrees with the claim."
    )
    notes = "".join(f"- {note}\n" for note in footer)
    return "\n".join(map(typeset.markdown, sheets)) + f"\n## Orderings\n\n{explained}\n\n{body}\n\n{notes}"


def write_csv(everything: Sequence[Run], path: Path) -> None:
    """One line a finished run: its means."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["corpus", "row", "seed", "fold", "clips", *METRICS])
        for run in everything:
            if runs.done(run):
                values = results.measured(run).values
                means = [f"{mean:.6f}" for mean in values.mean(axis=0)]
                table.writerow([run.corpus, run.row, run.seed, run.fold, len(values), *means])


_COLOURS = {"holds": OURS, "does not hold": PAPER, "undecided": "#8a949e"}


def picture(found: Sequence[Ordering], close: float, alpha: float, path: Path) -> None:
    """Draws every ordering's difference with its interval; left of zero is where the paper says it is."""
    plt, style = typeset.pyplot()
    shown = [o for o in found if o.difference is not None]
    figure, axis = plt.subplots(figsize=(9.5, 1.3 + 0.27 * max(len(shown), 1)))
    axis.axvspan(-close, close, color=style.LINE, alpha=0.6, linewidth=0, zorder=0)
    axis.axvline(0, color=style.INK, linewidth=0.8, zorder=1)
    for y, o in enumerate(shown):
        colour, d = _COLOURS[o.verdict(close, alpha)], o.difference
        if d.low is not None:
            axis.plot([d.low, d.high], [y, y], color=colour, linewidth=2.4, solid_capstyle="round", zorder=2)
        axis.plot(d.mean, y, "s" if o.close else "o", color=colour, markersize=6.5, zorder=3)
    names = [f"{o.low} {'≈' if o.close else '<'} {o.high}   ({o.corpus})" for o in shown]
    axis.set_yticks(range(len(shown)), names)
    axis.set_ylim(max(len(shown), 1) - 0.5, -0.5)
    style.tidy(axis, grid="y")
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(f"difference in JS, bits: first minus second, 95 % interval; grey: within {close}")
    for verdict, colour in _COLOURS.items():
        axis.plot([], [], "o", color=colour, label=verdict)
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle("The paper's orderings in the tiny lab", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
