"""The checkpoints of a run: adapters, optimizer and step, written in the background; the newest intact one comes back.

    <root>/step_00000100/{state/, digest.json}    see digest.py
    <root>/step_00000200.tmp/                     being written, or left by a killed process

A checkpoint is written beside its final name, hashed, and renamed last: under a final name there is a whole checkpoint
or a damaged one, never an unfinished one. So a run that finds only damaged ones can say so instead of starting over.

The state is small (never the base weights): it is gathered to the host and written by process 0 alone, which also frees
the next step to donate the device arrays at once, and makes a restore independent of the mesh it was saved from.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from ambijax import digest, hosts, rules
from ambijax.errors import ConfigError, NonFiniteError, described
from ambijax.workdir import check_writable

TRAINED = "trained"  # the field of structs.TrainState that `load_trained` reads

_STEP = re.compile(r"step_\d{8,}")
_STALE = re.compile(r"step_\d{8,}\..*tmp|.*\.orbax-checkpoint-tmp.*")


def check_meta(saved: dict, current: dict, where: Path) -> None:
    """Compares what a checkpoint was made with to what the run wants.

    Raises:
      ConfigError: names what differs, with both values; of another algorithm's settings that alone.
    """
    current = json.loads(json.dumps(current))  # tuples become lists, as in the file
    saved, current = (flax.traverse_util.flatten_dict(tree, sep=".") for tree in (saved, current))
    saved = {key: value for key, value in rules.ADDED.items() if key in current} | saved  # of an earlier version
    saved, current = ({k: v for k, v in tree.items() if k not in rules.FREED} for tree in (saved, current))
    if keys := sorted(key for key in saved | current if saved.get(key) != current.get(key)):
        shown = ["algorithm"] if "algorithm" in keys else keys
        both = "; ".join(_differs(key, saved.get(key), current.get(key)) for key in shown)
        raise ConfigError(f"{where} does not fit: {both}; restore these values or choose another --workdir")


# What a digest of `assemble.identity` is of: its hexadecimal digits tell nobody what has changed.
_DIGESTS = {
    "base": "the base weights",
    "tokenizer": "the tokenizer",
    "corpus": "the corpus (a line of its manifest, a chain of thought, or a sound)",
}


def _differs(key: str, saved: object, current: object) -> str:
    if key in _DIGESTS and isinstance(saved, str) and isinstance(current, str):
        return f"{_DIGESTS[key]} changed since the checkpoint ({key} was {saved[:12]} and is {current[:12]})"
    advice = " (a new run goes on from a finished one by init_from)" if key == "steps" else ""
    return f"{key} is {saved!r} in the checkpoint and {current!r} in this run{advice}"


def check_settings(directory: Path, settings: dict) -> None:
    """`check_meta` of the newest checkpoint's settings alone, which reads neither arrays nor weights nor sounds.

    Raises:
      ConfigError: they differ.
    """
    for path in _steps(directory):
        with contextlib.suppress(digest.DamagedError):
            meta = digest.read_record(path)["meta"]
            check_meta({key: meta[key] for key in meta.keys() & settings.keys()}, settings, path)
            return


class Checkpoints:
    """The checkpoints under one directory, which every process sees and one training run writes.

    Attributes:
      latest: the newest step known to be whole on disk, None before the first; in process 0, elsewhere after `wait`.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        """Opens `directory` and removes what killed processes left half-written; the caller holds its `lock`.

        Args:
          directory: created when it is not there.
          keep: how many of the newest checkpoints stay; the best one stays besides.
        """
        self.directory, self.keep, self.latest = directory, keep, None
        self._damaged: set[Path] = set()
        self._found: tuple | None = None  # what `check` read and `restore` will place
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = concurrent.futures.Future()
        self._pending.set_result(None)
        if jax.process_index() == 0:
            check_writable(directory)
            for path in directory.glob("*"):
                if path.is_dir() and _STALE.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finishes the write under way."""
        self._writer.shutdown()
        self._pending.result()

    def wait(self) -> None:
        """Returns when no write is under way, and all processes know what is `latest`; every process must call it."""
        self._pending.result()
        self.latest = hosts.from_main(self.latest)

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Copies the state to the host and writes it in the background; waits for the previous write first.

        A write that fails (disk full) is reported in one line and training goes on: the last good checkpoint stays.

        Args:
          step: updates done; a step that is already on disk is not written again.
          state: pytree of arrays; every process passes it.
          meta: JSON of what must be equal to resume: algorithm, rank, alpha, targets, base digest, seed, dtype, ...

        Raises:
          NonFiniteError: the state holds NaN or infinity; it would displace the finite checkpoints.
        """
        arrays = _to_host(state)
        if bad := digest.non_finite(arrays):
            raise NonFiniteError(f"state at step {step} is not finite in {bad}; the last checkpoint is {self.latest}")
        self._pending.result()
        if jax.process_index() == 0 and step != self.latest:
            record = {"step": step, "metric": None, "meta": json.loads(json.dumps(meta))}
            self._pending = self._writer.submit(self._commit, record, arrays)

    def score(self, step: int, metric: float) -> None:
        """Notes a checkpoint's dev score, by which the best one is kept; nothing where that step is not on the disk.

        Args:
          step: of a checkpoint that no write is under way for.
          metric: the lower the better; what is not finite is no score.
        """
        path = _path(self.directory, step)
        if jax.process_index() == 0 and path.is_dir() and math.isfinite(metric):
            try:
                digest.amend(path, {"metric": metric})
            except (OSError, digest.DamagedError) as error:
                logging.warning("%s: its dev score is not noted: %s; training goes on", path, described(error))
            self._prune()

    def _commit(self, record: dict, arrays: dict[str, np.ndarray]) -> None:
        final = _path(self.directory, record["step"])
        partial = final.with_name(final.name + ".tmp")
        need = sum(array.nbytes for array in arrays.values()) + 2**20  # Orbax's metadata and the digest
        try:
            shutil.rmtree(partial, ignore_errors=True)
            self.directory.mkdir(parents=True, exist_ok=True)
            _reserve(self.directory, need)
            digest.write(partial, record, arrays)
            if final.exists():  # a damaged one that this run passes again
                _remove(final)
            partial.rename(final)
            digest.fsync(self.directory)
        except Exception as error:  # OSError for the most part; Orbax's are ValueErrors
            shutil.rmtree(partial, ignore_errors=True)
            logging.warning(
                "checkpoint %s is not written: %s; needs %d bytes, %d are free; training goes on, last good step: %s",
                final,
                described(error),
                need,
                shutil.disk_usage(self.directory).free,
                self.latest,
            )
            return
        self.latest = record["step"]
        self._damaged.discard(final)
        self._prune()

    def _prune(self) -> None:
        paths = _steps(self.directory)
        intact = [path for path in paths if path not in self._damaged]
        for path in set(paths) - {*intact[: self.keep], _best(intact)}:
            try:
                _remove(path)
            except OSError as error:
                logging.warning("%s is not removed: %s; training goes on", path, described(error))

    def check(self, meta: dict) -> bool:
        """Reads what `restore` will place, so that a run which cannot go on says so before anything slow is read.

        Returns:
          whether there is anything.

        Raises:
          ConfigError: all checkpoints are damaged, `meta` differs, or an unknown format.
        """
        self._found = _first_intact(_steps(self.directory))
        if self._found:
            check_meta(self._found[1]["meta"], meta, self._found[0])
        return self._found is not None

    def restore(self, like: Any, meta: dict) -> tuple[int, Any] | None:
        """The newest intact checkpoint, placed as `like` says; each damaged one costs one warning line.

        Args:
          like: pytree of ShapeDtypeStruct (or arrays) with the shardings to restore to, on any mesh.
          meta: as given to `save`.

        Returns:
          (step, state), or None where no checkpoint was ever completed.

        Raises:
          ConfigError: all checkpoints are damaged; `meta`, a shape, a dtype or the tree differs; an unknown format.
        """
        found, self._found = self._found or _first_intact(_steps(self.directory)), None
        if jax.process_count() > 1:
            step = found[1]["step"] if found else -1
            multihost_utils.assert_equal(step, f"processes see different checkpoints in {self.directory}")
        if found is None:
            return None
        path, record, arrays, self._damaged = found
        check_meta(record["meta"], meta, path)
        leaves, tree = jax.tree_util.tree_flatten_with_path(like)
        wanted = {_name(key): leaf for key, leaf in leaves}
        _check_shapes(arrays, wanted, path)
        self.latest = record["step"]
        return self.latest, tree.unflatten(jax.device_put(arrays[name], leaf.sharding) for name, leaf in wanted.items())


