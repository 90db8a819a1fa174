"""Qwen2-Audio's weights as Hugging Face stores them: one name table, and strict reading a slice at a time.

    Hugging Face   one tensor a layer, matrices [out, in]    language_model.model.layers.3.mlp.up_proj.weight
    here           layers stacked, matrices [in, out]        language_model/layers/up_proj/kernel

Strict: every tensor must have a place here and every parameter its tensors, of the right shape; what does not fit is
named. Only safetensors are read, so nothing is unpickled, and torch is not used.
"""

import concurrent.futures
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ambijax import lfs
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from ambijax.model import qwen2_audio


class Row(NamedTuple):
    """One of our parameters, and the tensors that it is made of."""

    path: str  # ours
    key: str  # theirs, on disk; a {} counts layers, which we stack on a leading axis
    axes: tuple[int, ...]  # ours = theirs.transpose(axes), the layer axis aside


# Kind of module -> its parameters: our name, their name, axes.
_KINDS = {
    "table": (("embedding", "weight", (0, 1)),),
    "conv": (("kernel", "weight", (2, 1, 0)), ("bias", "bias", (0,))),
    "dense": (("kernel", "weight", (1, 0)), ("bias", "bias", (0,))),
    "no_bias": (("kernel", "weight", (1, 0)),),
    "layer_norm": (("scale", "weight", (0,)), ("bias", "bias", (0,))),
    "rms_norm": (("scale", "weight", (0,)),),
}
_MODULES = (
    ("audio_tower/conv1", "audio_tower.conv1", "conv"),
    ("audio_tower/conv2", "audio_tower.conv2", "conv"),
    ("audio_tower/embed_positions", "audio_tower.embed_positions", "table"),
    ("audio_tower/layers/self_attn_layer_norm", "audio_tower.layers.{}.self_attn_layer_norm", "layer_norm"),
    ("audio_tower/layers/q_proj", "audio_tower.layers.{}.self_attn.q_proj", "dense"),
    ("audio_tower/layers/k_proj", "audio_tower.layers.{}.self_attn.k_proj", "no_bias"),
    ("audio_tower/layers/v_proj", "audio_tower.layers.{}.self_attn.v_proj", "dense"),
    ("audio_tower/layers/out_proj", "audio_tower.layers.{}.self_attn.out_proj", "dense"),
    ("audio_tower/layers/final_layer_norm", "audio_tower.layers.{}.final_layer_norm", "layer_norm"),
    ("audio_tower/layers/fc1", "audio_tower.layers.{}.fc1", "dense"),
    ("audio_tower/layers/fc2", "audio_tower.layers.{}.fc2", "dense"),
    ("audio_tower/layer_norm", "audio_tower.layer_norm", "layer_norm"),
    ("multi_modal_projector", "multi_modal_projector.linear", "dense"),
    ("language_model/embed_tokens", "language_model.model.embed_tokens", "table"),
    ("language_model/layers/input_layernorm", "language_model.model.layers.{}.input_layernorm", "rms_norm"),
    ("language_model/layers/q_proj", "language_model.model.layers.{}.self_attn.q_proj", "dense"),
    ("language_model/layers/k_proj", "language_model.model.layers.{}.self_attn.k_proj", "dense"),
    ("language_model/layers/v_proj", "language_model.model.layers.{}.self_attn.v_proj", "dense"),
    ("language_model/layers/o_proj", "language_model.model.layers.{}.self_attn.o_proj", "no_bias"),
    (
        "language_model/layers/post_attention_layernorm",
        "language_model.model.layers.{}.post_attention_layernorm",
        "rms_norm",
    ),
    ("language_model/layers/gate_proj", "language_model.model.layers.{}.mlp.gate_proj", "no_bias"),
    ("language_model/layers/up_proj", "language_model.model.layers.{}.mlp.up_proj", "no_bias"),
    ("language_model/layers/down_proj", "language_model.model.layers.{}.mlp.down_proj", "no_bias"),
    ("language_model/norm", "language_model.model.norm", "rms_norm"),
)
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

TABLE = (
    *(Row(f"{ours}/{a}", f"{theirs}.{b}", axes) for ours, theirs, kind in _MODULES for a, b, axes in _KINDS[kind]),
    Row("language_model/lm_head", HEAD, (0, 1)),
)

