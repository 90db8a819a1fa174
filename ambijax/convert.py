"""Weights in and out: one name table between a Hugging Face Qwen2-Audio directory and our parameters, used both ways.

    python -m ambijax.convert --checkpoint Qwen2-Audio-7B-Instruct --out base

Three layouts of one checkpoint:

    Hugging Face   safetensors, one tensor a layer, matrices [out, in]: language_model.model.layers.3.mlp.up_proj.weight
    native         one Orbax array a parameter, layers stacked, matrices [in, out]
    params         the pytree that the model applies, the same arrays: language_model/layers/up_proj/kernel

Reading is strict: every tensor must have a place here and every parameter a tensor, of the right shape. It is streamed:
a device's shard is filled from just the slices it needs, and the host never holds more than one parameter. Nothing is
unpickled and torch is not used.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tqdm
from safetensors import SafetensorError, safe_open

from ambijax.errors import ConfigError
from ambijax.model import qwen2_audio

_VECTOR, _TABLE, _LINEAR, _CONV = (0,), (0, 1), (1, 0), (2, 1, 0)  # our axes as axes of theirs


class Row(NamedTuple):
    """One of our parameters, and the tensors that it is made of."""

    path: str  # ours
    key: str  # theirs, on disk; a {} counts layers, which we stack on a leading axis
    axes: tuple[int, ...]  # ours = theirs.transpose(axes), the layer axis aside


TABLE = (
    Row("audio_tower/conv1/kernel", "audio_tower.conv1.weight", _CONV),
    Row("audio_tower/conv1/bias", "audio_tower.conv1.bias", _VECTOR),
    Row("audio_tower/conv2/kernel", "audio_tower.conv2.weight", _CONV),
    Row("audio_tower/conv2/bias", "audio_tower.conv2.bias", _VECTOR),
    Row("audio_tower/embed_positions/embedding", "audio_tower.embed_positions.weight", _TABLE),
    Row("audio_tower/layers/q_proj/kernel", "audio_tower.layers.{}.self_attn.q_proj.weight", _LINEAR),
    Row("audio_tower/layers/q_proj/bias", "audio_tower.layers.{}.self_attn.q_proj.bias", _VECTOR),
    Row("audio_tower/layers/k_proj/kernel", "audio_tower.layers.{}.self_attn.k_proj.weight", _LINEAR),
    Row("audio_tower/layers/v_proj/kernel", "audio_tower.layers.{}.self_attn.v_proj.weight", _LINEAR),
    Row("audio_tower/layers/v_proj/bias", "audio_tower.layers.{}.self_attn.v_proj.bias", _VECTOR),
    Row("audio_tower/layers/out_proj/kernel", "audio_tower.layers.{}.self_attn.out_proj.weight", _LINEAR),
    Row("audio_tower/layers/out_proj/bias", "audio_tower.layers.{}.self_attn.out_proj.bias", _VECTOR),
    Row("audio_tower/layers/self_attn_layer_norm/scale", "audio_tower.layers.{}.self_attn_layer_norm.weight", _VECTOR),
    Row("audio_tower/layers/self_attn_layer_norm/bias", "audio_tower.layers.{}.self_attn_layer_norm.bias", _VECTOR),
    Row("audio_tower/layers/fc1/kernel", "audio_tower.layers.{}.fc1.weight", _LINEAR),
    Row("audio_tower/layers/fc1/bias", "audio_tower.layers.{}.fc1.bias", _VECTOR),
    Row("audio_tower/layers/fc2/kernel", "audio_tower.layers.{}.fc2.weight", _LINEAR),
    Row("audio_tower/layers/fc2/bias", "audio_tower.layers.{}.fc2.bias", _VECTOR),
    Row("audio_tower/layers/final_layer_norm/scale", "audio_tower.layers.{}.final_layer_norm.weight", _VECTOR),
    Row("audio_tower/layers/final_layer_norm/bias", "audio_tower.layers.{}.final_layer_norm.bias", _VECTOR),
    Row("audio_tower/layer_norm/scale", "audio_tower.layer_norm.weight", _VECTOR),
    Row("audio_tower/layer_norm/bias", "audio_tower.layer_norm.bias", _VECTOR),
    Row("multi_modal_projector/kernel", "multi_modal_projector.linear.weight", _LINEAR),
    Row("multi_modal_projector/bias", "multi_modal_projector.linear.bias", _VECTOR),
    Row("language_model/embed_tokens/embedding", "language_model.model.embed_tokens.weight", _TABLE),
    Row(
        "language_model/layers/input_layernorm/scale", "language_model.model.layers.{}.input_layernorm.weight", _VECTOR
    ),
    Row("language_model/layers/q_proj/kernel", "language_model.model.layers.{}.self_attn.q_proj.weight", _LINEAR),
    Row("language_model/layers/q_proj/bias", "language_model.model.layers.{}.self_attn.q_proj.bias", _VECTOR),
    Row("language_model/layers/k_proj/kernel", "language_model.model.layers.{}.self_attn.k_proj.weight", _LINEAR),
    Row("language_model/layers/k_proj/bias", "language_model.model.layers.{}.self_attn.k_proj.bias", _VECTOR),
    Row("language_model/layers/v_proj/kernel", "language_model.model.layers.{}.self_attn.v_proj.weight", _LINEAR),
    Row("language_model/layers/v_proj/bias", "language_model.model.layers.{}.self_attn.v_proj.bias", _VECTOR),
    Row("language_model/layers/o_proj/kernel", "language_model.model.layers.{}.self_attn.o_proj.weight", _LINEAR),
    Row(
        "language_model/layers/post_attention_layernorm/scale",
        "language_model.model.layers.{}.post_attention_layernorm.weight",
        _VECTOR,
    ),
    Row("language_model/layers/gate_proj/kernel", "language_model.model.layers.{}.mlp.gate_proj.weight", _LINEAR),
    Row("language_model/layers/up_proj/kernel", "language_model.model.layers.{}.mlp.up_proj.weight", _LINEAR),
    Row("language_model/layers/down_proj/kernel", "language_model.model.layers.{}.mlp.down_proj.weight", _LINEAR),
    Row("language_model/norm/scale", "language_model.model.norm.weight", _VECTOR),
    Row("language_model/lm_head", "language_model.lm_head.weight", _LINEAR),
)

# transformers 5 renames in memory; files that were written from such a state dict have these names.
_NEW_NAMES = (
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(audio_tower|multi_modal_projector)\."), r"\1."),
)

_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}

_EMBEDDING, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


class Tensor(NamedTuple):
    """Where a Hugging Face tensor lies."""

    file: Path
    key: str  # its name in that file
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it


class Parameter(NamedTuple):
    """A row of the table with the layer count and the shape that a config gives it."""

    row: Row
    shape: tuple[int, ...]  # ours, layers stacked

    @property
    def keys(self) -> list[str]:
        """The on-disk names of its tensors, one a layer."""
        return [self.row.key.format(i) for i in range(self.shape[0])] if "{}" in self.row.key else [self.row.key]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        own = self.shape[1:] if "{}" in self.row.key else self.shape
        return tuple(own[i] for i in np.argsort(self.row.axes))


def parameters(model: qwen2_audio.Qwen2Audio) -> list[Parameter]:
    """The model's base parameters in table order; nothing is allocated."""
    shapes = flax.traverse_util.flatten_dict(qwen2_audio.shapes(model)["params"], sep="/")
    found = [Parameter(row, shapes.pop(row.path).shape) for row in TABLE if row.path in shapes]
    assert not shapes, f"parameters without a row in convert.TABLE: {sorted(shapes)}"
    return found