def load_trained(directory: Path, *, best: bool) -> tuple[int, dict, dict]:
    """The trainable parameters alone, for a reader that knows nothing of the optimizer.

    Args:
      directory: the root given to `Checkpoints`.
      best: start from the checkpoint with the lowest metric (where one has a metric) instead of the newest.

    Returns:
      (step, variables as in TrainState.trained with numpy leaves, meta).

    Raises:
      ConfigError: no checkpoint, none intact, none with what was trained, or an unknown format.
    """
    paths = _steps(directory)
    if best and (first := _best(paths)):
        paths = [first, *(path for path in paths if path != first)]
    found = _first_intact(paths)
    if found is None:
        raise ConfigError(f"no checkpoint in {directory}; train first, or name the directory of a run that did")
    path, record, arrays, _ = found
    params = flax.traverse_util.unflatten_dict(arrays, sep="/").get(TRAINED)
    if not params:
        raise ConfigError(f"{path} holds no '{TRAINED}' entry; it was not written by ambijax.train")
    return record["step"], params, record["meta"]


def scored(directory: Path) -> bool:
    """Whether a checkpoint in `directory` has a dev score."""
    return _best(_steps(directory)) is not None


def exists(directory: Path) -> bool:
    """Whether a checkpoint was ever completed in `directory`, intact or not."""
    return bool(_steps(directory))


