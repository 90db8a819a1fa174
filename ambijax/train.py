"""The training loop, for all algorithms and any number of devices.

    python -m ambijax.train --config configs/grpoz.py:tiny --workdir runs/tiny

Started again in the same directory it resumes. Leaves config.json, env.json, metrics.jsonl, samples.jsonl,
checkpoints/ and eval/, and prints base against trained on the test speakers.
"""

import functools
import importlib.metadata
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tqdm
from ml_collections import FrozenConfigDict

from ambijax import assemble, checkpoint, convert, errors, evaluate, optim, settings, sharding
from ambijax.algorithms import ALGORITHMS, Setting
from ambijax.data import Dataset
from ambijax.structs import TrainState
from ambijax.workdir import lock

DROPOUT = 2**31 - 1  # folded into a step's key for dropout; examples are numbered from 0
SHOWN = ("loss", "loss/kl", "rollout/js", "rollout/format")  # beside the progress bar


def train(config: FrozenConfigDict, workdir: Path) -> None:
    """One run, from settings to the table; resumes from `workdir` when it holds checkpoints."""
    setting = assemble.setting(config)
    settings.save(config, workdir)
    (workdir / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
    with jax.set_mesh(setting.mesh), checkpoint.Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as saved:
        params = assemble.base(setting)
        sets = assemble.datasets(setting, params, ("train", "dev", "test"))
        variables = {"params": params, "lora": assemble.adapters(setting)}
        state, frozen, optimizer = start(config, variables)
        del variables, params  # what is trained now belongs to `state`, whose memory every update reuses
        meta = identity(config)
        if restored := saved.restore(state, meta):
            state = restored[1]
            tqdm.tqdm.write(f"resumed {workdir} at step {restored[0]}")

        def save(step: int, state: TrainState) -> None:
            saved.save(step, state, meta, metric=None)

        state = loop(setting, sets["train"], state, frozen, optimizer, save, workdir)
        saved.wait()
        print(report(setting, optim.merge(state.trained, frozen), sets, workdir))


def start(config: FrozenConfigDict, variables: dict) -> tuple[TrainState, dict, optax.GradientTransformation]:
    """The state before the first step, the frozen variables, and the optimizer."""
    labels = optim.labels(variables, config.optim.train)
    trained, frozen = optim.split(variables, labels)
    o = config.optim
    optimizer = optim.optimizer(
        learning_rate=optim.schedule(o.learning_rate, o.warmup, config.steps * updates(config)),
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip=o.clip,
        labels=labels,
    )
    fresh = jax.jit(lambda trained: TrainState(jnp.int32(0), trained, optimizer.init(trained)))
    where = sharding.shardings(jax.eval_shape(fresh, trained), jax.sharding.get_mesh())
    return jax.jit(fresh, out_shardings=where)(trained), frozen, optimizer


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
    config, algorithm = setting.config, ALGORITHMS[setting.config.algorithm]
    update = make_update(setting, algorithm.loss, optimizer, state)
    root = jax.random.key(config.seed)
    first = int(state.step)
    bar = tqdm.tqdm(range(first, config.steps), algorithm_title(config), config.steps, initial=first, unit="step")
    with Log(workdir, first) as log, Signals() as signals:
        for step in bar:
            began = time.perf_counter()
            key = jax.random.fold_in(root, step)
            batch = dataset.batch_at(config.seed, step, config.data.batch_size)
            current = optim.merge(state.trained, frozen)
            collected, measured, samples = algorithm.collect(setting, current, batch, key)
            del current  # its trained leaves are given away next
            for _ in range(updates(config)):
                state, aux = update(state, frozen, collected, jax.random.fold_in(key, DROPOUT))
            state = state.replace(step=state.step + 1)
            log.samples(step, [dataset.at(e).id for e in batch.prompt.example], samples)
            if step % config.log_every == 0 or step + 1 == config.steps:
                values = {name: float(value) for name, value in (aux | measured).items()}
                seconds = time.perf_counter() - began
                log.metrics(step, values | {"seconds": seconds, "clips_per_second": config.data.batch_size / seconds})
                bar.set_postfix({name.split("/")[-1]: f"{values[name]:.3f}" for name in SHOWN if name in values})
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps or signals.leave:
                save(step + 1, state)
            if signals.leave:
                raise errors.Preempted(f"stopped after step {step + 1}; the same command resumes {workdir}")
    return state


def make_update(
    setting: Setting, loss: Callable, optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[[TrainState, dict, object, jax.Array], tuple[TrainState, dict]]:
    """The jitted update (state, frozen, collected, key) -> (state, metrics); it reuses the memory of `state`.

    An update whose loss or gradient is not finite changes nothing but is counted in the metric `skipped`.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    def update(state: TrainState, frozen: dict, collected: object, key: jax.Array) -> tuple[TrainState, dict]:
        rngs = {"dropout": key} if setting.config.lora.dropout > 0 else {}

        def objective(trained: dict) -> tuple[jax.Array, dict]:
            per_example, aux = loss(setting, optim.merge(trained, frozen), collected, rngs)
            return per_example.mean(), {name: value.mean() for name, value in aux.items()}

        (value, aux), gradients = jax.value_and_grad(objective, has_aux=True)(state.trained)
        norm = optax.global_norm(gradients)
        changes, memory = optimizer.update(gradients, state.optimizer, state.trained)
        new = state.replace(trained=optax.apply_updates(state.trained, changes), optimizer=memory)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return new, aux | {"loss": value, "gradient_norm": norm, "skipped": 1 - finite}

    return update


def report(setting: Setting, variables: dict, sets: dict[str, Dataset], workdir: Path) -> str:
    """Evaluates base and trained on the test split; returns their table beside the floors."""
    test, title = sets["test"], algorithm_title(setting.config)
    rows = evaluate.floors(sets["train"].target, test.target)
    if not assemble.trains_base(setting.config):  # else the base is gone
        rows["base"] = evaluate.run(
            setting, {"params": variables["params"]}, test, workdir / "eval" / "test-base", "base"
        )
    rows[title] = evaluate.run(setting, variables, test, workdir / "eval" / "test", title)
    held_out = len({u.speaker for u in test.utterances})
    return f"\n{len(test)} clips of {held_out} held-out speakers\n{evaluate.table(rows)}"


def updates(config: FrozenConfigDict) -> int:
    """Updates a batch: mu of GRPO, else one."""
    return config.grpo.updates if config.algorithm in ("grpo", "grpoz") else 1


def algorithm_title(config: FrozenConfigDict) -> str:
    return {"grpoz": "GRPOz"}.get(config.algorithm, config.algorithm.upper())


def identity(config: FrozenConfigDict) -> dict:
    """What must not change between the parts of a run."""
    keep = ("algorithm", "seed", "steps", "lora", "optim", "data", "loss")
    whole = config.to_dict()
    del whole["data"]["root"]  # a corpus may move
    base = convert.digest(config.model.checkpoint)
    return {key: whole[key] for key in keep} | {"dtype": config.model.dtype, "base": base}


def environment() -> dict:
    """Versions, commit and devices of this run."""
    packages = ("ambijax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit.stdout.strip() or None,
        "devices": [device.device_kind for device in jax.devices()],
    }


class Log:
    """metrics.jsonl and samples.jsonl of a run. On resume, lines of steps that are done again are dropped."""

    def __init__(self, workdir: Path, first: int) -> None:
        self._files = {name: workdir / f"{name}.jsonl" for name in ("metrics", "samples")}
        for path in self._files.values():
            kept = []
            for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
                if line.endswith("\n") and json.loads(line)["step"] < first:
                    kept.append(line)
            path.write_text("".join(kept))

    def __enter__(self) -> "Log":
        self._open = {name: path.open("a", buffering=1) for name, path in self._files.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._open["metrics"].write(json.dumps({"step": step, **values}) + "\n")

    def samples(self, step: int, ids: list[str], groups: list[list[dict]]) -> None:
        """One line for each roll-out group."""
        for name, group in zip(ids, groups, strict=False):
            self._open["samples"].write(json.dumps({"step": step, "id": name, "group": group}) + "\n")


class Signals:
    """Turns SIGTERM and Ctrl-C into a wish to leave after the current step."""

    def __enter__(self) -> "Signals":
        self.leave = False
        self._before = {s: signal.signal(s, self._wish) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _wish(self, *_: object) -> None:
        self.leave = True

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)


def main() -> None:
    config, workdir = settings.parse(sys.argv)
    with lock(workdir):
        train(config, workdir)


if __name__ == "__main__":
    errors.run(main)
