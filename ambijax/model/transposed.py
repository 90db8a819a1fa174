"""The decoder's matrices transposed, as a loop over tokens reads them.

A decoding step multiplies every weight with a few columns, one for each sequence. A matrix on the left, with rows as
long as its input, is read once and as it lies; on the right, a CPU would rearrange it for every token (docs/log.md). So
activations are columns here, their feature axis first. Matrices that read the same input stand side by side: a layer is
four products, and two narrow ones each for the adapters.

    N outputs   D inputs   r rank of the adapters, together   B prompts   G sequences of one prompt   T new tokens
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ambijax.model.config import LoraConfig, TextConfig


class Transposed(NamedTuple):
    """Matrices of one input, side by side: y = (W x) scale + bias + b (a x), with x [D, ...] and y [*N, ...]."""

    weight: jax.Array  # [*N, D], float or int8
    scale: jax.Array | None  # [*N], of int8
    bias: jax.Array | None  # [*N]
    a: jax.Array | None  # [r, D]
    b: jax.Array | None  # [*N, r], scaled, zero where a matrix meets another's adapter

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(self.weight.astype(x.dtype), x, 1)
        beside = lambda z: jnp.expand_dims(z.astype(x.dtype), tuple(range(z.ndim, y.ndim)))  # noqa: E731
        if self.scale is not None:
            y *= beside(self.scale)
        if self.bias is not None:
            y += beside(self.bias)
        if self.a is not None:
            y += jnp.tensordot(self.b, jnp.tensordot(self.a, x, 1), 1)
        return y


class TransposedLayer(NamedTuple):
    """One decoder layer."""

    input_norm: jax.Array  # [hidden]
    qkv: Transposed  # N = [K, R + 2, D]: a key-value head's R queries, key and value; devices may split K
    out: Transposed  # N = [hidden]
    middle_norm: jax.Array  # [hidden]
    gate_up: Transposed  # N = [2, width]
    down: Transposed  # N = [hidden]


def transposed_layers(
    variables: dict, config: TextConfig, lora: LoraConfig | None, dtype: jnp.dtype
) -> tuple[TransposedLayer, ...]:
    """Each decoder layer of `variables` ({'params', 'lora'} or {'params'}), in the order in which they run.

    Adapters are float32 where they are trained; here they are in the activations' dtype, cast once.
    """
    stacked = {name: tree["language_model"]["layers"] for name, tree in variables.items() if "language_model" in tree}
    if "lora" in stacked:
        ready = {"a": lambda a: a.astype(dtype), "b": lambda b: (lora.scale * b).astype(dtype)}
        stacked["lora"] = jax.tree.map_with_path(lambda path, x: ready[path[-1].key](x), stacked["lora"])
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(_layer(jax.tree.map(lambda x, i=i: x[i], stacked), config) for i in range(count))


def _layer(variables: dict, c: TextConfig) -> TransposedLayer:
    params, adapters = variables["params"], variables.get("lora", {})
    of = lambda name: (params[name], adapters.get(name, {}))  # noqa: E731
    k, r = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
    heads = [of("q_proj"), of("k_proj"), of("v_proj")]
    return TransposedLayer(
        input_norm=params["input_layernorm"]["scale"],
        qkv=_beside(heads, [(k, r, c.head_dim), (k, 1, c.head_dim), (k, 1, c.head_dim)], axis=1),
        out=_beside([of("o_proj")], [(c.hidden_size,)], axis=0),
        middle_norm=params["post_attention_layernorm"]["scale"],
        gate_up=_beside([of("gate_proj"), of("up_proj")], [(1, c.intermediate_size)] * 2, axis=0),
        down=_beside([of("down_proj")], [(c.hidden_size,)], axis=0),
    )


def _beside(parts: Sequence[tuple[dict, dict]], shapes: Sequence[tuple[int, ...]], axis: int) -> Transposed:
    """Layers' (parameters, adapters) of one input, their outputs in these shapes and side by side along `axis`."""
    by_output = lambda z, shape: z.T.reshape(*shape, *z.shape[:-1])  # noqa: E731  [..., N] to [*N, ...]

    def join(which: int, name: str) -> jax.Array | None:
        given = [
            by_output(part[which][name], shape)
            for part, shape in zip(parts, shapes, strict=True)
            if name in part[which]
        ]
        return jnp.concatenate(given, axis=axis) if given else None

    weight, scale, bias = (join(0, name) for name in ("kernel", "scale", "bias"))
    if not parts[0][1]:
        return Transposed(weight, scale, bias, None, None)
    a = jnp.concatenate([adapter["a"].T for _, adapter in parts])
    # Rows of one matrix, columns of all adapters: zero but for its own.
    own = jnp.repeat(jnp.eye(len(parts), dtype=bool), len(a) // len(parts), axis=1)
    b = [
        jnp.where(mine, jnp.tile(by_output(adapter["b"], shape), len(parts)), 0)
        for mine, (_, adapter), shape in zip(own, parts, shapes, strict=True)
    ]
    return Transposed(weight, scale, bias, a, jnp.concatenate(b, axis=axis))
