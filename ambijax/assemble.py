"""Settings -> the things a command needs before its first step: mesh, model, tokenizer, weights, data."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import FrozenConfigDict

from ambijax import (
    audio,
    checkpoint,
    convert,
    data,
    features,
    hosts,
    hugging_face,
    manifest,
    optim,
    peft,
    prompt,
    rules,
    settings,
    sharding,
)
from ambijax.agent import Setting
from ambijax.corpora import synthetic
from ambijax.errors import ConfigError, DataError
from ambijax.model import config as model_config
from ambijax.model import kernels, qwen2_audio


def setting(config: FrozenConfigDict, devices: Sequence | None = None) -> Setting:
    """Mesh over `devices` or all there are, model and tokenizer, checked against each other before any weight is read.

    Raises:
      ConfigError: lists everything that does not fit.
    """
    shape = model_config.load(config.model.checkpoint)
    _assert_hears_alike(Path(config.model.checkpoint), shape)
    over = mesh(config, shape, devices)
    vocabulary = prompt.load(config.model.checkpoint, config.data.labels)
    prompt.assert_fits(vocabulary, shape.text.vocab_size, shape.audio_token)
    prompt.assert_answers_fit(vocabulary, config.data.max_tokens)
    return Setting(model=model(config, shape), vocabulary=vocabulary, mesh=over, config=config)


# What `audio.log_mel` computes, as preprocessor_config.json calls it.
_FEATURES = {
    "sampling_rate": audio.SAMPLE_RATE,
    "n_fft": audio.N_FFT,
    "hop_length": audio.HOP,
    "chunk_length": audio.SECONDS,
    "do_normalize": False,
}


def _assert_hears_alike(checkpoint: Path, shape: model_config.Qwen2AudioConfig) -> None:
    """Raises ConfigError: the model was trained on other features, or hears less than 30 s."""
    path = checkpoint / "preprocessor_config.json"
    told = hugging_face.read_json(path) if path.is_file() else {}
    told = {key: told.get(key, ours) for key, ours in _FEATURES.items()}
    told["max_source_positions"] = shape.audio.max_source_positions
    ours = _FEATURES | {"max_source_positions": audio.N_FRAMES // 2}
    if wrong := [f"{key} is {told[key]} there and {ours[key]} here" for key in ours if told[key] != ours[key]]:
        raise ConfigError(f"{checkpoint} was trained on other features than Qwen2-Audio's: {'; '.join(wrong)}")


def mesh(config: FrozenConfigDict, shape: model_config.Qwen2AudioConfig, devices: Sequence | None = None) -> Mesh:
    """The configured mesh over `devices`, or all there are, when batch and model can be split over it.

    Raises:
      ConfigError: names every key that does not fit, and the nearest values that would.
    """
    made = sharding.make_mesh(**config.mesh, devices=devices)
    text = shape.text
    wrong = sharding.check(
        made,
        batch=config.data.batch_size,
        accumulate=config.optim.accumulate,
        micro_batch=config.optim.micro_batch,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        vocab=text.vocab_size,
        tower=shape.audio.d_model,
        tower_mlp=shape.audio.encoder_ffn_dim,
    )
    if wrong:
        raise ConfigError("mesh: " + "; ".join(wrong))
    here = made.devices.flat[0].platform
    for key in ("attention", "decoding"):
        needed = kernels.PLATFORMS.get(config.model[key], here)
        if needed != here:
            raise ConfigError(f"model.{key}={config.model[key]!r} runs on a {needed}, not on a {here}; use 'xla'")
    if config.model.decoding == "triton":
        if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
            raise ConfigError(
                f"model.decoding='triton' needs Pallas' Triton, which jax {jax.__version__} lacks; use 'xla'"
            )
        if text.head_dim not in kernels.WIDTHS:
            widths = ", ".join(map(str, kernels.WIDTHS))
            raise ConfigError(f"model.decoding='triton' needs heads of width {widths}, not {text.head_dim}; use 'xla'")
    return made


def model(config: FrozenConfigDict, shape: model_config.Qwen2AudioConfig) -> qwen2_audio.Qwen2Audio:
    """The configured model; it holds no weights."""
    return qwen2_audio.Qwen2Audio(
        config=shape,
        lora=model_config.LoraConfig(**config.lora),
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        weights=config.model.weights,
        attention=config.model.attention,
        cache=config.model.cache,
        decoding=config.model.decoding,
    )


def base(setting: Setting) -> dict:
    """The checkpoint's weights, read straight into their shards: the collection 'params'."""
    return convert.load(
        setting.config.model.checkpoint,
        setting.model,
        dtype=setting.model.dtype,
        sharding=lambda path: NamedSharding(setting.mesh, sharding.parameter(f"params/{path}")),
    )


