"""The read-out: hidden state after the answer anchor -> distribution over emotions.

phat = softmax over the logits of the K class words (method of the paper, section 'final step'). Only K columns of the
output matrix are touched; the softmax over them equals the full-vocabulary softmax renormalised to the class words.
"""

import jax
import jax.numpy as jnp


def logits(hidden: jax.Array, head: jax.Array, class_ids: jax.Array) -> jax.Array:
    """hidden [..., D] and head [D, V] to float32 class logits [..., K]."""
    columns = jnp.take(head, class_ids, axis=1).astype(hidden.dtype)
    return jnp.matmul(hidden, columns, preferred_element_type=jnp.float32)


def distribution(logits: jax.Array, temperature: float) -> jax.Array:
    """Class logits [..., K] to phat [..., K]."""
    return jax.nn.softmax(logits / temperature, axis=-1)
