"""Acoustics against signals whose pitch, level, tempo and noise are known by construction."""

import dataclasses

import numpy as np
import pytest

from ambijax import acoustics
from ambijax.acoustics import MEASURES, Acoustics, Norm, measure
from ambijax.curation import prompts

RATE = acoustics.SAMPLE_RATE


def pulses(pitch: np.ndarray, height: float = 0.3) -> np.ndarray:
    """One pulse a period of the pitch contour [n] in Hz, slightly smoothed."""
    phase = np.cumsum(pitch) / RATE
    train = np.zeros(len(pitch))
    train[np.flatnonzero(np.diff(np.floor(phase)) > 0)] = height
    return np.convolve(train, np.hanning(9), mode="same").astype(np.float32)


def seconds(duration: float) -> np.ndarray:
    return np.arange(int(duration * RATE)) / RATE


def tone(frequency: float, amplitude: float, duration: float) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * frequency * seconds(duration))).astype(np.float32)


@pytest.mark.parametrize("pitch", [80, 100, 150, 233, 350, 440])
def test_pitch_of_a_pulse_train(pitch):
    clip = measure(pulses(np.full(RATE, float(pitch))))
    assert clip.pitch == pytest.approx(pitch, rel=0.01)
    assert clip.pitch_range < 0.3
    assert abs(clip.pitch_slope) < 0.3


@pytest.mark.parametrize("slope", [-6.0, 4.0])
def test_pitch_slope_is_not_range(slope):
    clip = measure(pulses(150 * 2 ** (slope * (seconds(1.5) - 0.75) / 12)))
    assert clip.pitch_slope == pytest.approx(slope, rel=0.05)
    assert clip.pitch_range < 0.5  # a version that forgets the slope reads 0.8 * 1.5 * |slope| = 4.8 and more
    assert clip.pitch == pytest.approx(150, rel=0.02)


def test_pitch_range_of_a_vibrato():
    # 80 % of a sine of amplitude A lies within A sin(0.4 pi): the range is 2 * 2 * 0.951 = 3.80 semitones.
    clip = measure(pulses(150 * 2 ** (2 * np.sin(2 * np.pi * 2 * seconds(2.0)) / 12)))
    assert clip.pitch_range == pytest.approx(3.80, rel=0.08)
    assert abs(clip.pitch_slope) < 1.5


def test_energy_is_root_mean_square_in_decibels():
    quiet, loud = measure(tone(200, 0.1, 1.0)), measure(tone(200, 0.2, 1.0))
    assert loud.energy == pytest.approx(20 * np.log10(0.2 / np.sqrt(2)), abs=0.3)
    assert loud.energy - quiet.energy == pytest.approx(20 * np.log10(2), abs=0.01)
    assert loud.pitch == pytest.approx(quiet.pitch)


