"""Checkpoints into shards, to the native layout, and back to Hugging Face; damage, kills and memory."""

import json
import os
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
from safetensors.numpy import load_file

from ambijax import convert, errors, hugging_face, sharding, workdir
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from tests.published import (
    INDEX,
    MODEL,
    TINY,
    assert_equal,
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
    directory = write(tmp_path_factory.mktemp("checkpoint") / "hf", random_tensors(TINY), shards=3)
    for name in ("tokenizer.json", "ambijax.json"):
        (directory / name).write_text("{}")
    return directory


@pytest.fixture(scope="module")
def native(checkpoint) -> Path:
    """The same as a native directory, read only."""
    out = checkpoint.parent / "native"
    convert.convert(checkpoint, out)
    return out


# --- into shards


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


# --- native


def test_native_equals_hugging_face(checkpoint, native):
    assert_equal(load(native), load(checkpoint))
    assert_equal(load(native, "bfloat16"), load(checkpoint, "bfloat16"))
    assert (native / "tokenizer.json").read_text() == (native / "ambijax.json").read_text() == "{}"
    assert model_config.load(native) == model_config.load(checkpoint)
    assert not list(native.parent.glob(".*.partial"))


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
def test_identity_is_of_the_weights(tmp_path, checkpoint, native, dtype, monkeypatch):
    tensors = random_tensors(TINY, dtype)
    one = convert.digest(write(tmp_path / "one", tensors))
    monkeypatch.setattr(convert, "_FILE", 2048)  # read in several pieces
    assert convert.digest(write(tmp_path / "other_names", new_names(tensors), shards=5)) == one
    assert (convert.digest(native) == convert.digest(checkpoint) == one) == (dtype == "float32")
    for name in ("audio_tower.layers.1.fc1.weight", "audio_tower.conv1.weight", "language_model.model.norm.weight"):
        for place in (0, -1):
            changed = tensors | {name: tensors[name].copy()}
            changed[name].flat[place] += np.ones((), dtype)
            assert convert.digest(write(tmp_path / f"{name}{place}", changed)) != one


def damage(native: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "native"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(native, copy)
    return copy


def data_files(directory: Path, leaf: str) -> list[Path]:
    return sorted(path for path in (directory / "params" / leaf / "c").rglob("*") if path.is_file())


def test_an_identity_is_computed_once_for_files_that_stay(tmp_path, checkpoint, monkeypatch):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    read = []
    blocks = hugging_face.blocks
    monkeypatch.setattr(hugging_face, "blocks", lambda tensor: read.append(tensor) or blocks(tensor))
    before = convert.digest(copy)
    once = len(read)
    assert convert.digest(copy) == before
    assert len(read) == once > 0
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert convert.digest(copy) != before


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
        (lambda d: (d / "native.json").write_text('{"format": 2}'), "has format 2, this ambijax reads 3"),
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
        load(tmp_path / ".out.partial")
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
from ambijax.model.compiled import kernels  # which a model with wide heads asks for, and a small one does not

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


def test_two_writers_of_one_directory_do_not_mix(tmp_path):
    with workdir.new_directory(tmp_path / "out", 0) as mine:
        (mine / "a").write_text("mine")
        refused = pytest.raises(ConfigError, match="is being written by another process")
        with refused, workdir.new_directory(tmp_path / "out", 0):
            pytest.fail("both write")
        assert (mine / "a").read_text() == "mine"
    assert (tmp_path / "out/a").read_text() == "mine"
    (tmp_path / ".late.partial/left").mkdir(parents=True)  # by a killed process
    (tmp_path / "late.partial").mkdir()  # somebody's own
    with workdir.new_directory(tmp_path / "late", 0):
        pass
    assert not list((tmp_path / "late").iterdir())
    assert (tmp_path / "late.partial").is_dir()
