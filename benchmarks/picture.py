"""docs/images/speed.png, how far ahead of transformers + PEFT every row is: `python -m benchmarks.picture`.

Reads docs/benchmarks/67m.json. Needs `pip install -e '.[report]'`.
"""

import json

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ambijax.report import style
from benchmarks import shapes, table
from benchmarks.compare import ROOT

RESULTS = ROOT / "docs" / "benchmarks" / "67m.json"
PICTURE = ROOT / "docs" / "images" / "speed.png"
TITLES = {  # rows shown, and their targets
    "features": ("log-mel", 3),
    "tower": ("audio tower", None),
    "readout": ("read-out", 4),
    "sft": ("SFT", 2),
    "dpo": ("DPO", None),
    "rollout": ("roll-out", 5),
    "grpoz": ("GRPOz", 5),
}
CHANGES = {"seconds": "clips of {:g} s", "new_tokens": "{} tokens", "samples": "K = {}"}  # of the preset's shape


def main() -> None:
    results = json.loads(RESULTS.read_text())
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(8.6, 6.2))
        draw(figure.subplots(), results)
        figure.savefig(PICTURE, metadata={"Software": None})


def draw(axes: Axes, results: list[dict]) -> None:
    """A line for each row and shape: the median of every machine, from p10 to p90."""
    found = {(r["row"], tuple(r["change"].items()), table.machine(r)): r["ratio"] for r in results}
    machines = sorted({machine for _, _, machine in found})
    changes = [tuple(change.items()) for change in ({}, *shapes.SWEEP)]
    lines = [(row, change) for row in TITLES for change in changes if any((row, change, m) in found for m in machines)]
    for i, machine in enumerate(machines):
        shown = [(y, found[(*line, machine)]) for y, line in enumerate(lines) if (*line, machine) in found]
        heights = [y + 0.3 * (i - (len(machines) - 1) / 2) for y, _ in shown]
        low, middle, high = ([ratio[name] for _, ratio in shown] for name in ("p10", "median", "p90"))
        axes.hlines(heights, low, high, style.trained(i), linewidth=1.5)
        axes.plot(middle, heights, "o", color=style.trained(i), markersize=5, label=machine)
    targets = [(y, TITLES[row][1]) for y, (row, _) in enumerate(lines) if TITLES[row][1]]
    ends = [[y + side for y, _ in targets] for side in (-0.45, 0.45)]
    axes.vlines([target for _, target in targets], *ends, style.MUTED, "dashed", linewidth=1, label="target")
    spelled = ([CHANGES[name].format(value) for name, value in change if name in CHANGES] for _, change in lines)
    names = [", ".join([TITLES[row][0], *words]) for (row, _), words in zip(lines, spelled, strict=True)]
    axes.set_yticks(range(len(lines)), names)
    axes.set(xlim=(0, None), ylim=(len(lines) - 0.4, -0.6), xlabel="times the speed of transformers + PEFT")
    style.tidy(axes, grid="x")
    axes.legend(loc="lower right")


if __name__ == "__main__":
    main()
