"""A plan in words and tables: does it fit, which key to change, how fast it can go.

A plan is what `plan.run` returns. Each program in it has, in bytes a chip: weights, adapters, optimizer, batch, cache,
temporaries (the cache lies in them), results, traffic; FLOPs a chip; and its collectives. One that is too large to be
compiled has only `needs`.
"""

from ambijax import chips
from ambijax.chips import GIB

KEYS = {  # program -> what makes it smaller: first what changes no result, last what makes another experiment
    "encode": ("use more chips (mesh.fsdp, mesh.tensor)",),
    "roll-out": ("raise optim.accumulate", "set model.cache=int8", "lower grpo.samples or dpo.samples"),
    "old policy": ("raise optim.accumulate", "lower loss.chunk", "lower data.batch_size"),
    "reference": ("raise optim.accumulate", "lower loss.chunk", "lower data.batch_size"),
    "update": ("set optim.micro_batch", "set model.remat=nothing_saveable", "lower grpo.samples"),
    "evaluation": ("lower eval.batch_size", "lower data.max_tokens"),
}


def total(program: dict) -> int:
    """Bytes a chip while the program runs."""
    if "needs" in program:
        return program["needs"]
    parts = ("weights", "adapters", "optimizer", "batch", "temporaries", "results")
    return sum(program[part] for part in parts)


def spare(program: dict, about: dict) -> float:
    """Bytes a chip that are left; negative when it does not fit, infinite where the chip's memory is not known."""
    return about["chip"]["memory"] - total(program) if about["chip"] else float("inf")


def verdict(program: dict, about: dict) -> str:
    """'fits with x GiB to spare', or what to change."""
    left = spare(program, about)
    if left == float("inf"):
        return "memory of this device is not in the table"
    if left >= 0:
        return f"fits with {left / GIB:.1f} GiB to spare"
    held = program["weights"] + program["adapters"] + program["optimizer"]
    if held > about["chip"]["memory"] / 2:
        way = "use more chips, or a larger mesh.fsdp x mesh.tensor: they split the weights; or set model.weights=int8"
    else:
        way = ", then ".join(KEYS[program["name"]])
    return f"needs {-left / GIB:.1f} GiB more: {way}"


def roofline(program: dict, about: dict) -> chips.Roofline | None:
    """The least time of a program; None where the chip is unknown or the program too large."""
    if about["chip"] is None or "needs" in program:
        return None
    wire = sum(c["wire"] for c in program["collectives"])
    return chips.roofline(chips.Chip(**about["chip"]), flops=program["flops"], traffic=program["traffic"], wire=wire)


def mfu(program: dict, about: dict) -> float:
    """Useful FLOPs, recomputation not among them, over what the chip could do in the roofline's time."""
    return program["model_flops"] / about["chip"]["flops"] / roofline(program, about).seconds


def step(result: dict) -> dict | None:
    """One training step: seconds, useful share of the peak, what takes longest; None without a roofline."""
    about = result["about"]
    collected = dict.fromkeys(("roll-out", "old policy", "reference"), about["parts"])
    times = collected | {"update": about["updates"]}
    parts = [(p, times[p["name"]]) for p in result["programs"] if p["name"] in times]
    if not any(p["name"] == "update" for p, _ in parts) or any(roofline(p, about) is None for p, _ in parts):
        return None
    seconds = sum(n * roofline(p, about).seconds for p, n in parts)
    useful = sum(n * p["model_flops"] for p, n in parts)
    slowest = max(parts, key=lambda part: part[1] * roofline(part[0], about).seconds)[0]
    prompts = next(p["prompts"] for p in result["programs"] if p["name"] == "update")
    return {
        "seconds": seconds,
        "mfu": useful / about["chip"]["flops"] / seconds,
        "slowest": f"{slowest['name']}, {roofline(slowest, about).bound}",
        "clips_a_second": prompts / seconds,
        "chip_hours": about["devices"] * seconds * 1000 / 3600,  # of a thousand steps
    }


def title(about: dict) -> str:
    mesh = " x ".join(f"{axis} {n}" for axis, n in about["mesh"].items())
    chip = about["chip"]["name"] if about["chip"] else about["kind"]
    return f"{about['config']} on {about['topology']}: {about['devices']} x {chip}, mesh {mesh}"


def shape(about: dict) -> str:
    return (
        f"{about['model']}; {about['prompt_tokens']} prompt tokens ({about['seconds_of_sound']:g} s of sound), "
        f"{about['completion_tokens']} completion tokens"
    )


