"""What both sides of benchmarks/compare.py compute: model sizes, clips, prompts, completions. No jax, no torch.

B clips of a training step   P prompt tokens   T completion tokens   K samples of a prompt
"""

import collections
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from ambijax import audio, emotions, prompt

# The tiny model's tokenizer serves every size: the rows above its tokens are embedded and sampled all the same.
VOCABULARY = prompt.load(Path(audio.__file__).parent / "tiny", emotions.CREMAD)
WORDS = (10, 600)  # ids of ordinary tokens
LOGITS = 8  # tokens of the row that compares all logits


@dataclasses.dataclass(frozen=True)
class Shape:
    """One experiment. `--set field=value` of compare.py changes a field; `sweep` changes several in turn."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    vocabulary: int
    tower: int
    tower_mlp: int
    tower_layers: int
    tower_heads: int
    dtype: str
    seconds: float = 4.5  # length of a clip: CREMA-D's are 1.3 to 5, IEMOCAP's 4.5 in the mean
    clips: int = 4  # of an SFT step, and prompts of a roll-out
    prompt: int = 192  # P, of which 25 a second are audio
    completion: int = 128  # T of SFT and DPO
    samples: int = 8  # K
    new_tokens: int = 128  # of a roll-out, for every sample: neither side may stop early
    readout_clips: int = 16  # clips read out at once
    feature_clips: int = 16
    rank: int = 8
    alpha: float = 16.0
    chunk: int = 32  # our completion positions per slice of vocabulary logits
    micro_batch: int = 0  # our prompts of an RL update whose gradient is formed at once, 0 is all; SFT and DPO take all
    decoding: str = "xla"  # our attention of roll-outs, model.decoding
    keep_activations: bool = False  # our grpo.keep_activations
    remat: str = ""  # our jax.checkpoint policy, '' is the one of configs/base.py
    reference_checkpointing: bool = False  # gradient checkpointing in torch: what a 7B step needs, and a small one not

    @property
    def audio_tokens(self) -> int:
        return audio.tokens(audio.mel_frames(round(self.seconds * audio.SAMPLE_RATE)))

    @property
    def together(self) -> int:
        """Prompts of an RL update whose gradient is formed at once."""
        divides = self.micro_batch and self.clips % self.micro_batch == 0
        return self.micro_batch if divides else self.clips

    @property
    def config(self) -> dict:
        """The Hugging Face config.json."""
        return {
            "architectures": ["Qwen2AudioForConditionalGeneration"],
            "model_type": "qwen2_audio",
            "audio_token_index": VOCABULARY.audio,
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": audio.N_MELS,
                "encoder_layers": self.tower_layers,
                "encoder_attention_heads": self.tower_heads,
                "encoder_ffn_dim": self.tower_mlp,
                "d_model": self.tower,
                "max_source_positions": audio.N_FRAMES // 2,
            },
            "text_config": {
                "model_type": "qwen2",
                "vocab_size": self.vocabulary,
                "hidden_size": self.hidden,
                "intermediate_size": self.mlp,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.heads,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "bos_token_id": VOCABULARY.endoftext,
                "eos_token_id": VOCABULARY.im_end,
                "pad_token_id": VOCABULARY.endoftext,
            },
        }

    @property
    def matrix_parameters(self) -> int:
        """N: what a token is multiplied with in decoder and head. Forward and backward through frozen ones are 4 N."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.mlp) + self.hidden * self.vocabulary


