"""The training loop, for all algorithms and any number of devices.

    python -m ambijax.train --config configs/grpoz.py:tiny --workdir runs/tiny [--dry_run]

Started again in the same directory it resumes. Leaves config.json, env.json, metrics.jsonl, samples.jsonl,
checkpoints/, goodput.json and eval/, and prints base against trained on the test speakers.
"""

from ambijax import goodput, signals

if __name__ == "__main__":
    signals.catch()  # the imports below take seconds, in which the machine may already be wanted back

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import optax
import tqdm
from ml_collections import FrozenConfigDict

from ambijax import (
    algorithms,
    assemble,
    checkpoint,
    compilation,
    errors,
    evaluate,
    hosts,
    optim,
    preflight,
    settings,
    trackers,
    workdir,
)
from ambijax.agent import Setting
from ambijax.algorithms import ALGORITHMS
from ambijax.data import Dataset
from ambijax.health import Health
from ambijax.journal import Log, environment
from ambijax.structs import TrainState
from ambijax.update import make_update, start, updates
from ambijax.watchdog import Watchdog

DRY_RUN = "--dry_run"  # checks all that needs no weights, prints the plan, writes nothing
SHOWN = ("loss", "loss/kl", "rollout/js", "rollout/format")  # beside the progress bar


def train(config: FrozenConfigDict, directory: Path) -> None:
    """One run, from settings to the table; resumes from `directory` when it holds checkpoints."""
    clock = goodput.Clock(directory / "goodput.json" if hosts.is_main() else None)
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    compilation.keep()
    setting = preflight.check(config, directory, write=True)
    with jax.set_mesh(setting.mesh), checkpoint.Checkpoints(directory / "checkpoints", config.checkpoint.keep) as saved:
        meta = assemble.identity(config)
        saved.check(meta)  # before anything slow is read
        if hosts.is_main():
            settings.save(config, directory)
            workdir.replace(directory / "env.json", json.dumps(environment(), indent=2) + "\n")
        params = assemble.base(setting)
        sets = assemble.datasets(setting, params, ("train", "dev", "test"))
        variables = assemble.initial(setting, params)
        state, frozen, optimizer = start(config, variables)
        del variables, params  # what is trained now belongs to `state`, whose memory every update reuses
        if restored := saved.restore(state, meta):
            state = restored[1]
            clock.resumed(restored[0])
            tqdm.tqdm.write(f"resumed {directory} at step {restored[0]}")
        clock.lap("init")
        if config.steps == 0:
            saved.save(0, state, meta, metric=None)
        with compilation.Programs() as programs:
            state = loop(setting, sets, state, frozen, optimizer, saved, meta, clock, programs, directory)
        table = report(setting, optim.merge(state.trained, frozen), sets, directory)
    clock.lap("evaluation")
    clock.write()
    if hosts.is_main():
        print(table)
        print(clock.summary())
        print(f"training {programs}")


