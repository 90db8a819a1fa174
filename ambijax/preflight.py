"""What can be known before any weight is read: whether a run could start, all that is wrong at once, and its plan."""

import importlib.util
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import FrozenConfigDict

from ambijax import assemble, audio, checkpoint, convert, data, held_out, kept, manifest, optim, peft, settings
from ambijax.agent import Setting
from ambijax.corpora import synthetic
from ambijax.errors import AmbijaxError, ConfigError, DataError
from ambijax.model import qwen2_audio
from ambijax.workdir import check_writable, existing

STATE = 3  # numbers a trained parameter: itself and Adam's two moments


def check(config: FrozenConfigDict, directory: Path, *, write: bool) -> Setting:
    """The setting of a run, after everything was checked that needs no weights.

    Args:
      config: passed `settings.check`.
      directory: the run's.
      write: create the run's directory, and a synthetic corpus that is not there, unless something else is wrong: it
        takes a while.

    Raises:
      ConfigError, DataError: lists all problems of mesh, model, tokenizer, weights, corpus and disk.
    """
    found: list[Setting] = []
    steps = (
        lambda: found.append(assemble.setting(config)),
        lambda: convert.check(config.model.checkpoint),
        lambda: _check_disk(found[0], directory if write else existing(directory)) if found else None,
        lambda: _check_start(config, directory),
        lambda: checkpoint.check_settings(directory / "checkpoints", assemble.told(config)),
        lambda: assert_tracker_installed(config.tracker),
    )
    wrong = [error for step in steps if (error := _error(step))]
    if error := _error(lambda: check_corpus(config, write and not wrong)):
        wrong.append(error)
    if wrong:
        kind = ConfigError if any(isinstance(error, ConfigError) for error in wrong) else DataError
        raise kind("; ".join(dict.fromkeys(map(str, wrong))))
    return found[0]


def _error(step: Callable[[], None]) -> AmbijaxError | None:
    try:
        step()
    except AmbijaxError as error:
        return error
    return None


def check_corpus(config: FrozenConfigDict, write: bool) -> None:
    """The configured corpus, its splits and that its sounds are there; one that is to be written only with `write`.

    Raises:
      ConfigError, DataError: it is not there, broken, too small, or some of its sounds are not there.
    """
    if write or not is_to_be_written(config):
        corpus = assemble.corpus(config)
        parts = assemble.splits(config, corpus)
        needed = {"train": config.steps > 0, "dev": config.eval.every > 0, "test": True}
        if empty := [name for name, wanted in needed.items() if wanted and not parts[name]]:
            raise DataError(
                f"{corpus.root}: no utterance is left for {' and '.join(empty)} with data.fold={config.data.fold} and "
                f"data.dev={config.data.dev}; the corpus needs three folds, or two with data.dev=groups"
            )
        _check_votes(corpus, parts, config.data.labels)
        if learns_reasoning(config) and not any(u.cot for u in parts["train"]):
            raise DataError(
                f"{corpus.root}: no utterance to train on has a chain of thought, and {config.algorithm} learns from "
                "them: python -m ambijax.curate writes them and --merge puts them in; or set data.cot=False"
            )
        manifest.check_sounds(corpus)
        _check_lengths(corpus, [u for utterances in parts.values() for u in utterances], config.data.windows)


def _check_lengths(corpus: manifest.Corpus, asked: Sequence[manifest.Utterance], windows: tuple[int, ...]) -> None:
    """Raises ConfigError: a clip fits into none of the windows, by its header."""
    longest = max(windows)
    if longest == audio.N_FRAMES:  # what is longer is cut
        return
    frames = {u.id: audio.declared_frames(corpus.path(u)) for u in asked}
    if long := [u for u in asked if frames[u.id] + audio.SILENT_FRAMES > longest]:
        worst = max(long, key=lambda u: frames[u.id])
        raise ConfigError(
            f"{len(long)} of {len(asked)} clips are longer than the longest of data.windows={tuple(windows)}, which "
            f"are in hundredths of a second: {corpus.path(worst)} has {frames[worst.id]}, and needs two more for "
            f"silence; add a window as long, {audio.N_FRAMES} holds every clip"
        )


def learns_reasoning(config: FrozenConfigDict) -> bool:
    """Whether curated chains of thought are trained on."""
    return config.steps > 0 and config.data.cot and config.algorithm != "grpo"


def check_reasoned(config: FrozenConfigDict, train: data.Dataset) -> None:
    """Raises DataError: chains of thought are to be learned, and not one of them can be used."""
    if learns_reasoning(config) and not any(example.reasoned for example in train.examples):
        raise DataError(
            f"{train.root}: none of the chains of thought follows the format within data.max_tokens="
            f"{config.data.max_tokens}, and {config.algorithm} learns from them; raise it, or curate them anew"
        )


