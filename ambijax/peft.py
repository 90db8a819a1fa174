"""LoRA adapters as PEFT keeps them, both ways: adapter_config.json and adapter_model.safetensors.

    PEFT   A [r, in], B [out, r]         base_model.model.language_model.model.layers.3.mlp.up_proj.lora_A.weight
    here   a [L, in, r], b [L, r, out]   language_model/layers/up_proj/a, layers stacked

The names, and the expression that says which modules are adapted, are those that load under transformers 4.57 and 5
alike. A plain list of module names would hit the audio tower too, and an adapter on the tower, or one named as
transformers 5 names modules in memory, loads under one of the two without a word and does nothing. So only the
decoder's adapters are written; reading accepts both spellings.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import flax.traverse_util
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ambijax import hugging_face
from ambijax.errors import ConfigError
from ambijax.hugging_face import some
from ambijax.model.config import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUMS = "SHA256SUMS"  # beside what was exported

_PREFIX = "base_model.model."
# Our module -> theirs: 'language_model/layers/up_proj' -> 'language_model.model.layers.{}.mlp.up_proj'
_MODULES = {
    row.path.removesuffix("/kernel"): row.key.removesuffix(".weight")
    for row in hugging_face.TABLE
    if row.path.startswith("language_model/layers/") and row.path.endswith("_proj/kernel")
}
_TOWER = "audio_tower"
# What PEFT can do and this model cannot: the value that says it is off.
_OFF = {
    **{"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none"},
    **{"use_qalora": False, "alora_invocation_tokens": None, "modules_to_save": None, "layers_to_transform": None},
    **{"rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None, "use_bdlora": None, "kasa_config": None},
    **{"velora_config": None, "monteclora_config": None, "arrow_config": None, "target_parameters": None},
    "trainable_token_indices": None,
}
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # other ways to begin (PiSSA, OLoRA, ...) change the base


def is_directory(path: str | Path) -> bool:
    """Whether a PEFT adapter lies there."""
    return (Path(path) / CONFIG).is_file()


def save(lora: dict, directory: Path, config: LoraConfig, base_model: str) -> None:
    """Writes adapters into a directory that exists.

    Args:
      lora: the collection 'lora', host arrays.
      directory: gets the two files.
      config: rank and alpha of the adapters.
      base_model: path or hub name of the weights they belong to, for `base_model_name_or_path`.

    Raises:
      ConfigError: there are adapters on the audio tower.
    """
    flat = flax.traverse_util.flatten_dict(lora, sep="/")
    if any(path.startswith(_TOWER) for path in flat):
        raise ConfigError(
            "adapters on the audio tower load without a word and do nothing in some versions of transformers; "
            "use --format merged"
        )
    tensors = {}
    for path, values in flat.items():
        module, leaf = path.rsplit("/", 1)
        for layer, value in enumerate(np.asarray(values)):
            key = f"{_PREFIX}{_MODULES[module].format(layer)}.lora_{leaf.upper()}.weight"
            tensors[key] = np.ascontiguousarray(value.T)
    names = "|".join(name.rsplit("/", 1)[1] for name in _MODULES if f"{name}/a" in flat)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf".*language_model.*\.({names})",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(directory / CONFIG, directory / WEIGHTS)  # safetensors lets only its owner read a file


def describe(directory: str | Path) -> tuple[LoraConfig, str]:
    """(rank and alpha, `base_model_name_or_path`) of a PEFT adapter.

    Raises:
      ConfigError: no adapter, or one of a kind that this model does not compute.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ConfigError(f"no PEFT adapter in {directory}: {path} does not exist")
    about = hugging_face.read_json(path)
    if about.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {about.get('peft_type')!r}; only LORA can be read")
    odd = [f"{key}={about[key]!r}" for key, off in _OFF.items() if (about.get(key) or off) != off]
    if (begun := about.get("init_lora_weights", True)) not in _INITIAL:
        odd.append(f"init_lora_weights={begun!r}")
    if odd:
        raise ConfigError(f"{path}: this model has no {', '.join(odd)}; merge the adapter with PEFT and use the result")
    rank, alpha = about.get("r"), about.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise ConfigError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be numbers")
    base = about.get("base_model_name_or_path") or ""
    return LoraConfig(rank=rank, alpha=float(alpha), dropout=0.0, audio_tower=False), base


