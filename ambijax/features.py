"""Clips to `data.Sound`: log-mel of every file and, while the audio tower is frozen, its output, once a clip."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from ambijax import audio, sharding
from ambijax.data import Sound
from ambijax.errors import DataError
from ambijax.manifest import Corpus, Utterance
from ambijax.model.qwen2_audio import Qwen2Audio

CLIPS = 16  # clips encoded at once


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip whose length is known and whose sound is read by the process that needs it."""

    frames: int  # valid mel frames
    load: Callable[[], np.ndarray]  # samples as `audio.load` gives them

    def mel(self, window: int, n_mels: int) -> np.ndarray:
        """Log-mel [window, n_mels]."""
        samples = self.load()
        if audio.mel_frames(len(samples)) != self.frames:
            raise DataError(f"a clip of {len(samples)} samples whose header promises {self.frames} mel frames")
        return audio.log_mel(samples, window, n_mels)


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: Qwen2Audio, variables: dict, mel: jax.Array, frames: jax.Array) -> jax.Array:
    return model.apply(variables, mel, frames, method="encode")


def encode(
    model: Qwen2Audio, variables: dict, mesh: Mesh, clips: Iterable[Clip], windows: tuple[int, ...]
) -> Iterator[Sound]:
    """Clips to projected tower output [A, D], in order; one compiled program for each window in use.

    Every process passes all clips, reads those whose rows its devices hold, and gets the sounds of all.
    """
    size = sharding.round_up(CLIPS, mesh)
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
    done, following = {}, 0
    for index, clip in enumerate(clips):
        window = audio.window(clip.frames, windows)
        queue = queues[window]
        queue.append((index, clip))
        if len(queue) == size:
            done.update(flush(window, queue))
            queue.clear()
        while following in done:
            yield done.pop(following)
            following += 1
    for window, queue in queues.items():
        if queue:
            done.update(flush(window, queue))
    for index in sorted(done):
        yield done[index]


def compute(
    corpus: Corpus,
    utterances: Iterable[Utterance],
    model: Qwen2Audio,
    params: dict,
    mesh: Mesh,
    *,
    windows: tuple[int, ...],
    live_tower: bool,
) -> dict[str, Sound]:
    """Utterance id -> sound for a whole corpus, with a progress bar.

    With a live tower every clip is put into the largest window that the corpus needs, so that any batch stacks.

    Raises:
      DataError: a file is missing or broken; names it.
    """
    utterances = list(utterances)
    bar = tqdm.tqdm(utterances, desc="features", unit="clip", mininterval=1.0)
    paths = (corpus.path(u) for u in bar)
    if live_tower:
        loaded = [audio.load(path) for path in paths]
        window = audio.window(max(audio.mel_frames(len(clip)) for clip in loaded), windows)
        n_mels = model.config.audio.num_mel_bins
        sounds = [Sound(audio.mel_frames(len(clip)), audio.log_mel(clip, window, n_mels)) for clip in loaded]
    else:
        clips = (Clip(audio.declared_frames(path), functools.partial(audio.load, path)) for path in paths)
        sounds = encode(model, {"params": params}, mesh, clips, windows)
    return {u.id: sound for u, sound in zip(utterances, sounds, strict=True)}
