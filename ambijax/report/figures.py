"""The figures: each is drawn once, by a function that also returns the numbers it shows.

FIGURES[name](report) -> Drawn | None      None: this report has nothing to show there
"""

import dataclasses
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ambijax import metrics, significance
from ambijax.report import style
from ambijax.report.runs import Report, System

BINS = 10  # of confidence; metrics.ECE_BINS leaves too few clips in a bin of a small test set to be read
SMOOTH = 0.1  # weight of the newest step in a smoothed curve
CURVES = {  # key of metrics.jsonl -> title; the first four that a run has are drawn
    "dev/js": "JS on dev ↓ (bits)",
    "rollout/js": "JS of roll-outs ↓ (bits)",
    "reward/mean": "reward ↑",
    "rollout/format": "share in the format ↑",
    "loss/kl": "L_KL ↓ (nats)",
    "loss/ce": "cross entropy ↓ (nats)",
    "loss": "loss ↓",
    "gradient_norm": "gradient norm",
}
EXAMPLES = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A figure, and the table it was drawn from."""

    title: str
    caption: str  # how to read it
    figure: Figure
    header: Sequence[str]
    rows: list[Sequence]


def colors(report: Report) -> dict[str, str]:
    """System -> colour."""
    bases = [system for system in report.systems if system.base]
    trained = [system for system in report.systems if not system.base]
    return {system.name: style.base(i) for i, system in enumerate(bases)} | {
        system.name: style.trained(i) for i, system in enumerate(trained)
    }


def _line(system: System) -> dict:
    """How its lines and marks look beside their colour."""
    return {"marker": "s", "linestyle": (0, (4, 2))} if system.base else {"marker": "o", "linestyle": "-"}


def draw(report: Report) -> dict[str, Drawn]:
    """All figures that this report has numbers for."""
    with matplotlib.rc_context(style.STYLE):
        drawn = {name: function(report) for name, function in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def learning_curves(report: Report) -> Drawn | None:
    """Metrics over the steps, raw and smoothed."""
    keys = [key for key in CURVES if any(key in line for run in report.runs for line in run.curves)][:4]
    if not keys:
        return None
    figure = Figure(figsize=(7.6, 4.4))
    panels = [*figure.subplots(2, 2, sharex=True, squeeze=False).flat]
    rows = []
    trained = [system for system in report.systems if not system.base]
    for axes, key in zip(panels, keys, strict=False):
        for i, (run, system) in enumerate(zip(report.runs, trained, strict=True)):
            points = [(line["step"], line[key]) for line in run.curves if key in line]
            if points:
                steps, values = np.array(points, np.float64).T
                axes.plot(steps, values, color=style.trained(i), alpha=0.25, linewidth=1)
                axes.plot(
                    steps, _smoothed(values), color=style.trained(i), linewidth=1.8, label=style.short(system.name)
                )
                rows += [(system.name, key, int(step), value) for step, value in points]
        axes.set_title(CURVES[key])
        style.tidy(axes, grid="y")
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=9.5, color=style.MUTED)
    if len(report.runs) > 1:
        _legend(figure, *panels)
    return Drawn(
        "Learning curves",
        "As training saw them, dev on clips it did not learn from: thin line as logged, bold line smoothed.",
        figure,
        ("system", "metric", "step", "value"),
        rows,
    )


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential mean, started at the first value; a step that is not finite is left out."""
    smooth, current = [], np.nan
    for value in values:
        if np.isfinite(value):
            current = value if np.isnan(current) else SMOOTH * value + (1 - SMOOTH) * current
        smooth.append(current)
    return np.array(smooth)


