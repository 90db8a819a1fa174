"""Fused attention equals ours, values and gradients, wherever a token exists.

cuDNN needs a GPU: what it is called with goes to the same function's implementation for any device instead.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ambijax import assemble, policy, rules, settings, sharding
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from ambijax.model import kernels
from ambijax.model.layers import Segment, _fused, attention
from tests import small, trained

RUNS_HERE = {
    "cudnn": functools.partial(kernels.cudnn, implementation="xla"),
    "splash": functools.partial(kernels.splash, interpret=True),
}
T = 20
ROWS = {  # which tokens of a sequence exist
    "right": np.arange(T) < np.array([[20], [13]]),
    "left": np.arange(T) >= np.array([[0], [7]]),
}


@pytest.mark.parametrize("kernel", RUNS_HERE)
@pytest.mark.parametrize("padding", ROWS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_has_our_values_and_gradients(kernel, padding, causal):
    exists = jnp.array(ROWS[padding])
    q, k, v, by_y = (jax.random.normal(jax.random.key(i), (2, 1, T, 4 if i in (0, 3) else 2, 16)) for i in range(4))
    own = exists[:, None, :, None, None]  # what a token that does not exist hears is nobody's business

    def out(q, k, v, attend):
        mask = exists[:, None, None]
        if causal:  # as the decoder has it, a group of one with keys of its own
            k, v = (jnp.einsum("bgtkd->bkgtd", z) for z in (k, v))
            mask = mask & (np.arange(T)[:, None] >= np.arange(T))
        else:  # as the tower has it, keys without a group
            k, v = (jnp.einsum("bgtkd->bktd", z) for z in (k, v))
        return jnp.where(own, attend(q, Segment(k, v, mask, causal)), 0)

    def both(attend):
        y, back = jax.vjp(functools.partial(out, attend=attend), q, k, v)
        return y, *back(by_y)

    ours = jax.jit(lambda: both(lambda q, segment: attention(q, [segment])))()
    fused = jax.jit(lambda: both(lambda q, segment: _fused(q, segment, RUNS_HERE[kernel])))()
    assert np.abs(ours[0]).max() > 0.5
    for a, b in zip(ours, fused, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kernel", ["splash", pytest.param("cudnn", marks=pytest.mark.slow)])
def test_a_model_that_reads_prompts_with_a_kernel_scores_as_ours_on_eight_devices(monkeypatch, kernel):
    used = []
    run = RUNS_HERE[kernel]
    monkeypatch.setitem(kernels.KERNELS, kernel, lambda *inputs: used.append(inputs[0].shape) or run(*inputs))
    devices = sharding.make_mesh(2, 2, 2)
    variables = _variables()
    prompt, given = small.prompts(4), small.completions(4, 2, 6)
    prompt = prompt.replace(
        audio=None, mel=np.random.default_rng(0).normal(size=(4, 24, 8)).astype(np.float32), frames=np.full(4, 14)
    )
    how = {"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}}
    with jax.set_mesh(devices):
        variables = jax.device_put(variables, sharding.shardings(variables, devices))
        prompt, given = sharding.place((prompt, given), devices)
        ours = policy.score(small.model(), variables, prompt, given, **how)
        assert not used
        fused = policy.score(small.model().clone(attention=kernel), variables, prompt, given, **how)
    assert {heads for *_, heads, _ in used} == {8, 2}  # the prompt's and the tower's
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(fused), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@functools.cache
def _variables():
    return jax.tree.map(np.asarray, small.variables(small.model()))


def _config(**model: object):
    flags = [f"--config.model.{key}={value}" for key, value in model.items()]
    return settings.parse(["t", "--config=configs/sft.py:tiny", "--workdir=w", *flags])[0]


@pytest.mark.parametrize(("kernel", "needs"), [("cudnn", "gpu"), ("splash", "tpu")])
def test_a_kernel_of_another_device_is_refused(kernel, needs):
    config = _config(attention=kernel, dtype="bfloat16")
    with pytest.raises(ConfigError, match=rf"^model.attention='{kernel}' runs on a {needs}, not on a cpu; use 'xla'$"):
        assemble.mesh(config, model_config.load(trained.TINY))


def test_what_no_kernel_can_is_refused():
    config = _config().to_dict()
    for kernel, said in (
        ("cudnn", "model.attention='cudnn' computes in bfloat16, and model.dtype='float32'"),
        ("flash", "model.attention='flash' must be one of xla, cudnn, splash"),
    ):
        config["model"]["attention"] = kernel
        assert rules.problems(config) == [said]
