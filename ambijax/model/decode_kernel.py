"""What a decoding step does between its products with weights, in one kernel for GPUs (Pallas, through Triton).

Written in JAX, it is two dozen small operations a layer, and a GPU takes longer to start and to end them than to read
what they read. Here they are one: rope, the softmax over prompt and completion, and writing the new token into the
caches. It reads the slots that are written and no others, so that caches need not grow in stages.

    B prompts   G sequences of one prompt   P prompt tokens   N slots of a completion
    K key-value heads   R query heads to each   D head width, a power of two
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ambijax import sharding
from ambijax.model.layers import MASKED

_BLOCK = 64  # keys that are looked at together


def attend(
    qkv: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    prompt: tuple[jax.Array, jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    slot: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention of one new token of each sequence, whose keys and values are written on the way.

    Args:
      qkv: [K, R + 2, D, B, G], a head's R queries, key and value, neither rotated nor scaled.
      turn: cos and sin of the new tokens' positions, float32 [B, D / 2] each, see `layers.rotation`.
      prompt: rotated keys and values [B, K, P, D], and which tokens exist, [B, P].
      own: rotated keys and values [B, K, G, N, D], of which those before `slot` are read.
      slot: where the new ones are written, int32 [].
      interpret: compute it as JAX does, on any device.

    Returns:
      [K, R, D, B, G] in qkv's dtype, and `own` with the new token, in the same memory.
    """
    tokens = sharding.partition("heads", None, None, "batch", None)
    by_prompt, by_head = sharding.partition("batch", None), sharding.partition("batch", "heads", None, None)
    caches = (sharding.partition("batch", "heads", None, None, None),) * 2
    run = functools.partial(_call, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):  # XLA cannot split a kernel by itself
        specs = (tokens, (by_prompt,) * 2, (by_head, by_head, by_prompt), caches, jax.sharding.PartitionSpec())
        run = jax.shard_map(run, in_specs=specs, out_specs=(tokens, caches), check_vma=False)
    return run(qkv, turn, prompt, own, slot)


def _call(qkv: jax.Array, turn: tuple, prompt: tuple, own: tuple, slot: jax.Array, interpret: bool) -> tuple:
    kv_heads, queries, d, b, g = qkv.shape
    r, p, n = queries - 2, prompt[0].shape[2], own[0].shape[3]

    # A program for each sequence and query head; sequences of one prompt come one after another and share its keys.
    def at(*shape: int | None, index: object) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda i, j, k: index(i, j // r, j % r, k))

    column = (None, None, d, None, None)
    cache = at(None, None, None, n, d, index=lambda g, k, _, b: (b, k, g, 0, 0))
    shared = at(None, None, p, d, index=lambda g, k, _, b: (b, k, 0, 0))
    of_prompt = lambda size: at(None, size, index=lambda g, k, _, b: (b, 0))  # noqa: E731
    out, *own = pl.pallas_call(
        _kernel,
        grid=(g, kv_heads * r, b),
        in_specs=[
            at(1, index=lambda *_: (0,)),
            at(*column, index=lambda g, k, r, b: (k, r, 0, b, g)),
            at(*column, index=lambda g, k, _, b: (k, r, 0, b, g)),
            at(*column, index=lambda g, k, _, b: (k, r + 1, 0, b, g)),
            *(of_prompt(d // 2), of_prompt(d // 2), of_prompt(p)),
            *(shared, shared, cache, cache),
        ],
        out_specs=[at(*column, index=lambda g, k, r, b: (k, r, 0, b, g)), cache, cache],
        out_shape=[
            jax.ShapeDtypeStruct((kv_heads, r, d, b, g), qkv.dtype),
            *(jax.ShapeDtypeStruct(z.shape, z.dtype) for z in own),
        ],
        input_output_aliases={9: 1, 10: 2},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(slot[None], qkv, qkv, qkv, *turn, prompt[2].astype(jnp.int32), *prompt[:2], *own)
    return out, tuple(own)


def _kernel(
    slot_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, exists_ref, shared_k, shared_v, _k, _v, out_ref, own_k, own_v
):  # fmt: skip
    """One query; references are [D], [D / 2], [P], [P, D] and [N, D]. The caches are read where they are written."""
    d, half, p = q_ref.shape[0], cos_ref.shape[0], exists_ref.shape[0]
    lower, upper, whole = pl.ds(0, half), pl.ds(half, half), pl.ds(0, d)
    cos, sin, slot = cos_ref[...], sin_ref[...], slot_ref[0]

    def turned(ref: object) -> tuple[jax.Array, jax.Array]:
        """Halves, rounded as `layers.rope` rounds."""
        x, y = ref[lower].astype(jnp.float32), ref[upper].astype(jnp.float32)
        return tuple(z.astype(ref.dtype) for z in (x * cos - y * sin, y * cos + x * sin))

    query = [z.astype(jnp.float32) * d**-0.5 for z in turned(q_ref)]
    key, value = turned(k_ref), v_ref[...]
    own_k[slot, lower], own_k[slot, upper], own_v[slot, whole] = *key, value

    def look(keys: object, values: object, seen: jax.Array, start: jax.Array, state: tuple) -> tuple:
        """At one block of keys. Each place in a block has a softmax of its own, which nobody has to wait for."""
        rows, top, total, out = pl.ds(start, _BLOCK), *state
        load = lambda ref, columns: triton.load(ref.at[rows, columns], mask=seen[:, None], other=0).astype(jnp.float32)  # noqa: E731
        score = sum((z * load(keys, columns)).sum(axis=1) for z, columns in zip(query, (lower, upper), strict=True))
        score = jnp.where(seen, score, MASKED)
        higher = jnp.maximum(top, score)
        kept, weight = jnp.exp(top - higher), jnp.where(seen, jnp.exp(score - higher), 0)
        return higher, total * kept + weight, out * kept[:, None] + weight[:, None] * load(values, whole)

    def at_prompt(i: jax.Array, state: tuple) -> tuple:
        rows = pl.ds(i * _BLOCK, _BLOCK)
        inside = i * _BLOCK + jnp.arange(_BLOCK) < p
        seen = inside & (triton.load(exists_ref.at[rows], mask=inside, other=0) != 0)
        return look(shared_k, shared_v, seen, i * _BLOCK, state)

    def at_own(i: jax.Array, state: tuple) -> tuple:
        return look(own_k, own_v, i * _BLOCK + jnp.arange(_BLOCK) < slot, i * _BLOCK, state)

    nothing = jnp.zeros(_BLOCK, jnp.float32)
    state = (nothing + MASKED, nothing, jnp.zeros((_BLOCK, d), jnp.float32))
    state = jax.lax.fori_loop(0, pl.cdiv(p, _BLOCK), at_prompt, state)
    tops, totals, outs = jax.lax.fori_loop(0, pl.cdiv(slot, _BLOCK), at_own, state)
    score = sum((q * k.astype(jnp.float32)).sum() for q, k in zip(query, key, strict=True))  # of itself
    top = jnp.maximum(tops.max(), score)
    kept, weight = jnp.exp(tops - top), jnp.exp(score - top)
    out = (outs * kept[:, None]).sum(axis=0) + weight * value.astype(jnp.float32)
    out_ref[...] = (out / ((totals * kept).sum() + weight)).astype(out_ref.dtype)