def reliability(report: Report) -> Drawn:
    """How often the likeliest class is the majority vote, against how likely the model finds it."""
    figure = Figure(figsize=(4.4, 4.1))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)))
    rows = []
    for system in report.systems:
        confidence = system.readout.max(axis=1)
        hit = system.readout.argmax(axis=1) == system.target.argmax(axis=1)
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # bin m holds (m / M, (m + 1) / M]
        points = [(confidence[bins == m].mean(), hit[bins == m].mean(), (bins == m).sum()) for m in np.unique(bins)]
        x, y, n = np.array(points).T
        color = colors(report)[system.name]
        line = _line(system)
        axes.plot(x, y, color=color, linewidth=1.4, markersize=3, label=style.short(system.name), **line)
        axes.scatter(x, y, s=18 + 240 * n / n.sum(), marker=line["marker"], color=color, alpha=0.85, linewidth=0)
        rows += [(system.name, *map(float, point[:2]), int(point[2])) for point in points]
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="share of majority votes met")
    style.tidy(axes, grid="both")
    _legend(figure, axes)
    return Drawn(
        "Reliability",
        f"Clips in {BINS} bins of confidence; a dot's area is its share of the clips. On the dashed line the model is "
        "right as often as it says; below, it is too certain.",
        figure,
        ("system", "confidence", "accuracy", "clips"),
        rows,
    )


def js_against_entropy(report: Report) -> Drawn:
    """Where a model is wrong: on the clips people agree about, or on the others."""
    figure = Figure(figsize=(4.4, 4.1))
    axes = figure.subplots()
    rows = []
    for index, system in enumerate(report.systems):
        color, line = colors(report)[system.name], _line(system)
        x, y = metrics.entropy(system.target), metrics.js(system.target, system.readout)
        points = axes.scatter(x, y, s=15, marker=line["marker"], color=color, alpha=0.45, linewidth=0)
        points.set_gid(f"points-{index}")
        parts = [part for part in np.array_split(np.argsort(x, kind="stable"), min(5, len(x))) if len(part)]
        means = np.array([(x[part].mean(), y[part].mean()) for part in parts])
        axes.plot(*means.T, color=color, linewidth=2, markersize=4.5, label=style.short(system.name), **line)
        ids = [record["id"] for record in system.records]
        rows += list(zip([system.name] * len(x), ids, x.tolist(), y.tolist(), strict=True))
    axes.set(xlabel="entropy of the votes (bits)", ylabel="JS to the votes (bits)", ylim=(-0.02, None))
    style.tidy(axes, grid="both")
    _legend(figure, axes)
    return Drawn(
        "JS against human entropy",
        "A dot is a clip, the further right the more its annotators disagree; click it to see the clip. The line is "
        "the mean of each fifth of the clips.",
        figure,
        ("system", "id", "entropy", "js"),
        rows,
    )


def confusion(report: Report) -> Drawn:
    """Majority votes against likeliest classes."""
    k, systems = len(report.labels), report.systems
    columns = min(len(systems), 3)
    lines = -(-len(systems) // columns)
    figure = Figure(figsize=(0.6 + (0.44 * k + 0.35) * columns + 0.5, (0.36 * k + 0.95) * lines))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    rows = []
    for axes, system in zip(grid.flat, systems, strict=False):
        counts = np.zeros((k, k), int)
        np.add.at(counts, (system.target.argmax(axis=1), system.readout.argmax(axis=1)), 1)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        for i, j in np.ndindex(k, k):
            color = colors(report)[system.name]
            axes.add_patch(
                Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=color, alpha=0.06 + 0.74 * shares[i, j])
            )
            if counts[i, j]:
                axes.text(j, i, counts[i, j], ha="center", va="center", fontsize=9)
            rows.append((system.name, report.labels[i], report.labels[j], int(counts[i, j])))
        axes.set(xlim=(-0.5, k - 0.5), ylim=(k - 0.5, -0.5), title=style.short(system.name))
        axes.set_xticks(range(k), [style.short(label, 10) for label in report.labels], rotation=45, ha="right")
        axes.set_yticks(range(k), [style.short(label, 10) for label in report.labels])
        style.tidy(axes, grid="none")
    for axes in list(grid.flat)[len(systems) :]:
        axes.set_visible(False)
    grid[0, 0].set_ylabel("majority vote")
    figure.supxlabel("likeliest class", fontsize=9.5, color=style.MUTED)
    return Drawn(
        "Confusion of majorities",
        "Clips by the class most annotators chose (row) and the class the model finds likeliest (column); the shade is "
        "the share of the row. A tied vote counts for the first of the tied classes.",
        figure,
        ("system", "majority vote", "likeliest class", "clips"),
        rows,
    )