def _some(names: Iterable[str]) -> str:
    """'a, b, c and 12 more'."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file by their names in it."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ConfigError(f"{path} is a git-lfs pointer, not weights; fetch them with `git lfs pull`")
    try:
        with safe_open(path, "numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return {k: Tensor(path, k, tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
    except SafetensorError as error:
        size = path.stat().st_size
        raise ConfigError(f"{path} ({size} bytes) is cut short or not safetensors: {error}; copy it again") from None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from a shard index."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if all(Path(name).name == name for name in weight_map.values()):
            return weight_map
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"{index} is not an index: expected a 'weight_map' from tensor names to files beside it")


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face directory by its on-disk name, new names translated.

    Raises:
      ConfigError: no safetensors; a shard is missing, cut short or a git-lfs pointer; the index and the shards
        disagree; a tensor is there twice.
    """
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file() and single.is_file():
        raise ConfigError(f"{directory} has both {single.name} and {index.name}; remove the one that is not meant")
    if not index.is_file() and not single.is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" ({_some(pickled)} is pickled, which is never read: save it as safetensors)" if pickled else ""
        raise ConfigError(f"no weights in {directory}: neither {single.name} nor {index.name} is there{hint}")
    weight_map = _weight_map(index) if index.is_file() else None

    contents, problems = {}, []
    for name in sorted(set(weight_map.values())) if weight_map else [single.name]:
        try:
            contents[name] = _header(directory / name)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    if weight_map is not None:
        said = set(weight_map.items())
        held = {(key, name) for name, content in contents.items() for key in content}
        if wrong := said ^ held:
            raise ConfigError(
                f"{index} and its shards disagree about {_some(f'{key} in {name}' for key, name in wrong)}; "
                "copy the checkpoint again"
            )

    found = {}
    for tensor in (tensor for content in contents.values() for tensor in content.values()):
        key = tensor.key
        for pattern, replacement in _NEW_NAMES:
            key = pattern.sub(replacement, key)
        if key in found:
            problems.append(f"{found[key].key} in {found[key].file.name} and {tensor.key} in {tensor.file.name}")
        found[key] = tensor
    if problems:
        raise ConfigError(f"{directory}: the same tensor twice: {_some(problems)}")
    return found


