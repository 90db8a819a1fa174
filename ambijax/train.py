"""The training loop, for all algorithms and any number of devices.

    python -m ambijax.train --config configs/grpoz.py:tiny --workdir runs/tiny

Started again in the same directory it resumes. Leaves config.json, env.json, metrics.jsonl, samples.jsonl,
checkpoints/ and eval/, and prints base against trained on the test speakers.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import optax
import tqdm
from ml_collections import FrozenConfigDict

from ambijax import algorithms, assemble, checkpoint, convert, errors, evaluate, hosts, optim, settings
from ambijax.agent import Setting
from ambijax.algorithms import ALGORITHMS
from ambijax.data import Dataset
from ambijax.journal import Log, environment
from ambijax.structs import TrainState
from ambijax.update import make_update, start, updates
from ambijax.workdir import lock

SHOWN = ("loss", "loss/kl", "rollout/js", "rollout/format")  # beside the progress bar


def train(config: FrozenConfigDict, workdir: Path) -> None:
    """One run, from settings to the table; resumes from `workdir` when it holds checkpoints."""
    setting = assemble.setting(config)
    settings.save(config, workdir)
    (workdir / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
    with jax.set_mesh(setting.mesh), checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as saved:
        params = assemble.base(setting)
        sets = assemble.datasets(setting, params, ("train", "dev", "test"))
        variables = assemble.initial(setting, params)
        state, frozen, optimizer = start(config, variables)
        del variables, params  # what is trained now belongs to `state`, whose memory every update reuses
        meta = identity(config)
        if restored := saved.restore(state, meta):
            state = restored[1]
            tqdm.tqdm.write(f"resumed {workdir} at step {restored[0]}")

        def save(step: int, state: TrainState) -> None:
            saved.save(step, state, meta, metric=None)

        if config.steps == 0:
            save(0, state)
        state = loop(setting, sets["train"], state, frozen, optimizer, save, workdir)
        saved.wait()
        print(report(setting, optim.merge(state.trained, frozen), sets, workdir))


def loop(
    setting: Setting,
    dataset: Dataset,
    state: TrainState,
    frozen: dict,
    optimizer: optax.GradientTransformation,
    save: Callable[[int, TrainState], None],
    workdir: Path,
) -> TrainState:
    """Trains from `state.step` to `config.steps`.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
    """
    config = setting.config
    update = make_update(setting, ALGORITHMS[config.algorithm].loss, optimizer, state)
    root = jax.random.key(config.seed)
    first = int(state.step)
    bar = tqdm.tqdm(range(first, config.steps), algorithm_title(config), config.steps, initial=first, unit="step")
    with Log(workdir, first) as log, hosts.interruptible():
        for step in bar:
            began = time.perf_counter()
            key = jax.random.fold_in(root, step)
            batch = dataset.batch_at(config.seed, step, config.data.batch_size)
            current = optim.merge(state.trained, frozen)
            parts, measured, samples = algorithms.collect(setting, current, batch, key)
            del current  # its trained leaves are given away next
            for _ in range(updates(config)):
                state, aux = update(state, frozen, parts, key)
            state = state.replace(step=state.step + 1)
            log.samples(step, [dataset.at(e).id for e in batch.prompt.example], samples)
            if step % config.log_every == 0 or step + 1 == config.steps:
                values = {name: float(value) for name, value in (aux | measured).items()}
                seconds = time.perf_counter() - began
                log.metrics(step, values | {"seconds": seconds, "clips_per_second": config.data.batch_size / seconds})
                bar.set_postfix({name.split("/")[-1]: f"{values[name]:.3f}" for name in SHOWN if name in values})
            leave = hosts.leave_requested()
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps or leave:
                save(step + 1, state)
            if leave:
                raise errors.Preempted(f"stopped after step {step + 1}; the same command resumes {workdir}")
    return state


def report(setting: Setting, variables: dict, sets: dict[str, Dataset], workdir: Path) -> str:
    """Evaluates base and trained on the test split; returns their table beside the floors."""
    test, title = sets["test"], algorithm_title(setting.config)
    floors = evaluate.floors(setting.config, sets["train"].utterances, test.utterances)
    rows = dict(floors)
    if setting.config.eval.base and not assemble.trains_base(setting.config):  # else the base is gone
        start, where = {"params": variables["params"]}, workdir / "eval" / "test-base"
        rows["base"] = evaluate.run(setting, start, test, where, "base", rows=floors, base=True)
    rows[title] = evaluate.run(setting, variables, test, workdir / "eval" / "test", title, rows=floors, base=False)
    held_out = len({u.speaker for u in test.utterances})
    return f"\n{len(test)} clips of {held_out} held-out speakers\n{evaluate.table(rows)}"


def algorithm_title(config: FrozenConfigDict) -> str:
    if config.steps == 0:
        return "start"
    return {"grpoz": "GRPOz"}.get(config.algorithm, config.algorithm.upper())


def identity(config: FrozenConfigDict) -> dict:
    """What must not change between the parts of a run."""
    keep = {"algorithm", "seed", "steps", "init_from", "lora", "optim", "data", "loss", "readout"}
    keep |= {"dpo", "grpo", "reward"} & {*config.keys()}
    whole = config.to_dict()
    del whole["data"]["root"]  # a corpus may move
    base = convert.digest(config.model.checkpoint)
    return {key: whole[key] for key in sorted(keep)} | {"dtype": config.model.dtype, "base": base}


def main() -> None:
    config, workdir = settings.parse(sys.argv)
    with hosts.cluster(**config.hosts), lock(workdir) if hosts.is_main() else contextlib.nullcontext():
        train(config, workdir)


if __name__ == "__main__":
    errors.run(main)
