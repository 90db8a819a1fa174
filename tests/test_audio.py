"""Audio: equal to transformers' extractor, exact in short windows, and one clear line for every bad file."""

import tracemalloc
import warnings

import numpy as np
import pytest
import soundfile

from ambijax import audio
from ambijax.errors import ConfigError, DataError


def voice(seconds: float, rate: int = 16_000, noise: float = 0.01) -> np.ndarray:
    """A buzz with a moving pitch under 3.4 kHz that fades in and out, float32 [n]; the same sound at any rate."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * (140 * t + 6 * np.sin(2 * np.pi * 1.3 * t))
    buzz = sum(np.sin(k * phase) / k for k in range(1, 16))
    loudness = np.sin(np.pi * t / seconds) ** 2 * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
    hiss = noise * np.random.default_rng(0).standard_normal(len(t))
    return (0.3 * buzz * loudness + hiss).astype(np.float32)


@pytest.fixture(scope="module")
def extractor():
    from transformers import WhisperFeatureExtractor

    # Qwen2-Audio's preprocessor_config.json
    return WhisperFeatureExtractor(feature_size=128, sampling_rate=16_000, hop_length=160, chunk_length=30, n_fft=400)


def reference(extractor, samples) -> tuple[np.ndarray, int]:
    """transformers' features [3000, 128] and the number of valid frames in its mask."""
    out = extractor(samples, sampling_rate=16_000, return_tensors="np", return_attention_mask=True)
    return out["input_features"][0].T, int(out["attention_mask"].sum())


@pytest.fixture
def without_torch(monkeypatch):
    """Has the extractor take its numpy path. With torch it computes in float32 and is itself off by up to 7e-5."""
    monkeypatch.setattr("transformers.models.whisper.feature_extraction_whisper.is_torch_available", lambda: False)


CLIPS = {
    "shortest": voice(0.025),
    "voice": voice(2.013),
    "quiet": voice(1.5) * 1e-4,  # below the power floor
    "tone": np.sin(0.3 * np.arange(16_000)).astype(np.float32),  # the whole dynamic range inside one frame
    "click at the end": np.eye(1, 16_000, 15_999, dtype=np.float32)[0],  # loudest frame lies after the last valid one
    "pause": np.concatenate([voice(0.4), np.zeros(8_000, np.float32), voice(0.3)]),
    "window full but for 5 ms": voice(29.995),
    "window full": voice(30),
}


@pytest.mark.parametrize("name", CLIPS)
def test_equals_transformers(extractor, without_torch, name):
    samples = CLIPS[name]
    expected, valid = reference(extractor, samples)
    assert audio.mel_frames(len(samples)) == valid
    got = audio.log_mel(samples, audio.N_FRAMES)
    assert got.shape == (3000, 128)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    frames = audio.window(valid, range(4, audio.N_FRAMES + 1, 2))  # the tightest there is
    assert frames in {valid + 2, valid + 3, 3000}
    np.testing.assert_allclose(audio.log_mel(samples, frames), expected[:frames], rtol=0, atol=1e-5)


def test_equals_transformers_with_torch(extractor):
    pytest.importorskip("torch")
    samples = voice(3.21)
    expected, _ = reference(extractor, samples)
    np.testing.assert_allclose(audio.log_mel(samples, 324), expected[:324], rtol=0, atol=1e-5)


def test_other_mel_sizes(without_torch):
    from transformers import WhisperFeatureExtractor

    samples = voice(1)
    expected, _ = reference(WhisperFeatureExtractor(feature_size=80), samples)
    np.testing.assert_allclose(audio.log_mel(samples, 104, n_mels=80), expected[:104], rtol=0, atol=1e-5)


def test_constants_are_those_of_the_published_config(shared_data):
    import json

    config = json.loads((shared_data / "qwen2_audio" / "preprocessor_config.json").read_text())
    ours = {
        "chunk_length": audio.SECONDS,
        "feature_size": audio.N_MELS,
        "hop_length": audio.HOP,
        "n_fft": audio.N_FFT,
        "n_samples": audio.N_SAMPLES,
        "nb_max_frames": audio.N_FRAMES,
        "sampling_rate": audio.SAMPLE_RATE,
    }
    assert {key: config[key] for key in ours} == ours


# --- lengths


def test_lengths():
    assert audio.mel_frames(400) == 3  # 2.5 hops
    assert audio.mel_frames(480_000) == 3000
    assert [audio.tokens(m) for m in (3, 4, 5, 7, 100, 3000)] == [1, 1, 1, 2, 25, 750]  # by hand from the formula
    assert audio.tokens(audio.N_FRAMES) == 750


def test_tokens_equal_the_encoder_for_every_length():
    torch = pytest.importorskip("torch")
    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

    frames = torch.arange(3, 3001)
    _, expected = Qwen2AudioEncoder._get_feat_extract_output_lengths(None, frames)
    assert [audio.tokens(m) for m in frames.tolist()] == expected.tolist()


