"""The tables of docs/scaling.md on the screen, docs/scaling.json and docs/images/scaling.png: `python docs/scaling.py`.

GRPOz of the published model, planned for more and more chips, completions and tokens. Needs libtpu and matplotlib
(`pip install -e '.[tpu,report]'`) and no TPU; what was compiled is kept in runs/plan.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from ambijax import plan, planned, settings

HERE = Path(__file__).parent
STEP = ("roll-out", "reference", "update")

# Topology, prompts, mesh.data, and what else differs from configs/grpoz.py.
CHIPS = [
    ("v5p:2x2x1", 4, 1, ()),
    ("v5p:2x2x2", 4, 1, ()),
    ("v5p:2x2x4", 4, 1, ()),
    ("v5p:2x4x4", 4, 1, ()),
    ("v5p:2x4x4", 8, 2, ()),
    ("v5p:4x4x8", 32, 8, ()),
    ("v5p:4x4x8", 128, 8, ()),
]
LENGTHS = [
    ("v5e:2x4", 4, 1, ()),
    ("v5e:2x4", 4, 1, ("grpo.samples=16",)),
    ("v5e:2x4", 4, 1, ("grpo.samples=32",)),
    ("v5e:2x4", 4, 1, ("data.max_tokens=512",)),
    ("v5e:2x4", 4, 1, ("data.max_tokens=1024",)),
]


def row(topology: str, prompts: int, data: int, keys: tuple[str, ...]) -> dict:
    """One planned step, in seconds, GiB a chip and chip-hours."""
    keys = (f"data.batch_size={prompts}", f"mesh.data={data}", *keys)
    flags = [f"--config.{key}" for key in keys]
    config, _ = settings.parse(["plan", "--config=configs/grpoz.py", "--workdir=unused", *flags])
    print(topology, *keys, file=sys.stderr)
    result = plan.run(plan.Case(config, "configs/grpoz.py", topology, 512, plan.TEXT, Path("runs/plan"), STEP))
    about, step = result["about"], planned.step(result)
    return {
        "topology": topology,
        "chips": about["devices"],
        "mesh": list(about["mesh"].values()),
        "prompts": prompts,
        "samples": config.grpo.samples,
        "tokens": config.data.max_tokens,
        "memory": max(map(planned.total, result["programs"])) / planned.GIB,
        "weights": max(p["weights"] for p in result["programs"]) / planned.GIB,
        **{p["name"]: planned.roofline(p, about).seconds for p in result["programs"]},
        "bound": [planned.roofline(p, about).bound for p in result["programs"]],
        "seconds": step["seconds"],
        "mfu": step["mfu"],
        "chip_hours": step["chip_hours"] / prompts,  # of a thousand prompts
    }


def table(rows: list[dict]) -> str:
    head = "| chips | mesh | prompts x K x tokens | weights, in all GiB a chip | roll-out | reference | update | step |"
    lines = [head + " MFU | chip-hours per 1,000 prompts |", "|---" * 10 + "|"]
    for r in rows:
        times = (f"{1000 * r[name]:.0f} ms, {bound}" for name, bound in zip(STEP, r["bound"], strict=True))
        mesh = " x ".join(map(str, r["mesh"]))
        shape = f"{r['prompts']} x {r['samples']} x {r['tokens']}"
        memory = f"{r['weights']:.2f}, {r['memory']:.1f}"
        cells = [r["topology"], mesh, shape, memory, *times, f"{r['seconds']:.2f} s", f"{r['mfu']:.0%}"]
        lines.append("| " + " | ".join([*cells, f"{r['chip_hours']:.2f}"]) + " |")
    return "\n".join(lines)


def picture(chips: list[dict], lengths: list[dict]) -> None:
    """Where a step's time goes: on the left with more chips, on the right with K and length."""
    colours = {"roll-out": "#2a78b5", "reference": "#8fbf8f", "update": "#d9793b"}
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    label = lambda r: f"{r['chips']} chips\n{r['prompts']} prompts"  # noqa: E731
    texts = [[label(r) for r in chips], [f"K {r['samples']}\n{r['tokens']} tokens" for r in lengths]]
    for axis, rows, names in zip(axes, (chips, lengths), texts, strict=True):
        below = [0.0] * len(rows)
        for name, colour in colours.items():
            axis.bar(names, [r[name] for r in rows], 0.7, below, color=colour, label=name)
            below = [b + r[name] for b, r in zip(below, rows, strict=True)]
        for x, (r, top) in enumerate(zip(rows, below, strict=True)):
            axis.annotate(f"{r['chip_hours']:.2f}", (x, top), ha="center", va="bottom", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=7, length=0)
        axis.margins(y=0.12)
    axes[0].set(ylabel="least seconds a step", title="v5p, K 8, 256 tokens")
    axes[1].set(title="eight v5e, 4 prompts")
    axes[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("above the bars: chip-hours per 1,000 prompts", fontsize=8)
    figure.savefig(HERE / "images" / "scaling.png", dpi=160)


def main() -> None:
    found = {"chips": [row(*cell) for cell in CHIPS], "lengths": [row(*cell) for cell in LENGTHS]}
    (HERE / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    picture(**found)
    print(table(found["chips"]), table(found["lengths"]), sep="\n\n")


if __name__ == "__main__":
    main()
