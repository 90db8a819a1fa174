"""Compiled programs: kept on disk between runs, and counted, so that a run can say that nothing compiles after warm-up.

compilation.keep(config.compilation_cache)
with compilation.Programs() as programs:
    ...                     # programs.at(step) before each step
print(programs)             # compiled 9 programs in 41 s, 3 more from the cache; none after step 0
"""

import os
from pathlib import Path

import jax

from ambijax.errors import ConfigError

_MADE = "/jax/core/compile/backend_compile_duration"  # a program was compiled, or read from the cache
_READ = "/jax/compilation_cache/cache_hits"
_LIMIT = 8 * 2**30  # bytes; with a limit JAX locks the directory, so that processes can share it
_QUICK = 0.5  # seconds; what compiles faster is not kept


def keep(where: str) -> None:
    """Keeps compiled programs of this process for later ones.

    Args:
      where: a directory; 'default' is ambijax/programs in the user's cache directory; 'off' keeps none.

    Raises:
      ConfigError: the directory cannot be written to.
    """
    if where == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = home / "ambijax" / "programs" if where == "default" else Path(where)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "choose another --config.compilation_cache, or 'off'"
        raise ConfigError(f"cannot keep compiled programs in {directory}: {error.strerror}; {advice}") from None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", _LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _QUICK)


class Programs:
    """Counts the programs that are made while it is entered.

    compiled, seconds: how many were compiled, and how long making all of them took.
    cached: how many were read from the cache instead.
    last: the step, as told by `at`, that was the last to need a program that did not exist; None when none did.
    """

    def __init__(self) -> None:
        self.compiled, self.cached, self.seconds = 0, 0, 0.0
        self.last: int | None = None
        self._step = 0

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

    def record(self) -> dict[str, float | None]:
        """What a run writes down."""
        seconds = round(self.seconds, 2)
        return {"compiled": self.compiled, "from_cache": self.cached, "seconds": seconds, "last_step": self.last}

    def __str__(self) -> str:
        return (
            f"compiled {self.compiled} programs in {self.seconds:.0f} s, {self.cached} more from the cache; "
            f"none after step {self.last}"
        )
