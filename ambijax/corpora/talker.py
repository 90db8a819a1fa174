"""A source-filter talker: letters and a tone of voice in, speech-like sound out.

Not intelligible speech, but sound with the parts in which emotion is heard: a glottal source (pitch contour, jitter,
shimmer, breath, spectral tilt) through formant resonators that follow the letters of the sentence, with energy, rate
and pauses (Fant 1960; Klatt 1980). The filters work on overlapping short spectra, so that nothing loops over samples.

Axes: P phones, T frames of HOP samples, F frequency bins, V dimensions of the tone of voice, n samples.
"""

import dataclasses
import re

import numpy as np

SAMPLE_RATE = 16_000  # Hz
HOP = 128  # samples, 8 ms
FFT = 512  # twice the window: the filters may ring for 16 ms
SECONDS = (1.0, 2.4)  # shortest and longest clip
EDGE = 0.05  # s of silence before and after the sentence

# The tone of voice: each dimension in standard deviations from the speaker's own even voice ...
VOICE = ("energy", "rate", "pitch", "pitch_range", "pitch_slope", "pauses", "tilt", "harmonicity")
LIMIT = 3.0
# ... and what one standard deviation is.
ENERGY_STEP = 4.0  # dB
RATE_STEP = 1.2  # factor on the speed
PITCH_STEP = 2.2  # semitones
RANGE_STEP = 1.6  # factor on the depth of the accents
SLOPE_STEP = 3.0  # semitones a second
PAUSE_STEP = 0.12  # s of silence inside the sentence
TILT_STEP = 1.8  # dB an octave
ROUGH_STEP = 1.7  # factor on jitter, shimmer and breath; less harmonicity is more of them

# The even voice.
ACCENT = 2.0  # semitones
DECLINATION = -2.0  # semitones a second
PAUSE = 0.05  # s
TILT = -6.0  # dB an octave above 250 Hz: -12 of the glottal flow, +6 of the lips
JITTER, SHIMMER, BREATH = 0.005, 0.05, 0.12  # parts of a period, of the amplitude, of the pulses' root mean square


@dataclasses.dataclass(frozen=True)
class Speaker:
    """Whoever talks: what stays the same from clip to clip."""

    gender: str
    pitch: float  # Hz
    tract: float  # factor on the formants; a shorter vocal tract has higher ones
    rough: float  # factor on jitter, shimmer and breath
    rate: float  # factor on the speed
    level: float  # dB re full scale


def speaker(rng: np.random.Generator, gender: str) -> Speaker:
    """A random 'male' or 'female' speaker (pitch and tract length after Peterson & Barney 1952)."""
    pitch, tract = {"male": (115, 1.0), "female": (195, 1.16)}[gender]
    return Speaker(
        gender,
        pitch=pitch * 2 ** (rng.normal(0, 1.2) / 12),
        tract=tract * np.exp(rng.normal(0, 0.03)),
        rough=np.exp(rng.normal(0, 0.15)),
        rate=np.exp(rng.normal(0, 0.06)),
        level=-27 + rng.normal(0, 1.0),
    )


@dataclasses.dataclass(frozen=True)
class Channel:
    """What lies between the mouth and the file."""

    low: float  # Hz, high-pass
    high: float  # Hz, low-pass
    noise: float  # dB re full scale


