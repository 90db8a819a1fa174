"""A checkpoint's weights into their shards, to a native checkpoint, and back to a Hugging Face directory.

    python -m ambijax.convert --checkpoint Qwen2-Audio-7B-Instruct --out base

Training takes either directory. The native one is stacked and turned already, has a checksum in every chunk, and is
read by all cores at once (on two cores that is no faster than the original):

    base/native.json     format version, the identity of the weights, the shapes; written last
    base/params/         an Orbax checkpoint of the pytree 'params', one array a parameter
    base/config.json     this and the tokenizer's files, as in the original

All is streamed: a shard is filled from just the slices it needs, and the host never holds more than one parameter.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import absl.logging
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import tensorstore
import tqdm
from safetensors.numpy import save_file

from ambijax import errors, hugging_face, workdir
from ambijax.errors import ConfigError
from ambijax.hugging_face import DTYPES, EMBEDDING, HEAD, Parameter, Tensor, some
from ambijax.model import layers, qwen2_audio

FORMAT = 3  # of native.json; raised when an older program could not read what this one writes

SHARD = 5 * 10**9  # bytes of a Hugging Face checkpoint's files, at most; the host holds one while it is written
_FILE = 64 * 2**20  # bytes of a native checkpoint's data files, at most

# What a checkpoint has beside its weights, copied where present.
_SIDE_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
    "ambijax.json",  # of a merged run: how it is asked
)


def load(
    directory: str | Path,
    model: qwen2_audio.Qwen2Audio,
    *,
    dtype: jnp.dtype,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
) -> dict:
    """Reads a checkpoint's weights straight into their shards.

    Args:
      directory: a Hugging Face directory (model.safetensors, or shards with an index), or a native one.
      model: fixes which parameters there are, their shapes, and which of them are quantised.
      dtype: what the parameters shall be; the file's values are cast, then quantised.
      sharding: our parameter path, 'language_model/layers/q_proj/kernel', to where it lies; None is the first device.

    Returns:
      the 'params' collection. The host holds at most one (stacked) parameter beside it.

    Raises:
      ConfigError: the weights are absent, damaged, or not exactly the model's.
    """
    directory = Path(directory)
    wanted = hugging_face.parameters(model)
    read = reader(directory, wanted, np.dtype(dtype))
    where = sharding or (lambda path: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    stored = flax.traverse_util.flatten_dict(qwen2_audio.shapes(model)["params"], sep="/")
    params = {}
    for parameter in tqdm.tqdm(wanted, "weights", disable=None, leave=False):
        held = {}  # devices that hold the same shard share one copy

        def shard(index: tuple[slice, ...], parameter: Parameter = parameter, held: dict = held) -> np.ndarray:
            key = tuple(s.indices(n) for s, n in zip(index, parameter.shape, strict=True))
            if key not in held:
                held[key] = read(parameter, index)
            return held[key]

        array = jax.make_array_from_callback(parameter.shape, where(parameter.path), shard)
        array.block_until_ready()  # the host's copy is gone before the next one is read
        if stored[parameter.path].dtype == jnp.int8:
            scale = parameter.path.removesuffix("kernel") + "scale"
            made = jax.jit(layers.quantize, out_shardings=(where(parameter.path), where(scale)))(array)
            params[parameter.path], params[scale] = jax.block_until_ready(made)
        else:
            params[parameter.path] = array
    return flax.traverse_util.unflatten_dict(params, sep="/")


def reader(
    directory: Path, wanted: Sequence[Parameter], dtype: np.dtype
) -> Callable[[Parameter, Sequence[slice]], np.ndarray]:
    """A function that reads parameter[index] from either kind of directory; the directory is checked at once."""
    return (_native_reader if _is_native(directory) else _hugging_face_reader)(directory, wanted, dtype)


def _hugging_face_reader(directory: Path, wanted: Sequence[Parameter], dtype: np.dtype) -> Callable:
    sources = hugging_face.match(directory, wanted)
    return lambda parameter, index: hugging_face.read(parameter, sources[parameter.path], index, dtype)


def check(directory: str | Path) -> None:
    """Finds what is wrong with a checkpoint from the headers of its files, in a moment.

    Raises:
      ConfigError: weights are absent, cut short, git-lfs pointers, or not those that config.json describes.
    """
    directory = Path(directory)
    if _is_native(directory):
        _native(directory)
    else:
        hugging_face.match(directory, hugging_face.parameters_of(directory))


def digest(directory: str | Path) -> str:
    """The identity of a checkpoint's weights, the same for a Hugging Face directory and its native copy.

    It covers the name, dtype, shape and every byte of every tensor, under whatever names and in whatever files they are
    stored: safetensors have no checksum, and a run must not go on from a base with a flipped bit. On a few cores this
    takes about as long as reading the files.

    Raises:
      ConfigError: the directory holds no intact checkpoint.
    """
    directory = Path(directory)
    if _is_native(directory):
        return _native(directory)["digest"]
    files = sorted(path for path in directory.glob("*") if path.is_file())
    return _digest(
        directory, tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    )


@functools.lru_cache(8)  # an evaluation on dev asks every time, and at 7B it takes as long as reading 17 GB
def _digest(directory: Path, files: tuple) -> str:
    """`digest` of a Hugging Face directory whose files are as they are said to be."""
    del files
    wanted = hugging_face.parameters_of(directory)
    sources = hugging_face.match(directory, wanted)
    named = [(key, tensor) for p in wanted for key, tensor in zip(p.keys, sources[p.path], strict=True)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = pool.map(lambda pair: _tensor_digest(*pair), named)
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def _tensor_digest(key: str, tensor: Tensor) -> str:
    sha = hashlib.sha256(f"{key} {tensor.dtype} {tensor.shape}".encode())
    for block in hugging_face.blocks(tensor):
        sha.update(np.ascontiguousarray(block).view(np.uint8))
    return sha.hexdigest()


def _is_native(directory: Path) -> bool:
    return (directory / "native.json").is_file()


def _native(directory: Path) -> dict:
    about = hugging_face.read_json(directory / "native.json")
    if about.get("format") != FORMAT or not {"digest", "parameters"} <= about.keys():
        found = f"{directory}/native.json has format {about.get('format')!r}, this ambijax reads {FORMAT}"
        raise ConfigError(f"{found}; convert the checkpoint again")
    return about


def _place(directory: Path, path: str) -> dict:
    """Where Orbax keeps a leaf's array: TensorStore's address of it."""
    leaf = (directory / "params" / path.replace("/", ".")).absolute()
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{leaf}/"}}


def _native_reader(directory: Path, wanted: Sequence[Parameter], dtype: np.dtype) -> Callable:
    held = {path: tuple(shape) for path, shape in _native(directory)["parameters"].items()}
    expected = {parameter.path: parameter.shape for parameter in wanted}
    if wrong := {path for path, _ in held.items() ^ expected.items()}:
        raise ConfigError(f"{directory} does not fit its config.json: {some(wrong)} missing, unknown or of other shape")

    def read(parameter: Parameter, index: Sequence[slice]) -> np.ndarray:
        try:
            place = _place(directory, parameter.path) | {"fill_missing_data_reads": False}
            store = tensorstore.cast(tensorstore.open(place, open=True).result(), dtype)
            if store.shape != parameter.shape:
                raise ValueError(f"it has shape {store.shape}")
            out = np.empty([len(range(n)[s]) for n, s in zip(parameter.shape, index, strict=True)], dtype)
            start, stop, _ = index[0].indices(parameter.shape[0])
            step = store.chunk_layout.read_chunk.shape[0]
            for row in range(start, stop, step):  # not all at once, or as much again lies in TensorStore's buffers
                rows = slice(row, min(row + step, stop))
                out[rows.start - start : rows.stop - start] = store[(rows, *index[1:])].read().result()
            return out
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise ConfigError(f"{directory}: {parameter.path} is damaged, convert again ({reason})") from None

    return read


def convert(checkpoint: str | Path, out: str | Path) -> None:
    """Writes a Hugging Face checkpoint as a native one; `out` appears when it is complete.

    Raises:
      ConfigError: the checkpoint is absent, damaged or of another model, or `out` cannot be written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if _is_native(checkpoint):
        raise ConfigError(f"{checkpoint} is a native checkpoint already")
    wanted = hugging_face.parameters_of(checkpoint)
    sources = hugging_face.match(checkpoint, wanted)
    sizes = {p.path: int(np.prod(p.shape)) * DTYPES[sources[p.path][0].dtype].itemsize for p in wanted}
    with workdir.new_directory(out, sum(sizes.values())) as partial:
        _copy_side_files(checkpoint, partial)
        # Orbax's own save holds three copies of an array (2.9 GB each at 7B). So it writes the tree with stubs for
        # leaves, and TensorStore, the library under it, replaces them piece by piece.
        stubs = flax.traverse_util.unflatten_dict({parameter.path: np.zeros(1) for parameter in wanted}, sep="/")
        with orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=True) as checkpointer:
            checkpointer.save(partial.absolute() / "params", stubs)
        with tqdm.tqdm(desc="converting", total=sum(sizes.values()), unit="B", unit_scale=True, disable=None) as bar:
            for parameter in wanted:
                _write_native(partial, parameter, sources[parameter.path])
                bar.update(sizes[parameter.path])
        shapes = {parameter.path: parameter.shape for parameter in wanted}
        about = {"format": FORMAT, "digest": digest(checkpoint), "parameters": shapes}
        (partial / "native.json").write_text(json.dumps(about, indent=1))


