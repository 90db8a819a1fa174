"""docs/plan.md, the default configurations on chips they are meant for: `python docs/plan.py`.

Needs libtpu (`pip install -e '.[tpu]'`) and no TPU. A program takes 2 s to two minutes of one core, once: what was
compiled is kept in runs/plan.
"""

import sys
from pathlib import Path

from ambijax import ahead, plan, planned, settings

HERE = Path(__file__).parent
WINDOW = 512  # mel frames: CREMA-D's longest clip is 5.0 s

CELLS = [  # configuration, topology
    ("sft", "v5e:2x2"),
    ("dpo", "v5e:2x4"),
    ("grpo", "v5e:2x4"),
    ("grpoz", "v5e:2x4"),
    ("grpoz", "v6e:2x2"),
    ("grpoz", "v5p:2x2x1"),
]


def main() -> None:
    results = []
    for name, topology in CELLS:
        file = f"configs/{name}.py"
        config, _ = settings.parse(["plan", f"--config={file}", "--workdir=unused"])
        print(f"{file} on {topology}", file=sys.stderr)
        results.append(plan.run(plan.Case(config, file, topology, WINDOW, plan.TEXT, Path("runs/plan"), ())))
    versions = ", ".join(f"{name} {version}" for name, version in ahead.versions().items())
    (HERE / "plan.md").write_text(planned.markdown(results, "python docs/plan.py", versions) + "\n")


if __name__ == "__main__":
    main()
