"""Random checkpoints in the layout of the published Qwen2-Audio, for tests of what reads and writes them.

Names and shapes are written down from the published checkpoint, not taken from the table under test.
"""

import json
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ambijax import convert
from ambijax.model import config as model_config
from ambijax.model.qwen2_audio import Qwen2Audio

TINY = {
    "model_type": "qwen2_audio",
    "audio_token_index": 60,
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "d_model": 16,
        "max_source_positions": 20,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000,
    },
}
# What the 7B's config.json fixes; the rest are the architecture's defaults.
PUBLISHED = {
    "model_type": "qwen2_audio",
    "audio_token_index": 151646,
    "audio_config": {
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "max_source_positions": 1500,
    },
    "text_config": {"intermediate_size": 11008, "rms_norm_eps": 1e-5, "rope_theta": 10000, "vocab_size": 156032},
}


def published_names(raw: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape as transformers has written them since 4.45."""
    a = raw["audio_config"]
    t = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32} | raw["text_config"]
    d, f, h, m, v = a["d_model"], a["encoder_ffn_dim"], t["hidden_size"], t["intermediate_size"], t["vocab_size"]
    kv = h * t.get("num_key_value_heads", t["num_attention_heads"]) // t["num_attention_heads"]
    names = {
        "audio_tower.conv1.weight": (d, a["num_mel_bins"], 3),
        "audio_tower.conv1.bias": (d,),
        "audio_tower.conv2.weight": (d, d, 3),
        "audio_tower.conv2.bias": (d,),
        "audio_tower.embed_positions.weight": (a["max_source_positions"], d),
        "audio_tower.layer_norm.weight": (d,),
        "audio_tower.layer_norm.bias": (d,),
        "multi_modal_projector.linear.weight": (h, d),
        "multi_modal_projector.linear.bias": (h,),
        "language_model.model.embed_tokens.weight": (v, h),
        "language_model.model.norm.weight": (h,),
        "language_model.lm_head.weight": (v, h),
    }
    for i in range(a["encoder_layers"]):
        layer = f"audio_tower.layers.{i}"
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj"):
            names |= {f"{layer}.{name}.weight": (d, d), f"{layer}.{name}.bias": (d,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            names |= {f"{layer}.{name}.weight": (d,), f"{layer}.{name}.bias": (d,)}
        names |= {f"{layer}.self_attn.k_proj.weight": (d, d)}
        names |= {f"{layer}.fc1.weight": (f, d), f"{layer}.fc1.bias": (f,)}
        names |= {f"{layer}.fc2.weight": (d, f), f"{layer}.fc2.bias": (d,)}
    for i in range(t["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        for name, out in (("q", h), ("k", kv), ("v", kv)):
            names |= {f"{layer}.self_attn.{name}_proj.weight": (out, h), f"{layer}.self_attn.{name}_proj.bias": (out,)}
        names |= {f"{layer}.self_attn.o_proj.weight": (h, h), f"{layer}.mlp.down_proj.weight": (h, m)}
        names |= {f"{layer}.mlp.gate_proj.weight": (m, h), f"{layer}.mlp.up_proj.weight": (m, h)}
        names |= {f"{layer}.input_layernorm.weight": (h,), f"{layer}.post_attention_layernorm.weight": (h,)}
    return names


def here(params: dict, name: str) -> np.ndarray:
    """The tensor `name` as it lies in our parameters, brought back to the shape it has on disk."""
    parts = [p for p in name.split(".") if p not in ("model", "self_attn", "mlp", "linear")]
    layer = next((int(p) for p in parts if p.isdigit()), None)
    *module, leaf = [p for p in parts if not p.isdigit()]
    node = params
    for part in module:
        node = node[part]
    if leaf == "weight" and isinstance(node, dict):
        node = next(node[k] for k in ("kernel", "scale", "embedding") if k in node)
    elif isinstance(node, dict):
        node = node[leaf]
    value = np.asarray(node if layer is None else node[layer])
    turned = value.ndim > 1 and not any(table in name for table in ("embed", "lm_head"))
    return value.T if turned else value


def random_tensors(raw: dict, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in published_names(raw).items()}
    tensors["multi_modal_projector.linear.bias"][:] = 0  # zeros are easily left out of a store
    return tensors


def new_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a state dict of transformers 5 calls them in memory."""
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "language_model")
        renamed[name if name.startswith("lm_head") else f"model.{name}"] = value
    return renamed


def write(directory: Path, tensors: dict[str, np.ndarray], raw: dict = TINY, shards: int = 1) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def tied(raw: dict) -> dict:
    return raw | {"text_config": raw["text_config"] | {"tie_word_embeddings": True}}


def model_of(raw: dict) -> Qwen2Audio:
    return Qwen2Audio(model_config.from_dict(raw), None, jnp.float32, "nothing_saveable")


MODEL = model_of(TINY)
INDEX = "model.safetensors.index.json"


def load(directory: Path, dtype: str = "float32", **kwargs) -> dict:
    return convert.load(directory, MODEL, dtype=jnp.dtype(dtype), **kwargs)


def assert_equal(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x in flax.traverse_util.flatten_dict(a, sep="/").items():
        y = flax.traverse_util.flatten_dict(b, sep="/")[path]
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path)