# Phones: seconds, F1, F2, F3 in Hz (of a man), voicing, frication, centre of the frication in Hz.
_VOWELS = {
    "a": (0.105, 700, 1220, 2500), "e": (0.090, 530, 1750, 2500), "i": (0.085, 390, 1950, 2600),
    "o": (0.105, 520, 900, 2400), "u": (0.090, 350, 950, 2300), "y": (0.085, 300, 2150, 2800),
    "ee": (0.115, 280, 2250, 2900), "oo": (0.115, 310, 870, 2250), "ou": (0.125, 640, 1050, 2400),
    "ai": (0.125, 560, 1800, 2500), "ea": (0.110, 380, 2050, 2650), "er": (0.105, 480, 1350, 1750),
}  # fmt: skip
_SONORANTS = {
    "m": (0.065, 250, 1100, 2200), "n": (0.060, 250, 1500, 2500), "ng": (0.065, 250, 1900, 2600),
    "l": (0.060, 360, 1150, 2700), "r": (0.060, 350, 1150, 1650), "w": (0.055, 300, 750, 2200),
    "j": (0.055, 280, 2150, 2800),
}  # fmt: skip
_FRICATIVES = {"s": 6000, "z": 6000, "f": 4500, "v": 4500, "th": 5000, "h": 1500, "sh": 3200, "ch": 3200, "x": 5500}
_STOPS = {"p": 1000, "b": 900, "t": 4500, "d": 4000, "k": 2000, "g": 1800, "c": 2000, "q": 2000}
_VOICED = set("zvbdg")
_SILENCE = (500, 1500, 2500, 0.0, 0.0, 0)  # no passage at all: that is how a silence is known


def _phone(spelling: str) -> list[tuple[float, ...]]:
    if spelling in _VOWELS:
        return [(*_VOWELS[spelling], 1.0, 0.0, 3000)]
    if spelling in _SONORANTS:
        return [(*_SONORANTS[spelling], 0.3, 0.0, 3000)]
    voicing = 0.12 if spelling in _VOICED else 0.0
    if spelling in _FRICATIVES:
        return [(0.075, 400, 1500, 2500, voicing, 0.12, _FRICATIVES[spelling])]
    burst = _STOPS[spelling]
    return [(0.045, 300, 1500, 2500, voicing / 2, 0.0, burst), (0.020, 400, 1500, 2500, voicing, 0.2, burst)]


