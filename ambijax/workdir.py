"""A run's directory belongs to one living process, can be written to before any work is done, and holds whole files."""

import contextlib
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from ambijax.errors import ConfigError


def check_writable(directory: Path) -> None:
    """Creates `directory` and writes a file into it, so that a read-only disk is found before any work is done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"ambijax")
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error.strerror}; choose another --workdir") from None


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all: beside its name first, then in its place.

    Raises:
      ConfigError: the disk is full or read-only, or a directory stands there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds `directory` for this process: two trainers in one directory would overwrite each other's checkpoints.

    The kernel drops the lock when the process dies, however it dies, so a dead trainer's lock is simply free.

    Raises:
      ConfigError: a living process holds it; names its pid and host.
    """
    check_writable(directory)
    try:
        file = (directory / "lock").open("a+", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot write {directory / 'lock'}: {error.strerror}; remove it") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            raise ConfigError(f"{directory} is in use by {holder}; stop it or choose another --workdir") from None
        except OSError as error:  # a network disk without locks must still be able to train
            logging.warning("cannot lock %s (%s); start only one trainer there", directory, error.strerror)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, it only says less
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
