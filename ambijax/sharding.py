"""Where every array lives: one table from logical axes to mesh axes.

    data    batch only: each group of devices has its own examples and a whole copy of the weights' shards
    fsdp    batch and weights: weights are gathered a layer at a time
    tensor  heads, feed-forward and vocabulary

The mesh axes are `Auto`: we place inputs and parameters, XLA places the rest.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ambijax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. An axis that is not listed is never split.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# Module -> logical axes of its matrix [in, out]; the head is [out, in]. Biases and scales follow the out axis, an
# adapter's A in and B out.
MATRICES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "heads"),
    "v_proj": ("embed", "heads"),
    "o_proj": ("heads", "embed"),
    "out_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "fc1": ("embed", "mlp"),
    "fc2": ("mlp", "embed"),
    "embed_tokens": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "multi_modal_projector": (None, "embed"),
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence | None = None) -> Mesh:
    """A mesh over `devices`, or all there are; one axis may be -1 and takes what the others leave.

    Raises:
      ConfigError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, shape = len(devices), [data, fsdp, tensor]
    free = [i for i, n in enumerate(shape) if n == -1]
    fixed = math.prod(n for n in shape if n != -1)
    if fixed < 1 or len(free) > 1 or count % fixed or (not free and fixed != count):
        given = f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor} does not make {count} devices"
        raise ConfigError(f"{given}; {_nearest_meshes(shape, count)}")
    for i in free:
        shape[i] = count // fixed
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _nearest_meshes(shape: list[int], count: int) -> str:
    """What to set instead: for each axis the value that would fit the other two, else how to leave it open."""
    fits = []
    for i, axis in enumerate(AXES):
        others = shape[:i] + shape[i + 1 :]
        if min(others) > 0 and count % math.prod(others) == 0:
            fits.append(f"mesh.{axis}={count // math.prod(others)}")
    ways = [*fits, f"-1 for one of them and divisors of {count} for the others"]
    return "try " + " or ".join(ways)


def partition(*logical: str | None) -> PartitionSpec:
    """Logical axes, one per dimension, to a PartitionSpec.

    Raises:
      ConfigError: two dimensions want the same mesh axis.
    """
    spec = [RULES.get(axis) for axis in logical]
    used = [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ConfigError(f"sharding.RULES puts two of the axes {logical} on the same mesh axis")
    return PartitionSpec(*spec)


def parameter(path: str) -> PartitionSpec:
    """The PartitionSpec of a variable by its path, for example 'params/language_model/layers/q_proj/kernel'."""
    *modules, leaf = ["", *path.split("/")]
    stacked = (None,) if "layers" in modules else ()  # layers are stacked on a leading axis
    name = leaf if leaf in MATRICES else modules[-1]
    if name not in MATRICES:
        return PartitionSpec()  # norms, convolutions, positions: small, on every device
    rows, columns = MATRICES[name]
    axes = {"bias": (columns,), "scale": (columns,), "a": (rows, None), "b": (None, columns)}.get(leaf, (rows, columns))
    return partition(*stacked, *axes)


def paths(tree: object) -> object:
    """The tree with every leaf replaced by its path, 'params/language_model/...'."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path), tree
    )


def shardings(variables: object, mesh: Mesh) -> object:
    """A NamedSharding for every leaf of a variables tree {'params': ..., 'lora': ...}."""
    return jax.tree.map(lambda path: NamedSharding(mesh, parameter(path)), paths(variables))


def place(batch: object, mesh: Mesh) -> object:
    """Host arrays with a leading batch axis to the mesh, split over 'data' and 'fsdp'.

    Every process passes the whole batch; each device takes its rows.
    """
    sharding = NamedSharding(mesh, partition("batch"))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


def fetch(tree: object) -> object:
    """The inverse of `place`: the whole batch as numpy arrays, in every process."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def rows(size: int, mesh: Mesh) -> list[int]:
    """Which of `size` rows of a batch lie on this process's devices."""
    where = NamedSharding(mesh, partition("batch")).addressable_devices_indices_map((size,))
    return sorted({row for (rows,) in where.values() for row in range(*rows.indices(size))})


def round_up(batch: int, mesh: Mesh) -> int:
    """The smallest batch of at least `batch` rows that the mesh can split."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch // split) * split


def split(axis: str) -> int:
    """Into how many parts the mesh at hand splits a logical axis of one mesh axis; 1 where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[RULES[axis]]


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps an array split over its first axis, the batch, so that XLA moves weights and not activations."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition("batch"))


def micro_batch(x: jax.Array, i: jax.Array, each: int) -> jax.Array:
    """The i-th micro-batch [B / each, ...] of parts [N, B, ...], `each` of which makes so many; all devices have rows.

    Rows next to each other lie on one device. So a micro-batch takes every `each`-th of a part, and none moves.
    """
    size = x.shape[1] // each
    start = (i // each, 0, i % each, *[0] * (x.ndim - 2))
    rows = x.reshape(len(x), size, each, *x.shape[2:])
    taken = jax.lax.dynamic_slice(rows, start, (1, size, 1, *x.shape[2:])).reshape(size, *x.shape[2:])
    if jax.sharding.get_abstract_mesh().empty:
        return taken
    # The other axes stay as they are: what a roll-out kept is split over its features, too.
    rest = [PartitionSpec.UNCONSTRAINED] * (taken.ndim - 1)
    return jax.lax.with_sharding_constraint(taken, PartitionSpec(*partition("batch"), *rest))


def check(
    mesh: Mesh,
    *,
    batch: int,
    accumulate: int,
    micro_batch: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    mlp: int,
    vocab: int,
    tower: int,
    tower_mlp: int,
) -> list[str]:
    """What does not divide, each with the config key and the nearest values that would; empty when all is well."""
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = "optim.accumulate x " if accumulate > 1 else ""
    found = [
        *_no_multiple(f"data.batch_size={batch}", batch, f"{parts}mesh.data x mesh.fsdp", split * accumulate),
        *_no_multiple(f"optim.micro_batch={micro_batch}", micro_batch, "mesh.data x mesh.fsdp", split),
    ]
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    wanted = [
        ("attention heads", heads),
        ("key-value heads", kv_heads),
        ("feed-forward width", mlp),
        ("vocabulary", vocab),
        ("audio tower's width", tower),
        ("audio tower's feed-forward width", tower_mlp),
    ]
    for what, size in wanted:
        if size % tensor:
            divisors = [n for n in range(1, tensor) if all(s % n == 0 for _, s in wanted)]
            found.append(f"mesh.tensor={tensor} does not divide the model's {size} {what}; try {divisors[-1]}")
    for what, size in (("hidden width", hidden), ("audio tower's width", tower)):
        if size % fsdp:
            divisors = [n for n in range(1, fsdp) if hidden % n == tower % n == 0]
            found.append(f"mesh.fsdp={fsdp} does not divide the model's {size} {what}; try {divisors[-1]}")
    return found


def _no_multiple(given: str, value: int, what: str, unit: int) -> list[str]:
    """That a value is no multiple of a unit, with the nearest values that are; empty when it is one."""
    if value % unit == 0:
        return []
    low, high = value // unit * unit, -(-value // unit) * unit
    return [f"{given} is not a multiple of {what} = {unit}; try " + (f"{low} or {high}" if low else f"{high}")]
