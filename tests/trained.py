"""Run directories made without training: the shipped tiny model, and random adapters that change what it says."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ambijax
from ambijax import checkpoint, convert, prompt, settings
from ambijax.model import config as model_config
from ambijax.model import qwen2_audio

TINY = Path(ambijax.__file__).parent / "tiny"


def make(directory: Path, *flags: str, base: bool = False, seed: int = 0) -> Path:
    """A run directory with one checkpoint at step 3.

    Args:
      directory: to create.
      flags: further command line flags, '--config.lora.rank=4' say.
      base: the base weights were trained, not the adapters.
      seed: of the weights.
    """
    arguments = ["t", "--config=configs/sft.py:tiny", f"--workdir={directory}", "--config.steps=3", *flags]
    config, _ = settings.parse(arguments)
    directory.mkdir(parents=True)
    settings.save(config, directory)
    shape = model_config.load(TINY)
    model = qwen2_audio.Qwen2Audio(shape, model_config.LoraConfig(**config.lora), jnp.float32, "nothing_saveable")
    rng = np.random.default_rng(seed)
    if base:
        params = convert.load(TINY, model, dtype=jnp.float32)
        trained = {"params": jax.tree.map(lambda x: x * (1 + 0.02 * rng.standard_normal(x.shape, np.float32)), params)}
    else:
        like = qwen2_audio.shapes(model)["lora"]
        trained = {"lora": jax.tree.map(lambda x: 0.05 * jnp.asarray(rng.standard_normal(x.shape, np.float32)), like)}
    with checkpoint.Checkpoints(directory / "checkpoints", keep=1) as saved:
        meta = {"base": convert.digest(TINY), "tokenizer": prompt.digest(TINY), "lora": config.lora.to_dict()}
        saved.save(3, {checkpoint.TRAINED: trained}, meta)
    return directory


def wavs(directory: Path, seconds: tuple[float, ...] = (0.9, 1.6, 2.2), seed: int = 0) -> list[Path]:
    """Gliding, pulsing tones in noise."""
    import soundfile

    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"clip{i}.wav" for i in range(len(seconds))]
    for path, length in zip(paths, seconds, strict=True):
        t = np.arange(int(length * 16000)) / 16000
        pitch, glide, pulse = rng.uniform((90, -30, 2), (260, 60, 7))
        voice = np.sin(2 * np.pi * (pitch + glide * t) * t) * (1 + np.sin(2 * np.pi * pulse * t))
        soundfile.write(path, 0.2 * voice + 0.01 * rng.normal(size=t.size), 16000)
    return paths
