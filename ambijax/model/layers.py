"""Layers shared by the audio tower and the decoder.

B batch   G sequences that share one prompt   T new tokens   S keys of a segment
H query heads   K key-value heads   R = H / K   D head width
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ambijax import activations
from ambijax.model import cpu_kernels, kernels, lora
from ambijax.model.config import LoraConfig
from ambijax.model.cpu_kernels import PRODUCT

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}

MASKED = -1e30  # finite, so that a query whose keys are all masked (padding) stays finite


def keep(remat: str) -> Callable[..., bool]:
    """What a layer keeps for its backward pass: 'products_saveable', or the name of a policy of `jax.checkpoint`.

    'products_saveable' keeps the output of every matrix product and of attention once, adapter included, and computes
    what is cheap again: norms, rope, activations, the weights of attention.
    """
    if remat == "products_saveable":
        return jax.checkpoint_policies.save_only_these_names(PRODUCT)
    policy = getattr(jax.checkpoint_policies, remat)
    # A layer's weights, read out of a stack, are never kept: together they would be the stack a second time.
    return lambda primitive, *args, **kwargs: (
        primitive is not jax.lax.dynamic_slice_p and policy(primitive, *args, **kwargs)
    )


class Dense(nn.Module):
    """y = x W + b, plus scale * dropout(x) A B where the collection 'lora' holds an adapter for this layer.

    Base weights live in 'params', adapters in 'lora'. Applying the model without 'lora' is the base model, which is
    how the reference policy is computed: same weights, no copy, no flag.

    With `int8` the kernel is int8 and 'scale' has a number for each output channel (`quantize`): W = Q s, and since s
    leaves the sum over inputs, x W = (x Q) s exactly. Nothing but x gets a gradient through them.
    """

    features: int
    use_bias: bool
    lora: LoraConfig | None = None
    int8: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, known: tuple[jax.Array, ...] = (), after: int = 0) -> jax.Array:
        """[..., in] to [..., out]; what is known of it is not computed again, see `activations.product`."""
        shape, scale = (x.shape[-1], self.features), None
        if self.int8:
            kernel = self.param("kernel", nn.initializers.zeros_init(), shape, jnp.int8)
            scale = self.param("scale", nn.initializers.ones_init(), shape[1:])
        else:
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[1:]) if self.use_bias else None
        adapter = self._adapter(x) if self.lora and (self.has_variable("lora", "a") or self.is_initializing()) else ()

        def multiply(x: jax.Array) -> jax.Array:
            y = self._product(x, kernel.astype(x.dtype), scale, *adapter)
            return checkpoint_name(y if bias is None else y + bias.astype(x.dtype), PRODUCT)

        return activations.product(multiply, x, known, after)

    def _product(self, x: jax.Array, kernel: jax.Array, scale: jax.Array | None, *adapter: jax.Array) -> jax.Array:
        """x W, and what the adapter adds to it."""
        plain = lambda: x @ kernel if scale is None else (x @ kernel) * scale.astype(x.dtype)  # noqa: E731
        if not adapter:
            return plain()
        a, b = adapter
        drops = self.lora.dropout > 0 and self.has_rng("dropout")
        if lora.merges(x.dtype) and scale is None and not drops:
            return lora.merged(x, kernel, a, self.lora.scale * b)
        return plain() + self.lora.scale * lora.apart(Dropout(self.lora.dropout)(x) if drops else x, a, b)

    def _adapter(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A [in, r] and B [r, out]. PEFT's default: A uniform in +-1/sqrt(in), B zero: the start is the base model."""
        fan_in, rank = x.shape[-1], self.lora.rank

        def uniform() -> jax.Array:
            key = self.make_rng("params")
            return jax.random.uniform(key, (fan_in, rank), minval=-(fan_in**-0.5), maxval=fan_in**-0.5)

        a = self.variable("lora", "a", uniform).value
        b = self.variable("lora", "b", lambda: jnp.zeros((rank, self.features))).value
        return a.astype(x.dtype), b.astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes entries of x with probability `rate` and divides the others by 1 - rate."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        # Behind a barrier the draw is an array. Without one, XLA for TPUs puts the generator's twenty rounds into every
        # product that reads x, and a 7B update takes many times as long to compile (docs/log.md).
        return jnp.where(jax.lax.optimization_barrier(keep), x / (1 - self.rate), 0)


