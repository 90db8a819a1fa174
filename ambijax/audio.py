"""A sound file becomes a log-mel spectrogram: file -> mono 16 kHz -> log-mel, and every guard on bad audio.

    load(path)                      float32 [samples], 16 kHz mono, at most 30 s
    mel_frames(n), tokens(frames)   how many mel frames and audio tokens that is
    window(frames, buckets)         the smallest declared mel length the clip fits into
    log_mel(samples, frames)        float32 [frames, mels]

The numbers are Whisper's, which Qwen2-Audio inherits; the result equals transformers' `WhisperFeatureExtractor`,
transposed. That reference always pads to 30 s. A shorter window of `frames` is exact all the same when at least two
silent frames follow the clip's m valid ones (m + 2 <= frames):

  - the spectrogram: an FFT reaches 200 samples beyond its centre, so only the frames 0..m+1 can hear the clip. The
    loudest frame, which sets the floor of the dynamic range, is among them; every later frame is the floor.
  - the encoder: its last valid position j = (m-1)//2 sees the mel frames 2j-2..2j+2, hence at most m+1 (two
    convolutions of width 3, the second with stride 2). Later positions are masked.

Only the full window of 3,000 frames may be filled to the end, because there the reference has the same edge.
"""

import contextlib
import functools
import os
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ambijax import lfs
from ambijax.errors import ConfigError, DataError

SAMPLE_RATE = 16_000  # samples a second
N_FFT = 400  # samples in one FFT window: 25 ms
HOP = 160  # samples between two mel frames: 10 ms
SECONDS = 30  # the longest clip
N_SAMPLES = SECONDS * SAMPLE_RATE  # 480,000 samples in the full window
N_FRAMES = N_SAMPLES // HOP  # 3,000 mel frames in the full window
SILENT_FRAMES = 2  # mel frames of silence after a clip that make a shorter window exact
N_MELS = 128  # mel bands of Qwen2-Audio
BLOCK = 100  # mel frames transformed at once, so that the temporaries stay in the cache: twice as fast

POWER_FLOOR = 1e-10  # mel power below this counts as silence
DYNAMIC_RANGE = 8.0  # decades of power below the loudest band of the clip; what is quieter is raised to that
PLAUSIBLE = 4_000_000  # samples a second over all channels: 192 kHz of twenty; more is a broken or hostile header
_OGG_PAGE = 65_307  # bytes of the largest page of an Ogg file
UNSCALED = 1.5  # samples lie in [-1, 1], with headroom for codecs; beyond are integers nobody scaled


def load(path: str | Path) -> np.ndarray:
    """Reads any wav or flac (or other file libsndfile reads) as the model hears it.

    Args:
      path: a sound file of any rate, width and number of channels. No more than its first 30 s are read.

    Returns:
      float32 [samples], 16 kHz, mono, 0.025 to 30 s. A longer file warns once.

    Raises:
      DataError: missing, a git-lfs pointer, empty, corrupt or truncated, or one of the defects that `check` names.
    """
    import soundfile  # here, so that a command which reads no sound starts faster

    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file{namesake(path)}")
        _assert_whole(path)
        with soundfile.SoundFile(os.fsencode(path)) as file:  # names are bytes, and not always text
            rate = file.samplerate
            if rate * file.channels > PLAUSIBLE:
                raise DataError(
                    f"{path}: its header says {rate} Hz and {file.channels} channels, which is no recording"
                )
            limit = SECONDS * rate + 1  # one frame more tells `check` that the clip is too long
            samples = file.read(limit, dtype="float32", always_2d=True)
            declared = min(file.frames, limit)
    except (OSError, soundfile.SoundFileError, TypeError) as error:  # TypeError: *.raw means headerless to soundfile
        # libsndfile's and the system's own words, without the path once more.
        why = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
        raise DataError(f"{path}: not a readable sound file, its header or data is corrupt ({why})") from None
    if len(samples) < declared:
        raise DataError(f"{path}: truncated, {len(samples)} of {file.frames} frames are there; copy it again")
    return check(samples, rate, str(path))


def namesake(path: Path) -> str:
    """What to say of a file that is not there, where only its spelling may be wrong; '' where nothing is alike.

    The accent of é is a character of its own on some disks, and of the letter on others.
    """
    while path.parent != path and not path.parent.exists():
        path = path.parent
    if "\\" in path.name:
        return "; the parts of a path are separated by /"
    spelled = unicodedata.normalize("NFC", path.name).casefold()
    with contextlib.suppress(OSError):
        for other in path.parent.iterdir():
            if other.name != path.name and unicodedata.normalize("NFC", other.name).casefold() == spelled:
                return f"; {other.name!r} is there, with other capitals or accents in another form: rename one"
    return ""


