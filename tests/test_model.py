"""Parity with transformers' Qwen2AudioForConditionalGeneration (torch, float32), and with PEFT's gradients.

Every checkpoint is random, with weights so large that logits are of order one: a wrong mask, position or pooling order
moves them by 1e-2 and more. Frames beyond a clip's end hold a constant that is not zero, as real silence does.
"""

import copy
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ambijax import convert
from ambijax.model import config as model_config
from ambijax.model import qwen2_audio
from ambijax.model.cache import Past
from ambijax.model.decoder import DecoderLayer
from ambijax.model.layers import Dropout, rope, rotation
from ambijax.model.qwen2_audio import Qwen2Audio

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = {"atol": 1e-4, "rtol": 0}
VOCABULARY, AUDIO_TOKEN, PAD = 300, 290, 299

# Multi-head, with the real window of 3,000 mel frames; grouped heads and a tied output matrix; one key-value head and a
# head width that is not hidden / heads. The reference demands mel windows of just 2 * max_source_positions frames.
OPTIONS = {
    "multi_head": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped_tied": {
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        "tie_word_embeddings": True,
    },
    "one_kv_head": {
        **{"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers")
TOWER = (
    *("d_model", "encoder_attention_heads", "encoder_ffn_dim", "encoder_layers"),
    *("num_mel_bins", "max_source_positions"),
)
SIZES = {  # in the order of TEXT and TOWER
    "multi_head": ((32, 48, 2), (16, 2, 40, 2, 12, 1500)),
    "grouped_tied": ((48, 64, 3), (24, 3, 32, 1, 8, 60)),
    "one_kv_head": ((40, 56, 1), (32, 4, 64, 3, 16, 52)),
}


class Pair(NamedTuple):
    """The reference and ours with the same weights."""

    reference: "transformers.Qwen2AudioForConditionalGeneration"
    model: Qwen2Audio
    params: dict

    @property
    def window(self) -> int:
        """Mel frames that the reference demands."""
        return 2 * self.model.config.audio.max_source_positions

    def apply(self, *args, method: str):
        return _apply(self.model, method)({"params": self.params}, *args)

    def forward(self, batch: "Batch") -> tuple[np.ndarray, dict]:
        """Logits [B, P, vocabulary], and what the tower and the projector gave."""
        logits, state = _forward(self.model)({"params": self.params}, *batch)
        return np.asarray(logits), {k: v["__call__"][0] for k, v in state["intermediates"].items()}


# One compiled function a model and method for the whole file: compiling is nearly all that these tests cost.
@functools.cache
def _apply(model: Qwen2Audio, method: str):
    return jax.jit(functools.partial(model.apply, method=method))


@functools.cache
def _forward(model: Qwen2Audio):
    stages = ("audio_tower", "multi_modal_projector")
    return jax.jit(functools.partial(model.apply, capture_intermediates=lambda module, _: module.name in stages))


class Batch(NamedTuple):
    """One prompt a row, in our layout."""

    mel: np.ndarray  # [B, M, F], M the pair's window
    frames: np.ndarray  # [B]
    tokens: np.ndarray  # [B, P]
    mask: np.ndarray  # [B, P]


def build(shape: str, directory: Path) -> Pair:
    text = dict(zip(TEXT, SIZES[shape][0], strict=True)) | OPTIONS[shape]
    audio = dict(zip(TOWER, SIZES[shape][1], strict=True))
    torch_config = transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", "vocab_size": VOCABULARY, **text},
        audio_config={"model_type": "qwen2_audio_encoder", **audio},
        audio_token_index=AUDIO_TOKEN,
    )
    reference = transformers.Qwen2AudioForConditionalGeneration(torch_config).eval()
    reference.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(len(shape))
    with torch.no_grad():
        for name, value in reference.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:  # biases around zero, norm scales around one
                value.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                value.copy_(1.5 * noise / np.sqrt(value[0].numel()))
        if text.get("tie_word_embeddings"):  # transformers 5 has no tying for this architecture: tie by value
            reference.lm_head.weight.copy_(reference.model.language_model.embed_tokens.weight)
    reference.save_pretrained(directory)
    model = Qwen2Audio(model_config.load(directory), None, jnp.float32, "nothing_saveable")
    return Pair(reference, model, convert.load(directory, model, dtype=jnp.float32))


@pytest.fixture(scope="session", params=list(SIZES))
def pair(request, tmp_path_factory) -> Pair:
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def grouped(tmp_path_factory) -> Pair:
    """One shape for the tests that need no more."""
    return build("grouped_tied", tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="session")
