"""Clips to `data.Sound`: log-mel of every file and, while the audio tower is frozen, its output, once a clip."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import llvmlite.binding
import numpy as np
import tqdm
from jax.sharding import Mesh

from ambijax import audio, compilation, hosts, kept, sharding
from ambijax.data import Sound
from ambijax.errors import DataError
from ambijax.manifest import Corpus, Utterance
from ambijax.model import compiled, cpu_kernels, encoder, kernels, layers, qwen2_audio
from ambijax.model.qwen2_audio import Qwen2Audio

CLIPS = 16  # clips encoded at once


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip whose length is known and whose sound is read by the process that needs it."""

    frames: int  # valid mel frames
    load: Callable[[], np.ndarray]  # samples as `audio.load` gives them, of so many frames

    def mel(self, window: int, n_mels: int) -> np.ndarray:
        """Log-mel [window, n_mels]."""
        return audio.log_mel(self.load(), window, n_mels)


def _listed(path: Path) -> Clip:
    """A file whose header says how long it is.

    Raises:
      DataError: it cannot be read, now or when it is loaded, or is not as long as its header says.
    """
    frames = audio.declared_frames(path)

    def load() -> np.ndarray:
        samples = audio.load(path)
        if (there := audio.mel_frames(len(samples))) != frames:
            raise DataError(f"{path}: {there} mel frames of sound where its header promises {frames}; copy it anew")
        return samples

    return Clip(frames, load)


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: Qwen2Audio, variables: dict, mel: jax.Array, frames: jax.Array) -> jax.Array:
    return model.apply(variables, mel, frames, method="encode")


def encode(
    model: Qwen2Audio,
    variables: dict,
    mesh: Mesh,
    clips: Iterable[Clip],
    windows: tuple[int, ...],
    *,
    most: int = CLIPS,
) -> Iterator[tuple[int, Sound]]:
    """Clips to projected tower output [A, D], a batch of one window at a time, each with its number among the clips.

    One program is compiled for each window in use. No output waits for another: a rare long clip holds nothing up.
    Every process passes all clips, reads those whose rows its devices hold, and gets the sounds of all. Where there
    are fewer clips than a batch holds, `most` says how many, and no more are computed.
    """
    size = sharding.round_up(min(CLIPS, most), mesh)
    mine = sharding.rows(size, mesh)
    n_mels = model.config.audio.num_mel_bins

    def flush(window: int, waiting: list[tuple[int, Clip]]) -> Iterator[tuple[int, Sound]]:
        mel = np.zeros((size, window, n_mels), np.float32)  # full batches only, so that the shape is one
        frames = np.full(size, window, np.int32)
        for row, (_, clip) in enumerate(waiting):
            frames[row] = clip.frames
            if row in mine:
                mel[row] = clip.mel(window, n_mels)
        out = sharding.fetch(_encode(model, variables, *sharding.place((mel, frames), mesh)))
        for (index, clip), row in zip(waiting, out, strict=False):
            yield index, Sound(clip.frames, row[: audio.tokens(clip.frames)].copy())

    queues = collections.defaultdict(list)  # window -> clips waiting for a full batch
    for index, clip in enumerate(clips):
        window = audio.window(clip.frames, windows)
        queue = queues[window]
        queue.append((index, clip))
        if len(queue) == size:
            yield from flush(window, queue)
            queue.clear()
    for window, queue in queues.items():
        if queue:
            yield from flush(window, queue)


def compute(
    corpus: Corpus,
    utterances: Iterable[Utterance],
    model: Qwen2Audio,
    params: dict,
    mesh: Mesh,
    *,
    windows: tuple[int, ...],
    live_tower: bool,
    directory: str,
) -> dict[str, Sound]:
    """Utterance id -> sound for a whole corpus, with a progress bar.

    With a live tower the values are log-mel in the clip's own window and two frames of silence beyond, which stand for
    all later silence. With a frozen one its outputs are kept in `directory`, and only those that are not there are
    computed; '' keeps none.

    Raises:
      DataError: a file is missing or broken; names it.
    """
    utterances = list(utterances)
    paths = [corpus.path(u) for u in utterances]
    with tqdm.tqdm(total=len(paths), desc="features", unit="clip", mininterval=1.0) as bar:
        if live_tower:
            sounds = _mels(paths, windows, model.config.audio.num_mel_bins, bar)
        else:
            sounds = _outputs(paths, model, params, mesh, windows, kept.Shelf(directory), bar)
    return {u.id: sound for u, sound in zip(utterances, sounds, strict=True)}


