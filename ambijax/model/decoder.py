"""The Qwen2 decoder: token embeddings to hidden states, with keys and values as plain values in and out.

    L layers   B prompts   G sequences that share one prompt   T new tokens   S past tokens
    K key-value heads   D head width

Prefill, teacher forcing, decoding and the forced read-out are one computation: new tokens [B, G, T] attend causally to
each other and to any number of past segments. A segment without a G axis is shared by the group.
"""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ambijax import sharding
from ambijax.model.config import LoraConfig, TextConfig
from ambijax.model.layers import ACTIVATIONS, Dense, RMSNorm, Segment, attention, rope


@flax.struct.dataclass
class Past:
    """Keys and values of earlier tokens, all layers.

    k, v: [L, B, K, S, D] when shared by the group, else [L, B, K, G, S, D], rotated; for `decode` a tuple of L arrays.
    mask: [B, S] or [B, G, S], True where the token exists.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    mask: jax.Array

    @property
    def shared(self) -> bool:
        return self.mask.ndim == 2

    def unstacked(self) -> "Past":
        """With an array for each layer."""
        return self.replace(k=tuple(self.k), v=tuple(self.v))

    def segment(self, k: jax.Array, v: jax.Array) -> Segment:
        """One layer's keys and values (self.k[i], self.v[i]) as an attention segment."""
        return Segment(k, v, self.mask[:, None, None] if self.shared else self.mask[:, :, None])


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer. Returns the new tokens' keys and values beside the hidden states."""

    config: TextConfig
    lora: LoraConfig | None
    weights: str  # of the frozen matrices: float, or int8 with a scale for each output channel
    attention: str  # of the prompt: xla, or a kernel's name

    @nn.compact
    def __call__(self, x: jax.Array, past_kv: tuple, past: tuple[Past, ...], positions: jax.Array, mask: jax.Array):
        c = self.config
        dense = functools.partial(Dense, lora=self.lora, int8=self.weights == "int8")

        y = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        q = dense(c.num_attention_heads * c.head_dim, True, name="q_proj")(y)
        k = dense(c.num_key_value_heads * c.head_dim, True, name="k_proj")(y)
        v = dense(c.num_key_value_heads * c.head_dim, True, name="v_proj")(y)
        q, k, v = (z.reshape(*z.shape[:-1], -1, c.head_dim) for z in (q, k, v))
        q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        k, v = (jnp.einsum("bgtkd->bkgtd", z) for z in (k, v))
        segments = [p.segment(*kv) for p, kv in zip(past, past_kv, strict=True)]
        y = attention(q, [*segments, Segment(k, v, mask, causal=True)], self.attention)
        x += dense(c.hidden_size, False, name="o_proj")(y.reshape(*y.shape[:-2], -1))

        y = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        gate = dense(c.intermediate_size, False, name="gate_proj")(y)
        up = dense(c.intermediate_size, False, name="up_proj")(y)
        x += dense(c.hidden_size, False, name="down_proj")(ACTIVATIONS[c.hidden_act](gate) * up)
        return x, (k, v)


class Decoder(nn.Module):
    """Embedding table, layers, final norm and output head."""

    config: TextConfig
    lora: LoraConfig | None
    weights: str
    attention: str
    remat: str  # name of a jax.checkpoint policy: what a layer keeps for its backward pass

    def setup(self):
        c = self.config
        layer = nn.remat(DecoderLayer, prevent_cse=False, policy=getattr(jax.checkpoint_policies, self.remat))
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_hidden_layers,
        )(c, self.lora, self.weights, self.attention)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = self.param("lm_head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size))

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[...] token ids to [..., hidden] embeddings."""
        return self.embed_tokens.embedding[tokens].astype(dtype)

    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, past: tuple[Past, ...] = ()
    ) -> tuple[jax.Array, Past]:
        """Runs all layers over new tokens.

        Args:
          x: embeddings [B, G, T, hidden].
          positions: [B, G, T] position of each new token in its own sequence.
          mask: [B, G, T], True where the new token exists; padding on either side is fine.
          past: earlier tokens of the same sequences.

        Returns:
          normalised hidden states [B, G, T, hidden], and the new tokens as a `Past` with a G axis.
        """
        x, (k, v) = self.layers(
            sharding.constrain_batch(x), tuple((p.k, p.v) for p in past), past, positions, _causal(mask)
        )
        return self.norm(x), Past(k, v, mask)

    def decode(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, past: tuple[Past, ...], layers: tuple[dict, ...]
    ) -> tuple[jax.Array, Past]:
        """The same for a loop over tokens, one layer after another without a scan.

        A scan over stacked arrays would copy every layer's weights and caches out of the stack at each token. Here each
        layer's are arrays of their own: `layers` are its variables, `past` is unstacked, and so is what is returned.
        """
        layer = DecoderLayer(self.config, self.lora, self.weights, self.attention, parent=None)
        x, causal, new = sharding.constrain_batch(x), _causal(mask), []
        for i, variables in enumerate(layers):
            x, kv = layer.apply(variables, x, tuple((p.k[i], p.v[i]) for p in past), past, positions, causal)
            new.append(kv)
        k, v = zip(*new, strict=True)
        return self.norm(x), Past(k, v, mask)

    def head(self) -> jax.Array:
        """The output matrix [hidden, vocabulary]."""
        return self.embed_tokens.embedding.T if self.config.tie_word_embeddings else self.lm_head


def _causal(mask: jax.Array) -> jax.Array:
    """Which new tokens [B, G, T] see which: [B, G, T, T]."""
    steps = jnp.arange(mask.shape[2])
    return (steps[:, None] >= steps) & mask[:, :, None, :]
