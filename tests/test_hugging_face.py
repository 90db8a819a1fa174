"""Reading Hugging Face checkpoints: every value lands where it belongs, and what does not fit is refused by name."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ambijax import assemble, convert, hugging_face, settings
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from tests import trained
from tests.published import (
    INDEX,
    PUBLISHED,
    TINY,
    here,
    load,
    model_of,
    new_names,
    published_names,
    random_tensors,
    tied,
    write,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory, read only."""
    return write(tmp_path_factory.mktemp("checkpoint") / "hf", random_tensors(TINY), shards=3)


def assert_totals(raw: dict) -> None:
    wanted = hugging_face.parameters(model_of(raw))
    assert {key: p.tensor_shape for p in wanted for key in p.keys} == published_names(raw)
    assert sum(len(p.keys) for p in wanted) == 876
    assert sum(int(np.prod(p.shape)) for p in wanted) == 8_397_094_912


def test_published_totals():
    assert_totals(PUBLISHED)


QWEN = {"model_type": "qwen2_audio"}


def test_rope_theta_is_where_transformers_reads_it():
    """In rope_parameters, where both places have one."""
    for text in ({"rope_theta": 1e4}, {"rope_theta": None}, {}):
        text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        assert model_config.from_dict(QWEN | {"text_config": text}).text.rope_theta == 1e6
    assert model_config.from_dict(QWEN | {"text_config": {"rope_theta": 2e5}}).text.rope_theta == 2e5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("preprocessor_config.json", {"hop_length": 320}, "hop_length is 320 there and 160 here"),
        ("config.json", {"audio_config": {"max_source_positions": 300}}, "max_source_positions is 300 there and 1500"),
    ],
)
def test_a_model_that_hears_otherwise_is_refused(tmp_path, name, change, message):
    shutil.copytree(trained.TINY, tmp_path / "model")
    path = tmp_path / "model" / name
    told = json.loads(path.read_text())
    for key, value in change.items():
        told[key] = told[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(told))
    argv = ["x", "--config=configs/sft.py:tiny", "--workdir=w", f"--config.model.checkpoint={tmp_path / 'model'}"]
    with pytest.raises(ConfigError, match=message):
        assemble.setting(settings.parse(argv)[0])


