"""One optimisation step: the state it starts from, and the jitted update of that state."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from ambijax import guard, optim, sharding
from ambijax.agent import Setting
from ambijax.structs import TrainState

DROPOUT = 2**31 - 1  # less a micro-batch's number, folded into a step's key: no example is numbered so high


def start(config: FrozenConfigDict, variables: dict) -> tuple[TrainState, dict, optax.GradientTransformation]:
    """The state before the first step, the frozen variables, and the optimizer.

    What is trained is float32 whatever `model.dtype` is: a step of AdamW is smaller than bfloat16 resolves.
    """
    labels = optim.labels(variables, config.optim.train)
    trained, frozen = optim.split(variables, labels)
    optimizer = make_optimizer(config, labels)
    made = functools.partial(fresh, config, optimizer)
    where = sharding.shardings(jax.eval_shape(made, trained), jax.sharding.get_mesh())
    return jax.jit(made, out_shardings=where)(trained), frozen, optimizer


def fresh(config: FrozenConfigDict, optimizer: optax.GradientTransformation, trained: dict) -> TrainState:
    """The state of step 0, what is trained in float32."""
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    return TrainState(jnp.int32(0), trained, optimizer.init(trained), guard.start(config.guard.spike_window))


def make_optimizer(config: FrozenConfigDict, labels: object) -> optax.GradientTransformation:
    """The configured optimizer for leaves labelled by `optim.labels`."""
    o = config.optim
    return optim.optimizer(
        learning_rate=optim.schedule(o.learning_rate, o.warmup, config.steps * updates(config)),
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip=o.clip,
        labels=labels,
    )


def make_update(
    setting: Setting, loss: Callable, optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[[TrainState, dict, tuple, jax.Array], tuple[TrainState, dict]]:
    """The jitted update (state, frozen, parts, key) -> (state, metrics); it reuses the memory of `state`.

    `parts` are a batch in equal parts (`algorithms.collect`), split further into micro-batches of
    `optim.micro_batch` prompts. Their gradients are formed one after another and averaged: the memory of one
    micro-batch, the update of the whole batch. (With adapter dropout other units are dropped.)
    An update that the guard refuses changes nothing but is counted in the metrics `skipped`.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
    def update(state: TrainState, frozen: dict, parts: tuple, key: jax.Array) -> tuple[TrainState, dict]:
        def objective(trained: dict, part: object, key: jax.Array) -> tuple[jax.Array, dict]:
            rngs = {"dropout": key} if setting.config.lora.dropout > 0 else {}
            per_example, aux = loss(setting, optim.merge(trained, frozen), part, rngs)
            return per_example.mean(), {name: value.mean() for name, value in aux.items()}

        stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)
        size = setting.config.optim.micro_batch
        each = len(parts[0].prompt.tokens) // size if size else 1  # micro-batches of a part
        n = len(parts) * each

        def add(total: dict, i: jax.Array) -> tuple[dict, dict]:
            part = jax.tree.map(lambda x: sharding.micro_batch(x, i, each), stacked)
            key_of_part = jax.random.fold_in(key, DROPOUT - i)
            (value, aux), gradients = jax.value_and_grad(objective, has_aux=True)(state.trained, part, key_of_part)
            return jax.tree.map(jnp.add, total, gradients), aux | {"loss": value}

        total, aux = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, state.trained), jnp.arange(n))
        gradients = jax.tree.map(lambda g: g / n, total)
        aux = {name: value.mean() for name, value in aux.items()}
        norm = optax.tree.norm(gradients)
        changes, memory = optimizer.update(gradients, state.optimizer, state.trained)
        sigma = setting.config.guard.spike_sigma
        apply, judged = guard.judge(state.guard, aux["loss"], norm, optax.tree.norm(changes), sigma=sigma)
        new = state.replace(trained=optax.apply_updates(state.trained, changes), optimizer=memory)
        new = jax.tree.map(lambda after, before: jnp.where(apply, after, before), new, state).replace(guard=judged)
        counts = {"skipped": 1 - apply, "skipped/total": judged.skipped, "skipped/in_a_row": judged.in_a_row}
        return new, aux | {"gradient_norm": norm} | counts

    return update


def updates(config: FrozenConfigDict) -> int:
    """Updates a batch: mu of GRPO, else one."""
    return config.grpo.updates if config.algorithm in ("grpo", "grpoz") else 1
