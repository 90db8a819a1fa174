"""What a run writes down besides its checkpoints: metrics, samples, and what it ran on."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jax


def environment() -> dict:
    """Versions, commit and devices of this run."""
    packages = ("ambijax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def commit() -> str | None:
    """The commit of this checkout; None for an installed package."""
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or None


class Log:
    """metrics.jsonl and samples.jsonl of a run. On resume, lines of steps that are done again are dropped."""

    def __init__(self, workdir: Path, first: int) -> None:
        self._files = {name: workdir / f"{name}.jsonl" for name in ("metrics", "samples")}
        for path in self._files.values():
            kept = []
            for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
                if line.endswith("\n") and json.loads(line)["step"] < first:
                    kept.append(line)
            path.write_text("".join(kept))

    def __enter__(self) -> "Log":
        self._open = {name: path.open("a", buffering=1) for name, path in self._files.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._open["metrics"].write(json.dumps({"step": step, **values}) + "\n")

    def samples(self, step: int, ids: list[str], groups: list[list[dict]]) -> None:
        """One line for each roll-out group."""
        for name, group in zip(ids, groups, strict=False):
            self._open["samples"].write(json.dumps({"step": step, "id": name, "group": group}) + "\n")
