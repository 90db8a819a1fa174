"""The kernels that decode on a GPU compute what a roll-out computes without them, by Pallas' interpreter on a CPU.

On an H200 they were held against the same: bfloat16 within 4e-3 (docs/log.md).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ambijax import assemble, policy, rules, sharding
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from ambijax.model import decode_kernel, kernels
from ambijax.model.layers import Segment, attention, rope, rotation
from tests import small, trained
from tests.test_kernels import _config

B, G, K, R, D, P, N = 2, 3, 2, 2, 16, 70, 140
interpreted = functools.partial(decode_kernel.attend, interpret=True)


def by_parts(qkv, turn, prompt, own, slot):
    """The same by `attention`: rotate, write, look."""
    turn = tuple(z[:, None, None] for z in turn)
    by_head = jnp.einsum("kndbg->bgknd", qkv)
    q, k = (rope(z.reshape(B, G, -1, D), turn) for z in (by_head[..., :R, :], by_head[..., R, :]))
    new = (jnp.einsum("bgkd->bkgd", z) for z in (k, by_head[..., R + 1, :]))
    own = [cache.at[:, :, :, slot].set(z) for cache, z in zip(own, new, strict=True)]
    written = jnp.broadcast_to(jnp.arange(N) <= slot, (B, G, 1, N))
    segments = [Segment(*prompt[:2], prompt[2][:, None, None]), Segment(*own, written)]
    out = attention(q[:, :, None], segments)[:, :, 0]
    return jnp.einsum("bgkrd->krdbg", out.reshape(B, G, K, R, D)), own


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_token_attends_as_by_parts_and_lies_in_its_slot(dtype):
    shapes = [(K, R + 2, D, B, G), *[(B, K, P, D)] * 2, *[(B, K, G, N, D)] * 2]
    qkv, *caches = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))
    exists = jnp.arange(P) >= jnp.array([[0], [9]])
    fused, plain = jax.jit(interpreted), jax.jit(by_parts)
    for slot in (0, 1, 63, 64, 65, 139):  # on either side of a block's edge, and the last
        turn = tuple(z[:, 0] for z in rotation(jnp.array([P, P - 9]) + slot, D, 1e4))
        given = (qkv, turn, (*caches[:2], exists), tuple(caches[2:]), jnp.int32(slot))
        (out, own), (expected, written) = fused(*given), plain(*given)
        assert np.abs(expected).max() > 0.3
        atol = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
        for a, b in zip((out, *own), (expected, *written), strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=atol)


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_roll_out_with_the_kernel_is_the_one_without(monkeypatch, devices):
    monkeypatch.setattr(decode_kernel, "attend", interpreted)
    mesh = sharding.make_mesh(*{1: (1, 1, 1), 8: (2, 2, 2)}[devices], devices=jax.devices()[:devices])
    model = small.model()
    one_layer = dataclasses.replace(model.config.text, num_hidden_layers=1)
    model = model.clone(config=dataclasses.replace(model.config, text=one_layer))
    variables = jax.tree.map(np.asarray, small.variables(model))
    how = {"tokens": small.TOKENS, "samples": 3, "max_tokens": 6, "temperature": 1.0}
    with jax.set_mesh(mesh):
        variables = jax.device_put(variables, sharding.shardings(variables, mesh))
        prompt = sharding.place(small.prompts(4), mesh)
        key, ends_line = jax.random.key(3), small.ENDS_LINE
        plain = policy.rollout(model, variables, prompt, key, ends_line, **how)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # there adapters stay beside their matrices
        fused = policy.rollout(model.clone(decoding="triton"), variables, prompt, key, ends_line, **how)
    assert plain.completions.mask.sum() > 40
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_the_kernel_cannot_is_refused():
    shape = model_config.load(trained.TINY)
    with pytest.raises(ConfigError, match=r"^model.decoding='triton' runs on a gpu, not on a cpu; use 'xla'$"):
        assemble.mesh(_config(decoding="triton"), shape)
    config = _config().to_dict()
    for changes, said in (
        ({"decoding": "cuda"}, "model.decoding='cuda' must be one of xla, triton"),
        (
            {"decoding": "triton", "cache": "int8"},
            "model.decoding='triton' reads a float cache, and model.cache='int8'",
        ),
    ):
        assert rules.problems(config | {"model": config["model"] | changes}) == [said]


def test_a_head_or_a_jax_that_the_kernel_cannot_use_is_refused(monkeypatch):
    config, shape = _config(decoding="triton"), model_config.load(trained.TINY)
    monkeypatch.setitem(kernels.PLATFORMS, "triton", "cpu")
    assemble.mesh(config, shape)
    monkeypatch.setattr(kernels, "WIDTHS", (16, 128))
    said = rf"^model.decoding='triton' needs heads of width 16, 128, not {shape.text.head_dim}; use 'xla'$"
    with pytest.raises(ConfigError, match=said):
        assemble.mesh(config, shape)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^model.decoding='triton' needs Pallas' Triton, which jax \S+ lacks; use 'xla'$"
    ):
        assemble.mesh(config, shape)
