"""The training loop, for all algorithms and any number of devices.

    python -m ambijax.train --config configs/grpoz.py:tiny --workdir runs/tiny [--dry_run]

Started again in the same directory it resumes. Leaves config.json, env.json, splits.json, metrics.jsonl, samples.jsonl,
checkpoints/, goodput.json and eval/, and prints base against trained on the test speakers.
"""

from ambijax import console, goodput, signals

if __name__ == "__main__":
    console.hold()
    signals.catch()  # the imports below take seconds, in which the machine may already be wanted back

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import tqdm
from absl import logging
from ml_collections import FrozenConfigDict

from ambijax import (
    agent,
    algorithms,
    assemble,
    checkpoint,
    compilation,
    errors,
    evaluate,
    held_out,
    hosts,
    optim,
    predictions,
    preflight,
    settings,
    trackers,
    workdir,
)
from ambijax.agent import Setting
from ambijax.algorithms import ALGORITHMS
from ambijax.data import Dataset
from ambijax.errors import NonFiniteError
from ambijax.health import Health
from ambijax.journal import Log, environment
from ambijax.structs import TrainState
from ambijax.update import make_update, start, updates
from ambijax.watchdog import Watchdog

DRY_RUN = "--dry_run"  # checks all that needs no weights, prints the plan, writes nothing into the directory
SHOWN = ("loss", "loss/kl", "rollout/js", "rollout/format")  # beside the progress bar


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a training works with from its first step to its last."""

    setting: Setting
    directory: Path
    sets: dict[str, Dataset]  # train, dev, test
    update: Callable  # jitted, see update.py
    frozen: dict  # variables that are not trained
    saved: checkpoint.Checkpoints
    meta: dict  # what must be equal to resume
    clock: goodput.Clock

    def variables(self, state: TrainState) -> dict:
        """All variables of the model."""
        return optim.merge(state.trained, self.frozen)


def train(config: FrozenConfigDict, directory: Path) -> None:
    """One run, from settings to the table; resumes from `directory` when it holds checkpoints."""
    clock = goodput.Clock(directory / "goodput.json" if hosts.is_main() else None)
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    compilation.keep()
    setting = preflight.check(config, directory, write=True)
    with jax.set_mesh(setting.mesh), checkpoint.Checkpoints(directory / "checkpoints", config.checkpoint.keep) as saved:
        meta = assemble.identity(config)
        resumes = saved.check(meta)  # before anything slow is read
        if hosts.is_main():
            settings.save(config, directory)
            workdir.replace(directory / "env.json", json.dumps(environment(), indent=2) + "\n")
        params = assemble.base(setting)
        sets = assemble.datasets(setting, params, ("train", "dev", "test"))
        preflight.check_reasoned(config, sets["train"])
        if hosts.is_main():
            held_out.note(directory, {split: dataset.utterances for split, dataset in sets.items()})
        variables = assemble.initial(setting, params, resumes=resumes)
        state, frozen, optimizer = start(config, variables)
        del variables, params  # what is trained now belongs to `state`, whose memory every update reuses
        if restored := saved.restore(state, meta):
            state = restored[1]
            clock.resumed(restored[0])
            tqdm.tqdm.write(f"resumed {directory} at step {restored[0]}")
        else:
            clock.resumed(0)  # what was done before a first checkpoint is lost as well
        if config.steps == 0 or (config.eval.checkpoint == "best" and not restored):  # the start may be the best
            saved.save(0, state, meta)
        clock.lap("init")
        update = make_update(setting, ALGORITHMS[config.algorithm].loss, optimizer, state)
        run = Run(setting, directory, sets, update, frozen, saved, meta, clock)
        with compilation.Programs() as programs:
            state = loop(run, state, programs)
        table = report(run, state)
    clock.lap("evaluation")
    clock.write()
    if hosts.is_main():
        print(table)
        print(clock.summary())
        print(f"training {programs}")


def loop(run: Run, state: TrainState, programs: compilation.Programs) -> TrainState:
    """Trains from `state.step` to `config.steps`; what it returns is on the disk.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
      NonFiniteError: too many updates in a row were skipped.
    """
    config, saved, clock = run.setting.config, run.saved, run.clock
    first = done = int(state.step)
    leave, last_save = False, time.monotonic()
    bar = tqdm.tqdm(range(first, config.steps), agent.title(config), config.steps, initial=first, unit="step")
    with (
        Log(hosts.notes(run.directory), first) as log,
        Watchdog(run.directory / f"stacks-{jax.process_index()}.txt", config.watchdog_seconds) as watchdog,
        # Several processes leave at the step they agree on, even when all is saved: one alone would strand the rest.
        signals.guarding(lambda: jax.process_count() > 1 or done not in (first, saved.latest), config.checkpoint.grace),
    ):
        health = Health(config, log, int(state.guard.skipped))
        for step in bar:
            programs.at(step)
            watchdog.rest()
            scores = assess(run, state, step)
            watchdog.feed()
            logs = bool(scores) or step % config.log_every == 0 or step + 1 == config.steps
            if logs:
                jax.block_until_ready(state)  # the update before would be timed with this one
            began = time.perf_counter()
            state, ids, measured, samples = advance(run, state, step)
            done = step + 1
            health.note(step, ids, measured)
            log.samples(step, ids, samples)
            if logs:
                values = {name: float(value) for name, value in (scores | measured).items()}
                seconds = time.perf_counter() - began
                log.metrics(step, values | {"seconds": seconds, "clips_per_second": config.data.batch_size / seconds})
                health.warn(step, values)
                bar.set_postfix({name.split("/")[-1]: f"{values[name]:.3f}" for name in SHOWN if name in values})
            clock.lap("update")
            leave = hosts.leave_requested()
            # To agree on the time several processes wait for the device, so they do where they wait for it anyway.
            agree = logs or jax.process_count() == 1
            late = agree and hosts.from_main(time.monotonic() - last_save > config.checkpoint.seconds)
            due = done % config.checkpoint.every == 0 or done == config.steps or is_assessed(config, done)
            if due or late or leave:
                health.look()
                log.sync()
                saved.save(done, state, run.meta)
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
            raise errors.Preempted(f"stopped after step {done}; the same command resumes {run.directory}")
        if done not in (first, saved.latest):
            raise errors.ConfigError(f"step {done} is not saved; make room for it and start the same command again")
        watchdog.rest()
        if scores := assess(run, state, done):
            log.metrics(done, scores)
    return state


def advance(run: Run, state: TrainState, step: int) -> tuple[TrainState, list[str], dict, list]:
    """One step: the state after it, the utterances it learned from, its metrics and its samples."""
    config = run.setting.config
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    batch = run.sets["train"].batch_at(config.seed, step, config.data.batch_size)
    ids = [run.sets["train"].at(example).id for example in batch.prompt.example]
    run.clock.lap("data")
    parts, measured, samples = algorithms.collect(run.setting, run.variables(state), batch, key)
    run.clock.lap("rollout")
    for _ in range(updates(config)):
        state, aux = run.update(state, run.frozen, parts, key)
    return state.replace(step=state.step + 1), ids, aux | measured, samples


def is_assessed(config: FrozenConfigDict, step: int) -> bool:
    """Whether the state of `step`, before its update, is evaluated on dev."""
    return config.eval.every > 0 and (step % config.eval.every == 0 or step == config.steps)


def assess(run: Run, state: TrainState, step: int) -> dict[str, float]:
    """The scores of the state on dev, noted beside its checkpoint; {} where it `is_assessed` not.

    That checkpoint is on the disk before, and predictions are as they come: whoever ends the process meanwhile loses no
    step, and the restart goes on with the clip after the last.
    """
    config = run.setting.config.eval
    if not is_assessed(run.setting.config, step):
        return {}
    run.saved.wait()
    run.clock.lap("checkpoint")
    dev = run.sets["dev"].spread(config.dev_clips)
    records = predictions.collect(
        run.setting, run.variables(state), dev, run.directory / "eval" / "dev", "dev", wait=True
    )
    try:
        scores = {name: value for name, value in evaluate.summarise(records).items() if value is not None}
    except NonFiniteError as error:  # the guard of the updates says when training must end
        scores = {}
        logging.warning("step %d has no score: %s", step, error)
    else:
        run.saved.score(step, scores[config.metric])
        if hosts.is_main():
            tqdm.tqdm.write(f"step {step}: {config.metric} {scores[config.metric]:.4f} on {len(dev)} clips of dev")
    run.clock.lap("evaluation")
    return {f"dev/{name}": value for name, value in scores.items()}


def report(run: Run, state: TrainState) -> str:
    """Evaluates base and the run's model on the test split; returns their table beside the floors."""
    config, test, title = run.setting.config, run.sets["test"], agent.title(run.setting.config)
    variables, chosen = run.variables(state), ""
    rows = dict(floors := evaluate.floors(config, run.sets["train"].utterances, test.utterances))
    if config.eval.base and not assemble.trains_base(config):  # else the base is gone
        where = run.directory / "eval" / "test-base"
        untrained = {"params": variables["params"]}
        rows["base"] = evaluate.run(run.setting, untrained, test, where, "base", rows=floors, base=True, wait=True)
    if config.eval.checkpoint == "best":
        run.saved.wait()  # for the last score
        step, variables = assemble.trained(run.setting, variables, run.directory)
        chosen = f"; {title} as of step {step}, the best on dev"
    where = run.directory / "eval" / "test"
    rows[title] = evaluate.run(run.setting, variables, test, where, title, rows=floors, base=False, wait=True)
    held_out = len({u.speaker for u in test.utterances})
    return f"\n{len(test)} clips of {held_out} held-out speakers{chosen}\n{evaluate.table(rows)}"


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
    signals.done()
