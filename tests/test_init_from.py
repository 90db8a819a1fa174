"""Starting from what an earlier run trained: bit-equal, or one line that says what does not fit."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from ambijax import assemble, checkpoint, convert, peft, prompt, settings, update
from ambijax.errors import ConfigError

pytestmark = pytest.mark.skipif(
    not (Path(assemble.__file__).parent / "tiny/model.safetensors").exists(), reason="the tiny model is not here"
)
NORM = "--config.optim.train=('params/language_model/norm/.*',)"


def parse(algorithm: str, *overrides: str):
    return settings.parse(["train", f"--config=configs/{algorithm}.py:tiny", "--workdir=unused", *overrides])[0]


@pytest.fixture(scope="module")
def base():
    """Setting and weights of the tiny model."""
    setting = assemble.setting(parse("sft"))
    with jax.set_mesh(setting.mesh):
        return setting, assemble.base(setting)


def initial(base, config, **options: bool) -> dict:
    setting, params = dataclasses.replace(base[0], config=config), base[1]
    if config.lora.rank != base[0].config.lora.rank:
        setting = assemble.setting(config)
    with jax.set_mesh(setting.mesh):
        return assemble.initial(setting, params, **options)


def finished(base, directory: Path, config, meta: dict) -> tuple[Path, dict]:
    """A run that has trained: every trained weight is one more than it was. Returns it and those weights."""
    setting = dataclasses.replace(base[0], config=config)
    with jax.set_mesh(setting.mesh), checkpoint.Checkpoints(directory / "checkpoints", 1) as saved:
        state, _, _ = update.start(config, assemble.initial(setting, base[1]))
        state = state.replace(trained=jax.tree.map(lambda x: x + 1, state.trained))
        base_of, tokenizer = convert.digest(config.model.checkpoint), prompt.digest(config.model.checkpoint)
        about = {"lora": config.lora.to_dict(), "base": base_of, "tokenizer": tokenizer} | meta
        saved.save(1, state, about)
    settings.save(config, directory)
    return directory, jax.tree.map(np.asarray, state.trained)


def test_a_run_that_trained_some_adapters_is_read_without_the_others(base, tmp_path):
    some = "--config.optim.train=('lora/language_model/layers/(q|v)_proj/.*',)"
    run, trained = finished(base, tmp_path / "run", parse("sft", some), {})
    setting = dataclasses.replace(base[0], config=settings.load(run))
    with jax.set_mesh(setting.mesh):
        _, variables = assemble.trained(setting, {"params": base[1]}, run)
    layers = variables["lora"]["language_model"]["layers"]
    for name, adapter in layers.items():
        if name in ("q_proj", "v_proj"):
            jax.tree.map(np.testing.assert_array_equal, adapter, trained["lora"]["language_model"]["layers"][name])
        else:
            assert not any(np.any(x) for x in jax.tree.leaves(adapter))  # they began as nothing and stayed that
    assert len(layers) == 7
    # The same as a PEFT adapter; another run that starts from it goes on with fresh ones beside it.
    held = jax.tree.map(np.asarray, {name: layers[name] for name in ("q_proj", "v_proj")})
    (tmp_path / "peft").mkdir()
    peft.save({"language_model": {"layers": held}}, tmp_path / "peft", setting.model.lora, "base")
    assert "(q_proj|v_proj)" in json.loads((tmp_path / "peft" / peft.CONFIG).read_text())["target_modules"]
    start = initial(base, parse("grpo", f"--config.init_from={tmp_path / 'peft'}"))["lora"]["language_model"]["layers"]
    np.testing.assert_array_equal(start["q_proj"]["b"], held["q_proj"]["b"])
    assert np.any(start["o_proj"]["a"])


@pytest.mark.parametrize(
    ("train", "lives"),
    [
        ("lora/.*", False),
        ("params/language_model/.*", False),
        ("params/multi_modal_projector/.*", True),
        ("params/audio_tower/layers/q_proj/.*", True),
        ("params/.*", True),
    ],
)
def test_the_tower_is_computed_once_unless_something_before_the_decoder_learns(base, train, lives):
    setting = dataclasses.replace(base[0], config=parse("sft", f"--config.optim.train=('{train}',)"))
    assert assemble.trains_tower(setting) == lives


def test_adapters_of_sft_start_dpo_and_grpo(base, tmp_path):
    run, trained = finished(base, tmp_path, parse("sft"), {})
    for algorithm in ("dpo", "grpoz"):
        start = initial(base, parse(algorithm, f"--config.init_from={run}"))
        jax.tree.map(np.testing.assert_array_equal, start["lora"], trained["lora"])
        jax.tree.map(np.testing.assert_array_equal, start["params"], base[1])  # the reference stays the base


def test_fully_fine_tuned_weights_start_full_fine_tuning(base, tmp_path):
    run, trained = finished(base, tmp_path, parse("sft", NORM), {})
    start = initial(base, parse("grpo", NORM, "--config.grpo.beta_kl=0", f"--config.init_from={run}"))
    scale = start["params"]["language_model"]["norm"]["scale"]
    np.testing.assert_array_equal(scale, trained["params"]["language_model"]["norm"]["scale"])
    np.testing.assert_array_equal(scale, base[1]["language_model"]["norm"]["scale"] + 1)
    np.testing.assert_array_equal(start["params"]["language_model"]["lm_head"], base[1]["language_model"]["lm_head"])


@pytest.mark.parametrize(
    ("earlier", "later", "meta", "message"),
    [
        (
            [],
            ["--config.lora.rank=4", "--config.lora.alpha=8"],
            {},
            "lora.rank is 8 there and 4 here; lora.alpha is 16",
        ),
        ([], [], {"base": "another"}, "it was trained on another base than model.checkpoint"),
        ([], [], {"tokenizer": "another"}, "it was trained with another tokenizer than that of model.checkpoint"),
        ([NORM], [], {}, "params/language_model/norm/scale, which optim.train=('lora/.*',) freezes"),
        ([], [NORM], {}, "it trained lora/language_model/layers/"),
    ],
)
def test_what_does_not_fit_is_one_line(base, tmp_path, earlier, later, meta, message):
    run, _ = finished(base, tmp_path, parse("sft", *earlier), meta)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        initial(base, parse("sft", *later, f"--config.init_from={run}"))
    assert "\n" not in str(caught.value)
    assert f"init_from={run}" in str(caught.value)


def test_a_run_that_resumes_needs_no_other(base, tmp_path):
    """What it began with is in its own checkpoint; the earlier run may have been moved away."""
    config = parse("sft", f"--config.init_from={tmp_path / 'gone'}")
    with pytest.raises(ConfigError, match="gone is not a run directory"):
        initial(base, config)
    assert set(initial(base, config, resumes=True)) == {"params", "lora"}


def test_a_directory_without_a_checkpoint_is_named(base, tmp_path):
    start = parse("sft", f"--config.init_from={tmp_path}")
    with pytest.raises(ConfigError, match=f"{tmp_path} is not a run directory"):
        initial(base, start)
    settings.save(start, tmp_path)
    with pytest.raises(ConfigError, match=f"no checkpoint in {tmp_path}"):
        initial(base, start)