def encode(mel: np.ndarray) -> np.ndarray:
    """The encoder's two convolutions on one channel: width 3 with padding 1, the second with stride 2."""
    convolved = np.convolve(mel, [0.3, 0.5, 0.7], mode="same")
    return np.convolve(convolved, [0.2, 0.4, 0.9], mode="same")[::2]


@pytest.mark.parametrize("valid", [*range(3, 12), 1999, 2997, 2998])
def test_window_is_exact_and_no_smaller_one_is(valid):
    mel = np.random.default_rng(valid).standard_normal(3000)
    mel[valid + 2 :] = -1.5  # frames that cannot hear the clip are the floor, which is not zero
    convolved = (valid - 1) // 2 + 1
    frames = audio.window(valid, range(4, 3001, 2))
    assert convolved <= frames // 2  # tokens fit
    np.testing.assert_array_equal(encode(mel[:frames])[:convolved], encode(mel)[:convolved])
    assert not np.allclose(encode(mel[: frames - 2])[:convolved], encode(mel)[:convolved][: frames // 2 - 1])


def test_window_takes_the_smallest_bucket():
    buckets = (3000, 304, 504)
    assert audio.window(302, buckets) == 304
    assert audio.window(303, buckets) == 504  # one silent frame would not do
    assert audio.window(2999, buckets) == 3000  # but the full window is the reference itself
    with pytest.raises(ConfigError, match="fits into none"):
        audio.window(303, (304,))
    for wrong in (303, 3002, 2, 0):
        with pytest.raises(ConfigError, match="even numbers"):
            audio.window(1, (wrong, 3000))


def test_a_window_that_cuts_the_clip_is_refused():
    with pytest.raises(ConfigError, match="fits into none"):
        audio.log_mel(voice(1), 100)


# --- formats and rates


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    frames = audio.window(audio.mel_frames(max(len(a), len(b))), range(4, 3001, 2))
    a, b = (audio.log_mel(x, frames).ravel() for x in (a, b))
    return np.corrcoef(a, b)[0, 1]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "FLAC"])
def test_formats(tmp_path, subtype):
    samples = np.round(voice(2) * 128) / 128  # on the grid of eight bits, which every format holds exactly
    kind, subtype = ("flac", "PCM_16") if subtype == "FLAC" else ("wav", subtype)
    path = tmp_path / f"clip.{kind}"
    soundfile.write(path, samples, 16_000, subtype=subtype)
    got = audio.load(path)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, samples)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_rates(tmp_path, rate):
    path = tmp_path / "clip.wav"
    soundfile.write(path, voice(2, rate, noise=0), rate, subtype="FLOAT")
    got, expected = audio.load(path), voice(2, noise=0)
    assert got.shape == expected.shape
    assert correlation(got, expected) > 0.999


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(tmp_path, channels):
    samples = voice(1)
    gains = np.linspace(0.1, 0.9, channels)  # mean 0.5
    soundfile.write(tmp_path / "clip.wav", samples[:, None] * gains, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(audio.load(tmp_path / "clip.wav"), samples / 2, atol=1e-6)


def test_stereo_at_another_rate(tmp_path):
    samples = voice(1, 44_100, noise=0)
    soundfile.write(tmp_path / "clip.wav", np.stack([samples, samples], 1), 44_100, subtype="FLOAT")
    assert correlation(audio.load(tmp_path / "clip.wav"), voice(1, noise=0)) > 0.999


# --- guards

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 81234\n"


def wav(samples, rate=16_000, subtype="FLOAT"):
    return lambda path: soundfile.write(path, np.asarray(samples), rate, subtype=subtype, format="WAV")


def cut(kind: str, keep: float):
    def write(path):
        soundfile.write(path, voice(1), 16_000, format=kind)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return write


def lastless(path):
    soundfile.write(path, voice(1), 16_000, format="OGG")
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"OggS")])


with_nan, with_inf = voice(1), voice(1)
with_nan[7], with_inf[7] = np.nan, -np.inf

