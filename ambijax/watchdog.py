"""A step that hangs says where: after `seconds` without a sign of life all stacks are written to a file."""

import faulthandler
import os
import threading
from pathlib import Path

from absl import logging

from ambijax.errors import ConfigError


class Watchdog:
    """Fed once a step.

    A thread writes the stacks, and while it does no other runs Python: a stack that changes while it is read ends the
    process. Where no thread can run, for one holds Python still, none changes either, and faulthandler writes them
    from C after twice the time.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        """`path` is appended to, and removed at the end when nothing was written; 0 seconds is no watchdog.

        Raises:
          ConfigError: it cannot be written, or is a link.
        """
        self._path, self._seconds = path, seconds
        how = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # the run may be somebody else's
        try:
            self._file = os.fdopen(os.open(path, how, 0o666), "a")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; remove it") from None
        self._timer: threading.Timer | None = None

    def feed(self) -> None:
        """Starts the time anew."""
        self.rest()
        if self._seconds:
            faulthandler.dump_traceback_later(2 * self._seconds, file=self._file)
            self._timer = threading.Timer(self._seconds, self._say)
            self._timer.daemon = True
            self._timer.start()

    def _say(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._file)
        text = "no step has ended for %g s (watchdog_seconds); the stacks of all threads are in %s"
        logging.warning(text, self._seconds, self._path)

    def rest(self) -> None:
        """Asks for no sign of life until it is fed again."""
        faulthandler.cancel_dump_traceback_later()
        if self._timer:
            self._timer.cancel()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if empty:
            self._path.unlink(missing_ok=True)
