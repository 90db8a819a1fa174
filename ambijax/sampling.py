"""Drawing tokens by inverting their distribution, with keys that depend on (seed, step, example, sample) alone.

B prompts   G completions of one prompt   V vocabulary
"""

import jax
import jax.numpy as jnp

from ambijax import sharding

_BLOCK = 256  # words of the vocabulary that are summed before one is drawn from them


def completion_keys(key: jax.Array, example: jax.Array, samples: int) -> jax.Array:
    """One PRNG key per completion, [B, G], from (seed and step in `key`, example, sample): batching changes nothing."""
    one = lambda e, g: jax.random.fold_in(jax.random.fold_in(key, e), g)  # noqa: E731
    return jax.vmap(lambda e: jax.vmap(lambda g: one(e, g))(jnp.arange(samples)))(example)


def draw(logits: jax.Array, keys: jax.Array | None, t: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """One token a completion, and its log-probability at the sampling temperature.

    Args:
      logits: of the next word, float32 [V, B, G].
      keys: of each completion, [B, G], see `completion_keys`; not read at temperature 0.
      t: which token of the completion this is; folded into the keys.
      temperature: divides the logits; 0 takes the likeliest word.

    Returns:
      int32 [B, G], float32 [B, G].
    """
    if temperature == 0.0:
        token = jnp.argmax(logits, axis=0).astype(jnp.int32)
        log_sum = jax.nn.logsumexp(logits, axis=0)
    else:
        logits = logits / temperature
        pair = jax.vmap(jax.vmap(lambda key: 1.0 - jax.random.uniform(jax.random.fold_in(key, t), (2,))))
        token, log_sum = categorical(logits, pair(keys))
    chosen = jnp.take_along_axis(logits, token[None], axis=0)[0]
    return token, chosen - log_sum


def categorical(logits: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverts the cumulative distribution, first over blocks of the vocabulary, then within one block.

    Two uniform numbers a token, where Gumbel noise takes one for every word of the vocabulary: on a CPU that was half
    of a roll-out. Two and not one, because the 2^-23 steps of a single one are coarser than the rarest words.

    Args:
      logits: [V, ...], words first as a decoding step's product with the head writes them.
      u: uniform in (0, 1], [..., 2].

    Returns:
      int32 tokens [...], and log sum exp of the logits [...].
    """
    size, rest = logits.shape[0], logits.shape[1:]
    parts = sharding.split("vocab")  # each holds whole blocks, or all would gather the logits to cut them into blocks
    blocks = -(-size // (_BLOCK * parts)) * parts
    top = jnp.max(logits, axis=0)
    weights = jnp.pad(jnp.exp(logits - top), [(0, blocks * _BLOCK - size)] + [(0, 0)] * len(rest))
    weights = weights.reshape(blocks, _BLOCK, *rest)
    block, total = _first_reaching(weights.sum(axis=1), u[..., 0])
    within = jnp.take_along_axis(weights, block[None, None], axis=0)[0]
    token = block * _BLOCK + _first_reaching(within, u[..., 1])[0]
    return token, top + jnp.log(total)


def _first_reaching(weights: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where running sums of weights [N, ...] first reach the share u [...] in (0, 1] of their sum, and it.

    Sums of a parallel scan move by a rounding also where a weight is zero; the entry before it is then meant.
    """
    running = jnp.cumsum(weights, axis=0)
    reached = jnp.argmax(running >= u * running[-1], axis=0)
    index = jnp.arange(len(weights)).reshape(-1, *[1] * u.ndim)
    return jnp.max(jnp.where((weights > 0) & (index <= reached), index, 0), axis=0).astype(jnp.int32), running[-1]
