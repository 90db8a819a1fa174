"""The tables of the page: every system between what needs no model, with intervals; and what training changed."""

import html

import numpy as np

from ambijax import evaluate, metrics, significance
from ambijax.report import figures, style
from ambijax.report.runs import Report, Run, System

CHANGES = {"JS ↓": "js", "BC ↑": "bc", "R2 ↑": "r2", "Brier ↓": "brier", "accuracy ↑": "accuracy"}


def tiles(report: Report) -> str:
    """The few figures to see first: of one run the paper's measures, of several their JS."""
    bases = {trained.name: base for _, base, trained in report.before_after}
    found = []
    for system in (s for s in report.systems if not s.base):
        after = evaluate.summarise(system.records)
        before = evaluate.summarise(bases[system.name].records) if system.name in bases else None
        shown = CHANGES if len(report.runs) == 1 else {"JS ↓": "js"}
        for column, key in shown.items():
            was = f"<small>{before[key]:.3f} → </small>" if before else ""
            title = html.escape(column if len(report.runs) == 1 else f"{column} of {system.name}")
            found.append(f'<div class="tile"><p>{title}</p><p class="value">{was}{after[key]:.3f}</p></div>')
    return "".join(found)


def results(report: Report) -> str:
    """Metrics of every system, below each its interval, the best system of a column in bold."""
    bounds = next((run.bounds for run in report.runs if run.bounds), {})
    summaries = {system.name: evaluate.summarise(system.records) for system in report.systems}
    spreads = {system.name: evaluate.intervals(system.records, report.runs[0].config) for system in report.systems}
    columns = {
        title: key for title, key in evaluate.COLUMNS.items() if any(s[key] is not None for s in summaries.values())
    }
    best = {}
    for title, key in columns.items():
        values = [summary[key] for summary in summaries.values() if summary[key] is not None]
        best[key] = (min if "↓" in title else max)(values)
    lines = [_row(name, [_cell(row.get(key)) for key in columns.values()], "floor") for name, row in bounds.items()]
    for system in report.systems:
        name, summary = system.name, summaries[system.name]
        cells = [_cell(summary[key], spreads[name].get(key), summary[key] == best[key]) for key in columns.values()]
        lines.append(_row(name, cells, dot=style.variable(figures.colors(report)[name])))
    config = report.runs[0].config.eval
    note = (
        f"Means over the clips, with {config.level:.0%} bootstrap intervals over {config.cluster}s; in bold the best "
        "model. In grey what needs no model: uniform, the mean of the training votes, the majority vote; then people "
        "against people."
    )
    return _table(["", *columns], lines, note)


def changes(report: Report) -> str:
    """Trained minus base on the same clips, with interval and p value."""
    lines = [
        _row(f"{trained.name} − {base.name}", [_change(run, base, trained, key) for key in CHANGES.values()])
        for run, base, trained in report.before_after
    ]
    if not lines:
        return ""
    note = (
        "What training changed, clip by clip: mean difference, its interval, and the p value of a sign-flip test "
        "(not corrected for the number of tests)."
    )
    return _table(["", *CHANGES], lines, note)


def _change(run: Run, base: System, trained: System, key: str) -> str:
    e = run.config.eval
    speakers = np.array([record["speaker"] for record in trained.records]) if e.cluster == "speaker" else None
    before, after = (metrics.per_utterance(s.target, s.readout)[key] for s in (base, trained))
    signed = lambda value: f"{value:+.3f}".replace("-", "−")  # noqa: E731
    mean = signed(np.mean(after - before))
    ends = significance.interval(after - before, seed=0, samples=e.resamples, level=e.level, clusters=speakers)
    if ends is None:  # of one speaker
        return f"<td>{mean}</td>"
    p = significance.paired(after, before, seed=0, samples=e.resamples, clusters=speakers)
    exact = f"p = {p:.3f}" if p >= 0.001 else "p &lt; 0.001"
    return f"<td>{mean}<small>{signed(ends[0])} to {signed(ends[1])}</small><small>{exact}</small></td>"


def _cell(value: float | None, spread: list[float] | None = None, best: bool = False) -> str:
    if value is None:
        return "<td></td>"
    below = f"<small>{spread[0]:.3f} to {spread[1]:.3f}</small>" if spread else ""
    return f"<td{' class=best' if best else ''}>{value:.3f}{below}</td>"


def _row(name: str, cells: list[str], kind: str = "", dot: str = "") -> str:
    mark = f'<span class="dot {dot}"></span>' if dot else ""
    return f'<tr class="{kind}"><th scope="row">{mark}{html.escape(name)}</th>{"".join(cells)}</tr>'


def _table(head: list[str], lines: list[str], note: str) -> str:
    columns = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in head)
    return (
        f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f'<p class="note">{html.escape(note)}</p>'
    )