def _check_votes(corpus: manifest.Corpus, parts: dict, labels: tuple[str, ...]) -> None:
    """Raises DataError: somebody's votes would be lost, to other classes or to a word that is spelled otherwise."""
    manifest.assert_classes(corpus, labels)
    asked = [u for utterances in parts.values() for u in utterances]
    voted = {id(u) for u in manifest.voted(asked, labels)}
    if without := [u.id for u in asked if id(u) not in voted]:
        raise DataError(
            f"{corpus.root}: {len(without)} of {len(asked)} utterances have no vote on data.labels={tuple(labels)}, "
            f"for one {without[0]}; the classes there are {', '.join(corpus.classes())}: set data.labels, or leave "
            "these utterances out by ambijax.prepare --on_bad=skip"
        )
    there = {emotion for u in asked for emotion, n in u.votes.items() if n}
    if (silent := [label for label in labels if label not in there]) and (lost := sorted(there - set(labels))):
        raise DataError(
            f"{corpus.root}: nobody voted on {', '.join(silent)}, and votes on {', '.join(lost)} would be left out; "
            "set data.labels"
        )


def is_to_be_written(config: FrozenConfigDict) -> bool:
    """Whether training would write the synthetic corpus first."""
    return config.data.corpus == "synthetic" and synthetic.is_free(Path(config.data.root))


def _check_start(config: FrozenConfigDict, directory: Path) -> None:
    """Whether a run may begin with `init_from`; one that resumes does not read it.

    Raises:
      ConfigError: it holds nothing.
      DataError: that run has learned from this corpus, and from speakers that are to be tested on.
    """
    start = Path(config.init_from)
    if not config.init_from or checkpoint.exists(directory / "checkpoints") or peft.is_directory(start):
        return
    if not checkpoint.exists(start / "checkpoints"):
        raise ConfigError(f"init_from={start}: no run with a checkpoint there, and no PEFT adapter")
    roots = [manifest.directory(c.data.root).resolve() for c in (settings.load(start), config)]
    if roots[0] == roots[1] and not is_to_be_written(config):
        held_out.check(start, "test", assemble.splits(config, assemble.corpus(config))["test"])


def assert_tracker_installed(name: str) -> None:
    """Raises ConfigError: the package of a tracker, '' for none, is not here."""
    if name and importlib.util.find_spec(name) is None:
        raise ConfigError(f"tracker={name} needs its package: pip install 'ambijax[{name}]'")


def _check_disk(setting: Setting, directory: Path) -> None:
    check_writable(directory)
    need, free = checkpoint_bytes(setting.model, setting.config.optim.train), shutil.disk_usage(directory).free
    if free < need:
        raise ConfigError(f"{directory}: a checkpoint takes {need:,} bytes, {free:,} are free; make room")


def trained_parameters(model: qwen2_audio.Qwen2Audio, train: tuple[str, ...]) -> int:
    """How many numbers are trained with `optim.train`."""
    shapes = qwen2_audio.shapes(model)
    trained, _ = optim.split(shapes, optim.labels(shapes, train))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))


def checkpoint_bytes(model: qwen2_audio.Qwen2Audio, train: tuple[str, ...]) -> int:
    """About how many bytes a checkpoint takes; what is trained is float32."""
    return 4 * STATE * trained_parameters(model, train)


def plan(setting: Setting, directory: Path) -> str:
    """What a run would do, for a person."""
    c, shape = setting.config, setting.mesh.shape
    if is_to_be_written(c):
        clips, epochs = f"{c.data.speakers * c.data.clips_per_speaker} synthetic clips, to be written first", ""
    else:
        parts = assemble.splits(c, assemble.corpus(c))
        sizes = {name: len(part) for name, part in parts.items()}
        clips = ", ".join(f"{size} {name}" for name, size in sizes.items())
        if learns_reasoning(c):
            clips += f"; {sum(bool(u.cot) for u in parts['train'])} to train on have a chain of thought"
        epochs = f", {c.steps * c.data.batch_size / max(1, sizes['train']):.1f} epochs"
    trained = trained_parameters(setting.model, c.optim.train)
    size, free = checkpoint_bytes(setting.model, c.optim.train) / 1e6, shutil.disk_usage(existing(directory)).free / 1e9
    rows = {
        "algorithm": c.algorithm,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, data {shape['data']} x fsdp "
        f"{shape['fsdp']} x tensor {shape['tensor']}",
        "model": f"{c.model.checkpoint}, {c.model.dtype}",
        "trained": f"{trained:,} parameters",
        "corpus": f"{c.data.root}: {clips}",
        "steps": f"{c.steps} of {c.data.batch_size} prompts{epochs}",
        "features": _features(setting),
        "checkpoints": f"{size:,.1f} MB, every {c.checkpoint.every} steps or {c.checkpoint.seconds:g} s, the newest "
        f"{c.checkpoint.keep} stay; {free:,.1f} GB free in {directory}",
    }
    return "\n".join(f"{name:<13}{text}" for name, text in rows.items())


def _features(setting: Setting) -> str:
    """Where tower outputs are kept and how many there are, of all runs."""
    config = setting.config
    if assemble.trains_tower(setting):
        return "anew in every step, for the tower is trained"
    if not config.data.features:
        return "made in every run, for data.features is empty"
    count, size = kept.size(config.data.features)
    return f"{count:,} tower outputs, {size / 1e9:,.1f} GB, kept in {config.data.features}; remove it when you like"