# Settings that may change between the parts of a run, beside `rules.CUT`; every other one makes it another run.
FREE = ("mesh", "hosts", "checkpoint", "warn", "log_every", "watchdog_seconds", "tracker", "tracker_audio")


def identity(config: FrozenConfigDict) -> dict:
    """What must not change between the parts of a run: its settings, its model to the last bit, and its corpus.

    Raises:
      ConfigError, DataError: the model or the corpus is missing or broken.
    """
    return told(config) | {
        "base": convert.digest(config.model.checkpoint),
        "shape": dataclasses.asdict(model_config.load(config.model.checkpoint)),
        "tokenizer": prompt.digest(config.model.checkpoint),
        "corpus": manifest.digest(corpus(config)),
    }


def told(config: FrozenConfigDict) -> dict:
    """The settings that must not change between the parts of a run."""
    kept = {key: value for key, value in config.to_dict().items() if key not in FREE}
    # Dev scores of other clips or measures are not to be compared.
    kept["eval"] = {key: config.eval[key] for key in ("max_clips", "dev_clips", "metric")}
    for section, name in (key.split(".") for key in rules.CUT):
        del kept[section][name]
    del kept["data"]["root"], kept["data"]["features"], kept["model"]["checkpoint"]  # they may move
    return kept


def corpus(config: FrozenConfigDict) -> manifest.Corpus:
    """The configured corpus; a synthetic one is written when it is not there."""
    d = config.data
    if d.corpus == "synthetic":
        if d.like not in synthetic.LIKE:
            raise ConfigError(f"data.like={d.like!r} must be one of {', '.join(synthetic.LIKE)}")
        spec = dataclasses.replace(
            synthetic.LIKE[d.like],
            seed=d.seed,
            speakers=d.speakers,
            clips_per_speaker=d.clips_per_speaker,
        )
        with hosts.main_first():
            return synthetic.write(Path(d.root), spec)
    if d.corpus == "manifest":
        return manifest.read(d.root)
    raise ConfigError(f"data.corpus={d.corpus!r} must be 'manifest' or 'synthetic'")


Edit = Callable[[list[manifest.Utterance]], list[manifest.Utterance]]


def splits(config: FrozenConfigDict, everything: manifest.Corpus) -> dict[str, list[manifest.Utterance]]:
    """The utterances to train on, to tune on and to test on; nothing is heard yet."""
    found = manifest.split(everything, config.data.fold, config.data.dev)
    if config.eval.max_clips >= 0:
        found["test"] = data.spread(found["test"], config.eval.max_clips)
    return found


def datasets(setting: Setting, params: dict, names: tuple[str, ...], *, edit: Edit = list) -> dict[str, data.Dataset]:
    """The named splits ('train', 'dev', 'test'), their clips heard once.

    Args:
      setting: the run's.
      params: base weights, whose audio tower listens.
      names: which splits.
      edit: applied to the utterances of these splits first, as a control does that swaps their sounds.

    Raises:
      ConfigError, DataError: the corpus is missing, broken, or leaks speakers between splits.
    """
    d = setting.config.data
    everything = corpus(setting.config)
    parts = splits(setting.config, everything)
    parts |= {name: edit(parts[name]) for name in names}
    if not any(parts[name] for name in names):
        split, labels = ", ".join(names), ", ".join(d.labels)
        raise DataError(f"{everything.root}: no utterance of the {split} split has a vote on {labels}")
    live = trains_tower(setting)
    sounds = features.compute(
        everything,
        [utterance for name in names for utterance in parts[name]],
        setting.model,
        params,
        setting.mesh,
        windows=tuple(d.windows),
        live_tower=live,
        directory=d.features,
    )
    return data.build(
        parts,
        names,
        sounds,
        setting.vocabulary,
        windows=tuple(d.windows),
        max_tokens=d.max_tokens,
        style=setting.style,
        gold_label=d.gold_label,
        seed=setting.config.seed,
        label_in_ce=setting.config.loss.lambda_kl == 0,
        live_tower=live,
        root=everything.audio_root or everything.root,
    )


def trains_base(config: FrozenConfigDict) -> bool:
    """Whether base weights are trained, and not adapters alone."""
    return rules.trains_base(config.optim.train)


def trains_tower(setting: Setting) -> bool:
    """Whether anything between the sound and the decoder is trained, so that its output cannot be computed once."""
    labels = optim.labels(qwen2_audio.shapes(setting.model), setting.config.optim.train)["params"]
    hears = jax.tree.leaves([labels["audio_tower"], labels["multi_modal_projector"]])
    return setting.config.lora.audio_tower or "train" in hears