def loop(
    setting: Setting,
    sets: dict[str, Dataset],
    state: TrainState,
    frozen: dict,
    optimizer: optax.GradientTransformation,
    saved: checkpoint.Checkpoints,
    meta: dict,
    clock: goodput.Clock,
    programs: compilation.Programs,
    directory: Path,
) -> TrainState:
    """Trains from `state.step` to `config.steps`; what it returns is on the disk.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
      NonFiniteError: too many updates in a row were skipped.
    """
    config, dataset = setting.config, sets["train"]
    update = make_update(setting, ALGORITHMS[config.algorithm].loss, optimizer, state)
    root = jax.random.key(config.seed)
    first = done = int(state.step)
    leave = False
    last_save = time.monotonic()
    bar = tqdm.tqdm(range(first, config.steps), algorithm_title(config), config.steps, initial=first, unit="step")
    with (
        Log(hosts.notes(directory), first) as log,
        Watchdog(directory / f"stacks-{jax.process_index()}.txt", config.watchdog_seconds) as watchdog,
        signals.guarding(lambda: done not in (first, saved.latest), config.checkpoint.grace),
    ):
        health = Health(config, log, int(state.guard.skipped))
        for step in bar:
            watchdog.feed()
            programs.at(step)
            began = time.perf_counter()
            key = jax.random.fold_in(root, step)
            batch = dataset.batch_at(config.seed, step, config.data.batch_size)
            ids = [dataset.at(example).id for example in batch.prompt.example]
            clock.lap("data")
            current = optim.merge(state.trained, frozen)
            parts, measured, samples = algorithms.collect(setting, current, batch, key)
            del current  # its trained leaves are given away next
            clock.lap("rollout")
            for _ in range(updates(config)):
                state, aux = update(state, frozen, parts, key)
            state = state.replace(step=state.step + 1)
            done = step + 1
            health.note(step, ids, aux)
            log.samples(step, ids, samples)
            if step % config.log_every == 0 or done == config.steps:
                values = {name: float(value) for name, value in (aux | measured).items()}
                seconds = time.perf_counter() - began
                log.metrics(step, values | {"seconds": seconds, "clips_per_second": config.data.batch_size / seconds})
                health.warn(step, values)
                bar.set_postfix({name.split("/")[-1]: f"{values[name]:.3f}" for name in SHOWN if name in values})
            clock.lap("update")
            leave = hosts.leave_requested()
            late = hosts.from_main(time.monotonic() - last_save > config.checkpoint.seconds)
            if late or done % config.checkpoint.every == 0 or leave or done == config.steps:
                health.look()
                log.sync()
                saved.save(done, state, meta, metric=None)
                clock.saved(done)
                clock.lap("checkpoint")
                last_save = time.monotonic()
            if leave:
                break
        bar.close()
        saved.wait()
        clock.lap("checkpoint")
        clock.write()
        if leave:
            raise errors.Preempted(f"stopped after step {done}; the same command resumes {directory}")
        if done > first and jax.process_index() == 0 and saved.latest != done:
            raise errors.ConfigError(f"step {done} is not saved; make room for it and start the same command again")
    return state


def report(setting: Setting, variables: dict, sets: dict[str, Dataset], directory: Path) -> str:
    """Evaluates base and trained on the test split; returns their table beside the floors."""
    test, title = sets["test"], algorithm_title(setting.config)
    floors = evaluate.floors(setting.config, sets["train"].utterances, test.utterances)
    rows = dict(floors)
    if setting.config.eval.base and not assemble.trains_base(setting.config):  # else the base is gone
        start, where = {"params": variables["params"]}, directory / "eval" / "test-base"
        rows["base"] = evaluate.run(setting, start, test, where, "base", rows=floors, base=True)
    rows[title] = evaluate.run(setting, variables, test, directory / "eval" / "test", title, rows=floors, base=False)
    held_out = len({u.speaker for u in test.utterances})
    return f"\n{len(test)} clips of {held_out} held-out speakers\n{evaluate.table(rows)}"


def algorithm_title(config: FrozenConfigDict) -> str:
    if config.steps == 0:
        return "start"
    return {"grpoz": "GRPOz"}.get(config.algorithm, config.algorithm.upper())


def main() -> None:
    config, directory = settings.parse([argument for argument in sys.argv if argument != DRY_RUN])
    if DRY_RUN in sys.argv:
        print(preflight.plan(preflight.check(config, directory, write=False), directory))
        return
    with hosts.cluster(**config.hosts), _alone(config, directory) if hosts.is_main() else contextlib.nullcontext():
        train(config, directory)


@contextlib.contextmanager
def _alone(config: FrozenConfigDict, directory: Path) -> Iterator[None]:
    """What the main process does for all of them: it holds the directory, and tells a tracker."""
    with workdir.lock(directory), trackers.following(config, directory):
        yield


if __name__ == "__main__":
    errors.run(main)
