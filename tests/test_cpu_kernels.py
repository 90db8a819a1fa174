"""The kernels of a CPU compute what the plain formulas say, and the model uses them: float32, one device."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ambijax import policy, sharding
from ambijax.model import compiled, cpu_kernels
from ambijax.model.compiled import calls
from ambijax.model.layers import Segment, attention, rope, rotation
from tests import small
from tests.test_speedups import _loss_and_gradient, _plain_attention

# Sequences, their length, prompt tokens, key-value heads, queries to each, width: blocks of 36 queries, vectors of 8 or
# 16 keys and tiles of 6 rows each with and without a rest.
SHAPES = [(1, 1, 5, 1, 1, 16), (3, 37, 70, 2, 2, 32), (2, 64, 96, 1, 3, 16), (1, 33, 16, 2, 1, 128)]


def _random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("g", "t", "p", "k", "r", "d"), SHAPES)
def test_attention_and_its_gradients_are_those_of_the_formula(g, t, p, k, r, d):
    # A prompt padded on its left, one that is hidden in places, tokens that do not exist, and words that may follow.
    b, rng = 2, np.random.default_rng(0)
    q, by_out = _random(b, g, t, k * r, d), _random(b, g, t, k * r, d)
    given = [(_random(b, k, p, d), _random(b, k, p, d)), (_random(b, k, g, t, d), _random(b, k, g, t, d))]
    hidden = (np.arange(p) >= np.array([[p // 2], [0]])) & (rng.random((b, p)) < 0.8)
    hidden[:, -1] = True
    exist = np.arange(t) < rng.integers(1, t + 1, (b, g, 1))
    causal = np.tril(np.ones((t, t), bool)) & exist[:, :, None]

    def pull(how):
        def run(q, kv):
            return how(q, [Segment(*kv[0], hidden[:, None, None]), Segment(*kv[1], causal)])

        out, back = jax.vjp(jax.jit(run), q, given)
        return jax.tree.leaves((out, back(by_out)))

    for ours, plain in zip(pull(_by_kernels), pull(_plain_attention), strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(ours, plain, atol=2e-5 if t > 1 else 1e-5)


def _by_kernels(q, segments):
    assert cpu_kernels.serves(q.dtype, q.shape[-1])
    return attention(q, segments)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_query_that_is_no_number_stays_none(sign):
    """Finite values instead would be learned from: the guard sees nothing."""
    q, k, v = _random(1, 1, 3, 2, 16), _random(1, 2, 3, 16), _random(1, 2, 3, 16)
    q[0, 0, 1, 0, 5] = np.copysign(np.nan, sign)
    out = np.asarray(_by_kernels(q, [Segment(k, v, np.ones((1, 1, 3, 3), bool))]))
    assert np.isnan(out[0, 0, 1, 0]).all()
    assert np.isfinite(np.delete(out.reshape(6, 16), 2, axis=0)).all()


def test_queries_that_see_nothing_disturb_nobody():
    # 0 / 0 would be a value of a token that does not exist, and 0 times that one the loss.
    q, k, v = (_random(1, 1, 40, 2, 16), _random(1, 2, 1, 40, 16), _random(1, 2, 1, 40, 16))
    seen = np.zeros((1, 1, 40, 40), bool)
    seen[..., :3, :3] = True

    def loss(q, k, v):
        return jnp.sum(cpu_kernels.attend(q, (k,), (v,), (seen,))[:, :, :3] ** 2)

    value, gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert np.isfinite(value)
    assert value > 0
    assert all(np.isfinite(g).all() and not g[..., 3:, :].any() for g in gradient[1:])
    assert np.isfinite(gradient[0]).all()
    assert not gradient[0][:, :, 3:].any()
    assert np.isfinite(cpu_kernels.attend(q, (k,), (v,), (seen,))).all()


@pytest.mark.parametrize(("p", "r", "d"), [(70, 2, 16), (5, 1, 32), (96, 3, 16)])
def test_a_new_token_attends_as_the_formula_says_and_lies_in_its_slot(p, r, d):
    b, g, k, n = 2, 3, 2, 140
    qkv, keys, values = _random(k, r + 2, d, b, g), _random(b, k, p, d), _random(b, k, p, d)
    exists, own = np.arange(p) >= np.array([[0], [p // 2]]), (_random(b, k, g, n, d), _random(b, k, g, n, d))
    for slot in (0, 15, 139):
        turn = rotation(jnp.array([p, p // 2]) + slot, d, 1e4)
        by_channel = (jnp.swapaxes(keys, 2, 3), values, exists)
        given = (qkv, tuple(z[:, 0] for z in turn), by_channel, own, jnp.int32(slot))
        out, written = jax.jit(cpu_kernels.decode)(*given)

        by_head = jnp.einsum("kndbg->bgknd", qkv)
        turn = tuple(z[:, None, None] for z in turn)
        q, new = (rope(z, turn) for z in (by_head[..., :r, :], by_head[..., r, None, :]))
        new = (jnp.einsum("bgkd->bkgd", z) for z in (new[..., 0, :], by_head[..., r + 1, :]))
        expected = [cache.copy() for cache in own]
        for cache, z in zip(expected, new, strict=True):
            cache[:, :, :, slot] = z
        for a, b_ in zip(written, expected, strict=True):
            np.testing.assert_allclose(a, b_, atol=1e-6)
        seen = np.broadcast_to(np.arange(n) <= slot, (b, g, 1, n))
        segments = [Segment(keys, values, exists[:, None, None]), Segment(*expected, seen)]
        plain = _plain_attention(q.reshape(b, g, 1, k * r, d), segments).reshape(b, g, k, r, d)
        assert np.abs(plain).max() > 0.3
        np.testing.assert_allclose(out, jnp.einsum("bgkrd->krdbg", plain), atol=2e-6)


@pytest.mark.parametrize("columns", [(1,), (5,), (2, 8), (3, 11), (4, 9), (100,)])
@pytest.mark.parametrize("rows", [(1,), (7, 3), (120,), (2, 167)])
@pytest.mark.parametrize("inputs", [50, 48])  # sums in vectors along 48, and across columns
def test_products_with_few_columns(inputs, rows, columns):
    weight, x = _random(*rows, inputs), _random(inputs, *columns)
    y = jax.jit(cpu_kernels.product)(weight, x)
    assert y.shape == (*rows, *columns)
    np.testing.assert_allclose(y, np.tensordot(weight.astype(np.float64), x, 1), atol=2e-5)


@pytest.mark.parametrize("r", [1, 4, 7, 12])
@pytest.mark.parametrize("d", [16, 64, 208])
def test_sums_over_rows(r, d):
    y, x = _random(3, 37, r), _random(3, 37, d)
    np.testing.assert_allclose(jax.jit(cpu_kernels.over_rows)(y, x), np.einsum("bnr,bnd->rd", y, x), atol=2e-5)


def test_a_roll_out_and_an_update_are_those_without_the_kernels(model, monkeypatch):
    wide = dataclasses.replace(model.config.text, head_dim=16)
    model = model.clone(config=dataclasses.replace(model.config, text=wide))
    variables = small.variables(model)

    def run(model):
        rolled = policy.rollout(
            *(model, variables, small.prompts(2), jax.random.key(0), small.ENDS_LINE),
            **{"tokens": small.TOKENS, "samples": 3, "max_tokens": 40, "temperature": 1.0},
        )
        return rolled, _loss_and_gradient(model, variables, small.prompts(2), small.completions(2, 3, 6))

    asked = _asked(monkeypatch)
    ours = run(model)
    assert {"attend", "decode", "product", "over_rows"} == asked
    monkeypatch.setattr(cpu_kernels, "serves", lambda *_: False)
    without = run(model.clone(remat="everything_saveable"))  # another model, or jit takes what it has traced
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), without, ours)


def _asked(monkeypatch):
    """Names of the kernels that are asked for from now on."""
    asked = set()
    for name in ("attend", "decode", "product", "over_rows"):
        kernel = getattr(cpu_kernels, name)
        monkeypatch.setattr(cpu_kernels, name, lambda *a, name=name, kernel=kernel: asked.add(name) or kernel(*a))
    return asked


def test_whom_they_serve(monkeypatch):
    assert cpu_kernels.serves(jnp.float32, 64)
    assert not cpu_kernels.serves(jnp.bfloat16, 64)
    assert not cpu_kernels.serves(jnp.float32, 72)  # no whole vectors
    with jax.set_mesh(sharding.make_mesh(1, 1, 2, devices=jax.devices()[:2])):
        assert not cpu_kernels.serves(jnp.float32, 64)  # XLA would gather what lies on several devices
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not cpu_kernels.serves(jnp.float32, 64)
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        assert cpu_kernels.serves(jnp.float32, 64)  # the mesh is what the program is for


def test_calls_on_all_devices_at_once():
    # Were a thread to wait for another, eight programs on two threads would wait forever.
    weight, x = _random(500, 64), _random(64, 8)
    run = jax.jit(lambda w, x: jax.lax.fori_loop(0, 50, lambda _, x: cpu_kernels.product(w, x)[:64] / 25, x))
    given = [jax.device_put((weight, x), device) for device in jax.devices()]
    for result in [run(*z) for z in given] * 2:
        np.testing.assert_array_equal(result, run(*given[0]))


def test_a_program_names_the_source_of_the_kernels_it_calls():
    # Programs are kept on disk: one of an earlier version would call a kernel that reads other operands.
    text = jax.jit(cpu_kernels.product).lower(jnp.ones((3, 4)), jnp.ones((4, 2))).as_text()
    assert compiled.SOURCES[:16] in text


def test_memory_stays_while_somebody_has_its_address():
    # numba frees an array after the last line that names it, and whoever still writes there writes to another's.
    def another(address):
        z = np.ones(1000, np.float32)
        return calls.address_of(z) == address and z[0] == 1

    another = calls.compiled(another)

    def kept():
        x = np.zeros(1000, np.float32)
        taken = another(calls.address_of(x))
        calls.alive(x)
        return taken

    assert not calls.compiled(kept)()
    for path in Path(compiled.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                given = {argument.arg for argument in function.args.args}
                late = _named(function, "alive")
                for name, line in _named(function, "address_of").items():
                    assert name in given or late.get(name, 0) > line, f"{path.name}: {function.name} frees {name}"


def _named(function, call):
    """Names in calls of a function, and the last line of each."""
    nodes = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    found = [(a.id, n.lineno) for n in nodes if n.func.id == call for a in n.args if isinstance(a, ast.Name)]
    return {name: max(line for other, line in found if other == name) for name, _ in found}


@pytest.mark.slow
def test_machine_code_is_made_once(tmp_path):
    script = "from ambijax.model.compiled import calls, kernels; print([e.cache_hits for e in calls._entries])"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", script]
    said = [subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert said == ["[0, 0]\n", "[1, 1]\n"]