@dataclasses.dataclass
class _Phones:
    """A sentence on the way to sound; silences are phones too."""

    seconds: np.ndarray  # [P]
    formants: np.ndarray  # [P, 3], Hz
    voicing: np.ndarray  # [P], 0 to 1
    frication: np.ndarray  # [P]
    centre: np.ndarray  # [P], Hz

    @property
    def vowel(self) -> np.ndarray:
        return self.voicing == 1.0

    @property
    def silent(self) -> np.ndarray:
        return self.centre == 0

    def frames(self, values: np.ndarray, glide: int) -> np.ndarray:
        """Values a phone [P] to a track [T] with transitions of `glide` frames."""
        ends = np.round(np.cumsum(self.seconds) * SAMPLE_RATE / HOP).astype(int)
        track = np.repeat(values, np.diff(ends, prepend=0))
        kernel = np.hanning(glide + 2)[1:-1]
        return np.convolve(np.pad(track, glide // 2, mode="edge"), kernel / kernel.sum(), mode="valid")


def _spell(sentence: str, pauses: dict[int, float]) -> _Phones:
    """The sentence as phones, with pauses[w] seconds of silence after word w."""
    rows = [(EDGE, *_SILENCE)]
    for index, word in enumerate(_words(sentence)):
        word = re.sub(r"([^eo])\1+", r"\1", word)  # a double consonant is one
        word = re.sub(r"(?<=[a-z]{2}[^aeiouy])e$", "", word)  # the e of 'made' is silent
        for spelling in re.findall("ee|oo|ou|ai|ea|er|ng|th|sh|ch|[a-z]", word):
            rows += _phone(spelling)
        if index in pauses:
            rows.append((pauses[index], *_SILENCE))
    table = np.array([*rows, (EDGE, *_SILENCE)])
    return _Phones(table[:, 0], table[:, 1:4], table[:, 4], table[:, 5], table[:, 6])


def _words(sentence: str) -> list[str]:
    return re.findall("[a-z]+", sentence.lower().replace("'", ""))


def _timed(rng: np.random.Generator, who: Speaker, sentence: str, voice: dict[str, float]) -> _Phones:
    """The phones at the wanted rate, with pauses; sets voice['rate'] to the rate reached within SECONDS."""
    boundaries = len(_words(sentence)) - 1
    silence = PAUSE + PAUSE_STEP * voice["pauses"]
    count = min(boundaries, 0 if silence < 0.04 else 1 if silence < 0.2 else 2)
    where = rng.choice(boundaries, size=count, replace=False) if count else ()
    phones = _spell(sentence, {int(w): silence / count for w in where})
    spoken = ~phones.silent
    phones.seconds[spoken] *= np.exp(rng.normal(0, 0.12, spoken.sum()))
    phones.seconds[-4:-1] *= 1.25  # the end of a sentence is drawn out
    still = phones.seconds[~spoken].sum()
    even = phones.seconds[spoken].sum() / who.rate
    reached = np.clip(even / RATE_STEP ** voice["rate"], SECONDS[0] - still, SECONDS[1] - still)
    phones.seconds[spoken] *= reached / phones.seconds[spoken].sum()
    voice["rate"] = float(np.log(even / reached) / np.log(RATE_STEP))
    return phones


def _pitch(rng: np.random.Generator, phones: _Phones, who: Speaker, voice: dict[str, float]) -> np.ndarray:
    """The pitch contour [T] in Hz: accents on every other vowel or so, a line through the sentence, the height."""
    heights = np.where(phones.vowel, rng.uniform(-0.3, 0.3, len(phones.vowel)), 0.0)
    stressed = np.flatnonzero(phones.vowel)[rng.integers(0, 2) :: 2]
    heights[stressed] += rng.uniform(0.7, 1.3, len(stressed))
    accents = phones.frames(heights, 21)
    accents *= 1.0 / max(np.ptp(accents), 1e-3)
    seconds = np.arange(len(accents)) * HOP / SAMPLE_RATE
    line = (DECLINATION + SLOPE_STEP * voice["pitch_slope"]) * seconds
    semitones = 2 * ACCENT * RANGE_STEP ** voice["pitch_range"] * accents + line
    semitones -= np.median(semitones[phones.frames(phones.voicing, 3) > 0.2])
    return np.clip(who.pitch * 2 ** ((semitones + PITCH_STEP * voice["pitch"]) / 12), 60.0, 490.0)


def _source(rng: np.random.Generator, pitch: np.ndarray, rough: float) -> np.ndarray:
    """Glottal pulses with jitter and shimmer, and breath [n], from the pitch a sample [n]."""
    phase = np.cumsum(pitch) / SAMPLE_RATE
    at = np.flatnonzero(np.diff(np.floor(phase), prepend=0))
    period = SAMPLE_RATE / pitch[at]
    times = at - (phase[at] % 1) * period + JITTER * rough * period * rng.standard_normal(len(at))
    times = np.clip(times, 0, len(pitch) - 2)
    height = np.sqrt(period) * (1 + SHIMMER * rough * rng.standard_normal(len(at)))  # of unit power
    left = times.astype(int)
    pulses = np.bincount(left, height * (left + 1 - times), len(pitch))
    pulses += np.bincount(left + 1, height * (times - left), len(pitch))
    return pulses + BREATH * rough * rng.standard_normal(len(pitch))


_FREQUENCY = np.fft.rfftfreq(FFT, 1 / SAMPLE_RATE).astype(np.float32)
_WINDOW = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)  # periodic: neighbours add up to one


def _resonator(centre: np.ndarray, width: float) -> np.ndarray:
    """Frequency response [..., F] of one formant of `centre` [...] and bandwidth `width` Hz; 1 at 0 Hz."""
    square = np.asarray(centre, np.float32)[..., None] ** 2
    return square / (square - _FREQUENCY**2 + 1j * _FREQUENCY * np.float32(width))


def _tract(phones: _Phones, who: Speaker, tilt: float) -> np.ndarray:
    """Response of the vocal tract and of the glottal slope, complex64 [T, F]."""
    response = _resonator(3500 * who.tract, 180) * _resonator(4500 * who.tract, 250)
    octaves = np.log2(np.maximum(_FREQUENCY, 250) / 250)
    response = response * 10 ** ((TILT + TILT_STEP * tilt) * octaves / 20)
    for formant, width in zip(phones.formants.T, (70, 100, 140), strict=True):
        response = response * _resonator(phones.frames(formant * who.tract, 9), width)
    return response.astype(np.complex64)


def _frication(phones: _Phones) -> np.ndarray:
    """Response of a narrow passage, float32 [T, F]: a hump about its centre."""
    distance = (_FREQUENCY - phones.frames(phones.centre, 1)[:, None].astype(np.float32)) / 1200
    return np.exp(-0.5 * distance**2)


def _band(channel: Channel) -> np.ndarray:
    """Response of the channel, float32 [F]: second-order slopes."""
    low = 1 / (1 + (channel.low / np.maximum(_FREQUENCY, 1)) ** 4)
    return np.sqrt(low / (1 + (_FREQUENCY / channel.high) ** 8)).astype(np.float32)


def _spectra(sound: np.ndarray) -> np.ndarray:
    """Short spectra [T, F] of a sound of T * HOP samples."""
    padded = np.pad(sound.astype(np.float32), (0, HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[::HOP]
    return np.fft.rfft(frames * _WINDOW, FFT)


def _sound(spectra: np.ndarray) -> np.ndarray:
    """Overlap-adds spectra [T, F] to T * HOP samples."""
    pieces = np.fft.irfft(spectra, FFT).reshape(len(spectra), FFT // HOP, HOP)
    out = np.zeros((len(spectra) + FFT // HOP, HOP))
    for k in range(FFT // HOP):
        out[k : k + len(spectra)] += pieces[:, k]
    return out[: len(spectra)].reshape(-1)


def speak(
    rng: np.random.Generator, who: Speaker, sentence: str, tone: np.ndarray, channel: Channel
) -> tuple[np.ndarray, np.ndarray]:
    """Says `sentence` in a tone of voice.

    Args:
      rng: the chance in how it comes out.
      who: the speaker.
      sentence: text with at least one word of Latin letters.
      tone: float [V], in VOICE order.
      channel: what the recording does to it.

    Returns:
      float32 [n] at 16 kHz, 1.0 to 2.4 s; and the tone [V] that was reached where a limit stood in the way.
    """
    voice = dict(zip(VOICE, np.clip(tone, -LIMIT, LIMIT).tolist(), strict=True))
    phones = _timed(rng, who, sentence, voice)
    pitch = _pitch(rng, phones, who, voice)
    n = len(pitch) * HOP
    frame = np.arange(n) / HOP

    stress = np.where(phones.vowel, rng.uniform(0.7, 1.3, len(phones.vowel)), 1.0)
    stress[-5:] *= 0.7  # the voice ebbs
    loudness = phones.frames(stress, 5)
    voicing = np.interp(frame, np.arange(len(pitch)), phones.frames(phones.voicing, 3) * loudness)
    frication = np.interp(frame, np.arange(len(pitch)), phones.frames(phones.frication, 3) * loudness)

    source = _source(
        rng, np.interp(frame, np.arange(len(pitch)), pitch), who.rough / ROUGH_STEP ** voice["harmonicity"]
    )
    spectra = _spectra(source * voicing) * _tract(phones, who, voice["tilt"])
    spectra += _spectra(rng.standard_normal(n) * frication) * _frication(phones)
    sound = _sound(spectra * _band(channel))

    speech = sound[voicing > 0.1]
    sound *= 10 ** ((who.level + ENERGY_STEP * voice["energy"]) / 20) / np.sqrt(np.mean(speech**2))
    sound += 10 ** (channel.noise / 20) * rng.standard_normal(n)
    return np.clip(sound, -0.99, 0.99).astype(np.float32), np.array(list(voice.values()))
