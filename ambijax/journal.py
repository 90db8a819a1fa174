"""What a run writes down besides its checkpoints: metrics, samples, bad batches, and what it ran on."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
from absl import logging

from ambijax import hosts
from ambijax.errors import ConfigError


def environment() -> dict:
    """Versions, commit, devices and current directory of this run."""
    packages = ("ambijax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "numba")
    return {
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
        "devices": [device.device_kind for device in jax.devices()],
        "directory": str(Path.cwd()),  # where relative paths of its settings start
    }


def commit() -> str | None:
    """The commit of this checkout; None for an installed package, also in somebody's repository, and without git."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    except OSError:
        return None
    top, *head = found.stdout.splitlines() or [""]
    return head[0] if found.returncode == 0 and Path(top).resolve() == root else None


@functools.cache
def sources() -> str:
    """The identity of the code that runs, committed, edited or installed: a digest of the package's modules."""
    root, sha = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode() + path.read_bytes())
    return sha.hexdigest()


class Lines:
    """A file of JSON lines with a step each. It grows by whole lines, whatever happens to disk or process.

    A line that a full disk does not take waits in memory for the next one, so a run that finds room again has them all.
    Process 0 writes; in the others this does nothing.
    """

    def __init__(self, path: Path, first: int) -> None:
        """Keeps what stands there of steps before `first`; later steps are done again, damaged lines are dropped.

        Raises:
          ConfigError: the file cannot be written.
        """
        self._path, self._waiting, self._warned, self._file = path, b"", False, None
        if not hosts.is_main():
            return
        try:
            if path.exists() or path.is_symlink():
                self._drop(first)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; move it away") from None

    def _drop(self, first: int) -> None:
        partial, damaged = self._path.with_name(f".{self._path.name}.partial"), 0
        partial.unlink(missing_ok=True)
        with self._path.open("rb") as old, partial.open("xb") as kept:
            for line in old:
                step = _step(line)
                damaged += step is None
                if step is not None and step < first:
                    kept.write(line)
        partial.replace(self._path)
        if damaged:
            logging.warning("%s: %d damaged lines are dropped", self._path, damaged)

    def append(self, record: dict) -> None:
        """Writes a line; NaN and infinity, which JSON does not know, become null."""
        if self._file is None:
            return
        finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
        self._waiting += (json.dumps(finite) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                logging.warning("cannot write %s: %s; its lines wait in memory", self._path, error.strerror)
            self._warned = True

    def sync(self) -> None:
        """Waits until the lines are on the disk, so that no checkpoint is newer than they are."""
        with contextlib.suppress(OSError):  # what a full disk does not take was said at the line
            if self._file:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()


def _step(line: bytes) -> int | None:
    """The step of a line, None for a damaged one."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


class Log:
    """metrics.jsonl, samples.jsonl and bad_batches.jsonl of a run. On resume, steps done again are written again."""

    def __init__(self, workdir: Path, first: int) -> None:
        self._metrics, self._samples, self._bad = self._all = [
            Lines(workdir / f"{name}.jsonl", first) for name in ("metrics", "samples", "bad_batches")
        ]

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        for lines in self._all:
            lines.close()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._metrics.append({"step": step, **values})

    def samples(self, step: int, ids: list[str], groups: list[list[dict]]) -> None:
        """One line for each roll-out group."""
        for name, group in zip(ids, groups, strict=False):
            self._samples.append({"step": step, "id": name, "group": group})

    def bad_batch(self, step: int, ids: list[str], loss: float, gradient_norm: float) -> None:
        """The batch of an update that was not applied."""
        self._bad.append({"step": step, "ids": ids, "loss": loss, "gradient_norm": gradient_norm})

    def sync(self) -> None:
        for lines in self._all:
            lines.sync()
