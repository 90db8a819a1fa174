"""Where the time of our side's steps goes: the operations of one step, those that take longest first.

    python benchmarks/profile.py --preset 67m --rows sft,grpoz
    python benchmarks/profile.py --preset 7b --rows rollout --set clips=16      on a GPU: its kernels

Rows and fields are those of benchmarks/compare.py. All of a kind are counted together, fusion.1 and
fusion.2. On a CPU operations overlap, and their sum exceeds the step.
"""

import argparse
import collections
import dataclasses
import re
import sys
import tempfile
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import ours, shapes  # noqa: E402


def operations(directory: Path) -> tuple[collections.Counter, collections.Counter]:
    """Nanoseconds and counts of each kind of operation in a trace."""
    taken, count = collections.Counter(), collections.Counter()
    on_cpu = jax.default_backend() == "cpu"
    for file in directory.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                if ("XLAEigen" in line.name or "XLAPjRt" in line.name) if on_cpu else "Stream" in line.name:
                    for event in line.events:
                        kind = re.sub(r"([._](\d+|clone))+$", "", event.name)
                        if kind and "::" not in kind:
                            taken[kind] += event.duration_ns
                            count[kind] += 1
    return taken, count


def profile(side: ours.Side, row: str, top: int) -> None:
    step = ours.ROWS[row](side)
    step()
    for _ in range(3):
        began = time.perf_counter()
        parts = step()
        seconds = time.perf_counter() - began
    spelled = "".join(f", {name} {part:.4f}" for name, part in parts.items()) if isinstance(parts, dict) else ""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            step()
        taken, count = operations(Path(directory))
    print(f"{row}: {seconds:.4f} s{spelled}; operations {sum(taken.values()) / 1e9:.4f} s")
    for kind, nanoseconds in taken.most_common(top):
        each = nanoseconds / count[kind] / 1e3
        print(f"{nanoseconds / 1e6:12.2f} ms {count[kind]:7} x {each:10.2f} us  {kind[:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=shapes.PRESETS, required=True)
    parser.add_argument("--rows", required=True, help=f"comma-separated, of {', '.join(ours.ROWS)}")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="changes a field")
    parser.add_argument("--top", type=int, default=20, help="operations to print")
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "ambijax-benchmark")
    args = parser.parse_args()
    rows = args.rows.split(",")
    if unknown := set(rows) - set(ours.ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ours.ROWS)}")
    try:
        shape = dataclasses.replace(shapes.PRESETS[args.preset], **shapes.changes(args.set))
    except ValueError as error:
        parser.error(f"--set: {error}")
    side = ours.Side(shape, shapes.make(shape, args.weights))
    for row in rows:
        profile(side, row, args.top)


if __name__ == "__main__":
    main()