def memory_rows(result: dict) -> list[list[str]]:
    """Per chip, GiB."""
    names = ("weights", "adapters", "optimizer", "batch", "cache")
    rows = [["GiB a chip", *names, "temporaries", "total", "verdict"]]
    for p in result["programs"]:
        parts = [f"{p[name] / GIB:.2f}" for name in names]
        rest = "" if "needs" in p else f"{(p['temporaries'] + p['results'] - p['cache']) / GIB:.2f}"
        what = f"{p['name']} {p['prompts']}" + f" x {p['completions']}" * (p["completions"] > 0)
        rows.append([what, *parts, rest, f"{total(p) / GIB:.2f}", verdict(p, result["about"])])
    return rows


def speed_rows(result: dict) -> list[list[str]]:
    """Per chip and call."""
    rows = [["a chip and call", "TFLOP", "useful", "memory GB", "collectives: count, GB", "least time", "bound", "MFU"]]
    for p in result["programs"]:
        if "needs" in p:
            continue
        line = roofline(p, result["about"])
        each = ", ".join(f"{c['kind']} {c['count']:,}: {c['payload'] / 1e9:.2f}" for c in p["collectives"])
        cells = [
            f"{p['flops'] / 1e12:.2f}",
            f"{p['model_flops'] / 1e12:.2f}",
            f"{p['traffic'] / 1e9:.1f}",
            each or "none",
        ]
        time = [_time(line.seconds), line.bound, f"{mfu(p, result['about']):.0%}"] if line else ["", "", ""]
        rows.append([p["name"], *cells, *time])
    return rows


def overview_rows(results: list[dict]) -> list[list[str]]:
    """A line for each plan: its fullest program, and its training step."""
    rows = [["configuration", "chips", "mesh", "fullest program", "GiB a chip", "verdict"]]
    rows[0] += ["least time of a step", "bound by", "MFU", "chip-hours per 1,000 steps"]
    for result in results:
        about = result["about"]
        fullest = max(result["programs"], key=total)
        mesh = " x ".join(str(n) for n in about["mesh"].values())
        cells = [about["config"], about["topology"], mesh, fullest["name"], f"{total(fullest) / GIB:.2f}"]
        rows.append([*cells, verdict(fullest, about), *_step_cells(result)])
    return rows


def _step_cells(result: dict) -> list[str]:
    if (found := step(result)) is None:
        return [""] * 4
    return [_time(found["seconds"]), found["slowest"], f"{found['mfu']:.0%}", f"{found['chip_hours']:.2f}"]


def summary(result: dict) -> str:
    """One line about the training step."""
    if (found := step(result)) is None:
        return ""
    return (
        f"a step takes at least {_time(found['seconds'])} ({found['slowest']} bound): "
        f"at most {found['clips_a_second']:.1f} clips/s and {found['mfu']:.0%} MFU, "
        f"{found['chip_hours']:.2f} chip-hours per 1,000 steps"
    )


def text(results: list[dict]) -> str:
    """Plans for a terminal."""
    lines = []
    for result in results:
        lines += ["", title(result["about"]), shape(result["about"]), ""]
        lines += [*_aligned(memory_rows(result)), "", *_aligned(speed_rows(result)), "", summary(result)]
        lines += [f"largest that fits, one key at a time: {line}" for line in result.get("sweep", [])]
    return "\n".join(lines)


def markdown(results: list[dict], command: str, versions: str) -> str:
    """Plans as a document; `command` made it, with these versions of the compiler."""
    lines = ["# The plan", "", f"Made by `{command}` with {versions}.", ""]
    lines += [
        "Memory is what the compiler reports, without machine code. Times are lower bounds: the slowest of arithmetic,"
    ]
    lines += [
        "memory and interconnect at their peak, the others hidden behind it.",
        "",
        *_table(overview_rows(results)),
    ]
    for result in results:
        lines += [f"## {title(result['about'])}", "", shape(result["about"]) + ".", ""]
        lines += [*_table(memory_rows(result)), *_table(speed_rows(result))]
        if said := summary(result):
            lines += [said[0].upper() + said[1:] + ".", ""]
        if "sweep" in result:
            lines += ["Largest that fits, one key at a time:", "", *(f"- {line}" for line in result["sweep"]), ""]
    return "\n".join(lines).rstrip()


def _table(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]] + [""]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