def load(directory: str | Path, config: LoraConfig) -> dict:
    """Reads a PEFT adapter as the collection 'lora', float32 numpy arrays.

    Args:
      directory: written by `save`, or by PEFT's `save_pretrained` under transformers 4 or 5.
      config: what the model is built with; rank and alpha must be the adapter's.

    Raises:
      ConfigError: damaged, not finite, of another rank or alpha, without a pair in some layer of a projection, or not
        what SHA256SUMS beside it says.
    """
    theirs, _ = describe(directory)
    if (theirs.rank, theirs.alpha) != (config.rank, config.alpha):
        both = (
            f"r={theirs.rank}, lora_alpha={theirs.alpha:g} there, lora.rank={config.rank}, lora.alpha={config.alpha:g}"
        )
        raise ConfigError(f"{directory} does not fit: {both} here; set lora.* to the adapter's")
    path = Path(directory) / WEIGHTS
    hint = "pickles are never read, save as safetensors" if path.with_suffix(".bin").is_file() else "copy it again"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; {hint}")
    try:
        found = load_file(path)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype numpy has not
        raise ConfigError(f"{path} is cut short or not safetensors ({error}); copy it again") from None
    tensors = {hugging_face.old_name(key.removeprefix(_PREFIX)): value for key, value in found.items()}
    layers = 1 + max((int(n) for key in tensors for n in re.findall(r"\.layers\.(\d+)\.", key)), default=-1)
    if layers > len(tensors):
        raise ConfigError(f"{path}: a tensor of layer {layers - 1:.20g} among {len(tensors)}; copy it again")
    lora = {}
    for module, name in _MODULES.items():
        if not any(f"{name.format(layer)}.lora_{leaf}.weight" in tensors for layer in range(layers) for leaf in "AB"):
            continue  # adapted are some projections, in all layers
        for leaf in ("a", "b"):
            keys = [f"{name.format(layer)}.lora_{leaf.upper()}.weight" for layer in range(layers)]
            if missing := [key for key in keys if key not in tensors]:
                raise ConfigError(
                    f"{path}: {len(missing)} missing tensors ({some(missing)}); "
                    "a projection that is adapted needs its pair in every layer"
                )
            values = [tensors.pop(key) for key in keys]
            if len({v.shape for v in values}) > 1 or any(v.ndim != 2 for v in values):
                raise ConfigError(f"{path}: {module} has layers of different shapes")
            lora[f"{module}/{leaf}"] = np.stack([v.T for v in values]).astype(np.float32)
            if not np.isfinite(lora[f"{module}/{leaf}"]).all():
                raise ConfigError(f"{path}: {module} holds NaN or infinity; export the adapter again")
    if not lora and not tensors:
        raise ConfigError(f"{path} holds no adapter; copy it again")
    if tensors:
        raise ConfigError(f"{path}: {len(tensors)} tensors that this model has no place for ({some(tensors)})")
    _check_sums(path.parent)
    return flax.traverse_util.unflatten_dict(lora, sep="/")


def _check_sums(directory: Path) -> None:
    sums = directory / SUMS
    lines = sums.read_text(errors="replace").splitlines() if sums.is_file() else ()
    told = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    for file in (directory / CONFIG, directory / WEIGHTS):
        if file.name in told and hashlib.sha256(file.read_bytes()).hexdigest() != told[file.name]:
            advice = f"copy it again, or remove {sums} if it was changed on purpose"
            raise ConfigError(f"{file} is not what was exported; {advice}")