def initial(setting: Setting, params: dict, *, resumes: bool = False) -> dict:
    """The variables a run starts from: base weights, fresh adapters (seeded, B = 0), and in their places what
    `init_from` holds, a run or a PEFT directory. One that resumes does not read that: it may be gone.

    Raises:
      ConfigError: that and this run do not fit.
    """
    config, start = setting.config, Path(setting.config.init_from)
    key = jax.random.key(config.seed)
    made = jax.jit(lambda key: qwen2_audio.init(setting.model, key)["lora"])
    where = sharding.shardings({"lora": jax.eval_shape(made, key)}, setting.mesh)["lora"]
    variables = {"params": params, "lora": jax.jit(made, out_shardings=where)(key)}
    if resumes or not config.init_from:
        return variables
    if peft.is_directory(start):
        earlier, wrong = {"lora": peft.load(start, setting.model.lora)}, []
    else:
        best = settings.load(start).eval.checkpoint == "best"
        _, earlier, meta = checkpoint.load_trained(start / "checkpoints", best=best)
        wrong = _differences(config, meta)
    labels = flax.traverse_util.flatten_dict(optim.labels(variables, config.optim.train), sep="/")
    if frozen := [path for path in flax.traverse_util.flatten_dict(earlier, sep="/") if labels.get(path) == "frozen"]:
        wrong.append(
            f"it trained {frozen[0]}, which optim.train={tuple(config.optim.train)} freezes, so that no checkpoint of "
            "this run would hold it: train it here too, or merge that run (ambijax.export) and name the result in "
            "model.checkpoint"
        )
    if wrong:
        raise ConfigError(f"init_from={start}: " + "; ".join(wrong))
    return _replaced(setting, variables, earlier, start)


def _differences(config: FrozenConfigDict, meta: dict) -> list[str]:
    """What would give an earlier run's weights another meaning here: other adapters, or another base under them."""
    there, here = meta["lora"], config.lora
    wrong = [
        f"lora.{name} is {there[name]} there and {here[name]} here"
        for name in ("rank", "alpha", "audio_tower")
        if there[name] != here[name]
    ]
    directory = config.model.checkpoint
    if meta["base"] != convert.digest(directory):
        wrong.append(f"it was trained on another base than model.checkpoint={directory}")
    if meta["tokenizer"] != prompt.digest(directory):
        wrong.append(f"it was trained with another tokenizer than that of model.checkpoint={directory}")
    return wrong


def trained(setting: Setting, variables: dict, run: Path) -> tuple[int, dict]:
    """The step of the checkpoint that `eval.checkpoint` says is the run's model, and its variables.

    Args:
      setting: the run's.
      variables: at least its base weights; what it trained takes its place in them.
      run: the run's directory.

    Raises:
      ConfigError: it holds no checkpoint, or was trained on another base than the setting's.
    """
    config = setting.config
    step, loaded, meta = checkpoint.load_trained(run / "checkpoints", best=config.eval.checkpoint == "best")
    if wrong := _differences(config, meta):
        raise ConfigError(f"{run}: " + "; ".join(wrong))
    return step, _replaced(setting, variables, loaded, run)


def _replaced(setting: Setting, variables: dict, loaded: dict, run: Path) -> dict:
    """The variables with the host arrays `loaded` of `run` in their places."""
    like = qwen2_audio.shapes(setting.model)
    where = sharding.shardings(like, setting.mesh)
    for collection, tree in loaded.items():
        part = _placed(tree, like[collection], where[collection], run)
        rest = variables.get(collection)
        if rest is None:  # adapters that were not trained add nothing
            rest = jax.jit(lambda c=collection: optax.tree.zeros_like(like[c]), out_shardings=where[collection])()
        variables = variables | {collection: optim.merge(part, rest)}
    return variables


def _placed(tree: dict, like: dict, where: dict, run: str | Path) -> dict:
    """Host arrays `tree`, a part of `like`, into their shards; None where `tree` has nothing."""
    given, shapes, shards = (flax.traverse_util.flatten_dict(z, sep="/") for z in (tree, like, where))
    placed = dict.fromkeys(shapes)
    for path, array in given.items():
        wanted = shapes[path].shape if path in shapes else "absent"
        if wanted != array.shape:
            raise ConfigError(f"{run}: trained {path} is {array.shape} there and {wanted} in the model; check lora.*")
        placed[path] = jax.device_put(array, shards[path])
    return flax.traverse_util.unflatten_dict(placed, sep="/")
