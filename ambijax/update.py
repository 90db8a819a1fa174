"""One optimisation step: the state it starts from, and the jitted update of that state."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from ambijax import optim, sharding
from ambijax.algorithms import Setting
from ambijax.structs import TrainState


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


def updates(config: FrozenConfigDict) -> int:
    """Updates a batch: mu of GRPO, else one."""
    return config.grpo.updates if config.algorithm in ("grpo", "grpoz") else 1
