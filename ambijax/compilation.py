"""Compiled programs: kept on disk between runs, and counted, so that a run can say that nothing compiles after warm-up.

The directory is JAX's own: JAX_COMPILATION_CACHE_DIR names another, JAX_ENABLE_COMPILATION_CACHE=false turns it off.
"""

import ctypes
import functools
import importlib.metadata
import os
import sys
from pathlib import Path

import jax

_MADE = "/jax/core/compile/backend_compile_duration"  # a program was compiled, or read from the cache
_READ = "/jax/compilation_cache/cache_hits"
_LARGE = 1.0  # seconds of compiling, from which on it took memory worth a search for it
_LIMIT = 8 * 2**30  # bytes; with a limit JAX locks the directory, so that processes can share it


def surroundings() -> dict:
    """What decides beside a program's text, devices and inputs what comes out of it, to the last bit."""
    libraries = ("jax", "jaxlib", "flax", "numpy", "numba", "llvmlite", "scipy", "soxr")
    return {
        "versions": [importlib.metadata.version(name) for name in libraries],
        "flags": [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        "precision": jax.config.jax_default_matmul_precision,
    }


def keep() -> None:
    """Keeps the compiled programs of this process for later ones, in the user's cache directory if nowhere else.

    What is not kept is the memory that compiling them took, see `give_back`.
    """
    give_back()
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ambijax" / "programs"
    try:
        directory = directory.expanduser()
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # a user without a name has no home
        advice = "set JAX_COMPILATION_CACHE_DIR to save minutes at the next start"
        print(
            f"compiled programs are not kept: {directory}: {getattr(error, 'strerror', error)}; {advice}",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", _LIMIT)


@functools.cache
def give_back() -> None:
    """From now on, memory that compiling took goes back to the system when the program is there.

    glibc keeps what was freed for whoever asks next, and nobody asks for as much again (docs/log.md). Other C libraries
    are left as they are.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def made(event: str, seconds: float, **_: object) -> None:
        if event == _MADE and seconds >= _LARGE:
            trim(0)

    if trim is not None:
        jax.monitoring.register_event_duration_secs_listener(made)


class Programs:
    """Counts the programs that are made while it is entered.

    compiled, seconds: how many were compiled, and how long making all of them took.
    cached: how many were read from the cache instead.
    last: the step, as told by `at`, that was the last to need a program that did not exist; None when none did.
    """

    def __init__(self) -> None:
        self.compiled, self.cached, self.seconds = 0, 0, 0.0
        self.last: int | None = None
        self._step: int | None = None

    def __enter__(self) -> "Programs":
        jax.monitoring.register_event_duration_secs_listener(self._made)
        jax.monitoring.register_event_listener(self._read)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._made)
        jax.monitoring.unregister_event_listener(self._read)

    def at(self, step: int) -> None:
        """From now on what is made is made in `step`."""
        self._step = step

    def _made(self, event: str, seconds: float, **_: object) -> None:
        if event == _MADE:
            self.compiled += 1
            self.seconds += seconds
            self.last = self._step

    def _read(self, event: str, **_: object) -> None:
        if event == _READ:  # comes before the event that the program is there
            self.compiled -= 1
            self.cached += 1

    def __str__(self) -> str:
        made = f"compiled {self.compiled} programs in {self.seconds:.0f} s, {self.cached} more from the cache"
        return made + ("" if self.last is None else f"; none after step {self.last}")
