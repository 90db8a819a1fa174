"""Standard output and error of a run: closed, left by their reader, or on a full disk, they do not stop a training.

`python -m ambijax.train ... | head -1`, a terminal that is gone, `> log` on the disk that the checkpoints have filled.
This imports nothing heavy: it is the first thing a training process does.
"""

import os
import sys
from typing import TextIO


def hold() -> None:
    """From now on whatever cannot be written there is dropped.

    A closed descriptor is opened on nothing before any file gets its number: XLA writes to 2, whatever that is.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest free number, this one
    sys.stdout, sys.stderr = (
        _Patient(stream or os.fdopen(number, "w", closefd=False))
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )


class _Patient:
    """A text stream whose `write` and `flush` never fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            return self._failed(error, len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error, 0)

    def _failed(self, error: OSError, length: int) -> int:
        if isinstance(error, BrokenPipeError):  # for good: also for what the interpreter still writes at its end
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
        return length
