"""The tables and the picture of docs/scaling.md, GRPOz planned on up to 128 chips: `python docs/scaling.py`.

Needs libtpu and matplotlib (`pip install -e '.[tpu,report]'`) and no TPU. A point takes one to three minutes of a core.
Its figures are kept in docs/scaling.json: after a change to the model or the plan remove it, and all are made anew.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ambijax import plan, planned, settings
from ambijax.report import style

HERE = Path(__file__).parent
CACHE = Path("runs/plan")
FIGURES = HERE / "scaling.json"
WINDOW = 512  # mel frames: CREMA-D's longest clip is 5.0 s
WAIT = 10e-6  # seconds until a collective begins, an assumption: the plan counts their bytes alone
STEP = ("roll-out", "reference", "update")


@dataclasses.dataclass(frozen=True)
class Point:
    """GRPOz on a topology: 4 prompts, K = 8 samples of 256 tokens, 32 layers split by heads, but for `keys`."""

    topology: str
    keys: tuple[str, ...] = ()
    layers: int = 32


V5P, BASE, SIXTEEN = "v5p:2x2x1", Point("v5p:2x2x1"), Point("v5p:2x2x4")
STUDIES = {
    "v5p": [BASE, Point("v5p:2x2x2"), SIXTEEN],  # the same step on more chips
    "groups": [SIXTEEN, Point("v5p:4x4x8", ("mesh.data=8", "data.batch_size=32"))],  # a v5p-256: its name counts cores
    "v5e": [*map(Point, ("v5e:2x4", "v5e:4x4"))],
    "K": [BASE, Point(V5P, ("grpo.samples=16",))],
    "length": [BASE, Point(V5P, ("data.max_tokens=512",))],
    "layers": [Point(V5P, layers=16), BASE],
}
SIZES = {"K": ("samples", 8), "length": ("tokens", 256), "layers": ("layers", 32)}  # and their defaults


def main() -> None:
    found = {point: kept(point) for point in dict.fromkeys(point for study in STUDIES.values() for point in study)}
    made = {name: [found[point] for point in study] for name, study in STUDIES.items()}
    page = HERE / "scaling.md"
    text = page.read_text(encoding="utf-8")
    for name, rows in (("chips", chip_rows(made)), ("size", size_rows(made))):
        table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
        begin, end = f"<!-- {name}: docs/scaling.py -->", f"<!-- end of {name} -->"
        text = re.sub(f"{begin}.*?{end}", f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")
    picture(made).savefig(HERE / "images/scaling.png", metadata={"Software": None})


def kept(point: Point) -> dict:
    """A point's figures, planned unless they are there."""
    every = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    name = " ".join([point.topology, *point.keys, f"layers={point.layers}"])
    if name not in every:
        print(name, file=sys.stderr)
        every[name] = figures(planned_at(point), point.layers)
        FIGURES.write_text(json.dumps(every, indent=1) + "\n")
    return every[name]


def planned_at(point: Point) -> dict:
    """A point's plan, of the programs of a training step."""
    keys = [*point.keys, f"model.checkpoint={model(point.layers)}"]
    given = [f"--config.{key}" for key in keys]
    config, _ = settings.parse(["plan", "--config=configs/grpoz.py", "--workdir=unused", *given])
    return plan.run(plan.Case(config, "configs/grpoz.py", point.topology, WINDOW, plan.TEXT, CACHE, STEP))


def model(layers: int) -> Path:
    """A directory with the published config.json, the decoder as deep as wanted."""
    directory = CACHE / f"layers_{layers}"
    directory.mkdir(parents=True, exist_ok=True)
    text = plan.PUBLISHED["text_config"] | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(plan.PUBLISHED | {"text_config": text}))
    return directory


def figures(result: dict, layers: int) -> dict:
    """What the tables and the picture show of a plan."""
    about, programs = result["about"], {p["name"]: p for p in result["programs"]}
    fullest = max(programs.values(), key=planned.total)
    found = {
        "chip": about["chip"]["name"],
        "chips": about["devices"],
        "mesh": about["mesh"],
        "weights": programs["update"]["weights"] / planned.GIB,
        "memory": planned.total(fullest) / planned.GIB,
        "prompts": programs["update"]["prompts"],
        "samples": programs["roll-out"]["completions"],
        "tokens": about["completion_tokens"],
        "layers": layers,
    }
    if (step := planned.step(result)) is None:
        return found | {"verdict": planned.verdict(fullest, about)}
    lines = {name: planned.roofline(programs[name], about) for name in STEP}
    collectives = [c for p in programs.values() for c in p["collectives"]]
    count = sum(c["count"] for c in collectives)
    return found | {
        **{name: (line.seconds, line.bound) for name, line in lines.items()},
        "seconds": step["seconds"],
        "mfu": step["mfu"],
        "count": count,
        "sent": sum(c["wire"] for c in collectives),
        "waiting": step["seconds"] + count * WAIT,
        "chip_hours": about["devices"] * step["seconds"] / found["prompts"] * 1000 / 3600,
    }


