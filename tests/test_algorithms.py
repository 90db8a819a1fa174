"""What each option of an algorithm does to what is collected and to the loss, on a model of a few thousand weights."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict
from scipy.special import rel_entr, softmax

from ambijax import (
    agent,
    algorithms,
    assemble,
    audio,
    cost,
    data,
    guard,
    metrics,
    optim,
    programs,
    prompt,
    reasoning,
    settings,
    sharding,
    update,
)
from ambijax.agent import Setting
from ambijax.algorithms import ALGORITHMS
from ambijax.emotions import CREMAD
from ambijax.errors import ConfigError
from ambijax.manifest import Utterance
from ambijax.model import qwen2_audio
from ambijax.reasoning import Reasoning
from ambijax.structs import Batch, Group, TrainState
from configs import dpo, grpo, grpoz, sft
from tests import small
from tests.test_prompt import train

CONFIGS = {"sft": sft, "dpo": dpo, "grpo": grpo, "grpoz": grpoz}
FEW, MANY = 8, 16  # prompts; many where eight devices or four parts share them
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
    sizes = {"data.batch_size": FEW, "data.max_tokens": 40, "lora.dropout": 0.0, **few}
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
    """A batch of prompts; the fourth has no chain of thought."""
    n = setting.config.data.batch_size
    rng = np.random.default_rng(0)
    utterances = [
        Utterance(f"u{i}", "", "well " * (i % 3), "s", 0, {CREMAD[i % 6]: 3, CREMAD[(i + 2) % 6]: i}, cot=COTS[i % 4])
        for i in range(n)
    ]
    utterances[3] = dataclasses.replace(utterances[3], cot="")
    frames = rng.integers(12, 30, n)
    live = assemble.trains_tower(setting)
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
    return built["train"].batch(range(n))


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


def descent(setting: Setting) -> tuple[Callable, TrainState, dict]:
    """The update when it is plain descent at rate one, and the state and the frozen variables that it starts from."""
    variables = placed(setting)
    trained, frozen = optim.split(variables, optim.labels(variables, setting.config.optim.train))
    plain = optax.sgd(1.0)
    zero, counters = jax.device_put((jnp.int32(0), guard.start(2)), NamedSharding(setting.mesh, PartitionSpec()))
    state = TrainState(zero, trained, plain.init(trained), counters)
    return update.make_update(setting, ALGORITHMS[setting.config.algorithm].loss, plain, state), state, frozen


def gradient(setting: Setting, parts: tuple) -> tuple[dict, dict]:
    """What one update by plain descent changes, negated: the gradient; and its metrics."""
    step, state, frozen = descent(setting)
    before = jax.tree.map(np.asarray, state.trained)
    with jax.set_mesh(setting.mesh):
        after, aux = step(state, frozen, parts, jax.random.key(1))
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, after.trained), jax.tree.map(float, aux)


def assert_same_update(expected: tuple[dict, dict], got: tuple[dict, dict]) -> None:
    """Two results of `gradient`."""
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected[0]))
    assert largest > 0.01
    for x, y in zip(*map(jax.tree.leaves, (expected[0], got[0])), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * max(1, largest))
    assert expected[1] == pytest.approx(got[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "devices", "parts"),
    [
        ("sft", 1, 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("dpo", 1, 4), ("grpo", 1, 4), ("grpoz", 1, 4), ("sft", 8, 2), ("grpoz", 8, 2)]
        ),
    ],
)
def test_parts_equal_the_whole_batch(vocabulary, algorithm, devices, parts):
    # A peer scales this model's loss by the number of parts: the gradient would be four times too large here.
    changes = {"devices": devices, "data__batch_size": MANY}
    whole = make(vocabulary, algorithm, **changes)
    in_parts = make(vocabulary, algorithm, **changes, optim__accumulate=parts)
    (one,), measured, samples = collect(whole)
    four, measured_in_parts, samples_in_parts = collect(in_parts)
    assert len(four) == parts
    assert measured == pytest.approx(measured_in_parts, abs=1e-6)
    for group, same in zip(samples, samples_in_parts, strict=True):
        assert [member.get("text") for member in group] == [member.get("text") for member in same]
    assert_same_update(gradient(whole, (one,)), gradient(in_parts, four))


@pytest.mark.parametrize(
    "algorithm", ["grpoz", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "grpo"))]
)
def test_a_sound_that_is_not_a_number_costs_its_update(vocabulary, algorithm):
    """F43 with roll-outs: of one prompt nothing is a number, and not a bit of what is trained changes."""
    setting = make(vocabulary, algorithm)
    batch = batch_for(setting)
    audio = np.array(batch.prompt.audio)
    audio[1] = np.nan
    batch = batch.replace(prompt=batch.prompt.replace(audio=audio))
    with jax.set_mesh(setting.mesh):
        parts, _, _ = algorithms.collect(setting, placed(setting), batch, jax.random.key(0))
        step, state, frozen = descent(setting)
        before = jax.tree.map(np.array, state.trained)
        state, aux = step(state, frozen, parts, jax.random.key(1))
    assert aux["skipped"] == 1
    assert not np.isfinite(aux["loss"])
    jax.tree.map(np.testing.assert_array_equal, before, state.trained)


def test_a_change_that_is_not_a_number_is_not_made(vocabulary, monkeypatch):
    """Of a finite gradient, as by moments that overflowed."""
    monkeypatch.setattr(optax, "sgd", lambda _: optax.scale(jnp.inf))
    setting = make(vocabulary, "sft")
    changes, aux = gradient(setting, collect(setting)[0])
    assert aux["skipped"] == 1
    assert np.isfinite(aux["gradient_norm"])
    assert not any(np.any(x) for x in jax.tree.leaves(changes))


@pytest.mark.parametrize(
    ("algorithm", "devices", "accumulate", "sizes"),
    [
        ("sft", 1, 4, (1, 2)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                *((algorithm, 1, 4, (1, 2)) for algorithm in ("dpo", "grpo", "grpoz")),
                *((algorithm, 8, 1, (8,)) for algorithm in CONFIGS),
            ]
        ),
    ],
)
def test_micro_batches_equal_their_part(vocabulary, algorithm, devices, accumulate, sizes):
    changes = {"devices": devices, "data__batch_size": MANY, "optim__accumulate": accumulate}
    parts, _, _ = collect(make(vocabulary, algorithm, **changes))
    expected = gradient(make(vocabulary, algorithm, **changes), parts)
    for size in sizes:
        got = gradient(make(vocabulary, algorithm, **changes, optim__micro_batch=size), parts)
        assert_same_update(expected, got)


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("grpoz", {"optim__micro_batch": 4}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("grpo", {"optim__accumulate": 2}),
                ("grpoz", {"optim__train": ("lora/.*", "params/language_model/.*"), "grpo__beta_kl": 0.0}),
                ("grpoz", {"devices": 8, "data__batch_size": MANY, "optim__micro_batch": 8}),
            ]
        ),
    ],
)
def test_what_a_roll_out_kept_changes_no_update(vocabulary, algorithm, changes):
    setting = make(vocabulary, algorithm, grpo__keep_activations=True, **changes)
    parts, _, _ = collect(setting)
    for part in parts:  # what is planned is what runs
        for planned, kept in zip(
            *map(jax.tree.leaves, (programs._known(setting, part.prompt), part.known)), strict=True
        ):
            assert (planned.shape, planned.dtype) == (kept.shape, kept.dtype)
            assert planned.sharding.is_equivalent_to(kept.sharding, kept.ndim)
    expected = gradient(setting, tuple(part.replace(known=None) for part in parts))
    assert_same_update(expected, gradient(setting, parts))


@pytest.mark.slow
def test_micro_batches_stay_on_their_devices_and_take_less_memory(vocabulary):
    settings_ = [make(vocabulary, "sft", devices=8, data__batch_size=MANY, optim__micro_batch=size) for size in (0, 8)]
    parts, _, _ = collect(settings_[0])
    temporary = []
    for setting in settings_:
        step, state, frozen = descent(setting)
        with jax.set_mesh(setting.mesh):
            compiled = step.lower(state, frozen, parts, jax.random.key(1)).compile()
        assert {c.kind for c in cost.Compiled(compiled.as_text()).collectives()} == {"all-reduce"}
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 0.7 * temporary[0]


def test_every_micro_batch_drops_other_units(vocabulary, monkeypatch):
    def drawn(setting: Setting, variables: dict, batch: Batch, rngs: dict) -> tuple[jax.Array, dict]:
        u = jax.random.uniform(rngs["dropout"])
        return jnp.zeros(len(batch.target)), {"mean": u, "square": u**2}

    monkeypatch.setitem(ALGORITHMS, "sft", dataclasses.replace(ALGORITHMS["sft"], loss=drawn))
    setting = make(vocabulary, "sft", lora__dropout=0.1, optim__micro_batch=2)
    _, aux = gradient(setting, collect(setting)[0])
    assert aux["square"] - aux["mean"] ** 2 > 1e-3  # the variance over four of them


@pytest.mark.parametrize(("algorithm", "updates"), [("grpo", 2), ("grpo", 1), ("sft", 1)])
def test_the_rate_falls_to_zero_with_the_last_update_of_the_last_step(vocabulary, algorithm, updates):
    changes = {"grpo__updates": updates} if algorithm == "grpo" else {}
    config = make(vocabulary, algorithm, steps=3, **changes).config
    weights = {"w": jnp.ones(1)}
    optimizer = update.make_optimizer(config, {"w": "train"})
    state, sizes = optimizer.init(weights), []
    for _ in range(3 * updates + 1):
        change, state = optimizer.update(weights, state, weights)
        sizes.append(float(jnp.abs(change["w"][0])))
    assert min(sizes[1:-1]) > 1e-3 * config.optim.learning_rate
    assert sizes[-1] < 1e-6 * config.optim.learning_rate


# --- the options: what is collected and the loss, against numpy in float64


def log_probs(setting: Setting, variables: dict, completions: object, prompts: object) -> tuple[np.ndarray, np.ndarray]:
    """log pi [B, G, T] and class logits [B, G, K] as float64."""
    with jax.set_mesh(setting.mesh):
        scores = setting.score(variables, prompts, completions, {}, setting.config.grpo.temperature)
    return np.asarray(scores.logp, np.float64), np.asarray(scores.readout, np.float64)


def gold_mask(setting: Setting, group: Group) -> np.ndarray:
    """Which tokens of gold the cross entropy covers, [B, T]: all, but for the class word where the KL has it."""
    mask = np.asarray(group.completions.mask)[:, -1].copy()
    mask[3] = False  # the prompt without a chain of thought
    if setting.config.loss.lambda_kl > 0:
        mask[np.arange(len(mask)), np.asarray(group.completions.anchor)[:, -1] + 1] = False
    return mask


def expected_group_loss(setting: Setting, group: Group, before: dict, now: dict) -> np.ndarray:
    """Equation 7 with all its options, [B], for the policy `now` and a roll-out of the policy `before`."""
    c = setting.config
    logp, readout = log_probs(setting, now, group.completions, group.prompt)
    old = log_probs(setting, before, group.completions, group.prompt)[0] if c.grpo.updates > 1 else logp
    ref = log_probs(setting, {"params": now["params"]}, group.completions, group.prompt)[0]
    a = np.asarray(group.advantages, np.float64)[..., None]
    mask, rho = np.asarray(group.completions.mask).copy(), np.exp(logp - old)
    if c.algorithm == "grpoz":
        mask[:, -1] = gold_mask(setting, group) & c.grpo.gold_in_loss
    token = -np.minimum(rho * a, np.clip(rho, 1 - c.grpo.eps_low, 1 + c.grpo.eps_high) * a)
    if c.grpo.gold_gamma > 0:
        token[:, -1] = (-a * np.exp(logp) / (np.exp(logp) + c.grpo.gold_gamma))[:, -1]
    k3 = np.exp(ref - logp) - (ref - logp) - 1
    token[:, : c.grpo.samples] += c.grpo.beta_kl * k3[:, : c.grpo.samples]
    total, lengths = np.where(mask, token, 0).sum(-1), mask.sum(-1)
    members = (lengths > 0).sum(-1)  # the fourth prompt has no gold
    loss = {
        "sequence_mean": (total / np.maximum(lengths, 1)).sum(-1) / members,
        "token_mean": total.sum(-1) * FEW / mask.sum(),
        "constant_length": total.sum(-1) / (members * c.data.max_tokens),
    }[c.grpo.aggregate]
    if setting.config.algorithm == "grpoz":
        p, phat = np.asarray(group.target, np.float64), softmax(readout[:, -1] / c.readout.temperature, -1)
        if c.loss.kl_direction == "reverse":
            q = 0.99 * p + 0.01 / p.shape[-1]
            kl = rel_entr(phat, q).sum(-1)
        else:
            kl = rel_entr(p, phat).sum(-1)
        ce_mask = gold_mask(setting, group)
        ce = -np.where(ce_mask, logp[:, -1], 0).sum(-1) / np.maximum(ce_mask.sum(-1), 1)
        loss = loss + c.loss.lambda_kl * kl + c.grpo.gold_ce * ce
    return loss


@pytest.fixture(scope="module")
def plain_loss(vocabulary) -> Callable[[str], np.ndarray]:
    """The group loss of an algorithm without any option, for the policy that the test below takes."""

    @functools.cache
    def loss(algorithm: str) -> np.ndarray:
        setting = make(vocabulary, algorithm)
        with jax.set_mesh(setting.mesh):
            return np.asarray(algorithms.group_loss(setting, moved(placed(setting)), collect(setting)[0][0], {})[0])

    return loss


def moved(variables: dict) -> dict:
    """The policy after an update."""
    return variables | {"lora": jax.tree.map(lambda x: 1.1 * x, variables["lora"])}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("grpo", {}),
        ("grpo", {"grpo__updates": 2, "grpo__eps_low": 0.01, "grpo__eps_high": 0.02}),
        ("grpo", {"grpo__beta_kl": 0.0}),
        ("grpoz", {}),
        ("grpoz", {"grpo__updates": 2, "grpo__eps_low": 0.01, "grpo__eps_high": 0.02}),
        ("grpoz", {"grpo__aggregate": "token_mean"}),
        ("grpoz", {"grpo__aggregate": "constant_length"}),
        ("grpoz", {"grpo__gold_in_loss": False}),
        ("grpoz", {"grpo__gold_in_loss": False, "loss__lambda_kl": 0.0, "grpo__gold_ce": 0.0}),
        ("grpoz", {"grpo__gold_gamma": 0.1}),
        ("grpoz", {"loss__lambda_kl": 0.0}),
        ("grpoz", {"loss__kl_direction": "reverse"}),
        ("grpoz", {"data__gold_label": "sample"}),
        ("grpo", {"grpo__temperature": 0.7}),
        ("grpoz", {"grpo__temperature": 0.7, "grpo__updates": 2, "grpo__gold_gamma": 0.1}),
        ("grpoz", {"readout__temperature": 2.0}),
    ],
)
def test_the_group_loss_is_equation_7(vocabulary, plain_loss, algorithm, changes):
    setting = make(vocabulary, algorithm, **changes)
    before = placed(setting)
    now = moved(before)
    (group,), _, _ = collect(setting)
    with jax.set_mesh(setting.mesh):
        loss, _ = algorithms.group_loss(setting, now, group, {})
    expected = expected_group_loss(setting, group, before, now)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.mean(loss), expected.mean(), rtol=1e-5, atol=1e-5)
    if changes and "data__gold_label" not in changes:  # the option does something
        assert np.abs(plain_loss(algorithm) - np.asarray(loss)).max() > 1e-4


def test_a_mean_over_tokens_is_one_over_all_parts(vocabulary):
    """No two parts are equally long, and none is divided by its own length."""
    setting = make(
        vocabulary, "grpo", data__batch_size=MANY, optim__accumulate=MANY // FEW, grpo__aggregate="token_mean"
    )
    before = placed(setting)
    now = moved(before)
    parts, _, _ = collect(setting)
    sizes = [int(np.sum(part.loss_mask)) for part in parts]
    assert len(set(sizes)) == len(parts) == 2
    for part, size in zip(parts, sizes, strict=True):
        with jax.set_mesh(setting.mesh):
            loss, _ = algorithms.group_loss(setting, now, part, {})
        alone = expected_group_loss(setting, part, before, now)
        np.testing.assert_allclose(loss, alone * (size / FEW) / (sum(sizes) / MANY), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_measured_of_the_samples_leaves_gold_out(vocabulary, temperature):
    setting = make(vocabulary, "grpoz", grpo__updates=2, grpo__temperature=temperature, grpo__eps_low=0.01)
    before = placed(setting)
    now = moved(before)
    (group,), _, _ = collect(setting)
    with jax.set_mesh(setting.mesh):
        _, aux = algorithms.group_loss(setting, now, group, {})
        _, off = algorithms.group_loss(setting, now, group.replace(logp_drawn=group.logp_drawn - 0.5), {})
        entropy = setting.score(now, group.prompt, group.completions, {}, temperature).entropy
    logp = log_probs(setting, now, group.completions, group.prompt)[0]
    old = log_probs(setting, before, group.completions, group.prompt)[0]
    ref = log_probs(setting, {"params": now["params"]}, group.completions, group.prompt)[0]
    mask, rho = np.asarray(group.completions.mask)[:, :3], np.exp(logp - old)

    def mean(x: np.ndarray) -> np.ndarray:
        return np.where(mask, np.asarray(x)[:, :3], 0).sum((1, 2)) / mask.sum((1, 2))

    np.testing.assert_allclose(aux["entropy"], mean(entropy), rtol=1e-5)
    np.testing.assert_allclose(aux["kl_to_reference"], mean(np.exp(ref - logp) - (ref - logp) - 1), rtol=1e-3)
    a = np.asarray(group.advantages)[:, :3, None]
    stopped = ((rho[:, :3] < 0.99) & (a < 0)) | ((rho[:, :3] > 1.2) & (a > 0))
    np.testing.assert_allclose(aux["clipped"], mean(stopped))
    assert 0 < np.mean(aux["clipped"]) < np.mean(mean((rho < 0.99) | (rho > 1.2)))
    assert np.max(aux["logp_gap"]) < 1e-4  # decoding and scoring are two programs of one policy
    np.testing.assert_allclose(off["logp_gap"], 0.5, atol=1e-3)


@pytest.mark.parametrize(
    "algorithm", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "grpoz"))]
)
def test_leaving_padding_out_changes_no_update(vocabulary, algorithm, monkeypatch):
    before = placed

    def brief(setting: Setting) -> dict:
        """A policy that soon ends what it writes, though never surely: k3 would blow roundings up."""
        variables = before(setting)
        head = variables["params"]["language_model"]["lm_head"]
        variables["params"]["language_model"]["lm_head"] = head.at[vocabulary.im_end].mul(3.0)
        return variables

    monkeypatch.setitem(globals(), "placed", brief)
    found = []
    for pack in (False, True):
        setting = make(vocabulary, algorithm, devices=2, data__pack=pack, data__max_tokens=112)
        parts, _, _ = collect(setting)
        completions = parts[0].gold if algorithm == "sft" else parts[0].completions
        found.append((completions.packing is not None, *gradient(setting, parts)))
    (no, plain, metrics), (yes, packed, same) = found
    assert (yes, no) == (True, False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), packed, plain)
    assert metrics == pytest.approx(same, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grpo__gold_reward": "measured", "readout__temperature": 2.0},
        {"grpo__scale": "none"},
        {"grpo__ddof": 0, "grpo__eps": 0.01, "grpo__min_std": 0.3},
        {"grpo__gold_adv_clip": 0.5},
        {"reward__w_fmt": 0.0, "reward__w_js": 2.0},
        {"reward__format": "partial"},
    ],
)
def test_rewards_and_advantages_follow_from_what_is_written_down(vocabulary, changes):
    setting = make(vocabulary, "grpoz", **changes)
    c = setting.config
    (group,), aux, samples = collect(setting)
    spread = [np.std([member["reward"] for member in members[:-1]], ddof=c.grpo.ddof) for members in samples]
    assert aux["reward/std"] == pytest.approx(np.mean(spread))
    assert aux["reward/degenerate"] == 0 < min(spread)
    measured = metrics.js(np.asarray(group.target), softmax(_gold_readout(setting, group) / c.readout.temperature, -1))
    for row, members in enumerate(samples):
        rewards = []
        for member in members[:-1]:
            exact = reasoning.format_reward(member["text"], CREMAD, style="steps", ended=False)
            assert member["format"] == exact == 0  # the model knows nothing of the format
            assert member["credit"] == exact or c.reward.format == "partial"
            rewards.append(c.reward.w_js * (1 - member["js"]) + c.reward.w_fmt * member["credit"])
            assert member["reward"] == pytest.approx(rewards[-1])
        gold = c.reward.w_js + c.reward.w_fmt
        if c.grpo.gold_reward == "measured":
            gold -= c.reward.w_js * measured[row]
        if row == 3:  # no chain of thought: a group of K
            assert members[-1]["reward"] is None
        else:
            assert members[-1]["reward"] == pytest.approx(gold, rel=1e-5)
            rewards.append(gold)
        r = np.array(rewards)
        advantages = r - r.mean()
        if c.grpo.scale == "std":
            advantages /= max(r.std(ddof=c.grpo.ddof), c.grpo.min_std) + c.grpo.eps
        advantages = np.append(advantages, 0.0)[: c.grpo.samples + 1]
        advantages[-1] = min(advantages[-1], c.grpo.gold_adv_clip)
        found = [member["advantage"] for member in members]
        np.testing.assert_allclose(found, advantages, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(group.advantages[row], advantages, rtol=1e-4, atol=1e-5)


def _gold_readout(setting: Setting, group: Group) -> np.ndarray:
    return log_probs(setting, placed(setting), group.completions, group.prompt)[1][:, -1]


def test_the_format_is_kept_by_what_ended_after_an_answer_of_its_own(vocabulary):
    setting = make(vocabulary, "grpoz")
    rolled = SimpleNamespace(ended=[[True, False, True]], forced=[[False, False, True]])
    texts = [[f"{COTS[0]}\nFinal emotion: {CREMAD[0]}"] * 3]
    assert agent.grade(setting, reasoning.format_reward, texts, rolled).tolist() == [[1, 0, 0]]


def test_negatives_by_hand():
    js = np.array([[0.1, 0.9, 0.3], [0.05, 0.0, 0.01], [0.2, 0.2, 0.8]])
    example = np.array([7, 8, 9])

    def pick(how, seed=0):
        return algorithms._negatives(how, js, 0.15, jax.random.key(seed), example)

    chosen, pairs = pick("worst")
    np.testing.assert_array_equal(chosen, [[1], [0], [2]])
    np.testing.assert_array_equal(pairs, [[True], [False], [True]])  # nothing above tau: masked
    chosen, pairs = pick("all")
    np.testing.assert_array_equal(chosen, [[0, 1, 2]] * 3)
    np.testing.assert_array_equal(pairs, js > 0.15)
    drawn = [pick("random", seed) for seed in range(20)]
    assert {int(chosen[0, 0]) for chosen, _ in drawn} == {1, 2}  # among those above tau, another at every step
    assert {int(chosen[2, 0]) for chosen, _ in drawn} == {0, 1, 2}
    assert all(pairs.ravel().tolist() == [True, False, True] for _, pairs in drawn)
    np.testing.assert_array_equal(pick("random")[0], drawn[0][0])
    alike = algorithms._negatives("random", np.ones((50, 3)), 0.15, jax.random.key(0), np.arange(50))[0]
    assert {*alike.ravel().tolist()} == {0, 1, 2}  # every example draws for itself
    js[0, 0] = np.nan  # a read-out that is no number is no negative, and hides none
    for how in ("worst", "random", "all"):
        chosen, pairs = pick(how)
        rejected = {row: {*chosen[row][pairs[row]].tolist()} for row in range(3)}
        assert rejected[0] <= {1, 2}
        assert rejected[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"dpo__negatives": "worst", "dpo__tau": 0.3},
        {"dpo__negatives": "all", "dpo__tau": 0.3},
        {"dpo__tau": 0.999},
        {"loss__lambda_kl": 0.0},
    ],
)
def test_the_dpo_loss_is_equation_4(vocabulary, changes):
    setting = make(vocabulary, "dpo", **changes)
    c, now = setting.config, placed(setting)
    (collected,), measured, samples = collect(setting)
    with jax.set_mesh(setting.mesh):
        loss, aux = algorithms.dpo_loss(setting, now, collected, {})
        scores = [
            setting.score(variables, collected.prompt, collected.completions, {})
            for variables in (now, {"params": now["params"]})
        ]
    pi, ref = (np.asarray(s.logp, np.float64).sum(-1) for s in scores)
    margin = c.dpo.beta * ((pi - ref)[:, :1] - (pi - ref)[:, 1:])
    pairs = np.asarray(collected.pairs)
    js = np.array([[member["js"] for member in group] for group in samples])
    worst = js if c.dpo.negatives == "all" else js.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(pairs, (worst > c.dpo.tau) & (np.arange(FEW) != 3)[:, None])
    assert measured["dpo/pairs"] == pytest.approx(pairs.mean())
    dpo = np.where(pairs, np.logaddexp(0, -margin), 0).sum(-1) / np.maximum(pairs.sum(-1), 1)
    gold, readout = np.asarray(scores[0].logp, np.float64)[:, 0], np.asarray(scores[0].readout, np.float64)[:, 0]
    ce_mask = np.asarray(collected.ce_mask)[:, 0]
    ce = -np.where(ce_mask, gold, 0).sum(-1) / np.maximum(ce_mask.sum(-1), 1)
    kl = rel_entr(np.asarray(collected.target, np.float64), softmax(readout, -1)).sum(-1)
    np.testing.assert_allclose(loss, dpo + c.loss.lambda_kl * kl + c.loss.lambda_ce * ce, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux["dpo/margin"], np.where(pairs, margin, 0).mean(-1), rtol=1e-3, atol=1e-5)
    assert (dpo > 0).any() == (c.dpo.tau < 0.9)
    assert np.all(np.asarray(loss)[3] == c.loss.lambda_kl * kl[3]) or loss[3] == pytest.approx(c.loss.lambda_kl * kl[3])


@pytest.mark.parametrize(
    ("changes", "covered", "ce_weight", "kl_weight"),
    [
        ({}, "all but the class word", 1.0, 1.0),
        ({"loss__lambda_kl": 0.0}, "all", 1.0, 0.0),  # CE alone
        ({"loss__lambda_ce": 0.0}, "all but the class word", 0.0, 1.0),  # KL alone
        ({"data__cot": False}, "all but the class word", 1.0, 1.0),  # anchor, end
        ({"data__cot": False, "loss__lambda_kl": 0.0}, "all", 1.0, 0.0),
    ],
)
def test_the_sft_loss_is_equation_3(vocabulary, changes, covered, ce_weight, kl_weight):
    setting = make(vocabulary, "sft", **changes)
    now = placed(setting)
    ((batch,), _, _) = collect(setting)
    with jax.set_mesh(setting.mesh):
        loss, _ = algorithms.sft_loss(setting, now, batch, {})
        scores = setting.score(now, batch.prompt, batch.gold, {})
    logp, readout = np.asarray(scores.logp, np.float64)[:, 0], np.asarray(scores.readout, np.float64)[:, 0]
    kl = rel_entr(np.asarray(batch.target, np.float64), softmax(readout, -1)).sum(-1)
    for row in range(FEW):
        ids = np.asarray(batch.gold.tokens)[row, 0]
        length, anchor = int(batch.gold.mask[row].sum()), int(batch.gold.anchor[row, 0])
        assert ids[anchor + 1] in vocabulary.class_ids
        assert ids[length - 1] == vocabulary.im_end
        counts = [t for t in range(length) if covered == "all" or t != anchor + 1]
        if row == 3 and setting.config.data.cot:
            assert anchor == len(vocabulary.anchor) - 1  # no chain of thought: for the read-out alone
            counts = []
        ce = -np.mean(logp[row, counts]) if counts else 0.0
        assert loss[row] == pytest.approx(ce_weight * ce + kl_weight * kl[row], rel=1e-4)


def test_the_class_word_of_gold_is_the_likeliest_or_drawn_from_the_votes(vocabulary):
    def words(**changes):
        batch = batch_for(make(vocabulary, "sft", **changes))
        after = np.take_along_axis(batch.gold.tokens[:, 0], batch.gold.anchor + 1, axis=1)[:, 0]
        return [vocabulary.class_ids.index(token) for token in after], batch.target

    argmax, p = words()
    assert argmax == p.argmax(axis=1).tolist()
    drawn, _ = words(data__gold_label="sample")
    assert drawn != argmax
    assert all(p[i, k] > 0 for i, k in enumerate(drawn))


def test_split_class_words_are_left_out_whole(vocabulary):
    v = dataclasses.replace(vocabulary, class_words=tuple((*word, 7) for word in vocabulary.class_words))
    batch = batch_for(make(v, "sft"))
    for row in (0, 1, 2):
        length, anchor = int(batch.gold.mask[row].sum()), int(batch.gold.anchor[row, 0])
        assert length == anchor + 4  # two tokens of the word, and the end
        covered = np.flatnonzero(batch.ce_mask[row, 0]).tolist()
        assert covered == [*range(anchor + 1), length - 1]


# --- what is trained

LORA, FULL = ("lora/.*",), ("params/.*",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "changes", "trained"),
    [
        ("sft", {"lora__audio_tower": True}, LORA),
        ("dpo", {"lora__audio_tower": True}, LORA),
        ("grpo", {"lora__audio_tower": True}, LORA),
        ("grpoz", {"lora__audio_tower": True}, LORA),
        ("sft", {"optim__train": FULL}, FULL),
        ("grpo", {"optim__train": FULL, "grpo__beta_kl": 0.0}, FULL),
        ("grpoz", {"optim__train": FULL, "grpo__beta_kl": 0.0}, FULL),
        ("sft", {"optim__train": ("params/language_model/.*",)}, ("params/language_model/.*",)),
    ],
)
def test_all_that_is_trained_moves_and_the_rest_is_bit_equal(vocabulary, algorithm, changes, trained):
    setting = make(vocabulary, algorithm, **changes)
    variables = placed(setting)
    before = jax.tree.map(np.asarray, variables)
    parts, _, _ = collect(setting)
    with jax.set_mesh(setting.mesh):
        state, frozen, optimizer = update.start(setting.config, variables)
        step = update.make_update(setting, ALGORITHMS[algorithm].loss, optimizer, state)
        for _ in range(2):  # the first has a learning rate of zero
            state, aux = step(state, frozen, parts, jax.random.key(1))
    assert not aux["skipped"]
    after = optim.merge(state.trained, frozen)
    for path, x, y in zip(*map(jax.tree.leaves, (sharding.paths(before), before, after)), strict=True):
        moves = any(re.fullmatch(pattern, path) for pattern in trained)
        assert np.array_equal(x, y) != moves, path


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("dpo", {"optim__train": FULL}, "optim.train reaches base weights, but the reference policy is the base"),
        ("grpoz", {"optim__train": FULL}, "or set grpo.beta_kl=0"),
        ("sft", {"optim__accumulate": 3}, "optim.accumulate=3 must divide data.batch_size=8"),
        ("sft", {"data__pack": True, "optim__accumulate": 2}, "data.pack is without optim.accumulate=2"),
        (
            "grpo",
            {"optim__accumulate": 2, "optim__micro_batch": 3},
            "optim.micro_batch=3 must divide data.batch_size=8 / optim.accumulate=2",
        ),
        ("sft", {"data__pack": True, "optim__micro_batch": 2}, "data.pack is without optim.micro_batch=2"),
        (
            "grpo",
            {"grpo__keep_activations": True, "grpo__updates": 2, "model__cache": "int8"},
            "grpo.updates=1, data.pack=False and model.cache='float', and here they are 2, False and 'int8'",
        ),
        ("sft", {"loss__lambda_ce": 0.0, "loss__lambda_kl": 0.0}, "nothing to learn"),
        ("sft", {"prompt__style": "audio_reasoner"}, "is for evaluation"),
        ("dpo", {"lora__dropout": 0.1, "dpo__tau": 1.0}, "dpo.tau=1.0 must be.*; lora.dropout=0.1 must be 0"),
        (
            "grpo",
            {"grpo__scale": "max", "grpo__ddof": 2},
            "grpo.ddof=2 must be .*; grpo.scale='max' must be one of std, none",
        ),
        (
            "grpo",
            {"reward__w_js": 0.0, "reward__w_fmt": 0.0, "reward__format": "half"},
            "reward.format='half' must be .*; .* are both 0",
        ),
    ],
)
def test_settings_that_cannot_work_are_all_refused_at_once(vocabulary, algorithm, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(vocabulary, algorithm, **changes)


def test_trained_weights_are_float32(vocabulary):
    setting = make(vocabulary, "sft", optim__train=("params/language_model/norm/.*",))
    variables = placed(setting)
    variables["params"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    with jax.set_mesh(setting.mesh):
        state, frozen, _ = update.start(setting.config, variables)
    assert {x.dtype for x in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(frozen["params"])} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_split_class_words_are_rolled_out_scored_and_learned(vocabulary):
    v = dataclasses.replace(vocabulary, class_words=tuple((*word, 7) for word in vocabulary.class_words))
    setting = make(v, "grpoz")
    variables = placed(setting)
    (group,), _, samples = collect(setting)
    with jax.set_mesh(setting.mesh):
        loss, aux = algorithms.group_loss(setting, variables, group, {})
        one = setting.score(variables, group.prompt, group.completions, {})
    single = setting.config.grpo.samples
    phat = softmax(np.asarray(one.readout, np.float64)[:, single], -1)
    expected = rel_entr(np.asarray(group.target, np.float64), phat).sum(-1)
    np.testing.assert_allclose(aux["loss/kl"], expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(one.readout)[:, single] < 0)  # log-probabilities of whole words
    assert np.all(np.isfinite(loss))
    for members in samples:
        for member in members[:-1]:
            assert sum(member["readout"]) == pytest.approx(1)
