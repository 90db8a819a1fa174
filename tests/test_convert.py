"""Checkpoints in and out: every value lands where it belongs, and whatever does not fit is refused by name.

The names and shapes below are written down from the published checkpoint, not taken from the table under test.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import NamedSharding
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ambijax import convert, errors, hugging_face, sharding
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from ambijax.model.qwen2_audio import Qwen2Audio

TINY = {
    "model_type": "qwen2_audio",
    "audio_token_index": 60,
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "d_model": 16,
        "max_source_positions": 20,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000,
    },
}
# What the 7B's config.json fixes; the rest are the architecture's defaults.
PUBLISHED = {
    "model_type": "qwen2_audio",
    "audio_token_index": 151646,
    "audio_config": {
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "d_model": 1280,
        "max_source_positions": 1500,
    },
    "text_config": {"intermediate_size": 11008, "rms_norm_eps": 1e-5, "rope_theta": 10000, "vocab_size": 156032},
}


def published_names(raw: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape as transformers has written them since 4.45."""
    a = raw["audio_config"]
    t = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32} | raw["text_config"]
    d, f, h, m, v = a["d_model"], a["encoder_ffn_dim"], t["hidden_size"], t["intermediate_size"], t["vocab_size"]
    kv = h * t.get("num_key_value_heads", t["num_attention_heads"]) // t["num_attention_heads"]
    names = {
        "audio_tower.conv1.weight": (d, a["num_mel_bins"], 3),
        "audio_tower.conv1.bias": (d,),
        "audio_tower.conv2.weight": (d, d, 3),
        "audio_tower.conv2.bias": (d,),
        "audio_tower.embed_positions.weight": (a["max_source_positions"], d),
        "audio_tower.layer_norm.weight": (d,),
        "audio_tower.layer_norm.bias": (d,),
        "multi_modal_projector.linear.weight": (h, d),
        "multi_modal_projector.linear.bias": (h,),
        "language_model.model.embed_tokens.weight": (v, h),
        "language_model.model.norm.weight": (h,),
        "language_model.lm_head.weight": (v, h),
    }
    for i in range(a["encoder_layers"]):
        layer = f"audio_tower.layers.{i}"
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj"):
            names |= {f"{layer}.{name}.weight": (d, d), f"{layer}.{name}.bias": (d,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            names |= {f"{layer}.{name}.weight": (d,), f"{layer}.{name}.bias": (d,)}
        names |= {f"{layer}.self_attn.k_proj.weight": (d, d)}
        names |= {f"{layer}.fc1.weight": (f, d), f"{layer}.fc1.bias": (f,)}
        names |= {f"{layer}.fc2.weight": (d, f), f"{layer}.fc2.bias": (d,)}
    for i in range(t["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        for name, out in (("q", h), ("k", kv), ("v", kv)):
            names |= {f"{layer}.self_attn.{name}_proj.weight": (out, h), f"{layer}.self_attn.{name}_proj.bias": (out,)}
        names |= {f"{layer}.self_attn.o_proj.weight": (h, h), f"{layer}.mlp.down_proj.weight": (h, m)}
        names |= {f"{layer}.mlp.gate_proj.weight": (m, h), f"{layer}.mlp.up_proj.weight": (m, h)}
        names |= {f"{layer}.input_layernorm.weight": (h,), f"{layer}.post_attention_layernorm.weight": (h,)}
    return names


def here(params: dict, name: str) -> np.ndarray:
    """The tensor `name` as it lies in our parameters, brought back to the shape it has on disk."""
    parts = [p for p in name.split(".") if p not in ("model", "self_attn", "mlp", "linear")]
    layer = next((int(p) for p in parts if p.isdigit()), None)
    *module, leaf = [p for p in parts if not p.isdigit()]
    node = params
    for part in module:
        node = node[part]
    if leaf == "weight" and isinstance(node, dict):
        node = next(node[k] for k in ("kernel", "scale", "embedding") if k in node)
    elif isinstance(node, dict):
        node = node[leaf]
    value = np.asarray(node if layer is None else node[layer])
    turned = value.ndim > 1 and "embed" not in name
    return value.T if turned else value


def random_tensors(raw: dict, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in published_names(raw).items()}
    tensors["multi_modal_projector.linear.bias"][:] = 0  # zeros are easily left out of a store
    return tensors


def new_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a state dict of transformers 5 calls them in memory."""
    renamed = {}
    for name, value in tensors.items():
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "language_model")
        renamed[name if name.startswith("lm_head") else f"model.{name}"] = value
    return renamed


def write(directory: Path, tensors: dict[str, np.ndarray], raw: dict = TINY, shards: int = 1) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def tied(raw: dict) -> dict:
    return raw | {"text_config": raw["text_config"] | {"tie_word_embeddings": True}}


def model_of(raw: dict) -> Qwen2Audio:
    return Qwen2Audio(model_config.from_dict(raw), None, jnp.float32, "nothing_saveable")


MODEL = model_of(TINY)


def load(directory: Path, dtype: str = "float32", **kwargs) -> dict:
    return convert.load(directory, MODEL, dtype=jnp.dtype(dtype), **kwargs)


def assert_equal(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x in flax.traverse_util.flatten_dict(a, sep="/").items():
        y = flax.traverse_util.flatten_dict(b, sep="/")[path]
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory, read only."""
    directory = write(tmp_path_factory.mktemp("checkpoint") / "hf", random_tensors(TINY), shards=3)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def native(checkpoint) -> Path:
    """The same as a native directory, read only."""
    out = checkpoint.parent / "native"
    convert.convert(checkpoint, out)
    return out


def assert_totals(raw: dict) -> None:
    wanted = hugging_face.parameters(model_of(raw))
    assert {key: p.tensor_shape for p in wanted for key in p.keys} == published_names(raw)
    assert sum(len(p.keys) for p in wanted) == 876
    assert sum(int(np.prod(p.shape)) for p in wanted) == 8_397_094_912


def test_published_totals():
    assert_totals(PUBLISHED)


def test_published_config(shared_data):
    assert_totals(json.loads((shared_data / "qwen2_audio" / "config.json").read_text()))


# --- Hugging Face -> params


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


def on_mesh(data: int, fsdp: int, tensor: int):
    mesh = sharding.make_mesh(data, fsdp, tensor)
    return lambda path: NamedSharding(mesh, sharding.parameter(path))


@pytest.mark.parametrize("layout", ["checkpoint", "native"])
@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2), (8, 1, 1)])
def test_shards_equal_the_whole(request, checkpoint, layout, shape):
    where = on_mesh(*shape)
    params = load(request.getfixturevalue(layout), sharding=where)
    for path, array in flax.traverse_util.flatten_dict(params, sep="/").items():
        assert array.sharding == where(path)
    assert_equal(params, load(checkpoint))


def test_replicas_are_read_once(checkpoint, monkeypatch):
    # Without the shared copy a mesh with data=2 would read and hold everything that is split at all twice.
    numbers, read = [], hugging_face.read
    monkeypatch.setattr(hugging_face, "read", lambda *args: numbers.append(0) or _count(read(*args), numbers))
    params = load(checkpoint, sharding=on_mesh(2, 2, 2))
    assert sum(numbers) == sum(x.size for x in jax.tree.leaves(params))


def _count(array: np.ndarray, numbers: list[int]) -> np.ndarray:
    numbers.append(array.size)
    return array


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


# --- what is refused

Q1 = "language_model.model.layers.1.self_attn.q_proj.weight"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


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


# --- native


def test_native_equals_hugging_face(checkpoint, native):
    assert_equal(load(native), load(checkpoint))
    assert_equal(load(native, "bfloat16"), load(checkpoint, "bfloat16"))
    assert (native / "tokenizer.json").read_text() == "{}"
    assert model_config.load(native) == model_config.load(checkpoint)
    assert not list(native.parent.glob("*.partial"))


def test_orbax_itself_restores_it(checkpoint, native):
    restored = orbax.checkpoint.PyTreeCheckpointer().restore(native.absolute() / "params")
    assert_equal(restored, load(checkpoint))


def test_a_large_parameter_lies_in_several_files(tmp_path, checkpoint, monkeypatch):
    # 3 layers of 32 x 48 numbers of 4 bytes: cut over layers, then each of the axes in two.
    monkeypatch.setattr(convert, "_FILE", 2048)
    convert.convert(checkpoint, tmp_path / "native")
    assert len(data_files(tmp_path / "native", "language_model.layers.up_proj.kernel")) == 3 * 2 * 2
    assert_equal(load(tmp_path / "native"), load(checkpoint))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_is_of_the_weights(tmp_path, checkpoint, native, dtype):
    tensors = random_tensors(TINY, dtype)
    one = convert.digest(write(tmp_path / "one", tensors))
    assert convert.digest(write(tmp_path / "other_names", new_names(tensors), shards=5)) == one
    assert (convert.digest(native) == convert.digest(checkpoint) == one) == (dtype == "float32")
    for name in (Q1, "audio_tower.conv1.weight", "language_model.model.norm.weight"):
        changed = dict(tensors)
        changed[name] = tensors[name] + np.ones((), dtype)
        assert convert.digest(write(tmp_path / name, changed)) != one


def damage(native: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "native"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(native, copy)
    return copy


def data_files(directory: Path, leaf: str) -> list[Path]:
    return sorted(path for path in (directory / "params" / leaf / "c").rglob("*") if path.is_file())


def test_a_flipped_bit_is_found(tmp_path, native):
    # Orbax's own arrays have no checksum: there most of these would load as other numbers.
    rng = np.random.default_rng(0)
    for leaf in ("language_model.layers.q_proj.kernel", "language_model.norm.scale", "audio_tower.conv1.kernel"):
        for _ in range(4):
            copy = damage(native, tmp_path)
            file = data_files(copy, leaf)[0]
            data = bytearray(file.read_bytes())
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            file.write_bytes(data)
            with pytest.raises(ConfigError, match=rf"{leaf.replace('.', '/')} is damaged, convert again"):
                load(copy)


def resize(metadata: Path) -> None:
    metadata.write_text(metadata.read_text().replace('"shape":[32]', '"shape":[31]'))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda d: data_files(d, "multi_modal_projector.kernel")[0].unlink(),
            "multi_modal_projector/kernel is damaged",
        ),
        (lambda d: os.truncate(data_files(d, "language_model.lm_head")[0], 9), "language_model/lm_head is damaged"),
        (lambda d: shutil.rmtree(d / "params"), "is damaged"),
        (lambda d: resize(d / "params" / "language_model.norm.scale" / "zarr.json"), r"it has shape \(31,\)"),
        (lambda d: (d / "native.json").unlink(), "no weights in"),
        (lambda d: (d / "native.json").write_text("{"), r"native\.json is not JSON"),
        (lambda d: (d / "native.json").write_text('{"format": 2}'), "has format 2, this ambijax reads 1"),
        (
            lambda d: (d / "native.json").write_text(
                (d / "native.json").read_text().replace("language_model/lm_head", "language_model/tail")
            ),
            "language_model/lm_head, language_model/tail missing, unknown or of other shape",
        ),
    ],
)
def test_damaged_native_is_refused(tmp_path, native, harm, message):
    copy = damage(native, tmp_path)
    harm(copy)
    with pytest.raises(ConfigError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_native_is_not_converted_again(tmp_path, native):
    with pytest.raises(ConfigError, match="native checkpoint already"):
        convert.convert(native, tmp_path / "out")


def test_output_is_not_overwritten(tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        convert.convert(checkpoint, tmp_path / "out")


def test_full_disk_is_told_before_writing(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match=r"may need [\d,]+ bytes, and 1 are free"):
        convert.convert(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failing_write_leaves_nothing(tmp_path, checkpoint, monkeypatch):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(convert, "_write_native", fail)
    with pytest.raises(ConfigError, match=r"cannot write .*No space left"):
        convert.convert(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from ambijax import convert
write, left = convert._write_native, int(sys.argv[3])
def count(*args):
    global left
    write(*args)
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
convert._write_native = count
convert.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 20, 39])
def test_a_killed_conversion_is_not_accepted(tmp_path, checkpoint, after):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(checkpoint), str(out), str(after)], capture_output=True)
    assert done.returncode == -9
    assert not out.exists()
    with pytest.raises(ConfigError, match="no weights"):
        load(tmp_path / "out.partial")
    convert.convert(checkpoint, out)
    assert_equal(load(out), load(checkpoint))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_command(tmp_path, checkpoint, monkeypatch, capsys):
    arguments = ["convert", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    errors.run(convert.main)
    assert convert.digest(tmp_path / "out") in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        errors.run(convert.main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"ambijax: {tmp_path}/out already exists")


# --- params -> Hugging Face


def stored(directory: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}  # transformers insists
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("limit", [10**9, 20_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, dtype, limit):
    tensors = random_tensors(TINY, dtype)
    source = write(tmp_path / "source", tensors)
    (source / "merges.txt").write_text("a b")
    params = convert.load(source, MODEL, dtype=jnp.dtype(dtype), sharding=on_mesh(2, 2, 2))
    convert.save_hugging_face(params, source, tmp_path / "out", dtype=jnp.dtype(dtype), max_shard_bytes=limit)

    back = stored(tmp_path / "out")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert (len(files) > 1) == (limit < 10**9)
    if limit < 10**9:
        assert all(sum(x.nbytes for x in load_file(file).values()) <= limit for file in files)
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert_equal(load(tmp_path / "out", dtype), load(source, dtype))
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b"
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw == TINY | {"dtype": dtype, "torch_dtype": dtype}


def test_a_directory_without_weights_gets_them(tmp_path, checkpoint):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    params = load(checkpoint)
    convert.save_hugging_face(params, tmp_path, tmp_path, dtype=jnp.float32)
    assert_equal(load(tmp_path), params)
    with pytest.raises(ConfigError, match=r"already has weights \(model\.safetensors\)"):
        convert.save_hugging_face(params, tmp_path, tmp_path, dtype=jnp.float32)


def test_other_parameters_are_not_saved(tmp_path, checkpoint):
    params = load(checkpoint)
    params["language_model"]["norm"]["scale"] = jnp.ones(31)
    del params["audio_tower"]["conv1"]["bias"]
    with pytest.raises(ConfigError, match=r"do not fit .*audio_tower/conv1/bias, language_model/norm/scale"):
        convert.save_hugging_face(params, checkpoint, tmp_path / "out", dtype=jnp.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("raw", [TINY, tied(TINY)], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_it(tmp_path, raw, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tensors = random_tensors(raw, dtype)
    if raw != TINY:
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].copy()
    source = write(tmp_path / "source", tensors, raw)
    params = convert.load(source, model_of(raw), dtype=jnp.dtype(dtype))
    convert.save_hugging_face(params, source, tmp_path / "out", dtype=jnp.dtype(dtype), max_shard_bytes=30_000)
    loaded, info = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    state = loaded.state_dict()
    for name, value in new_names(tensors).items():
        assert state[name].dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(state[name].float().numpy(), value.astype(np.float32), err_msg=name)


# --- memory

MEASURED = """
import re, sys
import jax
from pathlib import Path
from ambijax import convert, hugging_face

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

convert._FILE = hugging_face._BLOCK = 2**20  # as small beside the test's parameters as the real ones beside 7B's
convert.convert(sys.argv[1], sys.argv[2] + ".warm")  # imports, thread pools
Path("/proc/self/clear_refs").write_text("5")
before = peak()
convert.convert(sys.argv[3], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_conversion_holds_less_than_one_parameter(tmp_path, checkpoint):
    text = TINY["text_config"] | {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    raw = TINY | {"text_config": text}
    shapes = published_names(raw)
    rng = np.random.default_rng(0)
    bits = {name: rng.integers(0, 2**14, shape, np.uint16) for name, shape in shapes.items()}
    source = write(tmp_path / "source", {k: v.view(ml_dtypes.bfloat16) for k, v in bits.items()}, raw, shards=3)
    largest = 8 * 1024 * 8192 * 2  # an up_proj with its layers stacked, 134 MB
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(checkpoint), str(tmp_path / "out"), str(source)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # or what the C library's arenas hoard is counted too
    )
    assert int(done.stdout.split()[-1]) < 0.25 * largest
