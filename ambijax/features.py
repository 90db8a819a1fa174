"""Clips to `data.Sound`: log-mel of every file and, while the audio tower is frozen, its output, once a clip."""

import collections
import functools
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from ambijax import audio, sharding
from ambijax.data import Sound
from ambijax.manifest import Corpus, Utterance
from ambijax.model.qwen2_audio import Qwen2Audio

CLIPS = 16  # clips encoded at once


def mels(samples: Iterable[np.ndarray], windows: tuple[int, ...], n_mels: int) -> Iterator[Sound]:
    """Samples to log-mel, each clip in the smallest window that holds it."""
    for clip in samples:
        frames = audio.mel_frames(len(clip))
        yield Sound(frames, audio.log_mel(clip, audio.window(frames, windows), n_mels))


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: Qwen2Audio, variables: dict, mel: jax.Array, frames: jax.Array) -> jax.Array:
    return model.apply(variables, mel, frames, method="encode")


def encode(model: Qwen2Audio, variables: dict, mesh: Mesh, sounds: Iterable[Sound]) -> Iterator[Sound]:
    """Log-mel sounds to projected tower output [A, D], in order; one compiled program for each window in use."""
    size = sharding.round_up(CLIPS, mesh)

    def flush(waiting: list[tuple[int, Sound]]) -> Iterator[tuple[int, Sound]]:
        rows = [sound for _, sound in waiting]
        rows += rows[:1] * (size - len(rows))  # full batches only, so that the shape is one
        batch = (np.stack([s.values for s in rows]), np.array([s.frames for s in rows], np.int32))
        out = sharding.fetch(_encode(model, variables, *sharding.place(batch, mesh)))
        for (index, sound), row in zip(waiting, out, strict=False):
            yield index, Sound(sound.frames, row[: sound.tokens].copy())

    queues = collections.defaultdict(list)  # window -> clips waiting for a full batch
    done, following = {}, 0
    for index, sound in enumerate(sounds):
        queue = queues[len(sound.values)]
        queue.append((index, sound))
        if len(queue) == size:
            done.update(flush(queue))
            queue.clear()
        while following in done:
            yield done.pop(following)
            following += 1
    for queue in queues.values():
        if queue:
            done.update(flush(queue))
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
    clips = (audio.load(corpus.path(u)) for u in bar)
    n_mels = model.config.audio.num_mel_bins
    if live_tower:
        clips = list(clips)
        longest = max(audio.mel_frames(len(clip)) for clip in clips)
        sounds = mels(clips, (audio.window(longest, windows),), n_mels)
    else:
        sounds = encode(model, {"params": params}, mesh, mels(clips, windows, n_mels))
    return {u.id: sound for u, sound in zip(utterances, sounds, strict=True)}