def speakers(report: Report) -> Drawn:
    """JS of every speaker, before and after."""
    return _groups(
        report,
        lambda record: {"": [record["speaker"]]},
        "Speakers",
        "Mean JS to the votes of each speaker's clips (in brackets how many) and its bootstrap interval.",
    )


def slices(report: Report) -> Drawn:
    """JS by what a clip is like."""

    def of(record: dict) -> dict[str, list[str]]:
        p = np.array(record["target"])
        entropy = float(metrics.entropy(p))
        agreement = 0 if p.max() == 1 else 1 if p.max() > 0.5 else 2
        third = min(int(3 * entropy / np.log2(len(p))), 2)
        return {
            "majority vote": [report.labels[int(p.argmax())]],
            "agreement": [("all agree", "over half agree", "no majority")[agreement]],
            "entropy": [("low entropy", "middle entropy", "high entropy")[third]],
            "gender": [record["gender"]] if record.get("gender") else [],
        }

    return _groups(
        report,
        of,
        "Slices",
        "Mean JS to the votes by majority vote, by agreement of the annotators, by thirds of the possible entropy, and "
        "by gender where the corpus names it (in brackets how many clips), with bootstrap intervals.",
    )


def _groups(report: Report, of: Callable[[dict], dict[str, list[str]]], name: str, caption: str) -> Drawn:
    """Mean JS of each group of clips, a row a group, a mark a system; `of` maps a record to {kind: its groups}."""
    members: dict[tuple[str, str], None] = {}
    scores: dict[tuple[str, tuple[str, str]], list[float]] = {}
    for system in report.systems:
        js = metrics.js(system.target, system.readout)
        for record, value in zip(system.records, js.tolist(), strict=True):
            for kind, groups in of(record).items():
                for group in groups:
                    members[kind, group] = None
                    scores.setdefault((system.name, (kind, group)), []).append(value)
    kinds = list(dict.fromkeys(kind for kind, _ in members))
    named = [
        *report.labels,
        "all agree",
        "over half agree",
        "no majority",
        "low entropy",
        "middle entropy",
        "high entropy",
    ]
    rank = {group: i for i, group in enumerate(named)}
    order = sorted(members, key=lambda member: (kinds.index(member[0]), rank.get(member[1], 0), member[1]))
    step = min(0.18, 0.8 / len(report.systems))  # between the marks of a row
    height = max(0.26, 0.09 * len(report.systems)) * (len(order) + len(kinds))
    figure = Figure(figsize=(7.6 if len(order) > 14 else 5.2, 1.1 + height))
    axes = figure.subplots()
    places, y = {}, 0.0
    for i, member in enumerate(order):
        y += 1.0 + 0.7 * (i > 0 and order[i - 1][0] != member[0])
        places[member] = y
    rows, e = [], report.runs[0].config.eval
    for place, system in enumerate(report.systems):
        color, title, line = colors(report)[system.name], style.short(system.name), _line(system)
        offset = step * (place - (len(report.systems) - 1) / 2)
        for member in order:
            if values := scores.get((system.name, member)):
                spread = significance.interval(np.array(values), seed=0, samples=e.resamples, level=e.level)
                at = places[member] + offset
                if spread:
                    axes.plot(spread, [at, at], color=color, linewidth=1.6, alpha=0.5)
                mark = {"marker": line["marker"], "linestyle": "none", "markersize": 6, "markeredgewidth": 0}
                axes.plot(np.mean(values), at, color=color, label=title, **mark)
                rows.append((system.name, *member, float(np.mean(values)), *(spread or ("", "")), len(values)))
                title = None  # one line in the legend
    count = {member: max(len(scores.get((s.name, member), ())) for s in report.systems) for member in order}
    axes.set_yticks([places[m] for m in order], [f"{style.short(m[1])} ({count[m]})" for m in order])
    axes.set(xlabel="JS to the votes (bits)", xlim=(0, None), ylim=(y + 0.8, 0.2))
    style.tidy(axes, grid="x")
    _legend(figure, axes)
    return Drawn(name, caption, figure, ("system", "kind", "group", "js", "low", "high", "clips"), rows)


