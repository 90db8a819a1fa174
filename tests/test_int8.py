"""int8 weights: rounding is done once, when they are read; from there on everything is exact."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ambijax import convert, export, losses, plan, policy, programs, rules, settings, sharding
from ambijax.model import config as model_config
from ambijax.model import qwen2_audio, transposed
from ambijax.model.cache import Past
from ambijax.model.layers import quantize
from tests import small, trained

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROLLED = {"tokens": small.TOKENS, "samples": 3, "max_tokens": 6, "temperature": 1.0}


def in_decoder(path: str) -> bool:
    return path.startswith("language_model/layers/") and path.split("/")[2] in MATRICES and path.endswith("/kernel")


def rounded(params: dict) -> tuple[dict, dict]:
    """Parameters with the decoder's matrices in int8, and the float ones that those stand for."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    int8, floats = dict(flat), dict(flat)
    for path in filter(in_decoder, flat):
        q, scale = quantize(flat[path])
        int8[path], int8[path.removesuffix("kernel") + "scale"] = q, scale
        floats[path] = q.astype(scale.dtype) * scale[:, None]
    return tuple(flax.traverse_util.unflatten_dict(tree, sep="/") for tree in (int8, floats))


@pytest.fixture(scope="module")
def pair():
    """(model, variables) with int8 weights, and with the floats they stand for."""
    model = small.model()
    variables = small.variables(model)
    int8, floats = rounded(variables["params"])
    assert len(jax.tree.leaves(int8)) == len(jax.tree.leaves(floats)) + len(MATRICES)
    return (model.clone(weights="int8"), variables | {"params": int8}), (model, variables | {"params": floats})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_by_hand(dtype):
    w = jnp.array([[127.0, 0.6, 0.0], [-64.4, -1.27, 0.0]], dtype)
    q, scale = quantize(w)
    assert (q.dtype, scale.dtype) == (jnp.int8, w.dtype)
    np.testing.assert_array_equal(q, [[127, 60, 0], [-64, -127, 0]])
    np.testing.assert_allclose(np.array(scale, np.float32), [1.0, 0.01, 1 / 127], rtol=2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_weight_is_off_by_more_than_half_a_step(dtype):
    w = jax.random.normal(jax.random.key(0), (3, 300, 50)).astype(dtype)
    q, scale = quantize(w)
    q, scale, w = (np.array(x, np.float64) for x in (q, scale, w))
    steps = np.abs(w / scale[:, None] - q)
    # The largest weight may be 127.25 steps of a scale that bfloat16 rounded down.
    assert steps.max() < (0.5 if dtype == "float32" else 0.75)
    assert (np.abs(q).max(axis=1) == 127).all()
    off = np.sqrt(np.mean((q * scale[:, None] - w) ** 2) / np.mean(w**2))
    assert 0.005 < off < 0.009  # normal weights: 3 sigma / 127 / sqrt 12


def loss_and_gradient(model, variables):
    def loss(lora):
        scores = policy.score(
            *(model, {"params": variables["params"], "lora": lora}, small.prompts(2), small.completions(2, 3, 6)),
            **{"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}},
        )
        kl = losses.soft_label_kl(jnp.full(scores.readout.shape, 1 / 3), scores.readout)
        return jnp.mean(losses.cross_entropy(scores.logp, small.completions(2, 3, 6).mask) + kl)

    return jax.jit(jax.value_and_grad(loss))(variables["lora"])


def test_loss_and_gradients_are_those_of_the_floats_they_stand_for(pair):
    (loss, gradient), (expected, by_floats) = (loss_and_gradient(*side) for side in pair)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(by_floats))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, scale)), gradient, by_floats)


def test_a_roll_out_is_that_of_the_floats_they_stand_for(pair):
    how = (small.prompts(2), jax.random.key(3), small.ENDS_LINE)
    rolled, expected = (policy.rollout(*side, *how, **ROLLED) for side in pair)
    np.testing.assert_array_equal(rolled.completions.tokens, expected.completions.tokens)
    np.testing.assert_allclose(rolled.logp, expected.logp, atol=1e-4)
    np.testing.assert_allclose(rolled.readout, expected.readout, atol=1e-4)


@functools.cache
def tiny(weights: str, mesh: tuple[int, ...] = ()) -> dict:
    """The shipped model's parameters, by path."""
    model = qwen2_audio.Qwen2Audio(model_config.load(trained.TINY), None, jnp.float32, "nothing_saveable", weights)
    where = None
    if mesh:
        made = sharding.make_mesh(*mesh)
        where = lambda path: NamedSharding(made, sharding.parameter(f"params/{path}"))  # noqa: E731
    return flax.traverse_util.flatten_dict(
        convert.load(trained.TINY, model, dtype=jnp.float32, sharding=where), sep="/"
    )


def test_a_checkpoint_is_rounded_while_it_is_read():
    floats, int8 = tiny("float"), tiny("int8")
    assert {path for path, x in int8.items() if x.dtype == jnp.int8} == set(filter(in_decoder, floats))
    for path, x in floats.items():
        q, scale = quantize(x) if in_decoder(path) else (x, None)
        np.testing.assert_array_equal(int8[path], q)
        assert scale is None or np.array_equal(int8[path.removesuffix("kernel") + "scale"], scale)


def test_shards_are_rounded_by_the_scale_of_the_whole_channel():
    whole, shards = tiny("int8"), tiny("int8", (2, 2, 2))
    assert not shards["language_model/layers/o_proj/scale"].sharding.is_fully_replicated
    for path, x in whole.items():
        np.testing.assert_array_equal(x, shards[path])


