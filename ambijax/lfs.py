"""Pointer files: what a checkout leaves in place of large files where git-lfs did not fetch them."""

from pathlib import Path

_BEGINS = b"version https://git-lfs"
_MAX = 1024  # bytes; a pointer has about 130


def is_pointer(path: Path) -> bool:
    """Whether a file is one; not if it is missing or cannot be read, which whoever reads it will say."""
    try:
        if path.stat().st_size > _MAX:
            return False
        with path.open("rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS
    except OSError:
        return False
