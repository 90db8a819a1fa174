"""What can be measured in a voice: pitch, energy, rate, pauses and voice quality of one clip.

A number says little by itself: 200 Hz is high for one speaker and low for another. So a `Norm` over a speaker's clips
(or the whole corpus) turns the measures into z-scores, and `level` turns a z-score into one of five words.

The measures follow the speech-emotion literature (Banse & Scherer 1996; Juslin & Laukka 2003; Eyben et al. 2016).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

SAMPLE_RATE = 16_000  # Hz
FRAME = 1024  # samples, 64 ms: two periods of the lowest pitch and more
HOP = 256  # samples, 16 ms
PITCH_MIN, PITCH_MAX = 65.0, 500.0  # Hz
LEVEL_FLOOR = -100.0  # dB re full scale: what digital silence reads
SPEECH_RANGE = 30.0  # dB: quieter than the loudest frames by more is a pause
SPEECH_MIN = -65.0  # dB re full scale: below, nothing is speech
OCTAVE_ERROR = 9.0  # semitones from the median: what lies further is half or twice the pitch
VOICED_MIN = 0.5  # normalised autocorrelation at the pitch period
NUCLEUS_DIP = 2.5  # dB: a syllable nucleus rises this far above its surroundings (de Jong & Wempe 2009)
TILT_SPLIT, TILT_TOP = 1000.0, 5000.0  # Hz

VOICED = ("rate", "pitch", "pitch_range", "pitch_slope", "tilt", "harmonicity")  # what is measured in voiced frames
MEASURES = ("energy", "rate", "pitch", "pitch_range", "pitch_slope", "pauses", "tilt", "harmonicity", "energy_range")


@dataclasses.dataclass(frozen=True)
class Acoustics:
    """The measured prosody of one clip; always finite. With a pitch of 0 none of `VOICED` says anything."""

    energy: float  # dB re full scale, over the frames that hold speech
    rate: float  # syllable nuclei a second, pauses included
    pitch: float  # Hz, median over voiced frames; 0 = too few of them
    pitch_range: float  # semitones between the 10th and 90th percentile of voiced frames, about the slope
    pitch_slope: float  # semitones a second, straight line through the voiced frames
    pauses: float  # share of silent frames between the first and the last frame of speech
    tilt: float  # dB, 1-5 kHz against 0-1 kHz in voiced frames: high is tense, low is breathy or lax
    harmonicity: float  # dB, harmonics to noise in voiced frames: low is hoarse, rough or breathy
    energy_range: float  # dB, standard deviation over the frames that hold speech


def measure(samples: np.ndarray) -> Acoustics:
    """Measures one clip.

    Args:
      samples: float32 [n], mono, 16 kHz, full scale 1; any n, also 0.
    """
    import librosa

    samples = np.pad(samples.astype(np.float32), (0, max(0, FRAME - len(samples))))
    level = librosa.feature.rms(y=samples, frame_length=FRAME // 2, hop_length=HOP, center=True)[0]
    level = 20 * np.log10(np.maximum(level, 10 ** (LEVEL_FLOOR / 20)))
    speech = level > max(np.percentile(level, 95) - SPEECH_RANGE, SPEECH_MIN)
    if not speech.any():
        return Acoustics(LEVEL_FLOOR, *[0.0] * (len(MEASURES) - 1))

    pitch = librosa.yin(samples, fmin=PITCH_MIN, fmax=PITCH_MAX, sr=SAMPLE_RATE, frame_length=FRAME, hop_length=HOP)
    padded = np.pad(samples, FRAME // 2)  # frame i is centred on sample i * HOP, as in rms and yin
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP][: len(level)]
    periodicity = _periodicity(frames, pitch)
    voiced = speech & (periodicity > VOICED_MIN)
    first, last = np.flatnonzero(speech)[[0, -1]]
    return Acoustics(
        energy=float(10 * np.log10(np.mean(10 ** (level[speech] / 10)))),
        rate=float(_nuclei(level, voiced) / ((last - first + 1) * HOP / SAMPLE_RATE)),
        **_pitch_measures(pitch, voiced),
        pauses=float(1 - speech[first : last + 1].mean()),
        tilt=_tilt(frames[voiced]),
        harmonicity=_harmonicity(periodicity[voiced]),
        energy_range=float(level[speech].std()),
    )


def _periodicity(frames: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Normalised autocorrelation of each frame [F, FRAME] at its pitch period, [F], in [-1, 1]."""
    half = FRAME // 2
    lags = np.round(SAMPLE_RATE / pitch).astype(int)
    head = frames[:, :half]
    tail = np.take_along_axis(frames, lags[:, None] + np.arange(half), axis=1)
    power = np.sum(head**2, axis=1) * np.sum(tail**2, axis=1)
    return np.sum(head * tail, axis=1) / np.sqrt(power + 1e-12)


