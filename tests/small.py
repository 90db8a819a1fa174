"""A Qwen2-Audio of a few thousand random parameters, and prompts for it, for tests of everything above the model."""

import jax
import jax.numpy as jnp
import numpy as np

from ambijax.model import config as model_config
from ambijax.model import qwen2_audio
from ambijax.policy import Tokens
from ambijax.structs import Completions, Prompt

VOCABULARY = 64
AUDIO = 60
TOKENS = Tokens(ends=(1, 0), pad=0, classes=(10, 11, 12), anchor=(5, 6), forced=(4, 5, 6), newline=4)
ENDS_LINE = np.isin(np.arange(VOCABULARY), [4, 7])


def model(
    *,
    dropout: float = 0.0,
    dtype: str = "float32",
    vocabulary: int = VOCABULARY,
    audio_token: int = AUDIO,
    audio_tower: bool = False,
    layers: int = 3,
) -> qwen2_audio.Qwen2Audio:
    """Grouped key-value heads; wide enough to shard eight ways."""
    shape = model_config.Qwen2AudioConfig(
        audio=model_config.AudioConfig(
            num_mel_bins=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=16
        ),
        text=model_config.TextConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=8,
        ),
        audio_token=audio_token,
    )
    lora = model_config.LoraConfig(rank=4, alpha=8.0, dropout=dropout, audio_tower=audio_tower)
    return qwen2_audio.Qwen2Audio(shape, lora, jnp.dtype(dtype), "nothing_saveable")


def variables(m: qwen2_audio.Qwen2Audio) -> dict:
    """Random weights and adapters that do something. Larger ones would make gradients chaotic: at six times this
    size a relative change of 1e-6 in the adapters moves them by 1e-2, and no two summation orders agree."""
    # numpy's: JAX's takes longer to compile than a roll-out. With this seed greedy completions do not end early.
    rng = np.random.default_rng(6)
    wide = {"a": 0.05, "b": 0.05, "scale": 0.1, "embedding": 0.4, "lm_head": 0.2}  # logits that differ

    def draw(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        drawn = wide.get(name, 0.04) * rng.standard_normal(like.shape)
        return jnp.asarray(1 + drawn if name == "scale" else drawn, like.dtype)

    return jax.tree.map_with_path(draw, qwen2_audio.shapes(m))


def prompts(b: int, seed: int = 0) -> Prompt:
    """Prompts of different lengths, each with audio, padded on the right."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, 13, b)
    tokens = rng.integers(8, 50, (b, 12))
    tokens[:, 2:5] = AUDIO
    tokens[np.arange(b), lengths - 1] = TOKENS.newline
    mask = np.arange(12) < lengths[:, None]
    return Prompt(
        tokens=np.where(mask, tokens, TOKENS.pad).astype(np.int32),
        mask=mask,
        example=np.arange(b, dtype=np.int32),
        audio=rng.normal(size=(b, 4, 32)).astype(np.float32),
    )


def completions(b: int, g: int, t: int, seed: int = 0) -> Completions:
    """Random completions of different lengths with an anchor somewhere."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(t // 2, t + 1, (b, g))
    tokens = rng.integers(8, 50, (b, g, t)).astype(np.int32)
    return Completions(tokens=tokens, mask=np.arange(t) < lengths[..., None], anchor=(lengths - 3).astype(np.int32))
