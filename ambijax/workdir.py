"""A run's directory belongs to one living process, can be written to before any work is done, and holds whole files."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from ambijax.errors import ConfigError, DataError


class HeldError(ConfigError):
    """Another living process has the directory."""


def check_writable(directory: Path) -> None:
    """Creates `directory` and writes a file into it, so that a read-only disk is found before any work is done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"ambijax")
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error.strerror}; choose another directory") from None


def existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    return path if path.exists() else existing(path.absolute().parent)


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all: beside its name first, then in its place.

    Raises:
      ConfigError: the disk is full or read-only, or a directory stands there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # a killed process's, or a link in somebody's run that leads elsewhere
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def read_object(path: Path) -> dict:
    """The JSON object in a file, which may be somebody else's; {} where there is no such file.

    Raises:
      DataError: there is something else in it.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


@contextlib.contextmanager
def lock(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds `directory` for this process: two trainers in one directory would overwrite each other's checkpoints.

    The kernel drops the lock when the process dies, however it dies, so a dead trainer's lock is simply free.

    Args:
      directory: made if need be.
      wait: until a living process that holds it lets go, and say so, instead of raising.

    Raises:
      HeldError: a living process holds it; names its pid and host.
      ConfigError: it cannot be written to.
    """
    check_writable(directory)
    try:
        how = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # the run may be somebody else's
        file = open(os.open(directory / "lock", how, 0o666), "a+", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"cannot write {directory / 'lock'}: {error.strerror}; remove it") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            if not wait:
                raise HeldError(f"{directory} is in use by {holder}; stop it or choose another directory") from None
            logging.warning("%s is in use by %s; waiting for it", directory, holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a network disk without locks must still be able to train
            logging.warning("cannot lock %s (%s); start only one trainer there", directory, error.strerror)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, it only says less
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


@contextlib.contextmanager
def new_directory(out: Path, need: int) -> Iterator[Path]:
    """Yields a directory that becomes `out` when all is written, and goes when something fails."""
    if out.exists():
        raise ConfigError(f"{out} already exists; remove it or choose another name")
    partial = out.with_name(f".{out.name}.partial")
    try:
        with _claimed(partial):
            free = shutil.disk_usage(partial).free
            if need > free:
                raise ConfigError(f"{out} may need {need:,} bytes, and {free:,} are free there")
            yield partial
            partial.rename(out)
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        raise ConfigError(f"cannot write {out}: {error}") from error


@contextlib.contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Makes a directory, empty and this process's alone as long as it lives; what fails in it removes it.

    Raises:
      ConfigError: another process is writing there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network disk without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{directory} is being written by another process; choose another name") from None
        try:
            for left in directory.iterdir():  # by a killed process
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    finally:
        os.close(handle)