def long(tmp_path_factory) -> Pair:
    """The shape with the real audio window."""
    return build("multi_head", tmp_path_factory.mktemp("long"))


def audio_tokens(frames: int) -> int:
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def make_batch(pair: Pair, frames: tuple[int, ...], side: str, seed: int = 0) -> Batch:
    """Clips of `frames` mel frames in prompts with text of varying length before and after, padded on `side`.

    The prompts have no <|AUDIO|> but the clip's own; text turns before it (row 1) and after it (all).
    """
    rng = np.random.default_rng(seed)
    mel = np.full((len(frames), pair.window, pair.model.config.audio.num_mel_bins), -0.6, np.float32)
    rows = []
    for i, m in enumerate(frames):
        mel[i, :m] = rng.standard_normal((m, mel.shape[-1]))
        before, after = rng.integers(0, 280, 3 + 4 * (i % 3)), rng.integers(0, 280, 6 + 3 * (i % 2))
        rows.append([*before, *[AUDIO_TOKEN] * audio_tokens(m), *after])
    longest = max(map(len, rows))
    tokens, mask = np.full((len(rows), longest), PAD), np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), None)
        tokens[i, where], mask[i, where] = row, True
    return Batch(mel, np.array(frames), tokens, mask)


def reference_inputs(batch: Batch) -> dict:
    features = torch.tensor(batch.mel).transpose(1, 2).contiguous()
    return {
        "input_ids": torch.tensor(batch.tokens),
        "attention_mask": torch.tensor(batch.mask).long(),
        "input_features": features,
        "feature_attention_mask": torch.tensor(np.arange(batch.mel.shape[1]) < batch.frames[:, None]).long(),
    }