def test_published_config(shared_data):
    assert_totals(json.loads((shared_data / "qwen2_audio" / "config.json").read_text()))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("rename", [dict, new_names], ids=["old_names", "new_names"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_value_finds_its_place(tmp_path, dtype, rename, shards):
    tensors = random_tensors(TINY, dtype)
    params = load(write(tmp_path, rename(tensors), shards=shards), dtype)
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in tensors.values())
    for name, value in tensors.items():
        ours = here(params, name)
        assert ours.dtype == value.dtype
        np.testing.assert_array_equal(ours, value, err_msg=name)


def test_convolutions_are_turned(tmp_path):
    # here() turns with .T; this says the same in the axes' names.
    tensors = random_tensors(TINY)
    params = load(write(tmp_path, tensors))
    expected = np.einsum("oik->kio", tensors["audio_tower.conv2.weight"])
    np.testing.assert_array_equal(params["audio_tower"]["conv2"]["kernel"], expected)


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_values_are_cast(tmp_path, stored, asked):
    tensors = random_tensors(TINY, stored)
    params = load(write(tmp_path, tensors), asked)
    for name, value in tensors.items():
        np.testing.assert_array_equal(here(params, name), value.astype(asked), err_msg=name)


def test_a_large_tensor_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(hugging_face, "_BLOCK", 5 * 32 * 4)  # five rows of the embedding, which has 64
    tensors = random_tensors(TINY)
    params = load(write(tmp_path, tensors))
    for name, value in tensors.items():
        np.testing.assert_array_equal(here(params, name), value, err_msg=name)


@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_is_not_a_parameter(tmp_path, stored):
    tensors = random_tensors(TINY)
    head = tensors.pop("language_model.lm_head.weight")
    if stored:  # some writers store the same matrix twice
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].copy()
    directory = write(tmp_path, tensors, tied(TINY))
    params = convert.load(directory, model_of(tied(TINY)), dtype=jnp.float32)
    assert "lm_head" not in params["language_model"]
    save_file(tensors | {"language_model.lm_head.weight": head}, directory / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tie_word_embeddings is true, but language_model\.lm_head\.weight differs"):
        convert.load(directory, model_of(tied(TINY)), dtype=jnp.float32)


Q1 = "language_model.model.layers.1.self_attn.q_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


def edit_index(directory: Path, **changes: str | None) -> None:
    """Moves tensors to other files in the index, or drops them from it."""
    index = json.loads((directory / INDEX).read_text())
    for name, file in ((name.replace("__", "."), file) for name, file in changes.items()):
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    (directory / INDEX).write_text(json.dumps(index))


def misplaced(directory: Path) -> None:
    files = {path.name for path in directory.glob("*.safetensors")}
    held = json.loads((directory / INDEX).read_text())["weight_map"][Q1]
    edit_index(directory, **{Q1.replace(".", "__"): min(files - {held})})


def edit_tensors(directory: Path, change) -> None:
    """Rewrites the checkpoint as one file, after change(tensors)."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (directory / INDEX).unlink()
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(directory: Path) -> None:
    data = (directory / SHARD).read_bytes()
    (directory / SHARD).write_bytes(data[:-100])


def pickled_only(directory: Path) -> None:
    for file in [*directory.glob("*.safetensors"), directory / INDEX]:
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02")


def twice(directory: Path) -> None:
    tensors = load_file(directory / SHARD)
    name = next(iter(tensors))
    other = next(iter(new_names({name: tensors[name]})))
    save_file(tensors | {other: tensors[name]}, directory / SHARD)
    edit_index(directory, **{other.replace(".", "__"): SHARD})


def half_precision(tensors: dict) -> None:
    tensors[Q1] = tensors[Q1].astype(np.float16)


def mixed_layers(tensors: dict) -> None:
    tensors[Q1] = tensors[Q1].astype(ml_dtypes.bfloat16)


def everything(tensors: dict) -> None:
    del tensors["audio_tower.layer_norm.bias"], tensors["audio_tower.conv1.bias"]
    tensors["visual.patch.weight"] = np.zeros(3, np.float32)
    tensors[Q1] = tensors[Q1][:-1]


REFUSED = {
    "no_config": (lambda d: (d / "config.json").unlink(), r"config\.json does not exist"),
    "pickle": (pickled_only, r"no weights in .*pytorch_model\.bin: pickles are never read"),
    "two_layouts": (lambda d: shutil.copy(d / SHARD, d / "model.safetensors"), "has both"),
    "shard_missing": (lambda d: (d / SHARD).unlink(), rf"{SHARD} is missing"),
    "shard_cut": (truncate, rf"{SHARD} \(\d+ bytes\) is cut short"),
    "shard_empty": (lambda d: (d / SHARD).write_bytes(b""), rf"{SHARD} \(0 bytes\) is cut short"),
    "pointer": (
        lambda d: (d / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"),
        rf"{SHARD} is a git-lfs pointer",
    ),
    "index_broken": (lambda d: (d / INDEX).write_text('{"weight_map'), rf"{INDEX} is not JSON"),
    "index_without_map": (lambda d: (d / INDEX).write_text("{}"), "must have a 'weight_map'"),
    "index_leaves_directory": (lambda d: edit_index(d, x="../x.safetensors"), "to files beside it"),
    "index_names_the_wrong_file": (
        misplaced,
        rf"disagree about {re.escape(Q1)} in model-0000",
    ),
    "index_omits_a_tensor": (
        lambda d: edit_index(d, **{Q1.replace(".", "__"): None}),
        rf"disagree about {re.escape(Q1)} in",
    ),
    "index_invents_a_tensor": (lambda d: edit_index(d, ghost=SHARD), f"disagree about ghost in {SHARD}"),
    "twice": (twice, "the same tensor twice: .* and .*"),
    "unknown": (
        lambda d: edit_tensors(d, lambda t: t.update({"visual.weight": np.zeros(2, np.float32)})),
        r"1 unknown tensors \(visual\.weight\)",
    ),
    "missing": (lambda d: edit_tensors(d, lambda t: t.pop(Q1)), rf"1 missing tensors \({re.escape(Q1)}\)"),
    "wrong_shape": (
        lambda d: edit_tensors(d, lambda t: t.update({Q1: t[Q1][:, :-2]})),
        rf"1 wrong shapes \({re.escape(Q1)} is \[32, 30\], not \[32, 32\]\)",
    ),
    "dtype": (lambda d: edit_tensors(d, half_precision), rf"1 unexpected dtypes \({re.escape(Q1)} is F16; expected"),
    "mixed_dtypes": (
        lambda d: edit_tensors(d, mixed_layers),
        r"different dtypes \(language_model/layers/q_proj/kernel",
    ),
    "all_at_once": (
        lambda d: edit_tensors(d, everything),
        r"1 unknown tensors \(visual.*; 2 missing tensors \(audio_tower\.conv1\.bias, audio.*; 1 wrong shapes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, checkpoint, case):
    break_it, message = REFUSED[case]
    directory = tmp_path / "hf"
    shutil.copytree(checkpoint, directory)
    break_it(directory)
    with pytest.raises(ConfigError, match=message) as caught:
        convert.convert(directory, tmp_path / "out")  # the same checks as load, and config.json
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    if case != "no_config":
        with pytest.raises(ConfigError, match=message):
            load(directory)


def test_long_lists_are_cut(tmp_path):
    tensors = {name: value for name, value in random_tensors(TINY).items() if "audio_tower" not in name}
    with pytest.raises(ConfigError, match=r"37 missing tensors \(audio_tower\S+, audio\S+, audio\S+ and 34 more\)$"):
        load(write(tmp_path, tensors))


@pytest.mark.parametrize(
    "change",
    [
        {"text_config": {"num_hidden_layers": 10**9}},
        {"text_config": {"hidden_size": "abc"}},
        {"text_config": {"hidden_size": 1.5}},
        {"text_config": {"hidden_size": 10**400}},
        {"text_config": {"num_attention_heads": 0}},
        {"text_config": {"num_key_value_heads": -1}},
        {"text_config": {"hidden_size": 96, "num_attention_heads": 32}},  # heads of three
        {"text_config": {"rms_norm_eps": [[1]]}},
        {"text_config": {"rope_theta": float("nan")}},
        {"text_config": {"rope_theta": 10**400}},
        {"text_config": {"tie_word_embeddings": 1}},
        {"text_config": {"rope_scaling": "linear"}},
        {"text_config": 5},
        {"audio_config": {"num_mel_bins": [None]}},
        {"audio_config": {"encoder_ffn_dim": 0}},
        {"audio_config": {"encoder_attention_heads": 7}},
        {"audio_config": {"encoder_layers": True}},
        {"audio_token_index": "<|AUDIO|>"},
    ],
    ids=str,
)
def test_a_configuration_that_is_none_is_one_line(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(QWEN | change))
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        model_config.load(tmp_path)
    assert "\n" not in str(caught.value)
