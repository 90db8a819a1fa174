"""SIGTERM and Ctrl-C: the machine is wanted back. The process leaves with code 75, its work saved, in time.

What a run writes survives kill -9, so leaving at once is always safe. The one question is whether steps that are not
on the disk yet can still be saved:

    nothing is at stake (start-up, the first compilation, evaluation)   leaves at once
    steps are at stake   the loop sees `wanted` after its step, saves, and leaves; when that takes longer than `grace`
                         (a compilation, a hung collective), the process leaves with the last checkpoint
    a second signal      leaves at once

A handler written in Python runs in the main thread, which may be inside XLA for minutes. So the handlers do nothing;
a thread of its own reads what the interpreter writes to the wakeup descriptor the moment a signal arrives.
This imports nothing heavy: it is the first thing a training process does.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from ambijax.errors import Preempted

CAUGHT = (signal.SIGTERM, signal.SIGINT)

_asked, _agreed = threading.Event(), threading.Event()
_at_stake: Callable[[], bool] | None = None
_grace = _linger = 0.0  # seconds


def catch() -> None:
    """From now on SIGTERM and Ctrl-C mean: leave with code 75. Call it in the main thread."""
    for number in CAUGHT:
        signal.signal(number, lambda *_: None)
    if not any(thread.name == _listen.__name__ for thread in threading.enumerate()):
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(read,), name=_listen.__name__, daemon=True).start()


def done() -> None:
    """All is done and on the disk: no signal makes a failure of it while the interpreter ends.

    Which gives a caught signal back to the system, and with it the exit code of a killed process.
    """
    for number in CAUGHT:
        signal.signal(number, signal.SIG_IGN)


def share(linger: float) -> None:
    """In a cluster jax hears SIGTERM and tells all processes, whoever got it; each of them then calls `ask`.

    Args:
      linger: seconds that this process stays behind, for others to read that they shall leave.
    """
    global _heard, _linger
    _heard, _linger = lambda: os.kill(os.getpid(), signal.SIGTERM), linger


def ask() -> None:
    """Somebody wants this process to leave."""
    if _agreed.is_set():
        return
    if _asked.is_set():
        _leave("stopped at once by a second signal")
    at_stake = _at_stake  # once: the loop may end meanwhile
    if at_stake is None or not at_stake():
        _leave("stopped; every finished step is saved")
    _asked.set()
    late = f"stopped after {_grace:g} s, in which the step under way did not end; the last checkpoint stays"
    timer = threading.Timer(_grace, _leave, [late])
    timer.daemon = True
    timer.start()


def wanted() -> bool:
    """Whether the loop should save and leave after this step."""
    return _asked.is_set()


def heard() -> None:
    """The loop knows already, from another process, that all leave: later word of it asks for nothing more."""
    _agreed.set()  # first: somebody may be asking this very moment
    _asked.set()


@contextlib.contextmanager
def guarding(at_stake: Callable[[], bool], grace: float) -> Iterator[None]:
    """While this lasts, a signal waits up to `grace` seconds for the loop if `at_stake()`: there is work to save."""
    global _at_stake, _grace
    _at_stake, _grace = at_stake, grace
    try:
        yield
    finally:
        _at_stake = None


def _listen(descriptor: int) -> None:
    while True:
        if {*os.read(descriptor, 1)} & {*CAUGHT}:  # other signals wake up, too
            _heard()


def _leave(how: str) -> None:
    """Ends the process without unwinding: the main thread may not come back to Python for a long time."""
    time.sleep(_linger)
    with contextlib.suppress(OSError):
        os.write(2, f"\nambijax: {how}; the same command resumes\n".encode())
    os._exit(Preempted.exit_code)


_heard: Callable[[], None] = ask
