"""Low-rank adapters (arXiv 2106.09685) beside a frozen matrix: x W + x A B, with gradients for x, A and B.

Two ways to the same numbers. `apart` multiplies x with the matrix and with the adapter, and is right in any dtype.
`merged` multiplies it with W + A B: one product as wide as x instead of three, where float32 is float32.

    D inputs   F outputs   r rank
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ambijax.model import cpu_kernels
from ambijax.model.cpu_kernels import PRODUCT


def merges(dtype: jnp.dtype) -> bool:
    """Whether an adapter may be added to its matrix without being rounded away.

    In float32 on a CPU. bfloat16 has 8 bits, in which a young adapter is too small to change a weight; and a GPU or TPU
    rounds the operands of a float32 product to about as few.
    """
    return dtype == jnp.float32 and cpu_kernels.platform() == "cpu"


@jax.custom_vjp
def apart(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x A B with x [..., D], A [D, r], B [r, F].

    Its gradient is written out because of the order of the operands: left to itself, XLA on a CPU turns around the
    matrices with a row a token, [rows, D] and [rows, F], instead of those of r columns (docs/log.md).
    """
    return (x @ a) @ b


def _apart_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    narrow = checkpoint_name(x @ a, PRODUCT)
    return narrow @ b, (x, a, b, narrow)


def _apart_backward(saved: tuple, by_y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, a, b, narrow = saved
    by_narrow = by_y @ b.T
    return by_narrow @ a.T, _over_rows(by_narrow, x).T, _over_rows(narrow, by_y)


apart.defvjp(_apart_forward, _apart_backward)


@jax.custom_vjp
def merged(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x (W + A B) with x [..., D], W [D, F], A [D, r], B [r, F].

    Left to itself, the gradient by A and B would go through that by W + A B, a product as large as the forward one.
    """
    return x @ (w + a @ b)


def _merged_forward(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    return merged(x, w, a, b), (x, w, a, b)


def _merged_backward(saved: tuple, by_y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x, w, a, b = saved
    by_x, by_narrow = by_y @ (w + a @ b).T, by_y @ b.T
    # The gradient by W is dead code under jit wherever W is frozen.
    return by_x, _over_rows(x, by_y), _few_over_rows(by_narrow, x).T, _few_over_rows(x @ a, by_y)


merged.defvjp(_merged_forward, _merged_backward)


def _over_rows(y: jax.Array, z: jax.Array) -> jax.Array:
    """y^T z over all axes but the last, [D, F] of y [..., D] and z [..., F]."""
    rows = tuple(range(y.ndim - 1))
    return jax.lax.dot_general(y, z, ((rows, rows), ((), ())))


def _few_over_rows(y: jax.Array, z: jax.Array) -> jax.Array:
    """The same with few columns in y."""
    return (cpu_kernels.over_rows if cpu_kernels.serves(z.dtype, z.shape[-1]) else _over_rows)(y, z)
