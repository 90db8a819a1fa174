"""Many runs of `ambijax.train` and `ambijax.evaluate`: which are done, and doing the others.

Each run is a process and a directory of its own, made by the ordinary command. So a crash, a preemption or a kill costs
what that run did since its last checkpoint, and several machines may work on one shared directory: a run that another
process holds is left to it.
"""

import collections
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import FrozenConfigDict

from ambijax import assemble, manifest, rules, settings
from ambijax.errors import ConfigError, Preempted
from ambijax.workdir import HeldError, lock

ATTEMPTS = 3  # starts of one run; a resumed run goes on where it was
POLL = 0.5  # s between looks at the running processes
# What may differ between a run as planned and as found: where things lie, and how the work is cut.
_FREE = (*assemble.FREE, *rules.CUT, "model.checkpoint", "data.root", "data.features", "eval.batch_size")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training with its evaluation, or one more evaluation of a training."""

    row: str  # of the table: the method
    corpus: str  # that was trained on
    fold: int
    seed: int
    directory: Path  # of the training
    arguments: tuple[str, ...]  # of the training: what `settings.parse` reads, but --workdir
    elsewhere: Path | None = None  # the directory of another corpus, to evaluate the trained model on

    @property
    def command(self) -> list[str]:
        if self.elsewhere is None:
            return [sys.executable, "-m", "ambijax.train", *self.arguments, f"--workdir={self.directory}"]
        where = [f"--run={self.directory}", f"--corpus={self.elsewhere}", f"--fold={self.fold}"]
        return [sys.executable, "-m", "ambijax.evaluate", *where]

    @property
    def config(self) -> FrozenConfigDict:
        """The training's settings, checked.

        Raises:
          ConfigError: see `settings.parse`.
        """
        return settings.parse(["ambijax.tables", *self.arguments, f"--workdir={self.directory}"])[0]

    @property
    def evaluation(self) -> Path:
        """The directory that holds summary.json and predictions.jsonl."""
        other = manifest.directory(self.elsewhere).resolve().name if self.elsewhere else ""
        return self.directory / "eval" / (f"{other}-test{self.fold}" if other else "test")

    @property
    def trained(self) -> bool:
        """Whether the training that this evaluation needs is there; a training needs none."""
        return self.elsewhere is None or (self.directory / "eval" / "test" / "summary.json").exists()


def done(run: Run) -> bool:
    """Whether the run's evaluation is complete.

    Raises:
      ConfigError: it is, but under other settings than planned; names them.
    """
    try:
        clips = json.loads((run.evaluation / "summary.json").read_text())["clips"]
        complete = (run.evaluation / "predictions.jsonl").read_bytes().count(b"\n") == clips
    except (OSError, ValueError, KeyError):
        return False
    if complete and (differing := _differing(run)):
        raise ConfigError(f"{run.directory} was made with other settings: {differing}; move it or choose another --out")
    return complete


def _differing(run: Run) -> str:
    """Settings that both versions know and do not agree on: an upgrade with new keys does not undo days of training."""
    planned, found = _flat(run.config.to_dict()), _flat(json.loads((run.directory / "config.json").read_text()))
    keys = [key for key in sorted(planned.keys() & found.keys()) if planned[key] != found[key]]
    return "; ".join(f"{key} is {found[key]!r}, not {planned[key]!r}" for key in keys)


def _flat(config: dict) -> dict:
    """{'lora.rank': 8, ...} of what makes a run's result, as JSON values."""
    flat = {}
    for section, value in json.loads(json.dumps(config)).items():
        flat |= {f"{section}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {section: value}
    return {key: value for key, value in flat.items() if not {key, key.split(".")[0]} & set(_FREE)}


def seconds_per_step(runs: Sequence[Run]) -> float | None:
    """The median over what these runs have logged; None before the first step."""
    logs = [run.directory / "metrics.jsonl" for run in runs]
    lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").split("\n")]
    seconds = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged, or of dev alone
            seconds.append(float(json.loads(line)["seconds"]))
    return statistics.median(seconds) if seconds else None


def execute(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Does what is not done, in order, `jobs` at a time; returns the runs that failed, and those that need them.

    With several jobs each has its own share of the CPU cores; on an accelerator one at a time is meant.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the running ones have saved their state.
    """
    waiting, failed = [run for run in runs if not done(run)], []
    running: dict[int, _Started] = {}
    starts, told = collections.Counter(), False
    with _Signals() as signals:
        while running or (waiting and not signals.leave):
            for job in [job for job, started in running.items() if started.process.poll() is not None]:
                started = running.pop(job)
                if not done(run := started.run):
                    again = signals.leave or starts[run.evaluation] < ATTEMPTS
                    (waiting if again else failed).insert(0, run)
                _report(started, len(waiting) + len(running))
            failed += [run for run in waiting if run.directory in {f.directory for f in failed}]
            waiting = [run for run in waiting if run not in failed and not done(run)]
            for job in range(jobs):
                if job not in running and not signals.leave and (run := _next(waiting)):
                    waiting.remove(run)
                    starts[run.evaluation] += 1
                    running[job] = _start(run, job, jobs)
            if signals.leave and not told:
                for started in running.values():
                    started.process.terminate()  # once: a process that is already leaving must be let go
                told = True
            time.sleep(POLL)
    if signals.leave:
        raise Preempted(f"{len(waiting)} runs are left; the same command goes on")
    return failed


class _Started(NamedTuple):
    run: Run
    process: subprocess.Popen
    began: float


class _Signals:
    """Turns SIGTERM and Ctrl-C into a wish to leave, which is passed on to the running ones."""

    def __enter__(self) -> "_Signals":
        self.leave = False
        self._before = {s: signal.signal(s, self._wish) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _wish(self, *_: object) -> None:
        self.leave = True

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)


def _next(waiting: Sequence[Run]) -> Run | None:
    """The first run that can start: what it needs is there, and no other process holds it."""
    for run in waiting:
        if run.trained and not _held(run.evaluation if run.elsewhere else run.directory):
            return run
    return None


def _held(directory: Path) -> bool:
    try:
        with lock(directory):
            return False
    except HeldError:
        return True


def _start(run: Run, job: int, jobs: int) -> _Started:
    """Starts the run's process; what it says goes to console.log in its directory."""
    with _cores(job, jobs), (run.directory / "console.log").open("a") as console:
        process = subprocess.Popen(run.command, stdout=console, stderr=console, stdin=subprocess.DEVNULL)
    return _Started(run, process, time.monotonic())


@contextlib.contextmanager
def _cores(job: int, jobs: int) -> Iterator[None]:
    """Processes started inside run on every `jobs`-th core, where the system can say so."""
    everything = os.sched_getaffinity(0) if jobs > 1 and hasattr(os, "sched_setaffinity") else set()
    if mine := sorted(everything)[job::jobs]:
        os.sched_setaffinity(0, mine)
    try:
        yield
    finally:
        if mine:
            os.sched_setaffinity(0, everything)


def _report(started: _Started, left: int) -> None:
    run, code = started.run, started.process.returncode
    state = "done" if done(run) else f"exit code {code}, see {run.directory / 'console.log'}"
    print(f"{run.evaluation}  {time.monotonic() - started.began:6.0f} s  {state}; {left} left", flush=True)