def examples(report: Report) -> Drawn | None:
    """Votes and read-outs of a few clips, chosen by a rule and not by eye; None where no clip has all read-outs."""
    found = {system.name: {record["id"]: record for record in system.records} for system in report.systems}
    ids = [i for i in report.clips if all(i in records for records in found.values())]
    ids.sort(key=lambda i: (float(metrics.entropy(np.array(report.clips[i]["target"]))), i))
    chosen = [ids[n] for n in np.unique(np.linspace(0, len(ids) - 1, EXAMPLES).astype(int))] if ids else []
    if not chosen:
        return None
    columns = min(len(chosen), 3)
    lines = -(-len(chosen) // columns)
    k, shown = len(report.labels), [None, *report.systems]
    figure = Figure(figsize=(7.6, lines * (0.55 + 0.33 * k)))
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    rows, height = [], 0.72 / len(shown)
    for axes, name in zip(grid.flat, chosen, strict=False):
        for place, system in enumerate(shown):
            values = found[system.name][name]["readout"] if system else report.clips[name]["target"]
            title = style.short(system.name) if system else "annotators"
            color = colors(report)[system.name] if system else style.HUMAN
            y = np.arange(k) + (place - (len(shown) - 1) / 2) * height
            axes.barh(y, values, height * 0.92, color=color, linewidth=0, label=title)
            rows += [(name, title, label, value) for label, value in zip(report.labels, values, strict=True)]
        entropy = float(metrics.entropy(np.array(report.clips[name]["target"])))
        axes.set_title(f"{style.short(name, 18)}  ·  {abs(entropy):.1f} bits", color=style.MUTED)
        axes.set_yticks(range(k), [style.short(label, 12) for label in report.labels])
        axes.set(xlim=(0, 1.02), ylim=(k - 0.45, -0.55))
        axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))  # short: the panels' ends stand side by side
        style.tidy(axes, grid="x")
    for axes in list(grid.flat)[len(chosen) :]:
        axes.set_visible(False)
    _legend(figure, grid[0, 0])
    return Drawn(
        "Votes and read-outs",
        f"{len(chosen)} clips ({report.split}), evenly spaced from the one annotators agree about most to the one they "
        "agree about least; the title gives the entropy of the votes.",
        figure,
        ("id", "who", "class", "probability"),
        rows,
    )


def _legend(figure: Figure, *axes: matplotlib.axes.Axes) -> None:
    """The names that stand in any of the axes, above the figure, in one row where they fit."""
    found = {name: handle for a in axes for handle, name in zip(*a.get_legend_handles_labels(), strict=True)}
    names, handles = [*found], [*found.values()]
    width = 0.45 + 0.075 * max(map(len, names))  # inches of a handle and the longest name
    columns = max(1, int(figure.get_figwidth() / width))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.4)


FIGURES: dict[str, Callable[[Report], Drawn | None]] = {
    "examples": examples,
    "learning_curves": learning_curves,
    "reliability": reliability,
    "js_against_entropy": js_against_entropy,
    "confusion": confusion,
    "slices": slices,
    "speakers": speakers,
}
