"""What each option of an algorithm does to what is collected and to the loss, on a model of a few thousand weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from ml_collections import FrozenConfigDict

from ambijax import algorithms, audio, data, guard, optim, prompt, settings, sharding, update
from ambijax.agent import Setting
from ambijax.algorithms import ALGORITHMS
from ambijax.emotions import CREMAD
from ambijax.manifest import Utterance
from ambijax.model import qwen2_audio
from ambijax.reasoning import Reasoning
from ambijax.structs import Batch, TrainState
from configs import dpo, grpo, grpoz, sft
from tests import small
from tests.test_prompt import train

CONFIGS = {"sft": sft, "dpo": dpo, "grpo": grpo, "grpoz": grpoz}
PROMPTS = 8
COTS = [Reasoning(f"slow {i}", "a plain statement", "soft and falling", "sad" * (1 + i)).render() for i in range(4)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> prompt.Vocabulary:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [f"{cot}\nFinal emotion: {label}" for cot in COTS for label in CREMAD]
    train([*texts, prompt.instruction("well", CREMAD, style="steps")] * 20).save(str(directory / "tokenizer.json"))
    return prompt.load(directory, CREMAD)


def mesh(devices: int) -> Mesh:
    grid = np.array(jax.devices()[:devices]).reshape(devices, 1, 1)
    return Mesh(grid, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def make(vocabulary: prompt.Vocabulary, algorithm: str, *, devices: int = 1, **changes: object) -> Setting:
    """A small model under the tiny config of `algorithm`; `changes` are keys with '__' for the dot."""
    config = CONFIGS[algorithm].get_config("tiny")
    few = {f"{kind}.samples": 3 for kind in ("dpo", "grpo") if kind in config}
    sizes = {"data.batch_size": PROMPTS, "data.max_tokens": 56, "lora.dropout": 0.0, **few}
    config.update_from_flattened_dict(sizes | {key.replace("__", "."): value for key, value in changes.items()})
    settings.check(config)
    model = small.model(
        vocabulary=512,
        audio_token=vocabulary.audio,
        dropout=config.lora.dropout,
        audio_tower=config.lora.audio_tower,
    )
    return Setting(model, vocabulary, mesh(devices), FrozenConfigDict(config))


def batch_for(setting: Setting) -> Batch:
    """Eight prompts; the fourth has no chain of thought."""
    rng = np.random.default_rng(0)
    utterances = [
        Utterance(f"u{i}", "", "well " * (i % 3), "s", 0, {CREMAD[i % 6]: 3, CREMAD[(i + 2) % 6]: i}, cot=COTS[i % 4])
        for i in range(PROMPTS)
    ]
    utterances[3] = dataclasses.replace(utterances[3], cot="")
    frames = rng.integers(12, 32, PROMPTS)
    live = setting.config.lora.audio_tower
    width = (32, 8) if live else (8, 32)
    sounds = {
        u.id: data.Sound(int(f), rng.normal(size=width).astype(np.float32)[: None if live else audio.tokens(int(f))])
        for u, f in zip(utterances, frames, strict=True)
    }
    c = setting.config
    built = data.build(
        {"train": utterances},
        ("train",),
        sounds,
        setting.vocabulary,
        windows=(32,),
        max_tokens=c.data.max_tokens,
        style=setting.style,
        gold_label=c.data.gold_label,
        seed=0,
        label_in_ce=c.loss.lambda_kl == 0,
        live_tower=live,
        root=Path(),
    )
    return built["train"].batch(range(PROMPTS))


def collect(setting: Setting) -> tuple[tuple, dict, list]:
    with jax.set_mesh(setting.mesh):
        return algorithms.collect(setting, placed(setting), batch_for(setting), jax.random.key(0))


def placed(setting: Setting) -> dict:
    """Random variables, made without compiling anything; the adapters do something."""
    rng = np.random.default_rng(0)
    shapes = qwen2_audio.shapes(setting.model)
    variables = jax.tree.map(lambda x: 0.05 * rng.normal(size=x.shape).astype(np.float32), shapes)
    variables["params"]["language_model"]["lm_head"] *= 10.0  # logits that differ
    for norm in ("input_layernorm", "post_attention_layernorm"):
        variables["params"]["language_model"]["layers"][norm]["scale"] += 1.0
    variables["params"]["language_model"]["norm"]["scale"] += 1.0
    return jax.device_put(variables, sharding.shardings(variables, setting.mesh))


def gradient(setting: Setting, parts: tuple) -> tuple[dict, dict]:
    """What one update changes when it is plain descent at rate one, negated: the gradient; and its metrics."""
    variables = placed(setting)
    trained, frozen = optim.split(variables, optim.labels(variables, ("lora/.*",)))
    descent = optax.sgd(1.0)
    state = TrainState(jnp.int32(0), trained, descent.init(trained), guard.start(2))
    before = jax.tree.map(np.asarray, trained)
    with jax.set_mesh(setting.mesh):
        step = update.make_update(setting, ALGORITHMS[setting.config.algorithm].loss, descent, state)
        after, aux = step(state, frozen, parts, jax.random.key(1))
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, after.trained), jax.tree.map(float, aux)


@pytest.mark.parametrize(
    "algorithm",
    ["sft", pytest.param("dpo", marks=pytest.mark.slow), pytest.param("grpo", marks=pytest.mark.slow), "grpoz"],
)
def test_parts_equal_the_whole_batch(vocabulary, algorithm):
    # A peer scales this model's loss by the number of parts: the gradient would be four times too large here.
    whole = make(vocabulary, algorithm)
    in_parts = make(vocabulary, algorithm, optim__accumulate=4)
    (one,), measured, samples = collect(whole)
    four, measured_in_parts, samples_in_parts = collect(in_parts)
    assert len(four) == 4
    assert measured == pytest.approx(measured_in_parts, abs=1e-6)
    for group, same in zip(samples, samples_in_parts, strict=True):
        assert [member.get("text") for member in group] == [member.get("text") for member in same]
    expected, aux = gradient(whole, (one,))
    got, aux_in_parts = gradient(in_parts, four)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    assert largest > 0.01
    for x, y in zip(*map(jax.tree.leaves, (expected, got)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1, largest))
    assert aux == pytest.approx(aux_in_parts, rel=1e-5, abs=1e-6)