PRESETS = {
    # Seconds on two cores: to exercise every line.
    "small": Shape(
        **{"hidden": 64, "mlp": 128, "layers": 2, "heads": 4, "vocabulary": 1024, "dtype": "float32"},
        **{"tower": 32, "tower_mlp": 64, "tower_layers": 2, "tower_heads": 2},
        **{"seconds": 1.0, "clips": 2, "prompt": 48, "completion": 16, "samples": 2, "new_tokens": 8},
        **{"readout_clips": 2, "feature_clips": 2},
    ),
    # 67 million parameters: what two cores train in seconds a step.
    "67m": Shape(
        **{"hidden": 512, "mlp": 1408, "layers": 8, "heads": 8, "vocabulary": 32_000, "dtype": "float32"},
        **{"tower": 384, "tower_mlp": 1536, "tower_layers": 4, "tower_heads": 6},
        **{"micro_batch": 1, "chunk": 64, "keep_activations": True},
    ),
    # The published model's sizes; random weights made on the spot.
    "7b": Shape(
        **{"hidden": 4096, "mlp": 11_008, "layers": 32, "heads": 32, "vocabulary": 156_032, "dtype": "bfloat16"},
        **{"tower": 1280, "tower_mlp": 5120, "tower_layers": 32, "tower_heads": 20},
        **{
            "new_tokens": 256,
            "completion": 256,
            "reference_checkpointing": True,
            "decoding": "triton",
            "chunk": 128,
            "micro_batch": 1,
        },
    ),
}


def changes(given: list[str]) -> dict[str, object]:
    """'field=value' strings as a shape's fields and their values.

    Raises:
      ValueError: no such field, or a value that it cannot have.
    """
    kinds = {field.name: type(getattr(PRESETS["small"], field.name)) for field in dataclasses.fields(Shape)}
    read = {bool: {"True": True, "False": False}.__getitem__}  # bool("False") is True
    changed = {}
    for name, _, value in (change.partition("=") for change in given):
        if name not in kinds:
            raise ValueError(f"{name} is no field of a shape; there are {', '.join(kinds)}")
        kind = kinds[name]
        try:
            changed[name] = read.get(kind, kind)(value)
        except (KeyError, ValueError):
            raise ValueError(f"{name}={value!r} must be {kind.__name__}") from None
    return changed


# A ratio that holds for one shape only does not count: the ends of what the task uses, one field at a time.
SWEEP = (
    *({"seconds": s, "prompt": round(25 * s) + 80} for s in (2.0, 12.0)),
    *({"new_tokens": n} for n in (64, 512)),
    *({"samples": k} for k in (2, 16)),
)


SQUARES = 8  # products of a step of the row `matrix`: one alone would measure its start, too


def matrix_size(cpu: bool) -> int:
    """Rows and columns of the square product that measures the rate of a device."""
    return 2048 if cpu else 8192


def read_size(cpu: bool) -> tuple[int, int]:
    """Of the float32 matrix whose rows are summed to measure how fast its memory is read, as decoding reads weights."""
    return (2**13, 2**13) if cpu else (2**16, 2**15)


