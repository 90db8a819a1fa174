"""The decoder's matrices transposed, as a loop over tokens reads them.

A decoding step multiplies every weight with a few columns, one for each sequence. A matrix on the left, with rows as
long as its input, is read once and as it lies; on the right, a CPU would rearrange it for every token (docs/log.md). So
activations are columns here, their feature axis first. Matrices that read the same input stand side by side: a layer is
four products, and two narrow ones each for the adapters, one that both share (`Joined`), or none (`_merged`).

    N outputs   D inputs   r rank of the adapters, together   B prompts   G sequences of one prompt   T new tokens
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ambijax.model import cpu_kernels
from ambijax.model.config import LoraConfig, TextConfig
from ambijax.model.lora import merges


class Transposed(NamedTuple):
    """Matrices of one input, side by side: y = (W x) scale + bias + b (a x), with x [D, ...] and y [*N, ...]."""

    weight: jax.Array  # [*N, D], float or int8
    scale: jax.Array | None  # [*N], of int8
    bias: jax.Array | None  # [*N]
    a: jax.Array | None  # [r, D]
    b: jax.Array | None  # [*N, r], scaled, zero where a matrix meets another's adapter

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(self.weight, x, x.dtype)
        if self.scale is not None:
            y *= _meeting(self.scale, y)
        if self.bias is not None:
            y += _meeting(self.bias, y)
        if self.a is not None:
            y += jnp.tensordot(self.b, jnp.tensordot(self.a, x, 1), 1)
        return y


def product(weight: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """W x with W [*N, D] and x [D, ...]: [*N, ...] in `dtype`."""
    if weight.dtype == x.dtype == dtype and cpu_kernels.serves(dtype):
        return cpu_kernels.product(weight, x)
    return jnp.tensordot(weight.astype(x.dtype), x, 1, preferred_element_type=dtype)


class Joined(NamedTuple):
    """The same as one product, a's rows below the matrices': a GPU starts a small product as long as it makes it.

    Of float matrices on one device: rows of heads and rows of adapters cannot be split alike.
    """

    weight: jax.Array  # [N + r, D]
    bias: jax.Array | None  # [*N]
    b: jax.Array  # [r, *N]

    def __call__(self, x: jax.Array) -> jax.Array:
        both, rank = jnp.tensordot(self.weight, x, 1), len(self.b)
        y, narrow = both[:-rank].reshape(*self.b.shape[1:], *x.shape[1:]), both[-rank:]
        # A sum and not a product, so that XLA computes it inside of whatever reads it.
        narrow = jnp.expand_dims(narrow, tuple(range(1, self.b.ndim))).astype(jnp.float32)
        y += (_meeting(self.b, narrow) * narrow).sum(axis=0).astype(x.dtype)
        return y if self.bias is None else y + _meeting(self.bias, y)


def _meeting(z: jax.Array, y: jax.Array) -> jax.Array:
    """z as it is multiplied with y, whose first axes it has, and added to it."""
    return jnp.expand_dims(z.astype(y.dtype), tuple(range(z.ndim, y.ndim)))


class TransposedLayer(NamedTuple):
    """One decoder layer."""

    input_norm: jax.Array  # [hidden]
    qkv: Transposed | Joined  # N = [K, R + 2, D]: a key-value head's R queries, key and value; devices may split K
    out: Transposed | Joined  # N = [hidden]
    middle_norm: jax.Array  # [hidden]
    gate_up: Transposed | Joined  # N = [2, width]
    down: Transposed | Joined  # N = [hidden]


def transposed_layers(
    variables: dict, config: TextConfig, lora: LoraConfig | None, dtype: jnp.dtype, joined: bool = False
) -> tuple[TransposedLayer, ...]:
    """Each decoder layer of `variables` ({'params', 'lora'} or {'params'}), in the order in which they run.

    What is trained is float32; here it is in the activations' dtype, cast once, and adapters are part of their matrix
    where nothing is lost by that (`lora.merges`). `joined` makes `Joined` of matrices that can be.
    """
    stacked = {name: tree["language_model"]["layers"] for name, tree in variables.items() if "language_model" in tree}
    ready = {
        "kernel": lambda w: w if w.dtype == jnp.int8 else w.astype(dtype),
        "a": lambda a: a.astype(dtype),
        "b": lambda b: (lora.scale * b).astype(dtype),
    }
    stacked = jax.tree.map_with_path(lambda path, x: ready.get(path[-1].key, lambda x: x)(x), stacked)
    count = len(jax.tree.leaves(stacked)[0])
    layers = tuple(_layer(jax.tree.map(lambda x, i=i: x[i], stacked), config) for i in range(count))
    together = _merged if merges(dtype) else _joined if joined else lambda matrix: matrix
    return jax.tree.map(
        lambda matrix: together(matrix) if _takes_adapters(matrix) else matrix,
        layers,
        is_leaf=lambda x: isinstance(x, Transposed),
    )


def _takes_adapters(matrix: jax.Array | Transposed) -> bool:
    """Not a norm's scale, a matrix without adapters, or one in int8."""
    return isinstance(matrix, Transposed) and matrix.a is not None and matrix.scale is None


def _merged(matrix: Transposed) -> Transposed:
    weight = matrix.weight + jnp.tensordot(matrix.b, matrix.a, 1)
    return matrix._replace(weight=weight, a=None, b=None)


def _joined(matrix: Transposed) -> Joined:
    rows = matrix.weight.reshape(-1, matrix.weight.shape[-1])
    return Joined(jnp.concatenate([rows, matrix.a]), matrix.bias, jnp.moveaxis(matrix.b, -1, 0))


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