def quantize(x: jax.Array, axis: int = -2) -> tuple[jax.Array, jax.Array]:
    """X to Q, int8 like it, and s in X's dtype without `axis`, X ~ Q s: the largest entry along `axis` becomes +-127.

    A matrix [..., in, out] gets a scale for each output channel. Q is taken against s as it is stored, so that rounding
    s to bfloat16 costs nothing.
    """
    largest = jnp.max(jnp.abs(x), axis=axis).astype(jnp.float32)
    scale = (jnp.where(largest > 0, largest, 1.0) / 127).astype(x.dtype)
    steps = jnp.round(x.astype(jnp.float32) / jnp.expand_dims(scale, axis).astype(jnp.float32))
    return jnp.clip(steps, -127, 127).astype(jnp.int8), scale


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich, arXiv 1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.param("scale", nn.initializers.ones_init(), (x.shape[-1],)), self.epsilon)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, axis: int = -1) -> jax.Array:
    """`RMSNorm` over the first axis or the last, with `scale` of that axis."""
    # Without axes of size one: beside one, XLA on a CPU takes many times as long for the gradient's sums (docs/log.md).
    x32 = x.astype(jnp.float32).reshape([n for n in x.shape if n > 1])
    x32 *= jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axis, keepdims=True) + epsilon)
    across = [i for i in range(x.ndim) if i != axis % x.ndim]
    return jnp.expand_dims(scale.astype(x.dtype), across) * x32.astype(x.dtype).reshape(x.shape)


