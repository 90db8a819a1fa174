"""Self-attention by a fused kernel: cuDNN's on a GPU, splash attention on a TPU.

What a kernel can take is a sequence that attends to itself: the prompt, and the audio tower. A group's completions
attend to the prompt that they share and to themselves: one softmax over two sets of keys, which no kernel has.

    N sequences   T tokens   H query heads   K key-value heads   D head width
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ambijax import sharding

PLATFORMS = {"cudnn": "gpu", "splash": "tpu", "triton": "gpu"}  # where each runs; triton is decode_kernel.py
WIDTHS = (32, 64, 128, 256)  # of heads for triton: powers of two, of whose halves matrix units make products
_LANES = 128  # of a TPU; the length of a sequence must be a multiple


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, causal: bool, implementation: str = "cudnn"
) -> jax.Array:
    """[N, T, H, D] from q like it, k and v [N, T, K, D] and mask [N, T, T], True where a query may look.

    Args:
      q, k, v: rotated, not scaled.
      mask: `causal` is part of it.
      causal: not needed here.
      implementation: of `jax.nn.dot_product_attention`; 'xla' takes the same arguments on any device.
    """
    del causal
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, causal: bool, interpret: bool = False
) -> jax.Array:
    """The same by Pallas; `causal` must be known beforehand, and which tokens exist is read from the mask.

    A token that does not exist sees others of its kind instead of nothing.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, h, d = q.shape[1:]
    size = -(-t // _LANES) * _LANES
    exists = jnp.pad(mask.any(axis=1), [(0, 0), (0, size - t)]).astype(jnp.int32)
    q, k, v = (jnp.pad(z, [(0, 0), (0, size - t), (0, 0), (0, 0)]) for z in (q * d**-0.5, k, v))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, exists: jax.Array) -> jax.Array:
        one = masks.CausalMask((size, size)) if causal else masks.FullMask((size, size))
        every = masks.MultiHeadMask([one] * q.shape[2])
        attend = kernel.make_splash_mha(every, head_shards=1, q_seq_shards=1, interpret=interpret)
        q, k, v = (jnp.einsum("nthd->nhtd", z) for z in (q, k, v))
        out = jax.vmap(lambda q, k, v, ids: attend(q, k, v, kernel.SegmentIds(ids, ids)))(q, k, v, exists)
        return jnp.einsum("nhtd->nthd", out)

    return _split(run, h, k.shape[2])(q, k, v, exists)[:, :t]


def _split(run: Callable, heads: int, kv_heads: int) -> Callable:
    """`run` on each device's sequences and heads: XLA cannot split a Pallas kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    by_heads = heads % mesh.shape["tensor"] == kv_heads % mesh.shape["tensor"] == 0
    tokens = sharding.partition("batch", None, "heads" if by_heads else None, None)
    specs = (tokens, tokens, tokens, sharding.partition("batch", None))
    return jax.shard_map(run, in_specs=specs, out_specs=tokens, check_vma=False)


KERNELS = {"cudnn": cudnn, "splash": splash}