def _write_native(directory: Path, parameter: Parameter, sources: Sequence[Tensor]) -> None:
    """One parameter into its place in a native checkpoint, a file at a time."""
    dtype = DTYPES[sources[0].dtype]
    file = list(parameter.shape)  # halved over layers first, then over the longest axis
    while np.prod(file) * dtype.itemsize > _FILE:
        axis = 0 if parameter.stacked and file[0] > 1 else int(np.argmax(file))
        file[axis] = -(-file[axis] // 2)
    # In a file lie chunks that are read by themselves, so that an eighth of a matrix costs an eighth. With a checksum a
    # flipped bit is an error; Orbax's own arrays would not show it. Not compressed: bfloat16 weights would shrink by a
    # quarter and take twice as long to read.
    chunk = [1 if parameter.stacked and axis == 0 else n // math.gcd(n, 8) for axis, n in enumerate(file)]
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    chunks = {"chunk_shape": chunk, "codecs": plain, "index_codecs": plain}
    metadata = {
        "shape": parameter.shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file}},
        "codecs": [{"name": "sharding_indexed", "configuration": chunks}],
    }
    place = _place(directory, parameter.path) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    store = tensorstore.open(place, create=True, delete_existing=True).result()
    for corner in itertools.product(*(range(0, n, step) for n, step in zip(parameter.shape, file, strict=True))):
        index = tuple(slice(a, min(a + c, n)) for a, c, n in zip(corner, file, parameter.shape, strict=True))
        store[index].write(hugging_face.read(parameter, sources, index, dtype)).result()