def _mels(paths: list[Path], windows: tuple[int, ...], n_mels: int, bar: tqdm.tqdm) -> list[Sound]:
    sounds = []
    for path in paths:
        clip = audio.load(path)
        frames = audio.mel_frames(len(clip))
        window = min(audio.window(frames, windows) + audio.SILENT_FRAMES, audio.N_FRAMES)
        sounds.append(Sound(frames, audio.log_mel(clip, window, n_mels)))
        bar.update()
    return sounds


def _outputs(
    paths: list[Path],
    model: Qwen2Audio,
    params: dict,
    mesh: Mesh,
    windows: tuple[int, ...],
    shelf: kept.Shelf,
    bar: tqdm.tqdm,
) -> list[Sound]:
    """Projected tower outputs, from the shelf where they are there; those that are not are computed and put there."""
    clips = [_listed(path) for path in paths]
    keys, found = [""] * len(clips), [None] * len(clips)
    if hosts.anywhere([shelf.keeps])[0]:  # by all or by none: the lines below wait for each other
        origin = _origin(model, params, mesh)
        width, dtype = model.config.text.hidden_size, np.dtype(model.dtype)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            if hosts.is_main():
                keys = list(
                    pool.map(lambda path, clip: _key(origin, path, audio.window(clip.frames, windows)), paths, clips)
                )
            keys = hosts.from_main(keys)
            found = list(
                pool.map(lambda key, clip: shelf.find(key, (audio.tokens(clip.frames), width), dtype), keys, clips)
            )
    if shelf.damaged:
        tqdm.tqdm.write(f"{len(shelf.damaged)} kept tower outputs are damaged and made anew, {shelf.damaged[0]} say")
    missing = np.flatnonzero(hosts.anywhere([values is None for values in found]))
    bar.update(len(clips) - len(missing))
    computed = encode(model, {"params": params}, mesh, [clips[i] for i in missing], windows)
    for number, sound in computed:
        i = missing[number]
        found[i] = shelf.put(keys[i], sound.values)
        bar.update()
    return [Sound(clip.frames, values) for clip, values in zip(clips, found, strict=True)]


def _origin(model: Qwen2Audio, params: dict, mesh: Mesh) -> str:
    """The digest of all that a tower output depends on to the last bit, the clip and its window aside: weights, shape,
    precision, code, libraries, flags of the compiler, devices and the processor, which makes the log-mel."""
    modules = (audio, kernels, cpu_kernels, layers, encoder, qwen2_audio, sys.modules[__name__])
    about = {
        "format": kept.FORMAT,
        "config": repr(model.config),
        "attention": model.attention,
        "dtype": str(np.dtype(model.dtype)),
        "mesh": dict(mesh.shape),
        "devices": mesh.devices.flat[0].device_kind,
        "processor": llvmlite.binding.get_host_cpu_name(),
        "code": [compiled.SOURCES, *(hashlib.sha256(Path(m.__file__).read_bytes()).hexdigest() for m in modules)],
        **compilation.surroundings(),
    }
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    weights = {name: params[name] for name in ("audio_tower", "multi_modal_projector")}
    for path, leaf in zip(*map(jax.tree.leaves, (sharding.paths(weights), weights)), strict=True):
        values = np.ascontiguousarray(sharding.fetch(leaf))
        sha.update(f"{path} {values.dtype} {values.shape}".encode())
        sha.update(values.view(np.uint8))
    return sha.hexdigest()


def _key(origin: str, path: Path, window: int) -> str:
    """The name of a clip's tower output on the shelf."""
    with path.open("rb") as file:
        sound = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{origin} {sound} {window}".encode()).hexdigest()
