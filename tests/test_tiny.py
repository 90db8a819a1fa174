"""The model that ships with the package is a Qwen2-Audio like any other, and starts where the paper's base starts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ambijax
from ambijax import audio, convert, emotions, manifest, prompt, reasoning
from ambijax.model import config as model_config
from ambijax.model import qwen2_audio
from ambijax.tiny import make

TINY = Path(ambijax.__file__).parent / "tiny"
pytestmark = pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="not in this checkout")


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """Two seconds of a gliding, pulsing tone in noise."""
    t = np.arange(2 * audio.SAMPLE_RATE) / audio.SAMPLE_RATE
    noise = np.random.default_rng(0).normal(size=t.size)
    voice = np.sin(2 * np.pi * (120 + 30 * t) * t) * (1 + np.sin(2 * np.pi * 4 * t))
    return (0.2 * voice + 0.01 * noise).astype(np.float32)


def test_its_tokenizer_is_made_of_what_it_reads_and_writes():
    heard = manifest.Utterance("a", "a.wav", "It is late.", "s", 0, {"anger": 1}, cot="Keywords: loud")
    texts = list(make.texts(manifest.Corpus(Path(), (heard,))))
    vocabulary = prompt.load(TINY, emotions.CREMAD)
    for asked in ("steps", "answer"):
        assert prompt.instruction("It is late.", emotions.CREMAD, style=asked) in texts
    assert "Keywords: loud\nFinal emotion:" in texts
    assert all(reasoning.STYLES["steps"].system in text for text in texts[-3:])
    assert {i for text in texts for i in vocabulary.encode(text)} <= {*range(1280)}


def test_it_is_small():
    size = sum(path.stat().st_size for path in TINY.iterdir() if path.is_file())
    assert size <= 12 * 2**20
    shapes = qwen2_audio.shapes(qwen2_audio.Qwen2Audio(model_config.load(TINY), None, jnp.float32, "nothing_saveable"))
    assert 1e6 < sum(np.prod(x.shape) for x in jax.tree.leaves(shapes["params"])) < 5e6


def test_its_class_words_are_tokens():
    vocabulary = prompt.load(TINY, emotions.CREMAD)
    assert len(set(vocabulary.class_ids)) == 6
    text = json.loads((TINY / "config.json").read_text())["text_config"]
    prompt.assert_fits(vocabulary, text["vocab_size"], vocabulary.audio)


def test_transformers_loads_it_and_agrees(clip):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(TINY)
    instruction = prompt.instruction("It was a long day.", emotions.CREMAD, style="steps")
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{instruction}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = processor(text=chat, audio=[clip], sampling_rate=audio.SAMPLE_RATE, return_tensors="pt")

    frames = audio.mel_frames(len(clip))
    vocabulary = prompt.load(TINY, emotions.CREMAD)
    ids = prompt.encode_prompt(vocabulary, "It was a long day.", audio.tokens(frames), style="steps")
    assert inputs["input_ids"][0].tolist() == ids

    model = qwen2_audio.Qwen2Audio(model_config.load(TINY), None, jnp.float32, "nothing_saveable")
    params = convert.load(TINY, model, dtype=jnp.dtype("float32"))
    mel = audio.log_mel(clip, audio.window(frames, (256,)))[None]
    tokens = np.array([ids], np.int32)
    ours = model.apply({"params": params}, mel, np.array([frames]), tokens, np.ones_like(tokens, bool))
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)