def declared_frames(path: Path) -> int:
    """Valid mel frames of a file by its header alone: `mel_frames(len(load(path)))` of an intact one.

    Raises:
      DataError: no such file, or no readable header.
    """
    import soundfile

    try:
        about = soundfile.info(os.fsencode(path))
    except (OSError, soundfile.SoundFileError, TypeError):
        return mel_frames(len(load(path)))  # which says what is wrong with it
    n = min(about.frames, SECONDS * about.samplerate)
    return mel_frames(min((2 * n * SAMPLE_RATE + about.samplerate) // (2 * about.samplerate), N_SAMPLES))


def _assert_whole(path: Path) -> None:
    """Finds what libsndfile is silent about: pointer files, and sounds that end before their header or format says."""
    size = path.stat().st_size
    if lfs.is_pointer(path):
        raise DataError(f"{path}: a git-lfs pointer, not the sound itself; run `git lfs pull` in its repository")
    with path.open("rb") as file:
        head = file.read(12)
        if not head:
            raise DataError(f"{path}: the file is empty")
        if head.startswith(b"OggS"):
            if not _ends(file, size):
                raise DataError(f"{path}: truncated, its last page is missing or cut; copy it again")
            return
        kinds = {b"RIFFWAVE": ("little", b"data"), b"FORMAIFF": ("big", b"SSND"), b"FORMAIFC": ("big", b"SSND")}
        if (kind := head[:4] + head[8:]) not in kinds:
            return  # elsewhere decoding fails or ends early
        order, sound = kinds[kind]
        while len(header := file.read(8)) == 8:
            length = int.from_bytes(header[4:], order)
            if header[:4] == sound:
                present = size - file.tell()
                if length > present and length != 0xFFFFFFFF:  # all ones: written to a pipe, length unknown
                    raise DataError(f"{path}: truncated, {present} of {length} data bytes are there; copy it again")
                return
            file.seek(length + length % 2, 1)  # chunks are padded to an even length


def _ends(ogg: BinaryIO, size: int) -> bool:
    """Whether a file's last Ogg page says that its stream ends with it, and is whole (RFC 3533, section 6)."""
    ogg.seek(max(0, size - 2 * _OGG_PAGE))
    tail = ogg.read()
    page = tail[tail.rfind(b"OggS") :] if b"OggS" in tail else b""
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return bool(segments) and bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(segments)


def check(samples: np.ndarray, rate: int, name: str) -> np.ndarray:
    """Guards an array of samples and brings it to the form the model hears; `load` for sound that is in memory.

    Args:
      samples: floats [samples] or [samples, channels] in [-1, 1]; channels are averaged.
      rate: samples a second; resampled to 16 kHz when it is another.
      name: what to call the clip in messages.

    Returns:
      float32 [samples], 16 kHz, mono, 0.025 to 30 s. A longer clip is cut, with one warning for each name.

    Raises:
      DataError: no samples, wrong shape, NaN or infinity, unscaled integers, under 25 ms, or no sound at all.
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or rate <= 0:
        raise DataError(f"{name}: need samples [n] or [n, channels] and their rate, got {samples.shape} at {rate} Hz")
    if not samples.size:
        raise DataError(f"{name}: holds no samples")
    if not np.issubdtype(samples.dtype, np.floating):
        raise DataError(f"{name}: samples are {samples.dtype}; scale them to floats in [-1, 1]")
    if len(samples) > SECONDS * rate:
        _warn_cut(name)
        samples = samples[: SECONDS * rate]
    if not np.isfinite(samples).all():
        raise DataError(f"{name}: {np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")
    if (peak := np.abs(samples).max()) > UNSCALED:
        raise DataError(f"{name}: samples reach {peak:g}; scale them to [-1, 1] (16-bit integers: divide by 32768)")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    if len(mono) * SAMPLE_RATE < N_FFT * rate:
        raise DataError(f"{name}: lasts {1000 * len(mono) / rate:.1f} ms; at least 25 ms are needed")
    if mono.min() == mono.max():
        raise DataError(f"{name}: silent, every sample is {mono[0]:g}")
    mono = mono.astype(np.float32)
    if rate != SAMPLE_RATE:
        import soxr

        mono = soxr.resample(mono, rate, SAMPLE_RATE)[:N_SAMPLES]
    return mono


@functools.cache  # once for each name, however many epochs read it and whatever the warning filters are
def _warn_cut(name: str) -> None:
    warnings.warn(f"{name}: longer than {SECONDS} s; only the first {SECONDS} s are used", stacklevel=3)


def mel_frames(n_samples: int) -> int:
    """Number m of mel frames that a clip of `n_samples` at 16 kHz fills: ones in the reference's attention mask."""
    return -(-n_samples // HOP)


def tokens(frames: int) -> int:
    """Number of audio tokens the encoder makes of `frames` valid mel frames: 25 a second, 750 at most.

    >>> tokens(mel_frames(16_000))
    25
    """
    convolved = (frames - 1) // 2 + 1
    return (convolved - 2) // 2 + 1


def window(frames: int, buckets: Iterable[int]) -> int:
    """The smallest bucket in which a clip of `frames` valid mel frames is exact (see the module docstring).

    Args:
      frames: valid mel frames of the clip.
      buckets: the declared window lengths in mel frames, even, at most 3,000.

    Raises:
      ConfigError: a bucket cannot be a window, or the clip fits into none.
    """
    buckets = sorted(buckets)
    if wrong := [size for size in buckets if size % 2 or not SILENT_FRAMES < size <= N_FRAMES]:
        raise ConfigError(f"audio windows must be even numbers of mel frames up to {N_FRAMES}, got {wrong}")
    for size in buckets:
        if frames + SILENT_FRAMES <= size or frames <= size == N_FRAMES:
            return size
    raise ConfigError(f"a clip of {frames} mel frames fits into none of the windows {buckets}; declare {N_FRAMES}")


def log_mel(samples: np.ndarray, frames: int, n_mels: int = N_MELS) -> np.ndarray:
    """The log-mel spectrogram of a clip in a window of `frames`, time first.

        S = filters |rfft(hann * x)|^2,  L = log10 max(S, 1e-10),  result = (max(L, max L - 8) + 4) / 4

    Args:
      samples: float [samples] from `load` or `check`.
      frames: length of the window in mel frames, from `window`.
      n_mels: mel bands.

    Returns:
      float32 [frames, n_mels], equal to the first `frames` columns of the 30 s reference; silence after the clip.

    Raises:
      ConfigError: the window cuts the clip.
    """
    valid = mel_frames(len(samples))
    window(valid, [frames])  # raises when the window cuts the clip
    audible = min(frames, valid + SILENT_FRAMES)  # frames that can hear the clip; the others are the floor
    padded = np.zeros(audible * HOP, np.float32)
    padded[: len(samples)] = samples
    padded = np.pad(padded, N_FFT // 2, mode="reflect")  # centres frame i on sample i * HOP
    segments = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    result = np.empty((frames, n_mels), np.float32)
    power = np.empty((audible, N_FFT // 2 + 1), np.float32)
    for start in range(0, audible, BLOCK):
        block = slice(start, min(start + BLOCK, audible))
        spectrum = np.fft.rfft(segments[block] * _hann()).astype(np.complex64)  # the FFT in float64, as the reference
        np.add(spectrum.real**2, spectrum.imag**2, out=power[block])
    logs = result[:audible]
    logs[:] = power @ _mel_filters(n_mels)
    np.log10(np.maximum(logs, POWER_FLOOR, out=logs), out=logs)
    floor = max(np.log10(POWER_FLOOR), logs.max() - DYNAMIC_RANGE)
    np.maximum(logs, floor, out=logs)
    result[audible:] = floor
    result += 4
    result /= 4
    return result


@functools.cache
def _hann() -> np.ndarray:
    """The periodic Hann window, float64 [N_FFT]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)


@functools.cache
def _mel_filters(n_mels: int) -> object:
    """Slaney's triangular mel filters of unit area, float32 [N_FFT // 2 + 1, n_mels].

    Sparse, for an FFT bin is heard in two bands at most. That is faster than BLAS, whose threads wait for each other:
    beside other work a clip of 4.5 s took 0.3 s instead of 1.5 ms.
    """
    import scipy.sparse

    hertz = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)  # of the FFT bins
    # Slaney's mel scale: linear up to 1 kHz = 15 mel, then 27 mel for each factor of 6.4.
    top = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, top, n_mels + 2)
    edges = np.where(mels < 15, 200 / 3 * mels, 1000 * 6.4 ** ((mels - 15) / 27))  # hertz [n_mels + 2]
    rising = (hertz[:, None] - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - hertz[:, None]) / np.diff(edges)[1:]
    dense = (np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])).astype(np.float32)
    return scipy.sparse.csc_array(dense)