def reference_logits(pair: Pair, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        return pair.reference(**reference_inputs(batch)).logits.numpy()


def head(pair: Pair, hidden: jax.Array) -> np.ndarray:
    return np.asarray(hidden @ pair.apply(method="head").T)


FRAMES = (37, 102, 61)


def test_every_stage_equals_the_reference(pair):
    batch = make_batch(pair, FRAMES, "right")
    caught, handles = {}, []
    inner = pair.reference.model
    stages = {"audio_tower": inner.audio_tower, "multi_modal_projector": inner.multi_modal_projector}
    stages |= {f"layer {i}": layer for i, layer in enumerate(inner.language_model.layers)}
    for name, module in stages.items():
        catch = functools.partial(lambda name, module, args, out: caught.__setitem__(name, out), name)
        handles.append(module.register_forward_hook(catch))
    logits = reference_logits(pair, batch)
    for handle in handles:
        handle.remove()

    def assert_stage(ours, theirs, valid):
        assert np.abs(theirs[valid]).mean() > 0.1, "the reference is too small for the test to fail"
        np.testing.assert_allclose(np.asarray(ours)[valid], theirs[valid], **TOLERANCE)

    heard = np.arange(pair.window // 4) < np.array([audio_tokens(m) for m in FRAMES])[:, None]
    ours, stages = pair.forward(batch)
    assert_stage(stages["audio_tower"], caught["audio_tower"].last_hidden_state.numpy(), heard)
    assert_stage(stages["multi_modal_projector"], caught["multi_modal_projector"].numpy(), heard)

    # Decoder layers one by one, each fed with our own output of the layer below.
    text = pair.model.config.text
    x = np.array(pair.params["language_model"]["embed_tokens"]["embedding"])[batch.tokens]
    for i, row in enumerate(batch.tokens == AUDIO_TOKEN):
        x[i, row] = stages["multi_modal_projector"][i, : row.sum()]
    steps = np.arange(batch.tokens.shape[1])
    mask = batch.mask[:, None]
    blocks = ((mask, (steps[:, None] >= steps) & mask[:, :, None]),)
    turn = rotation(jnp.array(steps), text.head_dim, text.rope_theta)
    layer = jax.jit(DecoderLayer(text, None, "float", "xla").apply)
    for i in range(text.num_hidden_layers):
        params = jax.tree.map(lambda p, i=i: p[i], pair.params["language_model"]["layers"])
        x, _ = layer({"params": params}, x, (), (), turn, blocks)
        assert_stage(x, caught[f"layer {i}"].numpy(), batch.mask)

    assert_stage(ours, logits, batch.mask)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(pair, side):
    batch = make_batch(pair, FRAMES, side, seed=1)
    (ours, _), theirs = pair.forward(batch), reference_logits(pair, batch)
    np.testing.assert_allclose(ours[batch.mask], theirs[batch.mask], **TOLERANCE)


def test_short_window_equals_the_full_window(long):
    # The longest clip, even or odd, ends two or three frames before the short window does.
    for frames in ((38, 25), (33, 37)):
        batch = make_batch(long, frames, "right")
        theirs = reference_logits(long, batch)
        ours, _ = long.forward(batch._replace(mel=batch.mel[:, :40]))
        np.testing.assert_allclose(ours[batch.mask], theirs[batch.mask], **TOLERANCE)


def test_batch_of_one_equals_batch_of_eight(grouped):
    batch = make_batch(grouped, (37, 102, 61, 24, 80, 9, 55, 70), "left")
    together, _ = grouped.forward(batch)
    for i in (1, 5):
        valid = batch.mask[i]
        alone, _ = grouped.forward(Batch(*(x[i : i + 1] for x in batch[:2]), *(x[i : i + 1, valid] for x in batch[2:])))
        np.testing.assert_allclose(alone[0], together[i, valid], **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_by_token_equals_the_full_forward(grouped, side):
    steps = 6  # the last tokens of every row, decoded one by one; all of them are text
    batch = make_batch(grouped, FRAMES, side, seed=2)
    lengths = batch.mask.sum(1)
    ends = np.where(batch.mask, np.arange(batch.mask.shape[1]), -1).max(1)
    suffix = ends[:, None] + np.arange(1 - steps, 1)  # [B, steps], columns of the decoded tokens
    prompt_mask = batch.mask.copy()
    np.put_along_axis(prompt_mask, suffix, False, axis=1)

    audio = grouped.apply(batch.mel, batch.frames, method="encode")
    _, prompt = grouped.apply(batch.tokens, prompt_mask, audio, method="prefill")
    text = grouped.model.config.text
    cache = jnp.zeros((text.num_hidden_layers, len(FRAMES), text.num_key_value_heads, 1, steps, text.head_dim))
    own = Past(cache, cache, jnp.zeros((len(FRAMES), 1, steps), bool))

    theirs = reference_logits(grouped, batch)
    for t in range(steps):
        tokens = np.take_along_axis(batch.tokens, suffix[:, t : t + 1], axis=1)[:, None]
        positions = (lengths - steps + t)[:, None, None]
        hidden, new = grouped.apply(tokens, positions, np.ones_like(tokens, bool), (prompt, own), method="extend")
        own = Past(
            own.k.at[:, :, :, :, t].set(new.k[:, :, :, :, 0]),
            own.v.at[:, :, :, :, t].set(new.v[:, :, :, :, 0]),
            own.mask.at[:, :, t].set(True),
        )
        ours = head(grouped, hidden[:, 0, 0])
        np.testing.assert_allclose(ours, theirs[np.arange(len(ours)), suffix[:, t]], **TOLERANCE)


def test_a_group_that_shares_its_prompt_equals_separate_forwards(grouped):
    group, longest = 3, 7
    prompts = make_batch(grouped, FRAMES[:2], "right", seed=3)
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 280, (2, group, longest))
    lengths = rng.integers(2, longest + 1, (2, group))
    mask = np.arange(longest) < lengths[..., None]
    positions = prompts.mask.sum(1)[:, None, None] + np.arange(longest) + np.zeros_like(tokens)

    audio = grouped.apply(prompts.mel, prompts.frames, method="encode")
    _, past = grouped.apply(prompts.tokens, prompts.mask, audio, method="prefill")
    hidden, _ = grouped.apply(tokens, positions, mask, (past,), method="extend")
    ours = head(grouped, hidden)

    for b in range(2):
        prompt = prompts.tokens[b, prompts.mask[b]]
        for g in range(group):
            completion = tokens[b, g, : lengths[b, g]]
            row = np.concatenate([prompt, completion])[None]
            theirs = reference_logits(
                grouped, Batch(prompts.mel[b : b + 1], prompts.frames[b : b + 1], row, np.ones_like(row, bool))
            )
            np.testing.assert_allclose(ours[b, g, : len(completion)], theirs[0, len(prompt) :], **TOLERANCE)


PEFT_TARGETS = (
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    r"|.*audio_tower.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
)


def _peft_layer(peft_model, path: tuple[str, ...], layer: int):
    """The torch module behind our adapter path ('language_model', 'layers', 'q_proj')."""
    side, _, module = path
    parent = peft_model.base_model.model.model.get_submodule(side).layers[layer]
    inner = {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp", "fc1": "", "fc2": ""}.get(module, "self_attn")
    return parent.get_submodule(f"{inner}.{module}".lstrip("."))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks transformers 5.23
@pytest.mark.parametrize("pair", ["grouped_tied", "one_kv_head"], indirect=True)
def test_adapter_gradients_equal_peft(pair):
    peft = pytest.importorskip("peft")
    batch = make_batch(pair, FRAMES, "right", seed=5)
    lora = model_config.LoraConfig(rank=4, alpha=6.0, dropout=0.0, audio_tower=True)
    model = pair.model.clone(lora=lora)
    predicts = batch.mask[:, 1:]  # every real token but the first is a target

    peft_model = peft.get_peft_model(
        copy.deepcopy(pair.reference),
        peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=PEFT_TARGETS),
    )
    shapes = qwen2_audio.shapes(model)["lora"]
    rng = np.random.default_rng(6)
    adapters = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    pairs = {}  # our path and layer -> the torch parameter
    for path, value in jax.tree_util.tree_leaves_with_path(adapters):
        *module, matrix = (k.key for k in path)
        for i, own in enumerate(value):
            linear = _peft_layer(peft_model, tuple(module), i)
            weight = (linear.lora_A if matrix == "a" else linear.lora_B)["default"].weight
            weight.data.copy_(torch.tensor(own.T))
            pairs[(*module, matrix, i)] = weight
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert len(trained) == len(pairs)

    logits = peft_model(**reference_inputs(batch)).logits
    target = torch.tensor(batch.tokens[:, 1:][predicts])
    torch_loss = torch.nn.functional.cross_entropy(logits[:, :-1][torch.tensor(predicts)], target)
    torch_loss.backward()

    @jax.jit
    def value_and_grad(adapters):
        def loss(adapters):
            logits = model.apply({"params": pair.params, "lora": adapters}, *batch)
            logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), batch.tokens[:, 1:, None], axis=-1)
            return -jnp.sum(logprobs[..., 0] * predicts) / predicts.sum()

        return jax.value_and_grad(loss)(adapters)

    loss, gradients = value_and_grad(adapters)
    np.testing.assert_allclose(loss, torch_loss.item(), **TOLERANCE)
    for (*path, i), weight in pairs.items():
        ours = functools.reduce(lambda tree, key: tree[key], path, gradients)[i]
        theirs = weight.grad.numpy().T
        assert np.abs(theirs).max() > 1e-3, f"the gradient of {path} is too small for the test to fail"
        np.testing.assert_allclose(ours, theirs, err_msg=f"{path} layer {i}", **TOLERANCE)