def _nuclei(level: np.ndarray, voiced: np.ndarray) -> int:
    """How many syllable nuclei there are: voiced peaks of the energy [F] in dB with a dip on both sides."""
    from scipy.signal import find_peaks

    peaks, _ = find_peaks(level, prominence=NUCLEUS_DIP)
    return int(voiced[peaks].sum())


def _pitch_measures(pitch: np.ndarray, voiced: np.ndarray) -> dict[str, float]:
    """Median, slope, and the range about that slope, without octave errors."""
    if voiced.sum() < 3:  # a line through fewer frames is noise
        return {"pitch": 0.0, "pitch_range": 0.0, "pitch_slope": 0.0}
    semitones = 12 * np.log2(pitch[voiced])
    median = np.median(semitones)
    kept = np.abs(semitones - median) < OCTAVE_ERROR
    seconds = np.flatnonzero(voiced)[kept] * HOP / SAMPLE_RATE
    seconds, semitones = seconds - seconds.mean(), semitones[kept]
    slope = np.sum(seconds * semitones) / max(np.sum(seconds**2), 1e-9)
    low, high = np.percentile(semitones - slope * seconds, [10, 90])
    return {"pitch": float(2 ** (median / 12)), "pitch_range": float(high - low), "pitch_slope": float(slope)}


def _tilt(frames: np.ndarray) -> float:
    if not len(frames):
        return 0.0
    power = np.mean(np.abs(np.fft.rfft(frames * np.hanning(FRAME).astype(np.float32))) ** 2, axis=0)
    frequency = np.fft.rfftfreq(FRAME, 1 / SAMPLE_RATE)
    above = power[(frequency >= TILT_SPLIT) & (frequency < TILT_TOP)].sum()
    return float(10 * np.log10((above + 1e-9) / (power[frequency < TILT_SPLIT].sum() + 1e-9)))


def _harmonicity(periodicity: np.ndarray) -> float:
    """Harmonics-to-noise ratio of voiced frames (Boersma 1993): 10 log10(r / (1 - r)), median, at most 30 dB."""
    if not len(periodicity):
        return 0.0
    r = np.clip(np.median(periodicity), 0, 0.999)
    return float(10 * np.log10(r / (1 - r)))


# ---------------------------------------------------------------------------------------------------------------------

LEVELS = ("very low", "low", "moderate", "high", "very high")
MODERATE = LEVELS.index("moderate")
_EDGES = (-1.2, -0.45, 0.45, 1.2)  # z-scores; of a normal distribution about 12, 21, 35, 21 and 12 % fall between them


def level(z: float) -> int:
    """The level of a z-score as an index into LEVELS."""
    return int(np.searchsorted(_EDGES, z))


def _vector(acoustics: Acoustics) -> np.ndarray:
    """[M] in MEASURES order; pitch in semitones, because that is how pitch is heard. NaN where too little is voiced."""
    values = dataclasses.asdict(acoustics)
    if acoustics.pitch:
        values["pitch"] = 12 * np.log2(acoustics.pitch)
    else:  # a whisper has no tempo or tension of 0
        values |= dict.fromkeys(VOICED, np.nan)
    return np.array([values[name] for name in MEASURES])


# What a listener would just notice. A speaker with one clip, or an even one, has no smaller spread than this.
_SPREAD_MIN = dict(zip(MEASURES, (1.0, 0.3, 0.5, 0.5, 1.0, 0.02, 1.0, 0.5, 0.5), strict=True))


@dataclasses.dataclass(frozen=True)
class Norm:
    """Mean and spread of each measure over the clips of a speaker or of a corpus."""

    mean: dict[str, float]
    spread: dict[str, float]

    @classmethod
    def of(cls, clips: Sequence[Acoustics]) -> "Norm":
        """The norm of one clip or more."""
        values = np.stack([_vector(clip) for clip in clips])
        known = np.isfinite(values)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, values, 0).sum(0) / count
        spread = np.sqrt((np.where(known, values - mean, 0) ** 2).sum(0) / count)
        spread = np.maximum(spread, list(_SPREAD_MIN.values()))
        return cls(dict(zip(MEASURES, mean.tolist(), strict=True)), dict(zip(MEASURES, spread.tolist(), strict=True)))

    def z(self, acoustics: Acoustics) -> dict[str, float]:
        """Each measure as a z-score; 0 where there was nothing to measure."""
        values = dict(zip(MEASURES, _vector(acoustics).tolist(), strict=True))
        return {
            name: (value - self.mean[name]) / self.spread[name] if np.isfinite(value) else 0.0
            for name, value in values.items()
        }


def speaker_norms(clips: Sequence[Acoustics], speakers: Sequence[str], least: int) -> dict[str, Norm]:
    """One norm a speaker; a speaker with fewer than `least` clips is held against the whole corpus."""
    by_speaker: dict[str, list[Acoustics]] = {}
    for clip, speaker in zip(clips, speakers, strict=True):
        by_speaker.setdefault(speaker, []).append(clip)
    corpus = Norm.of(clips)
    return {speaker: Norm.of(own) if len(own) >= least else corpus for speaker, own in by_speaker.items()}