def _path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def _steps(directory: Path) -> list[Path]:
    """The checkpoint directories, newest first; whatever has another name or is empty is not one."""
    if not directory.is_dir():
        return []
    paths = [p for p in directory.iterdir() if _STEP.fullmatch(p.name) and p.is_dir() and any(p.iterdir())]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _best(paths: list[Path]) -> Path | None:
    metrics = {}
    for path in paths:
        with contextlib.suppress(digest.DamagedError, ConfigError):
            metrics[path] = digest.read_record(path)["metric"]
    scored = [path for path, metric in metrics.items() if metric is not None]
    return min(scored, key=metrics.__getitem__, default=None)


def _first_intact(paths: list[Path]) -> tuple[Path, dict, dict[str, np.ndarray], set[Path]] | None:
    """(path, digest, arrays by name, the damaged ones); None for no paths; ConfigError for no intact one."""
    damaged = {}
    for path in paths:
        try:
            record = digest.read_record(path)
            if path != _path(path.parent, record["step"]):
                raise digest.DamagedError(f"it is a copy of step {record['step']}")
            arrays = digest.read_arrays(path, record)
        except digest.DamagedError as error:
            damaged[path] = str(error)
            continue
        unused = _damaged(paths[len(damaged) + 1 :])  # one of them may have been the best
        if jax.process_index() == 0:
            for bad, reason in damaged.items():
                logging.warning("checkpoint %s is damaged (%s); using %s instead", bad, reason, path.name)
            for bad, reason in unused.items():
                logging.warning("checkpoint %s is damaged (%s) and can no longer be chosen", bad, reason)
        return path, record, arrays, {*damaged, *unused}
    if damaged:
        each = "; ".join(f"{path} ({reason})" for path, reason in damaged.items())
        raise ConfigError(f"no checkpoint is intact: {each}; put back a copy, or remove them to start from step 0")
    return None


def _damaged(paths: list[Path]) -> dict[Path, str]:
    """Which of these are not as they were written, and why."""
    reasons = {}
    for path in paths:
        try:
            digest.check_files(path, digest.read_record(path))
        except (digest.DamagedError, ConfigError) as error:
            reasons[path] = str(error)
    return reasons


def _check_shapes(arrays: dict[str, np.ndarray], wanted: dict[str, Any], path: Path) -> None:
    def text(tree: dict[str, Any], name: str) -> str:
        return f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "absent"

    names = sorted(name for name in arrays | wanted if text(arrays, name) != text(wanted, name))
    if names:
        both = "; ".join(
            f"{name} is {text(arrays, name)} in the checkpoint and {text(wanted, name)} in this run"
            for name in names[:3]
        )
        raise ConfigError(f"{path} does not fit in {len(names)} arrays: {both}; choose another --workdir")


def _to_host(state: Any) -> dict[str, np.ndarray]:
    """Every leaf by its name, as a private copy: the next step may donate or overwrite the device's memory."""

    def gather(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)

    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    gathered = jax.device_get([gather(leaf) for _, leaf in leaves])
    return {_name(key): np.array(leaf) for (key, _), leaf in zip(leaves, gathered, strict=True)}


def _name(key: tuple) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _reserve(directory: Path, size: int) -> None:
    """Takes `size` bytes of the disk for a moment: on a full one Orbax would print pages of tracebacks."""
    with tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, size)


def _remove(path: Path) -> None:
    """Renames before deleting, so that being killed half-way does not leave a damaged checkpoint."""
    trash = path.with_name(path.name + ".old.tmp")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