BAD = {
    "missing": (lambda path: None, "no such file"),
    "directory": (lambda path: path.mkdir(), "no such file"),
    "pointer": (lambda path: path.write_text(POINTER), "git lfs pull"),
    "empty file": (lambda path: path.touch(), "empty"),
    "no frames": (wav(np.zeros(0)), "no samples"),
    "corrupt header": (lambda path: path.write_bytes(b"RIFF\x10\0\0\0WAVEjunkjunkjunk"), "corrupt"),
    "not sound": (lambda path: path.write_text("sorry, moved" * 99), "corrupt"),
    "half a wav": (cut("WAV", 0.5), "truncated"),
    "wav short by a sample": (cut("WAV", 1 - 1 / 32_044), "truncated"),
    "half a flac": (cut("FLAC", 0.5), "corrupt|truncated"),
    "half an mp3": (cut("MP3", 0.5), "truncated"),
    "half an aiff": (cut("AIFF", 0.5), "truncated"),
    "half an ogg": (cut("OGG", 0.5), "truncated"),
    "an ogg short by its last page": (lastless, "truncated"),
    "an ogg short by a byte": (cut("OGG", 1 - 1e-9), "truncated"),
    "header only": (cut("WAV", 30 / 32_044), "corrupt"),
    "nan": (wav(with_nan), "1 samples are NaN or infinite"),
    "inf": (wav(with_inf), "1 samples are NaN or infinite"),
    "unscaled": (wav(voice(1) * 32_767), "divide by 32768"),
    "silent": (wav(np.zeros(16_000)), "silent"),
    "constant": (wav(np.full(16_000, 0.25)), "silent"),
    "channels cancel": (wav(np.stack([voice(1), -voice(1)], 1)), "silent"),
    "short": (wav(voice(0.0249)), "25 ms"),
    "short at 48 kHz": (wav(voice(0.0249, 48_000), 48_000), "25 ms"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, name):
    write, message = BAD[name]
    path = tmp_path / "clip.wav"
    write(path)
    with pytest.raises(DataError, match=message) as caught:
        audio.load(path)
    assert str(caught.value).count("clip.wav") == 1
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_no_disk_takes_is_a_bad_file_like_others(tmp_path):
    with pytest.raises(DataError, match="File name too long"):
        audio.load(tmp_path / f"{'x' * 300}.wav")


def test_a_header_that_no_recorder_writes_is_a_bad_file(tmp_path):
    """Half a minute of it would take gigabytes."""
    soundfile.write(tmp_path / "clip.flac", np.zeros((1000, 8)), 655_350)
    with pytest.raises(DataError, match="655350 Hz and 8 channels"):
        audio.load(tmp_path / "clip.flac")


def test_headerless_files_are_refused(tmp_path):
    (tmp_path / "clip.raw").write_bytes(b"\1\2" * 16_000)
    with pytest.raises(DataError, match="not a readable sound file"):
        audio.load(tmp_path / "clip.raw")


def test_wav_of_unknown_length_is_read(tmp_path):
    """ffmpeg writing to a pipe cannot go back to the header and leaves all ones in it."""
    path = tmp_path / "clip.wav"
    wav(voice(1), subtype="PCM_16")(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = data[4:8] = b"\xff" * 4
    path.write_bytes(data)
    assert len(audio.load(path)) == 16_000


def test_chunks_around_the_data_are_skipped(tmp_path):
    path = tmp_path / "clip.wav"
    wav(voice(1), subtype="PCM_16")(path)
    data = path.read_bytes()
    odd = b"LIST" + (5).to_bytes(4, "little") + b"hello" + b"\0"  # padded to an even length
    path.write_bytes(data[:12] + odd + data[12:] + odd)
    assert len(audio.load(path)) == 16_000
    path.write_bytes((data[:12] + odd + data[12:])[:-2])
    with pytest.raises(DataError, match="truncated"):
        audio.load(path)


def test_ten_minutes_are_cut_with_one_warning_and_not_read(tmp_path):
    path = tmp_path / "long.wav"
    long = np.tile(voice(30), 20)
    wav(long, subtype="PCM_16")(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracemalloc.start()
        first = audio.load(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        audio.load(path)
    assert [str(w.message) for w in caught] == [f"{path}: longer than 30 s; only the first 30 s are used"]
    assert len(first) == 480_000
    np.testing.assert_allclose(first, long[:480_000], atol=1e-4)
    assert peak < 12e6  # bytes; the ten minutes are 38 MB


def test_thirty_seconds_exactly_are_not_cut(tmp_path):
    wav(np.tile(voice(1, 44_100), 30), 44_100)(tmp_path / "clip.wav")
    assert len(audio.load(tmp_path / "clip.wav")) == 480_000  # a warning would be an error


def test_check_takes_arrays():
    samples = voice(1)
    np.testing.assert_array_equal(audio.check(samples.astype(np.float64), 16_000, "mine"), samples)
    assert len(audio.check(np.stack([samples] * 2, 1), 8_000, "mine")) == 32_000
    for bad, message in [
        ((samples * 32_767).astype(np.int16), "int16"),
        (samples[None, None], "need samples"),
        (np.zeros((0, 2)), "no samples"),
        (np.zeros(0), "no samples"),
    ]:
        with pytest.raises(DataError, match=f"^mine: .*{message}"):
            audio.check(bad, 16_000, "mine")
    with pytest.raises(DataError, match="at 0 Hz"):
        audio.check(samples, 0, "mine")
    with pytest.warns(UserWarning, match="^a long array: longer than 30 s"):
        assert len(audio.check(np.tile(samples, 31), 16_000, "a long array")) == 480_000


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_a_header_tells_how_many_frames_will_be_heard(tmp_path, rate):
    """Else a whole clip would be refused as one that is not as long as it says."""
    path = tmp_path / "clip.wav"
    for n in (*range(rate // 10, rate // 10 + 12), 31 * rate):
        soundfile.write(path, np.sin(0.1 * np.arange(n)), rate)
        with warnings.catch_warnings(action="ignore"):  # of the long one
            heard = audio.mel_frames(len(audio.load(path)))
        assert audio.declared_frames(path) == heard, n