# transformers 5 renames in memory; files that were written from such a state dict have these names.
_NEW_NAMES = (
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(audio_tower|multi_modal_projector)\."), r"\1."),
)

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}  # as safetensors spells them


class Parameter(NamedTuple):
    """A row of the table with the shape that a config gives it."""

    row: Row
    shape: tuple[int, ...]  # ours, layers stacked

    @property
    def path(self) -> str:
        return self.row.path

    @property
    def stacked(self) -> bool:
        return "{}" in self.row.key

    @property
    def keys(self) -> list[str]:
        """The on-disk names of its tensors, one a layer."""
        return [self.row.key.format(i) for i in range(self.shape[0])] if self.stacked else [self.row.key]

    @property
    def inverse(self) -> list[int]:
        """Their axes as axes of ours, the layer axis aside: theirs = ours.transpose(inverse)."""
        return [self.row.axes.index(i) for i in range(len(self.row.axes))]

    @property
    def size(self) -> int:
        """Numbers in each of its tensors."""
        return int(np.prod(self.tensor_shape))

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        return tuple(self.shape[self.stacked :][i] for i in self.inverse)


class Tensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    key: str  # its name in that file
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it


def old_name(key: str) -> str:
    """A tensor's name as in the published checkpoint, whichever version of transformers wrote it."""
    for pattern, replacement in _NEW_NAMES:
        key = pattern.sub(replacement, key)
    return key


def parameters(model: qwen2_audio.Qwen2Audio) -> list[Parameter]:
    """The model's base parameters in table order, as files have them: not quantised. Nothing is allocated."""
    shapes = flax.traverse_util.flatten_dict(qwen2_audio.shapes(model.clone(weights="float"))["params"], sep="/")
    found = [Parameter(row, shapes.pop(row.path).shape) for row in TABLE if row.path in shapes]
    assert not shapes, f"parameters without a row in hugging_face.TABLE: {sorted(shapes)}"
    return found


def parameters_of(directory: Path) -> list[Parameter]:
    """The base parameters of the model that `directory/config.json` describes."""
    config = model_config.load(directory)
    return parameters(qwen2_audio.Qwen2Audio(config, None, jnp.float32, "nothing_saveable"))


