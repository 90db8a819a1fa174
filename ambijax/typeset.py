"""A table of the paper beside ours, as Markdown, LaTeX and a picture."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ambijax.errors import ConfigError
from ambijax.published import METRICS

HEADS = {"js": "JS ↓", "bc": "BC ↑", "r2": "R2 ↑", "brier": "Brier ↓"}
_LATEX_HEADS = {"js": r"JS $\downarrow$", "bc": r"BC $\uparrow$", "r2": r"$R^2$ $\uparrow$"}
_LATEX_HEADS["brier"] = r"Brier $\downarrow$"
NOTHING, NOTHING_LATEX = "–", "--"
_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "→": r"$\rightarrow$", "≤": r"$\leq$", "≥": r"$\geq$", "×": r"$\times$", "·": r"$\cdot$", "–": "--",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its interval; `low` and `high` are None where there is too little to say."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{_short(self.low)}, {_short(self.high)}]"
        return f"{_short(self.mean)}{interval}"


@dataclasses.dataclass(frozen=True)
class Line:
    """One row: what the paper states, and what we found so far. `planned` = 0: no model, only the votes."""

    label: str
    paper: tuple[float | None, ...]  # in the order of METRICS
    ours: tuple[Estimate, ...]  # empty while no run is done
    clips: int
    seeds: int
    runs: int  # done
    planned: int

    @property
    def extent(self) -> str:
        """'5 of 5' runs and the like."""
        return f"{self.runs} of {self.planned}" if self.planned else ""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table and what it must say about itself."""

    title: str
    lines: Sequence[Line]
    footer: Sequence[str]

    @property
    def compares(self) -> bool:
        """Whether the paper states anything about these rows."""
        return any(value is not None for line in self.lines for value in line.paper)

    @property
    def sides(self) -> tuple[str, ...]:
        """The columns under every measure."""
        return ("paper", "ours") if self.compares else ("ours",)

    def cells(self, line: Line, ours: Callable[[Estimate], str]) -> list[str]:
        """A line's values in the order of the columns."""
        found = [ours(e) for e in line.ours] or [NOTHING] * len(METRICS)
        pairs = zip(map(_paper, line.paper), found, strict=True)
        return [cell for pair in pairs for cell in pair[-len(self.sides) :]]


def _short(value: float) -> str:
    """.235 for 0.235, as the paper writes; three digits, since two would hide what seeds do."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _paper(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}".lstrip("0")


def markdown(sheet: Sheet) -> str:
    """The sheet with 'paper' and 'ours' side by side under every measure."""
    names = [
        f"{HEADS[m]} {side}".removesuffix("" if sheet.compares else " ours") for m in METRICS for side in sheet.sides
    ]
    head = ["method", *names, "clips", "seeds", "runs"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for line in sheet.lines:
        rows.append([line.label, *sheet.cells(line, str), str(line.clips), str(line.seeds or ""), line.extent])
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    notes = "".join(f"- {note}\n" for note in sheet.footer)
    return f"## {sheet.title}\n\n{body}\n" + (f"\n{notes}" if notes else "")


def escape(text: str) -> str:
    r"""Text for LaTeX.

    >>> escape("lambda_kl=0 & 5 %")
    'lambda\\_kl=0 \\& 5 \\%'
    """
    return "".join(_ESCAPES.get(character, character) for character in text)


def latex(sheet: Sheet) -> str:
    """The sheet as a table of the package booktabs."""
    width = len(sheet.sides)
    columns = "l" + "r" * (width * len(METRICS) + 2)
    heads = " & ".join(rf"\multicolumn{{{width}}}{{c}}{{{_LATEX_HEADS[m]}}}" for m in METRICS)
    rules = " ".join(rf"\cmidrule(lr){{{2 + width * i}-{1 + width * (i + 1)}}}" for i in range(len(METRICS)))
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(sheet.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        rf" & {heads} & & \\",
        rules,
        "method & " + " & ".join(sheet.sides * len(METRICS)) + r" & clips & runs \\",
        r"\midrule",
    ]
    for line in sheet.lines:
        cells = [NOTHING_LATEX if cell == NOTHING else cell for cell in sheet.cells(line, _latex_estimate)]
        lines.append(" & ".join([escape(line.label), *cells, str(line.clips), escape(line.extent)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {escape(note)}" for note in sheet.footer]
    return "\n".join([*lines, r"\end{table}", ""])


def _latex_estimate(estimate: Estimate) -> str:
    if estimate.low is None:
        return _short(estimate.mean)
    return rf"{_short(estimate.mean)} {{\scriptsize [{_short(estimate.low)}, {_short(estimate.high)}]}}"


# --- pictures --------------------------------------------------------------------------------------------------------

PAPER, OURS = "#d55e00", "#0072b2"  # Okabe and Ito


def pyplot() -> tuple[object, object]:
    """matplotlib without a screen, in the look of the report's figures, and that look's module.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'ambijax[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ambijax.report import style

    pyplot.rcParams.update(style.STYLE)
    return pyplot, style


def picture(sheets: Sequence[Sheet], title: str, path: Path) -> None:
    """Draws one row of panels a sheet, one panel a measure: ours with its interval, the paper's beside it."""
    plt, style = pyplot()
    heights = [len(sheet.lines) for sheet in sheets]
    figure, axes = plt.subplots(
        len(sheets),
        len(METRICS),
        figsize=(11, 1.1 + 0.27 * sum(heights) + 0.6 * len(sheets)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
    )
    for row, sheet in zip(axes, sheets, strict=True):
        for m, (axis, metric) in enumerate(zip(row, METRICS, strict=True)):
            _panel(axis, style, sheet, m)
            axis.set_title(HEADS[metric])
            if m == 0 and len(sheets) > 1:
                axis.set_title(f"{sheet.title}  ", loc="right", x=0, fontweight="bold")
            axis.tick_params(labelleft=m == 0)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _panel(axis: object, style: object, sheet: Sheet, m: int) -> None:
    """One measure of every line of a sheet, the first line on top."""
    own = "ours, 95 % interval" if sheet.compares else "mean, 95 % interval"
    for y, line in enumerate(sheet.lines):
        if line.paper[m] is not None:
            axis.plot(line.paper[m], y, "D", color=PAPER, markerfacecolor="white", markersize=6, label="paper")
        if not line.ours:
            continue
        e = line.ours[m]
        if not line.planned:
            axis.plot(e.mean, y, "|", color=style.MUTED, markersize=11, markeredgewidth=2, label="no model")
            continue
        if e.low is not None:
            axis.plot([e.low, e.high], [y, y], color=OURS, linewidth=2.2, solid_capstyle="round")
        axis.plot(e.mean, y, "o", color=OURS, markersize=6.5, label=own)
    axis.set_yticks(range(len(sheet.lines)), [line.label for line in sheet.lines])
    axis.set_ylim(len(sheet.lines) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.12)
    style.tidy(axis, grid="y")
