"""ambijax against transformers + PEFT: both sides in one run, on identical weights, clips, lengths, adapters and dtype.

    python benchmarks/compare.py --preset 67m                     two CPU cores
    python benchmarks/compare.py --preset 7b                      one big GPU; random weights are made on the spot
    python benchmarks/compare.py --preset small                   exercises every line in a minute or two
    python benchmarks/compare.py --preset 67m --sweep --rows rollout,grpoz     2 to 12 s, 64 to 512 tokens, K 2 to 16

Each row runs in two fresh processes, one a side, so that peak memory is that row's alone; `--together` loads a large
model once for all rows. The sides take turns, one step each; a ratio is theirs / ours of two steps in succession. The
first step (compilation) is reported apart, warm-up steps are dropped. Writes DIR/PRESET.json and DIR/PRESET.md; rows
measured before stay in them, each with its commit and its machine.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import shapes, table  # noqa: E402
from benchmarks.shapes import Shape  # noqa: E402

ROWS = (
    *("matrix", "products", "attention", "token", "read", "logits", "features", "tower", "readout", "sft"),
    *("sft_live", "sft_mixed", "sft_mixed_padded", "dpo", "rollout", "grpoz"),
)
COMPARED = ("logits", "readout")  # rows whose outputs are held against each other
AGREE = 2e-3  # largest difference of the two sides' logits in float32; bfloat16 rounds them to 8 bits


class Process:
    """A side, with its model loaded."""

    def __init__(self, name: str, directory: Path, shape: Shape) -> None:
        arguments = [name, str(directory), json.dumps(dataclasses.asdict(shape))]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.side", *arguments],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment},
        )

    def prepare(self, row: str) -> dict:
        """Gets ready to run steps of a row: seconds of the first one, what was compiled, its output."""
        return self._ask(f"prepare {row}")

    def step(self) -> dict[str, float]:
        """Seconds of one step and of its parts."""
        return self._ask("step")

    def peak(self) -> dict:
        """Peak memory, and late compilations."""
        return self._ask("peak")

    def loaded(self) -> None:
        self._answer()

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, line: str) -> dict:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with {self._process.wait()}; its message is above")
        return json.loads(line)


@contextlib.contextmanager
def both(directory: Path, shape: Shape) -> Iterator[dict[str, Process]]:
    """Both sides, loaded at the same time."""
    sides = {name: Process(name, directory, shape) for name in ("ours", "reference")}
    for side in sides.values():
        side.loaded()
    yield sides
    for side in sides.values():
        side.end()


def measure(row: str, sides: dict[str, Process], shape: Shape, *, warmup: int, steps: int, seconds: float) -> dict:
    """One row on both sides, alternating, for `steps` pairs or about `seconds`, but at least three pairs."""
    ready = {name: side.prepare(row) for name, side in sides.items()}
    outputs = [made.pop("output") for made in ready.values()]
    difference = None if outputs[0] is None else float(np.abs(np.subtract(*outputs)).max())
    if difference is not None and (row == "logits" or shape.dtype == "float32") and not difference <= AGREE:
        raise SystemExit(f"{row}: the two sides' logits differ by {difference:.2g}; they do not compute the same")
    taken, began = {name: [] for name in sides}, None
    for i in range(warmup + steps):
        if i == warmup:
            began = time.perf_counter()
        if i >= warmup + 3 and time.perf_counter() - began > seconds:
            break
        for name, side in sides.items():
            parts = side.step()
            if i >= warmup:
                taken[name].append(parts)
    result = {name: _summary(taken[name]) | ready[name] | side.peak() for name, side in sides.items()}
    ratios = [b["total"] / a["total"] for a, b in zip(taken["ours"], taken["reference"], strict=True)]
    low, median, high = np.percentile(ratios, (10, 50, 90))
    ratio = {"median": median, "p10": low, "p90": high, "pairs": len(ratios)}
    return {"row": row, "ratio": ratio, "difference": difference, **result}


def _summary(taken: list[dict[str, float]]) -> dict:
    """Median, p10 and p90 seconds of a step, and the medians of its parts."""
    totals = [parts["total"] for parts in taken]
    low, median, high = np.percentile(totals, (10, 50, 90))
    names = [name for name in taken[0] if name != "total"]
    parts = {name: float(np.median([t[name] for t in taken])) for name in names}
    return {"median": median, "p10": low, "p90": high, "parts": parts}


def hardware() -> dict:
    """What this ran on."""
    packages = ("ambijax", "jax", "jaxlib", "flax", "torch", "transformers", "peft", "numpy")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    gpu = subprocess.run("nvidia-smi --query-gpu=name --format=csv,noheader || true", shell=True, capture_output=True)
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "gpu": gpu.stdout.decode().strip() or None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit.stdout.strip() or None,  # of a copy without its history
        "load": os.getloadavg()[0],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=shapes.PRESETS, required=True)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; all by default")
    parser.add_argument("--sweep", action="store_true", help="also at the ends of clip length, new tokens and K")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="changes a field of the shape"
    )
    parser.add_argument("--warmup", type=int, default=3, help="pairs of steps before the measured ones")
    parser.add_argument("--steps", type=int, default=20, help="measured pairs")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of measured pairs a row, at most (three at least)"
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="all rows in one process a side: the model is loaded once, our peak memory is of the rows so far",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "ambijax-benchmark")
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}")
    if args.together:  # these first: training changes the adapters, each side's in its own way
        args.rows.sort(key=lambda row: row not in COMPARED)
    try:
        args.set = shapes.changes(args.set)
    except ValueError as error:
        parser.error(f"--set: {error}")
    return args


def main() -> None:
    args = _arguments()
    preset = dataclasses.replace(shapes.PRESETS[args.preset], **args.set)
    made = subprocess.run(  # in a process of its own: this one must not hold the device
        [sys.executable, "-m", "benchmarks.shapes", json.dumps(dataclasses.asdict(preset)), str(args.weights)],
        **{"cwd": ROOT, "check": True, "stdout": subprocess.PIPE, "text": True},
    )
    directory = Path(made.stdout.splitlines()[-1])
    file = args.out / f"{args.preset}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text()) if file.exists() else []
    for change in shapes.SWEEP if args.sweep else ({},):
        shape = dataclasses.replace(preset, **change)
        for rows in [args.rows] if args.together else [[row] for row in args.rows]:
            with both(directory, shape) as sides:
                for row in rows:
                    budget = {"warmup": args.warmup, "steps": args.steps, "seconds": args.seconds}
                    result = measure(row, sides, shape, **budget)
                    result |= {"change": args.set | change, "shape": dataclasses.asdict(shape), "hardware": hardware()}
                    print(table.line(result), flush=True)
                    results = _with(results, result)
                    file.write_text(json.dumps(results, indent=1) + "\n")
                    file.with_suffix(".md").write_text(table.markdown(args.preset, results))


def _with(results: list[dict], new: dict) -> list[dict]:
    """In the order of ROWS, without an older result of the same on the same machine."""
    what = lambda r: (r["row"], r["change"], table.machine(r))  # noqa: E731
    others = [r for r in results if what(r) != what(new)]
    return sorted([*others, new], key=lambda r: ROWS.index(r["row"]))


if __name__ == "__main__":
    main()