def some(names: Iterable[str]) -> str:
    """'a, b, c and 12 more'."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _header(path: Path) -> list[Tensor]:
    """The tensors of one safetensors file."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    if lfs.is_pointer(path):
        raise ConfigError(f"{path} is a git-lfs pointer, not weights; fetch them with `git lfs pull`")
    try:
        with safe_open(path, "numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return [Tensor(path, key, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()]
    except SafetensorError as error:
        size = path.stat().st_size
        raise ConfigError(f"{path} ({size} bytes) is cut short or not safetensors ({error}); copy it again") from None


def _files(directory: Path) -> list[Tensor]:
    """The tensors of all safetensors files of a directory; the files are whole and the index tells the truth."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file() and single.is_file():
        raise ConfigError(f"{directory} has both {single.name} and {index.name}; remove the one that is not meant")
    if single.is_file():
        return _header(single)
    if not index.is_file():
        pickled = [path.name for path in directory.glob("*.bin")]
        hint = f" ({some(pickled)}: pickles are never read, save as safetensors)" if pickled else ""
        raise ConfigError(f"no weights in {directory}: neither {single.name} nor {index.name} nor native.json{hint}")

    said = read_json(index).get("weight_map")
    names = said.values() if isinstance(said, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ConfigError(f"{index} must have a 'weight_map' from tensor names to files beside it")
    found, problems = [], []
    for name in sorted(set(names)):
        try:
            found += _header(directory / name)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    if lies := said.items() ^ {(tensor.key, tensor.file.name) for tensor in found}:
        where = some(f"{key} in {name}" for key, name in lies)
        raise ConfigError(f"{index} and its shards disagree about {where}; copy the checkpoint again")
    return found


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its on-disk name, new names translated.

    Raises:
      ConfigError: no safetensors; a shard is missing, cut short or a git-lfs pointer; the index and the shards
        disagree; a tensor is there twice.
    """
    found, twice = {}, []
    for tensor in _files(directory):
        key = old_name(tensor.key)
        if key in found:
            other = found[key]
            twice.append(f"{other.key} in {other.file.name} and {tensor.key} in {tensor.file.name}")
        found[key] = tensor
    if twice:
        raise ConfigError(f"{directory} has the same tensor twice: {some(twice)}")
    return found


def match(directory: Path, wanted: Sequence[Parameter]) -> dict[str, list[Tensor]]:
    """Our path -> its tensors in layer order.

    Raises:
      ConfigError: as `tensors`; or tensors are unknown, missing, of another shape or an unexpected dtype. Names all.
    """
    found = tensors(directory)
    expected = {key: parameter.tensor_shape for parameter in wanted for key in parameter.keys}
    problems = []
    tied_yet_stored = HEAD not in expected and {HEAD, EMBEDDING} <= found.keys()
    if odd := [f"{t.key} is {t.dtype}" for t in found.values() if t.dtype not in DTYPES]:
        problems.append(f"{len(odd)} unexpected dtypes ({some(odd)}; expected {' or '.join(DTYPES)})")
    elif tied_yet_stored and not _equal(found.pop(HEAD), found[EMBEDDING]):
        problems.append(f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; make it false to use both")
    if unknown := found.keys() - expected.keys():
        problems.append(f"{len(unknown)} unknown tensors ({some(found[key].key for key in unknown)})")
    if missing := expected.keys() - found.keys():
        problems.append(f"{len(missing)} missing tensors ({some(missing)})")
    if wrong := [key for key in found.keys() & expected.keys() if found[key].shape != expected[key]]:
        shapes = some(f"{key} is {list(found[key].shape)}, not {list(expected[key])}" for key in wrong)
        problems.append(f"{len(wrong)} wrong shapes ({shapes})")
    sources = {parameter.path: [found.get(key) for key in parameter.keys] for parameter in wanted}
    if mixed := [path for path, own in sources.items() if len({tensor.dtype for tensor in own if tensor}) > 1]:
        problems.append(f"layers of different dtypes ({some(mixed)})")
    if problems:
        raise ConfigError(f"the weights in {directory} do not fit its config.json: {'; '.join(problems)}")
    return sources


_BLOCK = 2 * 2**20  # bytes read at a time; a larger block leaves the processor's cache while it is turned


def _rows(tensor: Tensor, window: Sequence[slice]) -> Iterator[slice]:
    """The rows of tensor[window], some at a time."""
    start, stop, _ = window[0].indices(tensor.shape[0])
    step = max(1, _BLOCK // (DTYPES[tensor.dtype].itemsize * int(np.prod(tensor.shape[1:]))))
    for row in range(start, stop, step):
        yield slice(row, min(row + step, stop))


def _read_rows(tensor: Tensor, rows: slice, window: Sequence[slice]) -> np.ndarray:
    """These rows of tensor[window]. The file is opened anew: what was read of an open one counts as memory."""
    with safe_open(tensor.file, "numpy") as file:
        return file.get_slice(tensor.key)[(rows, *window[1:])]


def blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    """All of a tensor, some rows at a time."""
    everything = [slice(None)] * len(tensor.shape)
    return (_read_rows(tensor, rows, everything) for rows in _rows(tensor, everything))


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(np.array_equal(*pair) for pair in zip(blocks(a), blocks(b), strict=True))


def read(parameter: Parameter, sources: Sequence[Tensor], index: Sequence[slice], dtype: np.dtype) -> np.ndarray:
    """parameter[index] as one array, from just the slices that it needs.

    Args:
      parameter: whose.
      sources: its tensors, from `match`.
      index: one slice an axis of ours.
      dtype: what the values are cast to.
    """
    out = np.empty([len(range(n)[s]) for n, s in zip(parameter.shape, index, strict=True)], dtype)
    window = [index[parameter.stacked :][i] for i in parameter.inverse]
    layers = zip(out, sources[index[0]], strict=True) if parameter.stacked else [(out, sources[0])]
    blocks = [(layer, source, rows) for layer, source in layers for rows in _rows(source, window)]

    def fill(block: tuple[np.ndarray, Tensor, slice]) -> None:
        layer, source, rows = block
        start = window[0].indices(source.shape[0])[0]
        theirs = layer.transpose(parameter.inverse)
        theirs[rows.start - start : rows.stop - start] = _read_rows(source, rows, window)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # turning a matrix around takes longer than reading it
        for _ in pool.map(fill, blocks):
            pass
    return out
