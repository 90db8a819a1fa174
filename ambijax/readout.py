"""The read-out: hidden state after the answer anchor -> distribution over emotions.

phat = softmax over the logits of the K class words (method of the paper, section 'final step'). Only K rows of the
output matrix are touched; the softmax over them equals the full-vocabulary softmax renormalised to the class words.
Where a tokenizer splits class words, a word's logit is its log-probability, summed over its tokens.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ambijax import losses


def logits(hidden: jax.Array, head: jax.Array, class_ids: jax.Array) -> jax.Array:
    """hidden [..., D] and head [V, D] to float32 class logits [..., K]."""
    rows = jnp.take(head, class_ids, axis=0).astype(hidden.dtype)
    return jnp.matmul(hidden, rows.T, preferred_element_type=jnp.float32)


def word_log_probs(
    hidden: jax.Array, head: jax.Array, words: Sequence[Sequence[int]], forward: Callable, written: jax.Array
) -> jax.Array:
    """log pi(word | everything up to the anchor) of class words of one or several tokens, one word after another.

    Args:
      hidden: of the anchor's last token [B, G, D].
      head: [V, D].
      words: K words as token ids.
      forward: (tokens, positions, mask), each [B, G, T], that continue the anchor -> (hidden [B, G, T, D], their past).
      written: tokens up to and with the anchor [B, G], prompt included.

    Returns:
      float32 [B, G, K], in the place of class logits: the softmax over them is phat.
    """
    longest = max(map(len, words))
    ids = np.array([[*word, *word[-1:] * (longest - len(word))] for word in words])
    counts = np.arange(longest) < np.array([[len(word)] for word in words])
    positions = written[..., None] + jnp.arange(longest - 1)

    def one(word: tuple[jax.Array, jax.Array]) -> jax.Array:
        tokens, count = (jnp.broadcast_to(x, (*written.shape, longest)) for x in word)
        after, _ = forward(tokens[..., :-1], positions, count[..., :-1])
        before = jnp.concatenate([hidden[:, :, None], after], axis=2)
        logp, _ = losses.token_log_probs(before, head, tokens, temperature=1.0, chunk=1)
        return jnp.sum(jnp.where(count, logp, 0.0), axis=-1)

    return jnp.moveaxis(jax.lax.map(one, (jnp.array(ids), jnp.array(counts))), 0, -1)