def test_bytes_of_the_published_model_by_hand():
    # 8,397,094,912 parameters; 32 x (4 x 4096^2 + 3 x 4096 x 11008) of them take one byte instead of two, and
    # 32 x (5 x 4096 + 2 x 11008) scales come beside them.
    config, _ = settings.parse(["p", "--config=configs/grpoz.py:cremad", "--workdir=w", "--config.model.weights=int8"])
    shape = model_config.from_dict(plan.PUBLISHED)
    setting = programs.setting(config, shape, jax.devices()[:1])
    found = programs.bytes_a_device(programs.variables(setting)["params"])
    rounded = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found == 2 * 8_397_094_912 - rounded + 2 * 32 * (5 * 4096 + 2 * 11008)
    assert found < 10.4e9


def test_training_what_is_rounded_is_refused():
    config, _ = settings.parse(["t", "--config=configs/sft.py:tiny", "--workdir=w", "--config.model.weights=int8"])
    wrong = config.to_dict()
    for train in (("params/.*",), ("lora/.*", "params/language_model/layers/q_proj/kernel")):
        wrong["optim"]["train"] = train
        (said,) = rules.problems(wrong)
        assert said.startswith("optim.train reaches base weights, which model.weights='int8' rounds")
    wrong["model"]["weights"] = "float"
    assert not rules.problems(wrong)


def test_a_merged_export_starts_from_the_weights_before_rounding(tmp_path):
    files = []
    for weights in ("float", "int8"):
        run = trained.make(tmp_path / weights, f"--config.model.weights={weights}")
        export.export(run, "merged", tmp_path / f"{weights}-out")
        files.append((tmp_path / f"{weights}-out" / "model.safetensors").read_bytes())
    assert files[0] == files[1]


# The cache of a roll-out.


def as_floats(past):
    return past.replace(
        **{name: tuple(q * scale[..., None] for q, scale in getattr(past, name)) for name in ("k", "v")}
    )


def test_a_step_on_a_rounded_cache_is_that_on_the_floats_it_stands_for():
    model, variables = small.model(), small.variables(small.model())
    prompt = small.prompts(2)
    read = policy.prefill(model, variables, prompt, {}).past
    rounded = read.unstacked("int8")
    assert {x.dtype for x in jax.tree.leaves((rounded.k, rounded.v))} == {np.dtype("int8"), np.dtype("float32")}
    floats = as_floats(rounded)
    for a, b in zip(read.k, floats.k, strict=True):
        assert 0 < np.abs(a - b).max() < np.abs(a).max() / 127  # half a step of a token's and head's own scale
    layers, token, slot = (
        transposed.transposed_layers(variables, model.config.text, model.lora, model.dtype),
        jnp.full((2, 3, 1), 9),
        jnp.int32(2),
    )
    empty = Past(*(jnp.zeros((3, 2, 4, 3, 5, 8)) for _ in range(2)), jnp.zeros((2, 3, 5), bool))

    def step(prompt: Past, own: Past) -> tuple:
        turn = model.apply(variables, jnp.full((2, 3, 1), 12), method="turn")
        given = (token, turn, prompt, own, slot, layers)
        return model.apply(variables, *given, method="decode")

    hidden, written = step(rounded, empty.unstacked("int8"))
    back = as_floats(written)
    for z in (*back.k, *back.v):
        assert z[:, :, :, 2].any()
        assert not z[:, :, :, [0, 1, 3, 4]].any()
    plain, exact = step(floats, empty.unstacked("float"))
    for first, one in ((back.k[0], exact.k[0]), (back.v[0], exact.v[0])):  # of the layers after it x differs
        assert 0 < np.abs(first - one).max() < np.abs(one).max() / 250
    np.testing.assert_allclose(hidden, plain, atol=1e-2)


def test_a_roll_out_on_a_rounded_cache_is_nearly_that_of_teacher_forcing():
    # Its own log-probabilities are read by nobody; an update scores what was written anew. The read-out stays near.
    model, variables = small.model().clone(cache="int8"), small.variables(small.model())
    prompt = small.prompts(2)
    rolled = policy.rollout(model, variables, prompt, jax.random.key(3), small.ENDS_LINE, **ROLLED)
    scores = policy.score(
        *(model, variables, prompt, policy.anchored(rolled, small.TOKENS)),
        **{"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}},
    )
    own = np.asarray(rolled.completions.mask) & ~np.isin(rolled.completions.tokens, small.TOKENS.ends)
    off = np.abs(np.where(own, rolled.logp - scores.logp[..., :6], 0))
    assert 1e-6 < off.max() < 0.05
    np.testing.assert_allclose(rolled.readout, scores.readout, atol=0.05)


def test_bytes_of_a_rounded_cache_by_hand():
    # Beside each 128 bytes lies a bfloat16 scale, where there were 256.
    config, _ = settings.parse(["p", "--config=configs/grpoz.py:cremad", "--workdir=w", "--config.model.cache=int8"])
    setting = programs.setting(config, model_config.from_dict(plan.PUBLISHED), jax.devices()[:1])
    roll_out = next(p for p in programs.programs(setting, 512, 96) if p.name == "roll-out")
    tokens = roll_out.prompts * (224 + config.grpo.samples * config.data.max_tokens)
    assert programs.cache(setting, roll_out) == tokens * 2 * 32 * 32 * (128 + 2)
