"""One side's process, started by benchmarks/compare.py: prepares one row, then runs one step for every line it reads.

    python -m benchmarks.side ours|reference ROW DIRECTORY SHAPE_AS_JSON

Answers a JSON line when ready, one for every step, and one with the peak memory at the end of input.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path

from benchmarks.shapes import Shape


def main() -> None:
    name, row, directory, shape = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints
    module = importlib.import_module(f"benchmarks.{name}")
    side = module.Side(Shape(**json.loads(shape)), Path(directory))
    step = module.ROWS[row](side)
    before, began = module.compiles(), time.perf_counter()
    step()
    first = time.perf_counter() - began
    after = module.compiles()
    output = getattr(step, "output", None)
    ready = {
        "first_seconds": first,
        **{key: after[key] - before[key] for key in after},
        "output": None if output is None else output.tolist(),
    }
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        parts = step()
        seconds = time.perf_counter() - began
        print(json.dumps({"total": seconds} | (parts if isinstance(parts, dict) else {})), file=answers, flush=True)
    late = module.compiles()["compiles"] - after["compiles"]
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = {"host_bytes": host, "device_bytes": module.peak_device_bytes(), "late_compiles": late}
    print(json.dumps(peak), file=answers, flush=True)


if __name__ == "__main__":
    main()
