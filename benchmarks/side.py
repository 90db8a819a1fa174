"""One side's process, started by benchmarks/compare.py: the model, ready to run rows.

    python -m benchmarks.side ours|reference DIRECTORY SHAPE_AS_JSON

Answers a JSON line when the model is there, and one for every line it reads: `prepare ROW` (runs the row's first step),
`step`, and `peak` (memory, and what was compiled since `prepare`).
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from types import ModuleType

from benchmarks.shapes import Shape


def prepare(module: ModuleType, side: object, row: str) -> tuple[object, dict]:
    """A row's step after its first run, and what that took."""
    module.forget_peak()
    step = module.ROWS[row](side)
    before, began = module.compiles(), time.perf_counter()
    step()
    first = time.perf_counter() - began
    made = {name: value - before[name] for name, value in module.compiles().items()}
    output = getattr(step, "output", None)
    return step, {"first_seconds": first, **made, "output": None if output is None else output.tolist()}


def timed(step: object) -> dict[str, float]:
    began = time.perf_counter()
    parts = step()
    seconds = time.perf_counter() - began
    return {"total": seconds} | (parts if isinstance(parts, dict) else {})


def peak(module: ModuleType, compiled: int) -> dict:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    late = module.compiles()["compiles"] - compiled
    return {"host_bytes": host, "device_bytes": module.peak_device_bytes(), "late_compiles": late}


def main() -> None:
    name, directory, shape = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints
    module = importlib.import_module(f"benchmarks.{name}")
    side = module.Side(Shape(**json.loads(shape)), Path(directory))
    print("{}", file=answers, flush=True)
    step, compiled = None, 0
    for line in sys.stdin:
        command, *row = line.split()
        if command == "prepare":
            step = None  # what the row before held goes first
            step, answer = prepare(module, side, *row)
            compiled = module.compiles()["compiles"]
        else:
            answer = timed(step) if command == "step" else peak(module, compiled)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
