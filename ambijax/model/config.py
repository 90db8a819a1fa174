"""The shape of a Qwen2-Audio, read from a Hugging Face `config.json`.

The published 7B file leaves most fields out, so the defaults below are those of transformers' `Qwen2AudioConfig`.
"""

import dataclasses
import json
from pathlib import Path

from ambijax.errors import ConfigError

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")  # implemented in layers.py
LAYERS_MAX = 1000  # more are a mistake of a file, which would be made room for
MOST = {int: 2**24, float: 1e15}  # of anything else, likewise


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """The Whisper-like audio tower."""

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    max_source_positions: int = 1500  # encoder frames of a 30 s window, two mel frames each
    activation_function: str = "gelu"


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The Qwen2 decoder."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): y = W x + alpha / rank * B A x."""

    rank: int
    alpha: float
    dropout: float  # on the adapter's input, active only when a 'dropout' key is given
    audio_tower: bool  # adapters on the tower's projections too

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Qwen2AudioConfig:
    """Everything that fixes the parameter shapes and the computation."""

    audio: AudioConfig = AudioConfig()
    text: TextConfig = TextConfig()
    audio_token: int = 151646


def _fields(cls: type, values: dict) -> dict:
    """The entries of `values` that `cls` knows and that are set.

    Raises:
      ConfigError: one is of another type, or no size or number that a model could have.
    """
    found = {}
    for field in dataclasses.fields(cls):
        kind, value = type(field.default), values.get(field.name)
        if value is None:
            continue
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise ConfigError(f"{field.name} is {value!r:.60}, which is no {kind.__name__}")
        if kind in MOST and not 0 < value <= MOST[kind]:
            raise ConfigError(f"{field.name} is {value!r:.60}; it must be above 0 and at most {MOST[kind]:g}")
        found[field.name] = value
    return found


def from_dict(raw: dict) -> Qwen2AudioConfig:
    """A Hugging Face Qwen2-Audio config, as parsed JSON, to ours.

    Raises:
      ConfigError: another architecture, or a feature that this model does not have.
    """
    if raw.get("model_type") != "qwen2_audio":
        raise ConfigError(f"model_type is {raw.get('model_type')!r}; this package runs 'qwen2_audio' checkpoints")
    text = dict(raw.get("text_config") or {})
    audio = dict(raw.get("audio_config") or {})
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(f"text_config: rope type {rope_type!r} is not supported, only 'default'")
    if text.get("use_sliding_window"):
        raise ConfigError("text_config: use_sliding_window is not supported")
    for part in (text.get("hidden_act"), audio.get("activation_function")):
        if part not in (None, *ACTIVATIONS):
            raise ConfigError(f"the activation {part!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if rope.get("rope_theta") is not None:  # the newer place, which transformers prefers
        text["rope_theta"] = rope["rope_theta"]
    text.setdefault("tie_word_embeddings", raw.get("tie_word_embeddings"))
    known = _fields(TextConfig, text)
    known.setdefault("hidden_size", TextConfig.hidden_size)
    known.setdefault("num_attention_heads", TextConfig.num_attention_heads)
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    known.setdefault("head_dim", known["hidden_size"] // known["num_attention_heads"])
    heard, token = AudioConfig(**_fields(AudioConfig, audio)), raw.get("audio_token_index") or raw.get("audio_token_id")
    if known["num_attention_heads"] % known["num_key_value_heads"]:
        raise ConfigError("text_config: num_attention_heads must be a multiple of num_key_value_heads")
    if known["head_dim"] < 2 or known["head_dim"] % 2:
        raise ConfigError(f"text_config: a head of width {known['head_dim']} cannot be rotated; it must be even")
    if heard.d_model % heard.encoder_attention_heads:
        raise ConfigError("audio_config: d_model must be a multiple of encoder_attention_heads")
    if token is not None and not isinstance(token, int):
        raise ConfigError(f"audio_token_index is {token!r:.60}, which is no token")
    if not 1 <= known.get("num_hidden_layers", 1) <= LAYERS_MAX or not 1 <= heard.encoder_layers <= LAYERS_MAX:
        raise ConfigError(f"num_hidden_layers and encoder_layers must be 1 to {LAYERS_MAX}")
    return Qwen2AudioConfig(
        audio=heard,
        text=TextConfig(**known),
        audio_token=token or Qwen2AudioConfig.audio_token,
    )


def load(directory: str | Path) -> Qwen2AudioConfig:
    """Reads `directory/config.json`.

    Raises:
      ConfigError: no such file, or not a Qwen2-Audio.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        get = "`hf download Qwen/Qwen2-Audio-7B-Instruct --local-dir DIR` makes such a directory"
        raise ConfigError(f"no model at {directory}: {path} does not exist; {get}")
    try:
        return from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: not the configuration of a Qwen2-Audio ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
