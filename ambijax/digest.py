"""Named arrays and a JSON record in one directory that proves itself on the way back.

    <directory>/state/...      the arrays, written by Orbax, with Orbax's own commit file
    <directory>/digest.json    the record, and the sha256 of every file, of every array, and of itself

Orbax has no checksum, keeps NaN and casts dtypes in silence. The digests of the files find every flipped bit, also in
bytes that Orbax does not read today; the digests of the arrays hold from memory to memory.
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ambijax.errors import ConfigError, described

FORMAT = 1  # raised when an older program could not read what this one writes


class DamagedError(Exception):
    """Why a directory cannot be used; the caller knows another one to turn to."""


def write(directory: Path, record: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes `directory`, which must not exist, down to the disk; the digest comes last."""
    _orbax().save(directory.absolute() / "state", args=ocp.args.PyTreeSave(arrays))
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        fsync(path)
        files[path.relative_to(directory).as_posix()] = _sha256(path)
    entries = {name: _describe(array) for name, array in arrays.items()}
    (directory / "digest.json").write_text(_encode({**record, "format": FORMAT, "arrays": entries, "files": files}))
    fsync(directory / "digest.json")


def amend(directory: Path, changes: dict) -> None:
    """Replaces entries of the record given to `write`, all at once or not at all.

    Raises:
      DamagedError: as `read_record`.
      OSError: the disk is full.
    """
    partial = directory / ".digest.json.partial"
    partial.unlink(missing_ok=True)
    partial.write_text(_encode({**read_record(directory), **changes}))
    fsync(partial)
    partial.replace(directory / "digest.json")


def read_record(directory: Path) -> dict:
    """The record given to `write`, with `arrays` {name: {dtype, shape, sha256}} and `files` {path: sha256} added.

    Raises:
      DamagedError: digest.json is missing or not as it was written.
      ConfigError: another version's format.
    """
    try:
        text = (directory / "digest.json").read_text()
        record = json.loads(text)
        del record["sha256"]
    except FileNotFoundError:
        raise DamagedError("digest.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError("digest.json is unreadable") from None
    if text != _encode(record):
        raise DamagedError("digest.json is altered")
    if record["format"] != FORMAT:
        versions = f"has checkpoint format {record['format']}, this ambijax reads {FORMAT}"
        raise ConfigError(f"{directory} {versions}; use the version that wrote it, or another --workdir")
    return record


def check_files(directory: Path, record: dict) -> None:
    """Reads every file and places no array.

    Raises:
      DamagedError: a file is not what the record says.
    """
    for name, digest in record["files"].items():
        try:
            if _sha256(directory / name) != digest:
                raise DamagedError(f"{name} is altered")
        except OSError as error:
            raise DamagedError(f"{name}: {error.strerror}") from None


def read_arrays(directory: Path, record: dict) -> dict[str, np.ndarray]:
    """The arrays by name, exactly as saved.

    Raises:
      DamagedError: a file or an array is not what the record says, or holds NaN or infinity.
    """
    check_files(directory, record)
    try:
        arrays = _orbax().restore(directory.absolute() / "state")
    except Exception as error:  # every file is as written, so it is this Orbax that cannot read them
        raise DamagedError(f"Orbax cannot read it: {described(error)}") from error
    if {name: _describe(array) for name, array in arrays.items()} != record["arrays"]:
        raise DamagedError("its arrays are not those that were saved")
    if bad := non_finite(arrays):
        raise DamagedError(f"{bad} is not finite")
    return arrays


def non_finite(arrays: dict[str, np.ndarray]) -> str:
    """The names of the arrays that hold NaN or infinity, '' when all are finite."""
    floating = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.inexact)}
    return ", ".join(name for name, array in floating.items() if not np.all(np.isfinite(array)))


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(array: np.ndarray) -> dict:
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": digest}


def _encode(record: dict) -> str:
    """JSON that carries its own sha256; equal records give equal text."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, "sha256": digest}, sort_keys=True, indent=1)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _orbax() -> ocp.Checkpointer:
    """A checkpointer that waits for no other process: one writes, and each reads for itself."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(this, active_processes={this}, barrier_sync_key_prefix=f"ambijax{this}")
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        multiprocessing_options=alone,
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )
