"""Where a run's time went, over all its restarts: goodput.json, and one line at the end.

    goodput = (roll-out + update, without what had to be done again) / wall time of all processes

Time is measured in laps: `lap("data")` books everything since the lap before on 'data', so the buckets add up to the
wall time. Compilation inside a lap goes to 'compile'. Work on a device is waited for where its result is first needed,
so a step's buckets are exact in sum and approximate apart.

The file is replaced about once a second: a process that is killed loses a second of its account.
"""

import contextlib
import json
import time
from pathlib import Path

from ambijax import workdir
from ambijax.errors import ConfigError

STARTED = time.monotonic()  # imported before anything heavy, so this is when the process began, nearly

BUCKETS = ("init", "compile", "data", "rollout", "update", "checkpoint", "evaluation", "lost")
_PRODUCTIVE = ("rollout", "update")
_EVERY = 1.0  # seconds between two writes
_KEPT = 16  # checkpoints a run may fall back over and still know what it lost


class Clock:
    """The account of one run directory."""

    def __init__(self, path: Path | None) -> None:
        """Goes on from the account in `path`; a damaged one starts anew, since nothing depends on it. None: no file."""
        self._path = path
        self._starts, self.seconds, self._done_at = 1, dict.fromkeys(BUCKETS, 0.0), {}
        with contextlib.suppress(
            *(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
        ):
            before = json.loads(path.read_bytes()) if path else {}
            seconds = {bucket: float(before["seconds"][bucket]) for bucket in BUCKETS}
            done_at = {int(step): float(seconds) for step, seconds in before["productive_at"].items()}
            self._starts, self.seconds, self._done_at = int(before["starts"]) + 1, seconds, done_at
        self._lap, self._written, self._compiled = STARTED, STARTED, 0.0

    @property
    def productive(self) -> float:
        """Seconds of steps that count."""
        return sum(self.seconds[bucket] for bucket in _PRODUCTIVE)

    def compiled(self, event: str, seconds: float, **_: object) -> None:
        """A listener for jax.monitoring: moves compilation out of the lap it happens in."""
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiled += seconds

    def lap(self, bucket: str) -> None:
        """Books the time since the last lap."""
        now = time.monotonic()
        took, self._lap = now - self._lap, now
        compiled, self._compiled = min(self._compiled, took), 0.0
        self.seconds["compile"] += compiled
        self.seconds[bucket] += took - compiled
        if now - self._written > _EVERY:
            self.write()

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is being written."""
        self._done_at[step] = self.productive
        self._done_at = {s: self._done_at[s] for s in sorted(self._done_at)[-_KEPT:]}

    def resumed(self, step: int) -> None:
        """The run goes on from `step`: what was done after it is lost."""
        self._done_at = {s: seconds for s, seconds in self._done_at.items() if s <= step}
        lost = self.productive - self._done_at.get(step, 0.0 if step == 0 else self.productive)
        share = lost / self.productive if lost else 0.0
        for bucket in _PRODUCTIVE:
            self.seconds[bucket] *= 1 - share
        self.seconds["lost"] += lost

    def write(self) -> None:
        self._written = time.monotonic()
        wall = sum(self.seconds.values())
        account = {
            "goodput": self.productive / wall if wall else 0.0,
            "wall": wall,
            "starts": self._starts,
            "seconds": self.seconds,
            "productive_at": self._done_at,
        }
        if self._path:
            with contextlib.suppress(ConfigError):  # a full disk; training is worth more than its account
                workdir.replace(self._path, json.dumps(account, indent=1) + "\n")

    def summary(self) -> str:
        """'goodput 71 % of 130 s in 2 starts: update 60 s, ...'."""
        wall = sum(self.seconds.values())
        parts = ", ".join(f"{bucket} {s:.0f} s" for bucket, s in self.seconds.items() if s >= 0.5)
        starts = f"{self._starts} start{'s' * (self._starts > 1)}"
        return f"goodput {100 * self.productive / wall:.0f} % of {wall:.0f} s in {starts}: {parts}"
