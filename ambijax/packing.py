"""Prompts and completions without their padding, for the layers that treat every token by itself.

    B prompts   N = P + G T slots of a prompt and its completions   R parts of the batch, one a device   M tokens each

A batch is padded to declared lengths, and padding costs as much as a token. Put side by side, the tokens that exist
fill fewer rows of every matrix product. Attention sees them in their slots, as ever, so that nothing else changes.
"""

import flax.struct
import jax
import numpy as np

EIGHTHS = (4, 5, 6)  # of all slots a packed batch has, each with a program of its own; a fuller batch stays as it is


@flax.struct.dataclass
class Packing:
    """Which token is in which slot."""

    slots: jax.Array  # int32 [R, M], of each token among the B / R x N of its part; that many where there is no token
    tokens: jax.Array  # int32 [R, B / R x N], of each slot; M where it is padding

    def pack(self, z: jax.Array) -> jax.Array:
        """[B, N, ...] to [R, M, ...]."""
        return _move(z.reshape(*self.tokens.shape, *z.shape[2:]), self.slots, self.tokens)

    def unpack(self, z: jax.Array, b: int) -> jax.Array:
        """[R, M, ...] to [B, N, ...], zero where there is no token."""
        return _move(z, self.tokens, self.slots).reshape(b, -1, *z.shape[2:])


def packing(prompts: np.ndarray, completions: np.ndarray, parts: int) -> Packing | None:
    """The packing of a batch; None where too little of it is padding.

    Args:
      prompts: bool [B, P], True where a token exists.
      completions: bool [B, G, T].
      parts: R, over how many devices the batch is split.
    """
    exists = np.concatenate([prompts, completions.reshape(len(completions), -1)], axis=1).reshape(parts, -1)
    size = exists.shape[1]
    room = [-(-size * n // 8) for n in EIGHTHS if size * n >= 8 * exists.sum(axis=1).max()]
    if not room:
        return None
    tokens = np.where(exists, np.cumsum(exists, axis=1) - 1, room[0]).astype(np.int32)
    slots = np.full((parts, room[0]), size, np.int32)
    for part, row in zip(exists, slots, strict=True):
        row[: part.sum()] = np.flatnonzero(part)
    return Packing(slots, tokens)


@jax.custom_vjp
def _move(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """x [R, M, ...] by the indices `there` [R, S] to [R, S, ...]; zero where an index is M. `back` is the inverse.

    The gradient of a gather is a scatter, which is slow; that of a permutation is the inverse one.
    """
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, there)


_move.defvjp(
    lambda x, there, back: (_move(x, there, back), (there, back)),
    lambda indices, by_y: (_move(by_y, *reversed(indices)), None, None),
)