def _copy_side_files(source: Path, out: Path) -> None:
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def save_hugging_face(
    params: dict, source: str | Path, out: str | Path, *, dtype: jnp.dtype, max_shard_bytes: int = SHARD
) -> None:
    """The way back: writes parameters as a Hugging Face checkpoint that transformers loads, under its on-disk names.

    Args:
      params: the 'params' collection, all of it addressable from this process.
      source, out, dtype, max_shard_bytes: see `write_hugging_face`.

    Raises:
      ConfigError: the parameters are not those of the source's config, or there are weights in `out`.
    """
    held = flax.traverse_util.flatten_dict(params, sep="/")
    wanted = hugging_face.parameters_of(Path(source))
    if wrong := {(path, value.shape) for path, value in held.items()} ^ {(p.path, p.shape) for p in wanted}:
        raise ConfigError(f"the parameters do not fit {source}/config.json: {some({path for path, _ in wrong})}")
    value = lambda parameter, layer: held[parameter.path] if layer is None else held[parameter.path][layer]  # noqa: E731
    write_hugging_face(value, source, out, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_hugging_face(
    value: Callable[[Parameter, int | None], np.ndarray],
    source: str | Path,
    out: str | Path,
    *,
    dtype: jnp.dtype,
    max_shard_bytes: int = SHARD,
) -> None:
    """Writes a Hugging Face checkpoint shard by shard, asking for one tensor's values at a time.

    Args:
      value: a parameter and, where layers are stacked, the layer, to its values in our layout.
      source: a checkpoint directory of the same model; its config and tokenizer files are copied.
      out: the directory to write, which may be `source` while that has no weights. Weights appear when complete.
      dtype: bfloat16 or float32.
      max_shard_bytes: larger weights are cut into shards with an index. The host holds one shard.

    Raises:
      ConfigError: there are weights in `out`.
    """
    source, out, dtype = Path(source), Path(out), np.dtype(dtype)
    kinds = ("*.safetensors", "*.safetensors.index.json", "native.json")
    if weights := [path.name for kind in kinds for path in out.glob(kind)]:
        raise ConfigError(f"{out} already has weights ({some(weights)}); remove them or choose another directory")
    wanted = hugging_face.parameters_of(source)
    tensors = {key: (p, layer if p.stacked else None) for p in wanted for layer, key in enumerate(p.keys)}
    if HEAD not in tensors:  # the config ties it; transformers 5 does not tie this model, so it is spelled out
        tensors[HEAD] = tensors[EMBEDDING]
    shards = _shards({key: parameter.size * dtype.itemsize for key, (parameter, _) in tensors.items()}, max_shard_bytes)

    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() != source.resolve():
        _copy_side_files(source, out)
    raw = hugging_face.read_json(source / "config.json") | {"dtype": dtype.name, "torch_dtype": dtype.name}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")

    def in_their_layout(key: str) -> np.ndarray:
        parameter, layer = tensors[key]
        theirs = np.asarray(value(parameter, layer)).transpose(parameter.inverse)
        return np.ascontiguousarray(theirs.astype(dtype, copy=False))

    for name, keys in tqdm.tqdm(shards.items(), "shards", disable=None, leave=False):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            values = dict(zip(keys, pool.map(in_their_layout, keys), strict=True))
        save_file(values, out / f"{name}.partial", metadata={"format": "pt"})
        shutil.copymode(out / "config.json", out / f"{name}.partial")  # safetensors lets only its owner read a file
        (out / f"{name}.partial").rename(out / name)
    if len(shards) > 1:
        size = sum(parameter.size for parameter, _ in tensors.values()) * dtype.itemsize
        weight_map = {key: name for name, keys in shards.items() for key in keys}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensors, in order, none over `limit` bytes unless a single tensor is."""
    shards, size = [[]], 0
    for key, own in sizes.items():
        if shards[-1] and size + own > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += own
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": keys for i, keys in enumerate(shards, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ambijax.convert", description="Hugging Face to native checkpoint.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, help="the native directory to write")
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns that there is nothing to merge
    convert(args.checkpoint, args.out)
    print(f"{args.out} holds weights {digest(args.out)}")


if __name__ == "__main__":
    errors.run(main)
