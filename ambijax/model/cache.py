"""Keys and values of earlier tokens, as a plain value that goes into the decoder and comes out of it.

L layers   B prompts   G sequences that share one prompt   S past tokens   K key-value heads   D head width
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from ambijax.activations import Activations
from ambijax.model.layers import Segment, quantize


@flax.struct.dataclass
class Past:
    """Keys and values of earlier tokens, all layers.

    k, v: [L, B, K, S, D] when shared by the group, else [L, B, K, G, S, D], rotated; for `decode` a tuple of L arrays.
      In place of each array may stand a pair: it in int8, and a scale for each token and head.
    mask: [B, S] or [B, G, S], True where the token exists.
    made: what a roll-out keeps for its update: of a prompt [B, L - 1, S, F], of sequences [B, L, G, S, F].
    by_channel: keys are [..., D, S].
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    mask: jax.Array
    made: Activations | None = None
    by_channel: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shared(self) -> bool:
        return self.mask.ndim == 2

    def unstacked(self, cache: str, by_channel: bool = False) -> "Past":
        """With an array for each layer; if `cache` is 'int8', with a pair for each.

        A product of few queries with keys that a loop reads again and again wants them `by_channel`.
        """
        layer = _rounded if cache == "int8" else jnp.asarray
        k, v = (tuple(map(layer, z)) for z in (self.k, self.v))
        if by_channel:
            # Behind a barrier, or XLA would undo this with what turns them back in `segment`.
            k = jax.lax.optimization_barrier(tuple(map(_turned, k)))
        return self.replace(k=k, v=v, by_channel=by_channel)

    def grown(self, slots: int) -> "Past":
        """Each sequence's own keys and values (L arrays) with empty room after them, up to `slots`."""

        def pad(z: jax.Array, axis: int) -> jax.Array:
            return jnp.pad(z, [(0, (slots - size) * (i == axis)) for i, size in enumerate(z.shape)])

        k, v = jax.tree.map(functools.partial(pad, axis=3), (self.k, self.v))
        return self.replace(k=k, v=v, mask=pad(self.mask, 2))

    def segment(self, k: jax.Array, v: jax.Array) -> Segment:
        """One layer's keys and values (self.k[i], self.v[i]) as an attention segment."""
        k = _turned(k) if self.by_channel else k
        k, v = (z[0] * z[1][..., None] if isinstance(z, tuple) else z for z in (k, v))
        return Segment(k, v, self.mask[:, None, None] if self.shared else self.mask[:, :, None])


def _rounded(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    return quantize(z, axis=-1)


def _turned(k: jax.Array | tuple) -> jax.Array | tuple:
    """A layer's keys [..., S, D] by channel, or back."""
    return (_turned(k[0]), k[1]) if isinstance(k, tuple) else jnp.swapaxes(k, -1, -2)


def put(cache: jax.Array | tuple, new: jax.Array, slot: jax.Array) -> jax.Array | tuple:
    """A layer's keys or values with those of one new token in a slot, in place under jit; rounded if the others are."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=3)
    return jax.tree.map(write, cache, _rounded(new) if isinstance(cache, tuple) else new)


def put_made(kept: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """What matrices made of tokens [B, L, G, S, F] with that of one new token [L, F, B, G, 1] in a slot, in place."""
    return jax.lax.dynamic_update_slice_in_dim(kept, jnp.einsum("lfbgt->blgtf", new), slot, axis=3)