def test_pauses_do_not_lower_the_energy_and_are_counted():
    voice, gap = tone(200, 0.1, 0.5), np.zeros(RATE // 2, np.float32)
    clip = measure(np.concatenate([gap, voice, gap, voice, gap]))
    assert clip.pauses == pytest.approx(1 / 3, abs=0.04)  # silence at the edges is no pause
    assert clip.energy == pytest.approx(measure(voice).energy, abs=0.5)


@pytest.mark.parametrize("rate", [3, 5])
def test_rate_counts_syllable_like_swells(rate):
    swell = (0.55 - 0.45 * np.cos(2 * np.pi * rate * seconds(2.0))).astype(np.float32)
    clip = measure(pulses(np.full(2 * RATE, 120.0)) * swell)
    assert clip.rate == pytest.approx(rate, rel=0.1)
    assert clip.energy_range > measure(pulses(np.full(2 * RATE, 120.0))).energy_range + 2


def test_tilt_is_the_power_ratio_of_the_bands():
    clip = measure(tone(250, 0.1, 1.0) + tone(2000, 0.05, 1.0))
    assert clip.tilt == pytest.approx(20 * np.log10(0.5), abs=0.1)


def test_harmonicity_is_harmonics_to_noise():
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    voice = tone(150, 0.1, 1.0)
    for snr in (5, 10, 20):
        noisy = voice + noise * np.float32(0.1 / np.sqrt(2) * 10 ** (-snr / 20))
        assert measure(noisy).harmonicity == pytest.approx(snr, abs=1.0)


def test_a_swelling_tone_is_still_harmonic():
    swelling = tone(150, 0.1, 0.2) * np.exp(20 * (seconds(0.2) - 0.2)).astype(np.float32)
    assert measure(swelling).harmonicity > 20  # normalised by one end of the frame alone it would read about 8


@pytest.mark.parametrize("samples", [0, 1, 400, 16_000])
def test_silence_is_finite_and_has_no_pitch(samples):
    clip = measure(np.zeros(samples, np.float32))
    assert clip.pitch == 0
    assert clip.energy == acoustics.LEVEL_FLOOR
    assert np.isfinite(dataclasses.astuple(clip)).all()


def test_noise_clicks_and_offsets_are_finite():
    rng = np.random.default_rng(0)
    click = np.zeros(RATE, np.float32)
    click[5000] = 1
    for samples in (rng.uniform(-1, 1, RATE), np.full(RATE, 0.5), click, rng.uniform(-1, 1, 900)):
        clip = measure(samples.astype(np.float32))
        assert np.isfinite(dataclasses.astuple(clip)).all()
    assert measure(rng.uniform(-1, 1, RATE).astype(np.float32)).pitch == 0


def clip_with(**values: float) -> Acoustics:
    even = {"energy": -25.0, "rate": 4.0, "pitch": 150.0, "pitch_range": 4.0, "pitch_slope": -2.0, "pauses": 0.1}
    return Acoustics(**{**even, "tilt": -10.0, "harmonicity": 9.0, "energy_range": 6.0, **values})


def test_norm_makes_z_scores_of_its_own_clips():
    rng = np.random.default_rng(0)
    clips = [clip_with(energy=e, rate=r, pitch=f) for e, r, f in rng.uniform([-40, 2, 90], [-10, 7, 300], (50, 3))]
    z = np.array([list(Norm.of(clips).z(clip).values()) for clip in clips])
    assert z.mean(0) == pytest.approx(np.zeros(len(MEASURES)), abs=1e-9)
    assert z.std(0)[:3] == pytest.approx(np.ones(3))
    assert z[:, 3:] == pytest.approx(0, abs=1e-9)  # measures that never vary: nothing is high or low


def test_norm_hears_pitch_in_semitones():
    norm = Norm.of([clip_with(pitch=100), clip_with(pitch=200)])
    assert norm.z(clip_with(pitch=100 * 2**0.5))["pitch"] == pytest.approx(0, abs=1e-9)
    assert norm.z(clip_with(pitch=400))["pitch"] == pytest.approx(3)


def test_a_clip_without_pitch_neither_bends_the_norm_nor_has_a_level():
    voiced = [clip_with(pitch=100), clip_with(pitch=200)]
    silent = measure(np.zeros(RATE, np.float32))
    norm = Norm.of([*voiced, silent])
    assert norm.mean["pitch"] == Norm.of(voiced).mean["pitch"]
    assert norm.z(silent)["pitch"] == 0
    assert np.isfinite(list(Norm.of([silent]).z(silent).values())).all()


def test_a_whisper_has_no_tempo_or_tension_of_zero():
    """It has energy and pauses; what is measured in voiced frames was not there to be measured."""
    rng = np.random.default_rng(0)
    whisper = measure((0.1 * rng.standard_normal(RATE)).astype(np.float32))
    assert whisper.pitch == 0
    voiced = [clip_with(energy=e) for e in (-30.0, -28.0)]
    norm, without = Norm.of([*voiced, whisper]), Norm.of(voiced)
    for name in acoustics.VOICED:
        assert norm.mean[name] == without.mean[name]
        assert norm.z(whisper)[name] == 0
    assert norm.mean["energy"] != without.mean["energy"]
    described = prompts.describe(whisper, norm)
    assert "voiced" in described
    assert not any(word in described for word in ("Hz", "effort", "rate", "ratio"))


def test_levels():
    words = [acoustics.LEVELS[acoustics.level(z)] for z in (-9, -1, 0, 1, 9)]
    assert words == ["very low", "low", "moderate", "high", "very high"]


def test_a_speaker_with_few_clips_is_held_against_the_corpus():
    clips = [clip_with(energy=e) for e in (-30.0, -20.0, -10.0)]
    norms = acoustics.speaker_norms(clips, ["a", "a", "b"], least=2)
    assert norms["a"].mean["energy"] == pytest.approx(-25)
    assert norms["b"].mean["energy"] == pytest.approx(-20)
