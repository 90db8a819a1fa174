"""What a layer's matrices make of tokens, kept from a roll-out for the update that learns from it.

The policy that a first update starts from is the one that sampled. So what the forward pass of that update would
compute was computed before, token by token, and the update that is given it computes gradients alone.

    L layers   B prompts   G completions of one prompt   P, T tokens of each   N tokens side by side   F features
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ambijax import sharding


class Activations(NamedTuple):
    """Outputs of a decoder layer's seven matrices, adapters and biases included, [..., F] with an F for each."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    o: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array


_SPLIT = Activations("heads", "heads", "heads", None, "mlp", "mlp", None)  # logical axis of each one's features


def partitions(rank: int) -> list[PartitionSpec]:
    """How arrays of `rank` axes, batch first and features last, lie on the devices that make them."""
    return [sharding.partition("batch", *[None] * (rank - 2), axis) for axis in _SPLIT]


def split(made: Activations) -> Activations:
    """Keeps them where they are made."""
    if jax.sharding.get_abstract_mesh().empty:
        return made
    specs = partitions(made.q.ndim)
    return Activations(*(jax.lax.with_sharding_constraint(z, spec) for z, spec in zip(made, specs, strict=True)))


class Known(NamedTuple):
    """Of a batch's prompts and of the first G of their completions. Batch first, as all that a batch is made of."""

    prompt: Activations  # [B, L - 1, P, F]: little is computed of a prompt in the last layer
    completions: Activations  # [B, L, G, T, F]

    def by_layer(self) -> "Known":
        """With layers first and each prompt's completions side by side: [L - 1, B, P, F] and [L, B, G T, F]."""
        turned = lambda z: jnp.moveaxis(z, 1, 0)  # noqa: E731
        beside = lambda z: turned(z).reshape(z.shape[1], len(z), -1, z.shape[-1])  # noqa: E731
        return Known(jax.tree.map(turned, self.prompt), jax.tree.map(beside, self.completions))


def product(multiply: Callable[[jax.Array], jax.Array], x: jax.Array, known: tuple, after: int) -> jax.Array:
    """multiply(x) for x [B, N, D], with its gradients, computing forward only what is not known.

    Args:
      multiply: [B, N, D] to [B, N, F], each token by itself.
      x: tokens of unknown outputs, then those that are known, then `after` unknown ones.
      known: outputs [B, n, F] one after another; may be none.
      after: how many follow them.
    """
    if not known:
        return multiply(x)
    end = x.shape[1] - after
    start = end - sum(z.shape[1] for z in known)
    rest = multiply(jax.lax.stop_gradient(jnp.concatenate([x[:, :start], x[:, end:]], axis=1)))
    return _computed(jnp.concatenate([rest[:, :start], *known, rest[:, start:]], axis=1), multiply(x))


@jax.custom_jvp
def _computed(y: jax.Array, again: jax.Array) -> jax.Array:
    """y, with the gradients of `again`, which has the same values: under jit those are dead code."""
    return y


_computed.defjvp(lambda primals, tangents: (primals[0], tangents[1]))