def test_without_adapters_it_is_the_base_model(grouped):
    tokens = np.arange(12).reshape(1, 12)
    inputs = (tokens, np.ones_like(tokens, bool), np.zeros((1, 1, grouped.model.config.text.hidden_size), np.float32))
    model = grouped.model.clone(lora=model_config.LoraConfig(rank=2, alpha=4.0, dropout=0.5, audio_tower=False))
    adapters = jax.jit(lambda key: qwen2_audio.init(model, key)["lora"])(jax.random.key(0))
    base = {"params": grouped.params}

    @jax.jit
    def prefill(variables, **kwargs):
        return model.apply(variables, *inputs, method="prefill", **kwargs)[0]

    expected, _ = grouped.apply(*inputs, method="prefill")
    np.testing.assert_array_equal(prefill(base), expected)  # no collection
    np.testing.assert_allclose(prefill({**base, "lora": adapters}), expected, atol=1e-5, rtol=0)  # B is zero
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    adapted = prefill({**base, "lora": adapters})
    assert np.abs(adapted - expected).max() > 1e-2
    dropped = prefill({**base, "lora": adapters}, rngs={"dropout": jax.random.key(1)})
    assert np.abs(dropped - adapted).max() > 1e-2


def test_dropout_leaves_the_mean():
    dropped = Dropout(0.25).apply({}, jnp.ones((100, 100)), rngs={"dropout": jax.random.key(0)})
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / kept.size)


def test_rope_is_exact_far_out_in_bfloat16():
    # With angles in bfloat16 (8 bits) position 257 would be position 256, and the error would be of order one.
    positions = np.array([0, 1, 256, 257, 1023, 4095, 8191])
    x = np.random.default_rng(0).standard_normal((7, 1, 16)).astype(jnp.bfloat16)
    frequencies = 10000.0 ** (-np.arange(8) / 8)
    angles = positions[:, None] * frequencies
    x1, x2 = np.split(x[:, 0].astype(np.float64), 2, axis=-1)
    expected = np.concatenate(
        [x1 * np.cos(angles) - x2 * np.sin(angles), x2 * np.cos(angles) + x1 * np.sin(angles)], axis=-1
    )
    ours = rope(jnp.array(x), rotation(jnp.array(positions), x.shape[-1], 10000.0))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours[:, 0], np.float64), expected, rtol=2**-8, atol=2e-3)
