"""Makes the base model that ships with the package: tokenizer, random weights, training, export.

    python -m ambijax.tiny.make --out runs/make_tiny       half an hour on two CPU cores

Everything but the tokenizer and the random start is what any user runs: ambijax.train with configs/pretrain.py, then
the export to a Hugging Face directory. The result in DIR/tiny replaces the files beside this module.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from ml_collections import FrozenConfigDict

from ambijax import assemble, convert, emotions, errors, manifest, prompt, reasoning, settings
from ambijax.model import config as model_config
from ambijax.model import qwen2_audio

VOCABULARY = 1280  # tokens; the closed vocabulary of the offline teacher needs about half
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 128,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "d_model": 128,
    "activation_function": "gelu",
    "max_source_positions": 1500,
}
PREPROCESSOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "processor_class": "Qwen2AudioProcessor",
    "feature_size": 128,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
    "chunk_length": 30,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
}
TOKENIZER = {
    "tokenizer_class": "Qwen2Tokenizer",
    "processor_class": "Qwen2AudioProcessor",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "bos_token": None,
    "add_prefix_space": False,
    "additional_special_tokens": ["<|im_start|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"],
    "model_max_length": 8192,
}
# How Qwen2 cuts text before the merges.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE like Qwen2's, trained on `texts`, with Qwen2-Audio's special tokens at the end."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.normalizer = tokenizers.normalizers.NFC()
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(texts, trainer)
    t.add_special_tokens(list(SPECIAL))
    return t


def texts(corpus: manifest.Corpus) -> Iterable[str]:
    """What the model will read and write: instructions with transcripts, and reasonings."""
    for utterance in corpus.utterances:
        for labels in (emotions.CREMAD, emotions.IEMOCAP):
            yield prompt.instruction(utterance.transcript, labels, style="steps")
        yield f"{utterance.cot}\n{reasoning.ANCHOR}"
        yield prompt.instruction(utterance.transcript, emotions.CREMAD, style="answer")
        system = reasoning.STYLES["steps"].system
        yield from (f"{system} {role}\nAudio 1: \n" for role in ("system", "user", "assistant"))


def description(t: tokenizers.Tokenizer) -> dict[str, dict]:
    """The JSON files that describe the model to ambijax and to transformers, by name."""
    ids = {name: t.token_to_id(name) for name in SPECIAL}
    end = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"]}
    text = {
        "model_type": "qwen2",
        "vocab_size": -(-t.get_vocab_size() // 64) * 64,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": ids["<|im_end|>"],
        **end,
    }
    return {
        "config.json": {
            "architectures": ["Qwen2AudioForConditionalGeneration"],
            "model_type": "qwen2_audio",
            "audio_token_index": ids["<|AUDIO|>"],
            "audio_config": AUDIO,
            "text_config": text,
            "torch_dtype": "bfloat16",
        },
        "generation_config.json": {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], **end},
        "preprocessor_config.json": PREPROCESSOR,
        "tokenizer_config.json": TOKENIZER,
    }


def write_random(directory: Path, t: tokenizers.Tokenizer, seed: int) -> None:
    """A Hugging Face checkpoint directory with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    t.save(str(directory / "tokenizer.json"))
    files = description(t)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    model = qwen2_audio.Qwen2Audio(
        model_config.from_dict(files["config.json"]), None, jnp.dtype("float32"), "nothing_saveable"
    )
    params = jax.jit(lambda key: qwen2_audio.init(model, key)["params"])(jax.random.key(seed))
    convert.save_hugging_face(params, directory, directory, dtype=jnp.dtype("float32"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ambijax.tiny.make", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="working directory; the result is in its tiny/")
    args, rest = parser.parse_known_args()
    workdir, random = args.out / "run", args.out / "random"
    common = ["--config=configs/pretrain.py:tiny", f"--config.data.root={args.out / 'corpus'}", f"--workdir={workdir}"]
    common += [f"--config.model.checkpoint={random}", *rest]
    config, _ = settings.parse(["make", *common])
    if not (random / "config.json").exists():
        corpus = assemble.corpus(config)
        write_random(random, tokenizer(texts(corpus)), config.seed)
    subprocess.run([sys.executable, "-m", "ambijax.train", *common], check=True)
    export(config, workdir, args.out / "tiny")


def export(config: FrozenConfigDict, workdir: Path, out: Path) -> None:
    """The trained weights in bfloat16 as a Hugging Face directory."""
    setting = assemble.setting(config)
    with jax.set_mesh(setting.mesh):
        _, variables = assemble.trained(setting, {"params": assemble.base(setting)}, workdir)
    convert.save_hugging_face(variables["params"], config.model.checkpoint, out, dtype=jnp.dtype("bfloat16"))
    print(f"written to {out}")


if __name__ == "__main__":
    errors.run(main)
