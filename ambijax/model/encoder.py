"""The audio tower: log-mel frames to one embedding per 40 ms (the Whisper encoder plus a pooling by two).

    B clips   M mel frames of the window   F mel bins   T = M / 2 encoder frames   A = T / 2 audio tokens   E width

A window shorter than 3,000 frames is exact as long as two silent frames follow the clip: the two convolutions reach one
frame to the right each, and attention never looks beyond the clip's own frames.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ambijax.model.config import AudioConfig, LoraConfig
from ambijax.model.layers import ACTIVATIONS, Dense, Segment, attention


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer; attends to all frames where `mask` is True."""

    config: AudioConfig
    lora: LoraConfig | None
    attention: str  # xla, or a kernel's name

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        heads = (c.encoder_attention_heads, c.d_model // c.encoder_attention_heads)

        y = nn.LayerNorm(epsilon=1e-5, dtype=x.dtype, name="self_attn_layer_norm")(x)
        q = Dense(c.d_model, True, self.lora, name="q_proj")(y)
        k = Dense(c.d_model, False, self.lora, name="k_proj")(y)
        v = Dense(c.d_model, True, self.lora, name="v_proj")(y)
        q, k, v = (z.reshape(*z.shape[:-1], *heads) for z in (q, k, v))
        k, v = (jnp.einsum("bshd->bhsd", z) for z in (k, v))
        y = attention(q[:, None], [Segment(k, v, mask[:, None, None])], self.attention)[:, 0]
        x += Dense(c.d_model, True, self.lora, name="out_proj")(y.reshape(x.shape))

        y = nn.LayerNorm(epsilon=1e-5, dtype=x.dtype, name="final_layer_norm")(x)
        y = ACTIVATIONS[c.activation_function](Dense(c.encoder_ffn_dim, True, self.lora, name="fc1")(y))
        x += Dense(c.d_model, True, self.lora, name="fc2")(y)
        return x, None


class AudioTower(nn.Module):
    """mel [B, M, F] with valid frames [B] to embeddings [B, A, E]; entries beyond a clip's tokens are undefined."""

    config: AudioConfig
    lora: LoraConfig | None
    attention: str  # xla, or a kernel's name

    @nn.compact
    def __call__(self, mel: jax.Array, frames: jax.Array) -> jax.Array:
        c = self.config
        # The reference runs these two with exact gelu whatever `activation_function` says; so do we.
        x = ACTIVATIONS["gelu"](nn.Conv(c.d_model, (3,), padding=1, dtype=mel.dtype, name="conv1")(mel))
        x = ACTIVATIONS["gelu"](nn.Conv(c.d_model, (3,), strides=2, padding=1, dtype=mel.dtype, name="conv2")(x))
        positions = nn.Embed(c.max_source_positions, c.d_model, name="embed_positions").embedding
        x += positions[: x.shape[1]].astype(x.dtype)

        mask = jnp.arange(x.shape[1]) < ((frames - 1) // 2 + 1)[:, None]
        layers = nn.scan(
            nn.remat(EncoderLayer, prevent_cse=False),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.encoder_layers,
        )
        x, _ = layers(c, self.lora, self.attention, name="layers")(x, mask)

        x = nn.avg_pool(x, (2,), strides=(2,))  # the reference pools first, then normalises
        return nn.LayerNorm(epsilon=1e-5, dtype=x.dtype, name="layer_norm")(x)
