"""Attention, products with few columns and sums over many rows, on a CPU by our own kernels (compiled/).

XLA's take about twice as long (docs/log.md).

    B prompts   G sequences of one prompt   T new tokens   S keys of a segment   N outputs   D inputs, or head width
    K key-value heads   R query heads to each   H = K R   r few
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # names what `layers.keep` keeps
_WIDTH = 16  # numbers in the longest vectors that CPUs have


def platform() -> str:
    """Of the devices that a program is made for: those of the mesh that is set, else this machine's."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()


def serves(dtype: jnp.dtype, width: int = _WIDTH) -> bool:
    """Whether they compute this: in float32, on one CPU device, heads of whole vectors."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and dtype == jnp.float32 and width % _WIDTH == 0 and (mesh.empty or mesh.size == 1)


@jax.custom_vjp
def attend(q: jax.Array, keys: tuple, values: tuple, masks: tuple) -> jax.Array:
    """Softmax attention over several segments of keys, see `layers.attention`.

    Args:
      q: [B, G, T, H, D], rotated, not scaled.
      keys, values: of each segment, [B, K, S, D] or [B, K, G, S, D].
      masks: of each segment, broadcastable to [B, G, T, S]. A query that sees nothing gets numbers without a meaning.

    Returns:
      like q.
    """
    return _forward(q, keys, values, masks)[0]


def _forward(q: jax.Array, keys: tuple, values: tuple, masks: tuple) -> tuple[jax.Array, tuple]:
    from ambijax.model.compiled import kernels  # compiles when it is first imported

    b, g, t, h, _ = q.shape
    results = [q, jax.ShapeDtypeStruct((b, h, g, t), q.dtype)]
    items = b * keys[0].shape[1]
    given = _buffers(q, keys, values, masks)
    found = kernels.call(kernels.FORWARD, items, results, given, segments=len(keys))
    out, logs = (checkpoint_name(z, PRODUCT) for z in found)
    return out, (q, keys, values, masks, out, logs)


def _backward(saved: tuple, by_out: jax.Array) -> tuple:
    from ambijax.model.compiled import kernels

    q, keys, values, masks, out, logs = saved
    given = _buffers(q, keys, values, masks)
    results = [q, *(z for kv in zip(keys, values, strict=True) for z in kv)]
    items = len(q) * keys[0].shape[1]
    by_q, *by_kv = kernels.call(
        kernels.BACKWARD, items, map(_by_sequence, results), [*given, out, logs, by_out], segments=len(keys)
    )
    by_kv = [by.reshape(z.shape) for by, z in zip(by_kv, results[1:], strict=True)]
    return by_q, tuple(by_kv[::2]), tuple(by_kv[1::2]), None


attend.defvjp(_forward, _backward)


def _buffers(q: jax.Array, keys: tuple, values: tuple, masks: tuple) -> list[jax.Array]:
    whole = [jnp.broadcast_to(mask, (len(q), *mask.shape[1:])) for mask in masks]
    segments = zip(map(_by_sequence, keys), map(_by_sequence, values), whole, strict=True)
    return [q, *(z for segment in segments for z in segment)]


def _by_sequence(z: jax.Array) -> jax.Array:
    """Keys [B, K, S, D] that sequences share as [B, K, 1, S, D]."""
    return z if z.ndim == 5 else z[:, :, None]


def decode(
    qkv: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    prompt: tuple[jax.Array, jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    slot: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention of one new token of each sequence, see `decode_kernel.attend`; a prompt's keys are [B, K, D, P]."""
    from ambijax.model.compiled import kernels

    k, r, d, b, g = qkv.shape
    results = [jax.ShapeDtypeStruct((k, r - 2, d, b, g), qkv.dtype), *own]
    given = [qkv, *turn, *prompt, *own, slot[None]]
    out, *own = kernels.call(kernels.DECODE, b * k, results, given, aliases={6: 1, 7: 2})
    return out, tuple(own)


def product(weight: jax.Array, x: jax.Array) -> jax.Array:
    """W x with W [*N, D] and x [D, ...], of few columns: [*N, ...]."""
    from ambijax.model.compiled import kernels

    rows, columns = weight.reshape(-1, weight.shape[-1]), x.reshape(len(x), -1)
    count = columns.shape[1]
    if count <= kernels.FEW and len(rows) % 2 == 0 and len(x) % _WIDTH == 0:  # a tile of it is two rows of W at most
        kind, width = kernels.DOTS, kernels.FEW
        whole = jnp.pad(columns.T, [(0, width - count), (0, 0)])
    else:
        kind, width = kernels.PRODUCT, count + -count % _WIDTH
        whole = jnp.pad(columns, [(0, 0), (0, width - count)])
    result = jax.ShapeDtypeStruct((len(rows), width), x.dtype)
    [y] = kernels.call(kind, -(-len(rows) // kernels.CHUNK), [result], [rows, whole])
    return y[:, :count].reshape(*weight.shape[:-1], *x.shape[1:])


def over_rows(y: jax.Array, x: jax.Array) -> jax.Array:
    """Y^T X over all axes but the last, [r, D] of y [..., r] and x [..., D], with few r."""
    from ambijax.model.compiled import kernels

    y, x = (z.reshape(-1, z.shape[-1]) for z in (y, x))
    result = jax.ShapeDtypeStruct((y.shape[1], x.shape[1]), x.dtype)
    [sums] = kernels.call(kernels.OVER_ROWS, -(-x.shape[1] // kernels.COLUMNS), [result], [y, x])
    return sums
