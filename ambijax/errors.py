"""What can go wrong for a user, and how a command says so: one line, and an exit code a scheduler can act on.

Exit codes: 0 done, 2 configuration, 3 data, 4 training became non-finite, 75 preempted (start me again to resume),
1 anything else.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable

_format = warnings.formatwarning
_SHOWN = 300  # characters of somebody else's message


class AmbijaxError(Exception):
    """An error whose message is for the user: what, where, and what to do."""

    exit_code = 1


class ConfigError(AmbijaxError):
    """A key, a flag, a checkpoint or a combination of them cannot work."""

    exit_code = 2


class DataError(AmbijaxError):
    """A file of the user's data is missing, broken or contradicts another."""

    exit_code = 3


class NonFiniteError(AmbijaxError):
    """Training produced NaN or infinity too often to go on."""

    exit_code = 4


class Preempted(AmbijaxError):
    """The scheduler asked the process to leave; its state is saved."""

    exit_code = 75


def run(main: Callable[[], None]) -> None:
    """Runs a command and exits with its code; a user's mistake prints one line, no traceback.

    Set AMBIJAX_TRACEBACK=1 to see the traceback as well.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    warnings.formatwarning = _plain
    try:
        main()
    except KeyboardInterrupt:
        print("ambijax: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message, code = _explained(error)
        if not message or os.environ.get("AMBIJAX_TRACEBACK") == "1":
            raise
        print("ambijax:", message, file=sys.stderr)
        sys.exit(code)


def _plain(message: Warning, category: type[Warning], *where: object) -> str:
    """A warning for the user without the line of source that gave it; one for programmers keeps it."""
    return f"{message}\n" if category is UserWarning else _format(message, category, *where)


def described(error: Exception) -> str:
    """An exception of a library as part of one line for a person."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]


def _explained(error: Exception) -> tuple[str, int]:
    """One line for the user and an exit code; '' of what only a traceback explains."""
    if isinstance(error, AmbijaxError):
        return " ".join(str(error).splitlines()), error.exit_code
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        needed = (str(error).strip() or "MemoryError").splitlines()[0][:_SHOWN]
        advice = "python -m ambijax.plan says what takes how much, and which setting makes it smaller"
        return f"out of memory: {needed}; {advice}", ConfigError.exit_code
    if isinstance(error, OSError):  # a full disk, a file that vanished
        return str(error), AmbijaxError.exit_code
    return "", AmbijaxError.exit_code