def products(shape: Shape) -> collections.Counter[tuple[int, int, int]]:
    """How often a GRPOz step multiplies [rows, inputs] with frozen [inputs, outputs], as we cut it; not in decoding.

    Pre-fill, the reference's scores of samples, the update on them and gold: forward, and the gradient by activations,
    which is a product with the matrix turned around. Of a prompt one token leaves the last layer, the others need keys
    and values; the head meets completions alone, a slice of time steps at once. With `keep_activations` the update
    computes forward what no roll-out has: gold, and prompts in the last layer.
    """
    made, h, m, steps, upper = collections.Counter(), shape.hidden, shape.mlp, shape.new_tokens, shape.layers - 1
    slices = -(-steps // shape.chunk)

    def layers(prompts: int, completions: int, times: int, *, known: bool = False, back: bool = False) -> None:
        words = prompts * completions * steps
        tokens = prompts * shape.prompt + words
        rows, leaving = words if known else tokens, prompts + words
        upper_layers = [(rows, h, h, 4 * upper), (rows, h, m, 2 * upper), (rows, m, h, upper)]
        last = [(tokens, h, h, 2), (leaving, h, h, 2), (leaving, h, m, 2), (leaving, m, h, 1)]
        for count, inputs, outputs, n in upper_layers + last:
            made[(count, outputs, inputs) if back else (count, inputs, outputs)] += n * times

    def head(prompts: int, completions: int, times: int, *, back: bool = False) -> None:
        size = (shape.vocabulary, h) if back else (h, shape.vocabulary)
        made[prompts * completions * steps // slices, *size] += slices * times

    groups, unknown = shape.clips // shape.together, 1 if shape.keep_activations else shape.samples + 1
    layers(shape.clips, 0, 1)
    layers(shape.clips, shape.samples, 1)
    head(shape.clips, shape.samples, 1)
    layers(shape.together, unknown, groups, known=shape.keep_activations)
    for back in (False, True):
        head(shape.together, shape.samples + 1, groups, back=back)
    layers(shape.together, shape.samples + 1, groups, back=True)
    return +made


def attention(shape: Shape) -> int:
    """FLOP of a GRPOz step in what completions attend to, all of the prompt and themselves so far; not in decoding.

    Two products forward, in score and again in the update, where gold comes in, and five for the gradient, of which one
    makes the scores again: remat keeps none (arXiv 2205.14135).
    """
    pairs = shape.new_tokens * shape.prompt + shape.new_tokens * (shape.new_tokens + 1) // 2
    return 2 * shape.hidden * shape.layers * shape.clips * pairs * (2 * shape.samples + 7 * (shape.samples + 1))


def token(shape: Shape) -> tuple[list[tuple[int, int]], int]:
    """[outputs, inputs] of every frozen matrix that a roll-out's next tokens meet, in turn, and how many they are."""
    h, m = shape.hidden, shape.mlp
    layer = [(3 * h, h), (h, h), (2 * m, h), (h, m)]
    return [*layer * shape.layers, (shape.vocabulary, h)], shape.clips * shape.samples


def clips(shape: Shape, count: int) -> list[np.ndarray]:
    """Noise with a slow loudness contour, float32 [samples] each."""
    rng = np.random.default_rng(0)
    n = round(shape.seconds * audio.SAMPLE_RATE)
    contour = 0.5 + 0.5 * np.sin(np.arange(n) / 3000)
    return [(0.1 * contour * rng.standard_normal(n)).astype(np.float32) for _ in range(count)]


def prompts(shape: Shape, count: int) -> np.ndarray:
    """int64 [count, P]: a token, the clip's audio tokens, words. All are equally long, which is best for the rival."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(*WORDS, (count, shape.prompt))
    tokens[:, 1 : 1 + shape.audio_tokens] = VOCABULARY.audio
    return tokens


def completions(shape: Shape, count: int, per_prompt: int, length: int) -> np.ndarray:
    """int64 [count, per_prompt, length]: words, then the anchor, a class word and the end."""
    tokens = np.random.default_rng(2).integers(*WORDS, (count, per_prompt, length))
    end = (*VOCABULARY.anchor, VOCABULARY.class_ids[0], VOCABULARY.im_end)
    tokens[..., -len(end) :] = end
    return tokens


def mixed(shape: Shape) -> list[Shape]:
    """Examples of unequal length, twice `clips` of them: clip and completion from 40 % of the shape's to all of it."""
    shares = np.linspace(0.4, 1.0, 2 * shape.clips)
    text = shape.prompt - shape.audio_tokens
    shorter = [dataclasses.replace(shape, clips=1, seconds=shape.seconds * share) for share in shares]
    return [
        dataclasses.replace(one, prompt=one.audio_tokens + text, completion=round(shape.completion * share))
        for one, share in zip(shorter, shares, strict=True)
    ]


def make(shape: Shape, directory: Path) -> Path:
    """Random weights of this shape as a Hugging Face directory; an existing one is taken."""
    import jax
    import jax.numpy as jnp

    from ambijax import convert
    from ambijax.model import config, qwen2_audio

    sizes = (shape.hidden, shape.mlp, shape.layers, shape.heads, shape.vocabulary, shape.tower, shape.dtype)
    out = directory / "-".join(map(str, sizes))
    if not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        dtype = jnp.dtype(shape.dtype)
        (out / "config.json").write_text(json.dumps(shape.config))
        model = qwen2_audio.Qwen2Audio(config.load(out), None, dtype, "nothing_saveable")
        made = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), qwen2_audio.init(model, key)["params"]))
        convert.save_hugging_face(made(jax.random.key(0)), out, out, dtype=dtype)
        (out / "done").touch()
    return out


if __name__ == "__main__":
    print(make(Shape(**json.loads(sys.argv[1])), Path(sys.argv[2])))
