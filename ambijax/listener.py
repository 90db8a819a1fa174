"""A model that listens: a run, an export or a checkpoint, opened to predict distributions for any clip.

>>> import ambijax
>>> model = ambijax.load("runs/tiny")  # doctest: +SKIP
>>> model.predict("clip.wav").distribution  # doctest: +SKIP
{'anger': 0.62, 'happiness': 0.05, ...}
"""

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from ambijax import (
    agent,
    assemble,
    audio,
    data,
    features,
    hugging_face,
    metrics,
    peft,
    prompt,
    reasoning,
    rules,
    settings,
    sharding,
)
from ambijax.agent import Setting
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from ambijax.model.config import LoraConfig
from ambijax.structs import Prompt

ABOUT = "ambijax.json"  # in an exported directory: how the model is asked
FORMAT = 1  # of it
# How a checkpoint is asked that says nothing of itself: as configs/base.py asks one that is trained.
_UNTOLD = {
    "cot": True,
    "style": "steps",
    "max_tokens": 256,
    "windows": [256, 512, 768, 1024, 1536, 2048, 3000],
    "temperature": 1.0,
    "batch_size": 16,
}
_SETTINGS = {  # what each of them is in a run
    **{key: f"data.{key}" for key in ("labels", "cot", "max_tokens", "windows")},
    **{"style": "prompt.style", "temperature": "readout.temperature"},
    **{"batch_size": "eval.batch_size", "dtype": "model.dtype"},
}
_OPTIONS = {  # of a prediction, each held to the bounds of a run's setting
    **{"batch_size": "eval.batch_size", "samples": "dpo.samples"},
    **{"temperature": "dpo.temperature", "seed": "seed"},
}
_NO_LORA = LoraConfig(rank=1, alpha=1.0, dropout=0.0, audio_tower=False)  # of a model without adapters: unused
_MESH = {"data": 1, "fsdp": -1, "tensor": 1}  # of the devices that are here, whatever it was trained on
_CHUNK = 32  # positions per slice of vocabulary logits, where class words of several tokens are scored; bounds memory
_NO_BATCH = 0  # of training, which does not happen; a multiple of any mesh
_NO_PARTS = {"accumulate": 1, "micro_batch": 0}  # of it


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model makes of one clip."""

    distribution: dict[str, float]  # with several samples, their mean
    reasoning: str  # the chain of thought, without the answer line; with several samples, the first
    entropy: float  # of the distribution, bits
    forced: bool  # that reasoning never came to an answer; the answer anchor was appended for it


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model ready to predict. Made by `load`."""

    setting: Setting
    variables: dict

    def predict(
        self,
        clips: str | Path | np.ndarray | Iterable[str | Path | np.ndarray],
        transcripts: str | Iterable[str | None] | None = None,
        *,
        batch_size: int | None = None,
        samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Prediction | list[Prediction]:
        """Listens to one clip, or to several. A clip's prediction does not depend on the others in the batch.

        Args:
          clips: sound file, or float samples [n] at 16 kHz; or a list, iterator or column of such.
          transcripts: what is said, for a list one each; '' or None: the model is told that no transcript is given.
          batch_size: clips at once; None is the setting's. It changes speed and memory, not the numbers.
          samples: 1 writes the likeliest chain of thought; more draw as many, and the distribution is their mean.
          temperature: of the drawing, unused with one sample.
          seed: of the drawing; what is drawn for a clip depends on it and on the clip alone.

        Returns:
          a prediction for one clip, a list for a list.

        Raises:
          ConfigError: an option is out of bounds, transcripts are not as many as clips, or one of either is no such.
          DataError: a clip cannot be heard; names it.
        """
        if isinstance(clips, np.ndarray) and clips.dtype.kind in "OU":  # a column of paths
            clips = clips.tolist()
        if isinstance(clips, str | Path | np.ndarray):
            alone = None if transcripts is None else [transcripts]
            options = {"batch_size": batch_size, "samples": samples, "temperature": temperature, "seed": seed}
            return self.predict([clips], alone, **options)[0]
        check(batch_size=batch_size, samples=samples, temperature=temperature, seed=seed)
        size = batch_size or self.setting.config.eval.batch_size
        clips = list(clips)
        transcripts = [""] * len(clips) if transcripts is None else transcripts
        transcripts = transcripts if isinstance(transcripts, str) else list(transcripts)
        if isinstance(transcripts, str) or len(transcripts) != len(clips):
            raise ConfigError(f"{len(transcripts)} transcripts for {len(clips)} clips; give one each, or none")
        _assert_text(transcripts)
        heard = [_hear(clip, f"clip {i}") for i, clip in enumerate(clips)]
        key = jax.random.key(seed)
        temperature = temperature if samples > 1 else 0.0
        predictions = []
        for start in range(0, len(heard), size):
            part = slice(start, start + size)
            with jax.set_mesh(self.setting.mesh):
                asked = self._asked(heard[part], transcripts[part])
                rolled = sharding.fetch(self.setting.rollout(self.variables, asked, key, samples, temperature))
            texts, readout = agent.read(self.setting, rolled)
            predictions += [self._prediction(*row) for row in zip(texts, readout, rolled.forced, strict=True)][
                : len(heard[part])
            ]
        return predictions

    def stream(self, clip: str | Path | np.ndarray, transcript: str = "", *, chunk: int = 4) -> Iterator[Prediction]:
        """Listens to one clip and shows the prediction as it comes about.

        Args:
          clip, transcript: see `predict`.
          chunk: tokens between two looks.

        Yields:
          the reasoning so far, and what the model would answer if it had to answer now; the last is `predict`'s.

        Raises:
          DataError: the clip cannot be heard.
        """
        _assert_text([transcript])
        sound, setting = _hear(clip, "clip"), self.setting
        with jax.set_mesh(setting.mesh):
            rolls = setting.stream(self.variables, self._asked([sound], [transcript]), chunk)
        while True:
            with jax.set_mesh(setting.mesh):  # not around the yield: it would be set for whoever is shown this
                rolled = next(rolls, None)
            if rolled is None:
                return
            rolled = sharding.fetch(rolled)
            texts, readout = agent.read(setting, rolled)
            yield self._prediction(texts[0], readout[0], rolled.forced[0])

    def _asked(self, heard: Sequence[np.ndarray], transcripts: Sequence[str]) -> Prompt:
        """The prompts of some clips on the mesh, filled up to a power of two: few shapes are ever compiled."""
        c, v = self.setting.config, self.setting.vocabulary
        windows = (*c.data.windows, audio.N_FRAMES)  # a clip may be longer than any of the corpus
        clips = [features.Clip(audio.mel_frames(len(clip)), lambda clip=clip: clip) for clip in heard]
        most = 1 << (len(heard) - 1).bit_length()
        tower = (self.setting.model, self.variables, self.setting.mesh)
        encoded = dict(features.encode(*tower, clips, windows, most=most))
        sounds = [encoded[i] for i in range(len(clips))]
        tokens = [
            np.array(prompt.encode_prompt(v, text or "", sound.tokens, style=self.setting.style), np.int32)
            for text, sound in zip(transcripts, sounds, strict=True)
        ]
        size = sharding.round_up(most, self.setting.mesh)
        rows = [*range(len(heard))] + [0] * (size - len(heard))
        numbers = [zlib.crc32(clip.tobytes()) & 0x7FFFFFFF for clip in heard]  # what is drawn depends on the sound
        text = data.round_up(max(len(t) - s.tokens for t, s in zip(tokens, sounds, strict=True)))
        asked = data.prompts(
            [tokens[i] for i in rows],
            [sounds[i] for i in rows],
            [numbers[i] for i in rows],
            windows=windows,
            slots=[window // 4 + text for window in windows],  # what comes next may fill its window: no new program
            pad=v.endoftext,
            live_tower=False,
        )
        return sharding.place(asked, self.setting.mesh)

    def _prediction(self, texts: list[str], readout: np.ndarray, forced: np.ndarray) -> Prediction:
        """One clip's samples: N texts, distributions [N, K], flags [N]."""
        mean = readout.mean(axis=0)
        return Prediction(
            distribution=dict(zip(self.setting.vocabulary.labels, mean.tolist(), strict=True)),
            reasoning=reasoning.split_answer(texts[0])[0],
            entropy=float(metrics.entropy(mean)),
            forced=bool(forced[0]),
        )


def _hear(clip: str | Path | np.ndarray, name: str) -> np.ndarray:
    """A clip's samples at 16 kHz, of a file or as they are; `name` is what to call it otherwise."""
    if isinstance(clip, np.ndarray):
        return audio.check(clip, audio.SAMPLE_RATE, name)
    if not isinstance(clip, str | Path):
        what = "a clip is a sound file or a numpy array of samples at 16 kHz"
        raise ConfigError(f"{name} is a {type(clip).__name__}; {what}")
    return audio.load(clip)


def _assert_text(transcripts: Sequence[str | None]) -> None:
    """Raises ConfigError: what is said is no text, as NaN where a table has a gap."""
    for i, said in enumerate(transcripts):
        if said is not None and not isinstance(said, str):
            raise ConfigError(f"transcript {i} must be text, got {said!r:.60}; '' or None where none is given")


def check(*, batch_size: int | None, samples: int, temperature: float, seed: int) -> None:
    """Whether `Model.predict` can be asked with these, before there is a model.

    Raises:
      ConfigError: one of them is out of bounds.
    """
    told = {"samples": samples, "seed": seed}
    if batch_size is not None:
        told["batch_size"] = batch_size
    if samples > 1:  # one is not drawn
        told["temperature"] = temperature
    told = {key: value.item() if isinstance(value, np.generic) else value for key, value in told.items()}
    if wrong := _out_of_bounds(told, {key: _OPTIONS[key] for key in told}):
        raise ConfigError(wrong)


def _out_of_bounds(told: dict, names: dict[str, str]) -> str:
    """What is wrong with values that are held to the bounds of settings of these names; '' if nothing."""
    held = {key: rules.RULES[setting] for key, setting in names.items()}
    return "; ".join(f"{key}={told[key]!r:.60} must be {r.what}" for key, r in held.items() if not r.holds(told[key]))


def load(
    model: str | Path,
    *,
    base: bool = False,
    labels: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
) -> Model:
    """Opens a model for prediction.

    Args:
      model: a run directory; a directory written by ambijax.export; a PEFT adapter; a Qwen2-Audio checkpoint.
      base: leave the adapters of a run or a PEFT directory out.
      labels: the class words to choose from; None takes what the directory says.
      checkpoint: where the base weights lie; None takes what a run or a PEFT directory says.

    Raises:
      ConfigError: none of these, or something is missing or does not fit; says what.
    """
    model = Path(model)
    if isinstance(labels, str):
        raise ConfigError(f"labels must be a list of class words, not {labels!r}")
    if labels is not None and (wrong := _out_of_bounds({"labels": tuple(labels)}, {"labels": "data.labels"})):
        raise ConfigError(wrong)
    if peft.is_directory(model):
        return _load_peft(model, base, labels, checkpoint)
    if not (model / "config.json").is_file():
        what = "no run directory, export or checkpoint: it has neither config.json nor adapter_config.json"
        raise ConfigError(f"{model} is {what}")
    if "model_type" in hugging_face.read_json(model / "config.json"):
        if base or checkpoint:
            raise ConfigError(f"{model} is a whole checkpoint without adapters; load its base by its own directory")
        setting = _setting(_config(model, _told(model, labels)))
        with jax.set_mesh(setting.mesh):
            return Model(setting, {"params": assemble.base(setting)})
    config = ConfigDict(settings.load(model).to_dict())
    with config.ignore_type():
        config.mesh.update(_MESH)
        config.model.checkpoint = str(checkpoint or config.model.checkpoint)
        config.data.labels = tuple(labels or config.data.labels)
        config.data.batch_size = _NO_BATCH
        config.optim.update(_NO_PARTS)
        config.model.attention = config.model.decoding = "xla"  # on whatever device this is
    setting = _setting(FrozenConfigDict(config))
    with jax.set_mesh(setting.mesh):
        variables = {"params": assemble.base(setting)}
        return Model(setting, variables if base else assemble.trained(setting, variables, model)[1])


def _setting(config: FrozenConfigDict) -> Setting:
    """On as many of the devices here as can share the weights."""
    shape = model_config.load(config.model.checkpoint)
    widths = (shape.text.hidden_size, shape.audio.d_model)
    count = max(n for n in range(1, jax.device_count() + 1) if all(width % n == 0 for width in widths))
    return assemble.setting(config, jax.devices()[:count])


def _load_peft(directory: Path, base: bool, labels: Sequence[str] | None, checkpoint: str | Path | None) -> Model:
    lora, name = peft.describe(directory)
    if checkpoint and not (Path(checkpoint) / "config.json").is_file():
        raise ConfigError(f"{checkpoint} is no checkpoint: it has no config.json; {directory} adapts {name!r}")
    checkpoint = Path(checkpoint or name)
    if not (checkpoint / "config.json").is_file():
        raise ConfigError(f"{directory} adapts {name!r}, which is not here; say where it lies with checkpoint")
    setting = _setting(_config(checkpoint, _told(directory, labels), lora, init_from=directory))
    with jax.set_mesh(setting.mesh):
        params = assemble.base(setting)
        return Model(setting, {"params": params} if base else assemble.initial(setting, params))


def about(config: FrozenConfigDict, dtype: str = "") -> dict:
    """How a run's model is asked, for `ABOUT`: what this module needs, and the texts for whoever uses another tool.

    Args:
      config: the run's.
      dtype: to compute in; '' = the run's.
    """
    c = config
    style = agent.style(c)
    ask = {name: prompt.instruction(said, c.data.labels, style=style) for name, said in _SAID.items()}
    return {
        "format": FORMAT,
        "labels": list(c.data.labels),
        "system": reasoning.STYLES[style].system,
        "instruction": ask,
        "anchor": reasoning.ANCHOR,
        "cot": c.data.cot,
        "style": c.prompt.style,
        "max_tokens": c.data.max_tokens,
        "windows": list(c.data.windows),
        "temperature": c.readout.temperature,
        "batch_size": c.eval.batch_size,
        "dtype": dtype or c.model.dtype,
    }


_SAID = {"with_transcript": "{transcript}", "without_transcript": ""}


def _told(directory: Path, labels: Sequence[str] | None) -> dict:
    """What `ABOUT` in an exported directory says; defaults where there is none."""
    told = hugging_face.read_json(directory / ABOUT) if (directory / ABOUT).is_file() else {}
    if told and told.get("format") != FORMAT:
        raise ConfigError(f"{directory / ABOUT} has format {told.get('format')!r}, this ambijax reads {FORMAT}")
    told = {"dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16"} | _UNTOLD | told
    labels = list(labels) if labels else told.get("labels")
    if not labels:
        raise ConfigError(f"{directory} does not say which emotions to choose from; name them with labels")
    told |= {"labels": tuple(labels) if isinstance(labels, list) else labels}
    if wrong := _out_of_bounds(told, _SETTINGS):
        raise ConfigError(f"{directory / ABOUT}: {wrong}")
    return told


def _config(checkpoint: Path, told: dict, lora: LoraConfig = _NO_LORA, init_from: str | Path = "") -> FrozenConfigDict:
    """The settings that prediction needs, for a model that is not a run."""
    return FrozenConfigDict(
        {
            "model": {
                "checkpoint": str(checkpoint),
                "dtype": told["dtype"],
                "weights": "float",
                "cache": "float",
                "attention": "xla",
                "decoding": "xla",
                "remat": "nothing_saveable",
            },
            "lora": dataclasses.asdict(lora),
            "seed": 0,
            "init_from": str(init_from),
            "mesh": _MESH,
            "optim": {**_NO_PARTS, "train": ("lora/.*",)},
            "prompt": {"style": told["style"]},
            "data": {
                **{key: told[key] for key in ("labels", "cot", "max_tokens")},
                "windows": tuple(told["windows"]),
                "batch_size": _NO_BATCH,
            },
            "loss": {"chunk": _CHUNK},
            "readout": {"temperature": told["temperature"]},
            "eval": {"batch_size": told["batch_size"]},
        }
    )