def rotation(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the angles by which `rope` turns, float32 [..., 1, D / 2] each; the same in every layer.

    Args:
      positions: [...] integers.
      width: D, of a head.
      theta: base of the geometric series of wavelengths.
    """
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # in bfloat16 wrong from position 257
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), halves convention of Qwen2, in float32.

    Args:
      x: [..., heads, D].
      turn: of x's positions, see `rotation`.
    """
    cos, sin = turn
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


class Segment(NamedTuple):
    """Keys and values that queries may attend to.

    k, v: [B, K, S, D] when the G sequences share them (the prompt), [B, K, G, S, D] when each has its own. Heads come
      first, as the products want them: a cache is never turned around.
    mask: True where a query may look, broadcastable to [B, G, T, S].
    causal: these are the queries' own tokens, and none looks ahead; the mask says so, too.
    """

    k: jax.Array
    v: jax.Array
    mask: jax.Array
    causal: bool = False


def attention(q: jax.Array, segments: Sequence[Segment], implementation: str = "xla") -> jax.Array:
    """Softmax attention over the concatenation of several key segments, without concatenating the keys.

    This is what lets a group compute its prompt once: the prompt's keys are one segment that all G sequences read,
    their own tokens another, and no key is ever copied G times.

    Args:
      q: [B, G, T, H, D], already rotated.
      segments: at least one.
      implementation: 'xla', or the fused kernel that whole sequences attend to themselves by (kernels.py).

    Returns:
      [B, G, T, H, D] in q's dtype; scores and softmax are float32.
    """
    b, g, t, h, d = q.shape
    if implementation != "xla" and len(segments) == 1 and segments[0].k.shape[-2] == t:
        return checkpoint_name(_fused(q, segments[0], kernels.KERNELS[implementation]), PRODUCT)
    keys, values, masks, _ = zip(*segments, strict=True)
    if cpu_kernels.serves(q.dtype, d):
        return cpu_kernels.attend(q, keys, values, masks)
    kv_heads = segments[0].k.shape[1]
    # Batch axes first, and the rows that share keys side by side: one large product for a shared segment.
    q = jnp.einsum("bgtkrd->bkgrtd", q.reshape(b, g, t, kv_heads, h // kv_heads, d) * d**-0.5)
    out = _attention(q, keys, values, tuple(mask[:, None, :, None] for mask in masks))
    return jnp.einsum("bkgrtd->bgtkrd", out).reshape(b, g, t, h, d)


@jax.custom_vjp
def _attention(q: jax.Array, keys: tuple, values: tuple, masks: tuple) -> jax.Array:
    """q [B, K, G, R, T, D], scaled; masks broadcastable to [B, K, G, R, T, S] -> [B, K, G, R, T, D]."""
    return _attention_forward(q, keys, values, masks)[0]


def _attention_forward(q: jax.Array, keys: tuple, values: tuple, masks: tuple) -> tuple[jax.Array, tuple]:
    scores = _scores(q, keys, masks)
    top = functools.reduce(jnp.maximum, (s.max(axis=-1, keepdims=True) for s in scores))
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
    # Divided after the product: a number for each channel of a head instead of one for each key.
    out = sum(_over_keys(w.astype(q.dtype), v, jnp.float32) for w, v in zip(weights, values, strict=True)) / total
    out, top, total = (checkpoint_name(z, PRODUCT) for z in (out.astype(q.dtype), top, total))
    return out, (q, keys, values, masks, out, top, total)


def _attention_backward(saved: tuple, by_out: jax.Array) -> tuple:
    """With P = softmax(S), S = Q K^T, O = P V:  dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = dS K,  dK = dS^T Q.

    P is computed again from a row's largest score and sum (arXiv 2205.14135), so that no policy of `jax.checkpoint`
    keeps it. The sum over a row of P dP is taken as that of dO O, a number a query instead of a pass over all scores.
    """
    q, keys, values, masks, out, top, total = saved
    center = jnp.sum(by_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    by_q, by_keys, by_values = 0, [], []
    for k, v, s in zip(keys, values, _scores(q, keys, masks), strict=True):
        weights = jnp.exp(s - top) / total
        by_scores = (weights * (_by_key(by_out, v) - center)).astype(q.dtype)
        by_q += _over_keys(by_scores, k, q.dtype)
        by_keys.append(_over_queries(by_scores, q, k))
        by_values.append(_over_queries(weights.astype(q.dtype), by_out, v))
    return by_q, tuple(by_keys), tuple(by_values), None


_attention.defvjp(_attention_forward, _attention_backward)


def _own(k: jax.Array) -> str:
    """The axis G of keys that each sequence has for itself."""
    return "g" * (k.ndim == 5)


def _scores(q: jax.Array, keys: tuple, masks: tuple) -> list[jax.Array]:
    return [jnp.where(mask, _by_key(q, k), MASKED) for k, mask in zip(keys, masks, strict=True)]


def _by_key(x: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum(f"bkgrtd,bk{_own(k)}sd->bkgrts", x, k, preferred_element_type=jnp.float32)


def _over_keys(weights: jax.Array, v: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(f"bkgrts,bk{_own(v)}sd->bkgrtd", weights, v, preferred_element_type=dtype)


def _over_queries(weights: jax.Array, x: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.einsum(f"bkgrts,bkgrtd->bk{_own(like)}sd", weights, x)


def _fused(q: jax.Array, own: Segment, kernel: Callable) -> jax.Array:
    """`attention` to one segment of the sequences themselves, T = S."""
    b, g, t, h, d = q.shape
    k, v = (jnp.einsum("bkgsd->bgskd", z.reshape(b, -1, g, t, d)).reshape(b * g, t, -1, d) for z in (own.k, own.v))
    mask = jnp.broadcast_to(own.mask, (b, g, t, t)).reshape(b * g, t, t)
    return kernel(q.reshape(b * g, t, h, d), k, v, mask, own.causal).reshape(q.shape)