def _match(directory: Path, wanted: Sequence[Parameter]) -> dict[str, list[Tensor]]:
    """Our path -> its tensors in layer order; an error names everything that does not fit."""
    found = tensors(directory)
    expected = {key: parameter.tensor_shape for parameter in wanted for key in parameter.keys}
    problems = []
    if _HEAD in found and _HEAD not in expected:  # tied, yet stored: fine as long as it says the same
        if _EMBEDDING in found and _equal(found[_HEAD], found[_EMBEDDING]):
            del found[_HEAD]
        else:
            problems.append(f"tie_word_embeddings is true but {_HEAD} differs from {_EMBEDDING}; set it to false")
    if unknown := found.keys() - expected.keys():
        problems.append(f"{len(unknown)} unknown tensors ({_some(found[key].key for key in unknown)})")
    if missing := expected.keys() - found.keys():
        problems.append(f"{len(missing)} missing tensors ({_some(missing)})")
    shared = sorted(found.keys() & expected.keys())
    if wrong := [key for key in shared if found[key].shape != expected[key]]:
        shapes = (f"{key} is {list(found[key].shape)}, not {list(expected[key])}" for key in wrong)
        problems.append(f"{len(wrong)} wrong shapes ({_some(shapes)})")
    if wrong := [key for key in shared if found[key].dtype not in _DTYPES]:
        dtypes = (f"{key} is {found[key].dtype}" for key in wrong)
        problems.append(f"{len(wrong)} unexpected dtypes ({_some(dtypes)}; expected {' or '.join(_DTYPES)})")
    if problems:
        raise ConfigError(f"the weights in {directory} do not fit its config.json: {'; '.join(problems)}")
    return {parameter.row.path: [found[key] for key in parameter.keys] for parameter in wanted}


_BLOCK = 64 * 2**20  # bytes


def _blocks(tensor: Tensor, window: Sequence[slice]) -> Iterable[tuple[slice, np.ndarray]]:
    """tensor[window] some rows at a time: (rows of the window, their values).

    The file is opened for every block: what has been read of an open file stays mapped and counts as memory.
    """
    start, stop, _ = window[0].indices(tensor.shape[0])
    step = max(1, _BLOCK // (_DTYPES[tensor.dtype].itemsize * int(np.prod(tensor.shape[1:]))))
    for row in range(start, stop, step):
        end = min(row + step, stop)
        with safe_open(tensor.file, "numpy") as file:
            yield slice(row - start, end - start), file.get_slice(tensor.key)[(slice(row, end), *window[1:])]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    window = [slice(None)] * len(a.shape)
    return a.shape == b.shape and all(
        np.array_equal(x, y) for (_, x), (_, y) in zip(_blocks(a, window), _blocks(b, window), strict=True)
    )


def _read(parameter: Parameter, sources: Sequence[Tensor], index: Sequence[slice], dtype: np.dtype) -> np.ndarray:
    """parameter[index], layers stacked, from its tensors."""
    stacked = "{}" in parameter.row.key
    layers = sources[index[0]] if stacked else sources
    inverse = np.argsort(parameter.row.axes)  # theirs = ours.transpose(inverse)
    window = [index[int(stacked) :][i] for i in inverse]
    lengths = [len(range(n)[s]) for n, s in zip(parameter.shape, index, strict=True)]
    out = np.empty(lengths, dtype)
    for layer, source in zip(out if stacked else [out], layers, strict=True):
        theirs = layer.transpose(inverse)
        for rows, values in _blocks(source, window):
            theirs[rows] = values
    return out


def load(
    directory: str | Path,
    model: qwen2_audio.Qwen2Audio,
    *,
    dtype: jnp.dtype,
    sharding: Callable[[str], jax.sharding.Sharding] | None = None,
) -> dict:
    """Reads a checkpoint's weights straight into their shards.

    Args:
      directory: a Hugging Face directory (model.safetensors, or shards with an index).
      model: fixes which parameters there are and their shapes.
      dtype: what the parameters shall have; the file's own values are cast.
      sharding: our parameter path, 'language_model/layers/q_proj/kernel', to where it lies; None is the first device.

    Returns:
      the 'params' collection. At no time does the host hold more than one (stacked) parameter beside it.

    Raises:
      ConfigError: the weights are absent, damaged, or not exactly the model's.
    """
    directory = Path(directory)
    wanted = parameters(model)
    sources = _match(directory, wanted)
    where = sharding or (lambda path: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    params = {}
    for parameter in tqdm.tqdm(wanted, "reading weights", unit="parameter", disable=None, leave=False):
        path = parameter.row.path
        shards = {}  # several devices may hold the same shard

        def shard(index: tuple[slice, ...], parameter: Parameter = parameter, shards: dict = shards) -> np.ndarray:
            key = tuple(s.indices(n) for s, n in zip(index, parameter.shape, strict=True))
            if key not in shards:
                shards[key] = _read(parameter, sources[parameter.row.path], index, np.dtype(dtype))
            return shards[key]

        params[path] = jax.make_array_from_callback(parameter.shape, where(path), shard)
        params[path].block_until_ready()  # so that the host's copy is gone before the next one is read
    return flax.traverse_util.unflatten_dict(params, sep="/")