def chip_rows(made: dict) -> list[list[str]]:
    """A line for each number of chips."""
    rows = [["chips", "data x tensor", "prompts", "GiB a chip: weights, in all", *STEP, "step", "MFU"]]
    rows[0] += ["collectives: count, GB sent", f"step with {WAIT * 1e6:g} µs each", "chip-hours per 1,000 prompts"]
    for f in [*made["v5e"], *made["v5p"], *made["groups"][1:]]:
        mesh = f"{f['mesh']['data']} x {f['mesh']['tensor']}"
        cells = [f"{f['chips']} {f['chip']}", mesh, str(f["prompts"]), f"{f['weights']:.2f}, {f['memory']:.1f}"]
        exchanged = [f"{f['count']:,}, {f['sent'] / 1e9:.0f}", time(f["waiting"])]
        rows.append([*cells, *times(f), f"{f['mfu']:.0%}", *exchanged, f"{f['chip_hours']:.2f}"])
    return rows


def size_rows(made: dict) -> list[list[str]]:
    """A line for each K, length and depth."""
    rows = [["on 4 v5p", "GiB a chip: weights, in all", *STEP, "step", "MFU", "chip-hours per 1,000 prompts"]]
    for study, (name, default) in SIZES.items():
        for f in made[study]:
            what = f"{study} = {f[name]}" + " (default)" * (f[name] == default)
            memory = f"{f['weights']:.2f}, {f['memory']:.1f}"
            rows.append([what, memory, *times(f), f"{f['mfu']:.0%}", f"{f['chip_hours']:.2f}"])
    return rows


def times(f: dict) -> list[str]:
    return [*(f"{time(f[name][0])}, {f[name][1]}" for name in STEP), time(f["seconds"])]


def time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def picture(made: dict) -> Figure:
    """Time, memory and cost by chips; time by K, length and depth."""
    with matplotlib.rc_context(style.STYLE):
        figure = Figure(figsize=(8.6, 6.8))
        (seconds, memory), (cost, size) = figure.subplots(2, 2)
        for chip, color in (("v5e", style.trained(3)), ("v5p", style.trained(0))):
            draw(seconds, made[chip], "seconds", f"{chip}, 4 prompts", color, "o-")
            draw(seconds, made[chip], "waiting", f"{chip}, {WAIT * 1e6:g} µs a collective", color, "o:")
            draw(memory, made[chip], "memory", f"{chip}, in all", color, "o-")
            draw(memory, made[chip], "weights", f"{chip}, weights", color, "o:")
            draw(cost, made[chip], "chip_hours", f"{chip}, 4 prompts", color, "o-")
        first = made["v5p"][0]
        ideal = [f | {"seconds": first["seconds"] * first["chips"] / f["chips"]} for f in made["v5p"]]
        draw(seconds, ideal, "seconds", "v5p in proportion", style.MUTED, "--")
        draw(cost, made["groups"], "chip_hours", "v5p, 4 prompts to 16 chips", style.trained(1), "o--")
        for i, study in enumerate(SIZES):
            draw_size(size, made[study], study, style.trained((1, 2, 5)[i]))
        by_chips(seconds, "Least time of a step (s)", [4, 8, 16], [0.2, 0.5, 1, 2])
        by_chips(memory, "Memory a chip (GiB)", [4, 8, 16], [1, 2, 5, 10, 20])
        by_chips(cost, "Chip-hours per 1,000 prompts", [4, 8, 16, 32, 64, 128], [0.1, 0.2, 0.5, 1])
        size.set(title="Least time of a step on 4 v5p (s)", xlabel="times the default", ylim=(0, None))
        size.set_xticks([0.5, 1, 2], ["0.5", "1", "2"])
        for axes in (seconds, memory, cost, size):
            style.tidy(axes, grid="y")
            axes.legend(fontsize=8)
    return figure


def draw(axes: Axes, points: list[dict], name: str, label: str, color: str, how: str) -> None:
    """One figure by the number of chips."""
    axes.plot([f["chips"] for f in points], [f[name] for f in points], how, color=color, label=label, markersize=4)


def by_chips(axes: Axes, title: str, chips: list[int], values: list[float]) -> None:
    axes.set(title=title, xlabel="chips", xscale="log", yscale="log")
    axes.set_xticks(chips, map(str, chips))
    axes.set_yticks(values, map(str, values))
    axes.minorticks_off()


def draw_size(axes: Axes, points: list[dict], study: str, color: str) -> None:
    """A step's time by the multiple of the default K, length or depth."""
    name, default = SIZES[study]
    axes.plot([f[name] / default for f in points], [f["seconds"] for f in points], "o-", color=color, label=study)


if __name__ == "__main__":
    main()
