"""Arrays kept on disk between runs, each under the digest of all that made it.

    <directory>/<key[:2]>/<key>    the array's bytes, then the sha256 of key and bytes
    <directory>/partial/           being written, or left by a killed process

An entry is written beside its name and renamed, so that several processes can share a directory and a killed one leaves
no half of an entry. Nothing waits for the disk: what a power cut takes, the sha256 finds.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import sys
import time
import uuid
from pathlib import Path

import numpy as np

from ambijax.errors import DataError

FORMAT = 1  # part of every key; raised when an entry is written in another way
_SHA = hashlib.sha256().digest_size  # bytes
_PARTIAL = re.compile("[0-9a-f]+-[0-9a-f]{32}")  # what is written here, and nothing that somebody else put there
_STALE = 24 * 3600  # seconds after which nobody is still writing a file in partial/


@dataclasses.dataclass(frozen=True)
class Kept:
    """An array that lies on disk and is read whenever `np.asarray(kept)` asks for it, so that memory holds none."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """Raises DataError: the file was removed or altered since it was found."""
        if (array := self.read()) is None:
            raise DataError(f"{self.path} was whole a while ago and is gone or altered; start again, it is made anew")
        return array if dtype is None else array.astype(dtype, copy=False)

    def read(self) -> np.ndarray | None:
        """The array, None unless its file is there and whole."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return None
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        if len(data) != size + _SHA or _sha256(self.path.name, memoryview(data)[:size]) != data[size:]:
            return None
        return np.frombuffer(data, self.dtype, count=size // self.dtype.itemsize).reshape(self.shape)


class Shelf:
    """A directory of kept arrays; '' keeps nothing.

    Attributes:
      damaged: entries found that are not what was written.
    """

    def __init__(self, directory: str) -> None:
        self._root = _root(directory)
        self.damaged: list[Path] = []
        if self._root:
            with contextlib.suppress(OSError):
                for path in (self._root / "partial").glob("*"):
                    if _PARTIAL.fullmatch(path.name) and time.time() - path.stat().st_mtime > _STALE:
                        path.unlink()

    @property
    def keeps(self) -> bool:
        return self._root is not None

    def find(self, key: str, shape: tuple[int, ...], dtype: np.dtype) -> Kept | None:
        """The array under `key`, a hexadecimal digest, if it is here and whole."""
        if self._root is None:
            return None
        found = Kept(self._root / key[:2] / key, shape, dtype)
        if found.read() is not None:
            return found
        if os.access(found.path, os.R_OK):
            self.damaged.append(found.path)
        return None

    def put(self, key: str, array: np.ndarray) -> Kept | np.ndarray:
        """Keeps an array; one that cannot be kept (disk full, read-only) comes back, and is the last that is tried."""
        if self._root is None:
            return array
        path = self._root / key[:2] / key
        data = array.tobytes()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            (self._root / "partial").mkdir(exist_ok=True)
            partial = self._root / "partial" / f"{key}-{uuid.uuid4().hex}"
            try:
                with partial.open("xb") as file:  # for all whom the umask lets read, unlike a temporary file
                    file.write(data)
                    file.write(_sha256(key, data))
                os.replace(partial, path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            print(f"{self._root}: nothing more is kept for later runs: {error.strerror}", file=sys.stderr)
            self._root = None
            return array
        return Kept(path, array.shape, array.dtype)


def size(directory: str) -> tuple[int, int]:
    """How many arrays a directory keeps, and their bytes."""
    root = _root(directory)
    sizes = [path.stat().st_size for path in root.glob("??/*")] if root else []
    return len(sizes), sum(sizes)


def _root(directory: str) -> Path | None:
    """The directory; None for '' and where it lies in the home of a user who has none, as in many containers."""
    try:
        return Path(directory).expanduser() if directory else None
    except RuntimeError as error:
        print(f"{directory}: nothing is kept for later runs: {error}; set data.features", file=sys.stderr)
        return None


def _sha256(key: str, data: bytes | memoryview) -> bytes:
    sha = hashlib.sha256(key.encode())
    sha.update(data)
    return sha.digest()
