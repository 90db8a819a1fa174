"""What a decoding step does between its products with weights, in two kernels for GPUs (Pallas, through Triton).

Written in JAX, it is two dozen small operations a layer, and a GPU takes longer to start and to end them than to read
what they read. Here the first kernel rotates, writes the new tokens into the caches and lets a whole group look at its
prompt, whose keys are read once; in the second each sequence looks at its own tokens. Slots that are not written are
not read, so that caches need not grow in stages.

    B prompts   G sequences of one prompt   P prompt tokens   N slots of a completion
    K key-value heads   R query heads to each   D head width, one of kernels.WIDTHS
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ambijax import sharding
from ambijax.model.layers import MASKED

_BLOCK = 64  # keys that are looked at together
_COLUMNS = 16  # sequences in a product of matrix units, at least


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
    like = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    how = {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=2), "interpret": interpret}

    # A program for each query head of a prompt. What it leaves has a column for each sequence, and columns beyond the
    # group's, which are neither read nor written.
    at = lambda shape, index: pl.BlockSpec(shape, lambda h, b: index(h // r, h % r, b))  # noqa: E731
    columns = max(_COLUMNS, pl.next_power_of_2(g))
    column = (None, None, d, None, columns)
    cache = at((None, None, columns, n, d), lambda k, _, b: (b, k, 0, 0, 0))
    shared = at((None, None, p, d), lambda k, _, b: (b, k, 0, 0))
    of_prompt = lambda size: at((None, size), lambda k, _, b: (b, 0))  # noqa: E731
    query = at(column, lambda k, r, b: (k, r, 0, b, 0))
    sums = at((None, None, None, columns), lambda k, r, b: (k, r, b, 0))
    state_shape = [like((kv_heads, r, d, b, g)), *[like((kv_heads, r, b, g))] * 2]
    rotated, *own, out, top, total = pl.pallas_call(
        functools.partial(_read_prompt, g),
        grid=(kv_heads * r, b),
        in_specs=[
            at((1,), lambda *_: (0,)),
            query,
            at(column, lambda k, _, b: (k, r, 0, b, 0)),
            at(column, lambda k, _, b: (k, r + 1, 0, b, 0)),
            *(of_prompt(d // 2), of_prompt(d // 2), of_prompt(p)),
            *(shared, shared, cache, cache),
        ],
        out_specs=[query, cache, cache, query, sums, sums],
        out_shape=[like((kv_heads, r, d, b, g), qkv.dtype), *(like(z.shape, z.dtype) for z in own), *state_shape],
        input_output_aliases={9: 1, 10: 2},
        **how,
    )(slot[None], qkv, qkv, qkv, *turn, prompt[2].astype(jnp.int32), *prompt[:2], *own)

    # A program for each sequence and query head.
    at = lambda shape, index: pl.BlockSpec(shape, lambda g, h, b: index(g, h // r, h % r, b))  # noqa: E731
    column = at((None, None, d, None, None), lambda g, k, r, b: (k, r, 0, b, g))
    cache = at((None, None, None, n, d), lambda g, k, _, b: (b, k, g, 0, 0))
    number = at((None, None, None, 1), lambda g, k, r, b: (k, r, b, g))
    out = pl.pallas_call(
        _read_own,
        grid=(g, kv_heads * r, b),
        in_specs=[at((1,), lambda *_: (0,)), column, cache, cache, column, number, number],
        out_specs=column,
        out_shape=like((kv_heads, r, d, b, g), qkv.dtype),
        **how,
    )(slot[None], rotated, *own, out, top, total)
    return out, tuple(own)


def _read_prompt(
    g, slot_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, exists_ref, keys, values, _k, _v,
    rotated_ref, own_k, own_v, out_ref, top_ref, total_ref,
):  # fmt: skip
    """A query head of the g sequences of a prompt; references are [D, G], [D / 2], [P], [P, D], [G, N, D] and [G].

    G is g rounded up to what a product of matrix units takes: JAX lets no slice leave a reference.
    """
    (d, columns), p, slot = q_ref.shape, exists_ref.shape[0], slot_ref[0]
    lower, upper, whole = pl.ds(0, d // 2), pl.ds(d // 2, d // 2), pl.ds(0, d)
    group, exist = pl.ds(0, columns), jnp.arange(columns) < g
    cos, sin = cos_ref[...][:, None], sin_ref[...][:, None]
    column = lambda ref, rows: triton.load(ref.at[rows, group], mask=exist[None], other=0)  # noqa: E731

    def turned(ref: object) -> tuple[jax.Array, jax.Array]:
        """Halves [D / 2, G], rounded as `layers.rope` rounds."""
        x, y = (column(ref, rows).astype(jnp.float32) for rows in (lower, upper))
        return tuple(z.astype(ref.dtype) for z in (x * cos - y * sin, y * cos + x * sin))

    query = turned(q_ref)
    for rows, half in zip((lower, upper), query, strict=True):
        triton.store(rotated_ref.at[rows, group], half, mask=exist[None])
    for cache, rows, new in zip(
        (own_k, own_k, own_v), (lower, upper, whole), (*turned(k_ref), column(v_ref, whole)), strict=True
    ):
        triton.store(cache.at[group, slot, rows], new.T, mask=exist[:, None])

    def look(i: jax.Array, state: tuple) -> tuple:
        rows, inside, (top, total, out) = pl.ds(i * _BLOCK, _BLOCK), i * _BLOCK + jnp.arange(_BLOCK) < p, state
        seen = inside & (triton.load(exists_ref.at[rows], mask=inside, other=0) != 0)
        load = lambda ref, part: triton.load(ref.at[rows, part], mask=seen[:, None], other=0)  # noqa: E731
        score = sum(triton.dot(load(keys, part), half) for part, half in zip((lower, upper), query, strict=True))
        score = jnp.where(seen[:, None], score * d**-0.5, MASKED)
        higher = jnp.maximum(top, score.max(axis=0))
        kept, weight = jnp.exp(top - higher), jnp.where(seen[:, None], jnp.exp(score - higher), 0)
        out = out * kept + triton.dot(load(values, whole), weight.astype(values.dtype), trans_a=True)
        return higher, total * kept + weight.sum(axis=0), out

    nothing = jnp.zeros(columns, jnp.float32)
    state = (nothing + MASKED, nothing, jnp.zeros((d, columns), jnp.float32))
    top, total, out = jax.lax.fori_loop(0, pl.cdiv(p, _BLOCK), look, state)
    triton.store(out_ref.at[whole, group], out, mask=exist[None])
    triton.store(top_ref.at[group], top, mask=exist)
    triton.store(total_ref.at[group], total, mask=exist)


def _read_own(slot_ref, query_ref, keys, values, read_ref, top_ref, total_ref, out_ref):
    """One query of one sequence goes on after its prompt; references are [D], [N, D] and [1]."""
    d, slot = query_ref.shape[0], slot_ref[0]
    query = query_ref[...].astype(jnp.float32) * d**-0.5

    def look(i: jax.Array, state: tuple) -> tuple:
        rows, (top, total, out) = pl.ds(i * _BLOCK, _BLOCK), state
        seen = i * _BLOCK + jnp.arange(_BLOCK) <= slot
        load = lambda ref: triton.load(ref.at[rows, pl.ds(0, d)], mask=seen[:, None], other=0).astype(jnp.float32)  # noqa: E731
        key, value = load(keys), load(values)
        score = jnp.where(seen, (key * query).sum(axis=1), MASKED)
        higher = jnp.maximum(top, score.max())
        kept, weight = jnp.exp(top - higher), jnp.exp(score - higher)
        return higher, total * kept + weight.sum(), out * kept + (weight[:, None] * value).sum(axis=0)

    state = (top_ref[0], total_ref[0], read_ref[...])
    _, total, out = jax.lax.fori_loop(0, pl.cdiv(slot + 1, _BLOCK), look, state)
    out_ref[...] = (out / total).astype(out_ref.dtype)
