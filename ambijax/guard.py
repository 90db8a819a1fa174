"""Whether an update is applied: decided inside the jitted step, so that no bad one ever reaches the state.

An update is skipped when its loss, its gradient or the change it makes is not finite, and, if asked for, when its loss
is a spike: more than `sigma` standard deviations above the mean of the last W applied updates. What the decision needs
is part of the state, so a resumed run decides alike.
"""

import jax
import jax.numpy as jnp

from ambijax.structs import Guard

_FLAT = 1e-3  # the deviation of losses that hardly move: next to W equal ones any other would be a spike


def start(window: int) -> Guard:
    """Nothing seen yet; `window` is W."""
    return Guard(jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.zeros(window, jnp.float32))


def judge(guard: Guard, loss: jax.Array, *sizes: jax.Array, sigma: float) -> tuple[jax.Array, Guard]:
    """(apply bool [], the guard after it).

    Args:
      guard: from the update before.
      loss: float32 [].
      sizes: norms that must be finite, as of the gradient.
      sigma: of the spike test, which waits until W updates were applied; 0 asks for none.
    """
    apply = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(sizes)))
    window = len(guard.losses)
    if sigma > 0:
        limit = guard.losses.mean() + sigma * jnp.maximum(guard.losses.std(), _FLAT)
        apply &= (guard.applied < window) | (loss <= limit)
    return apply, Guard(
        applied=guard.applied + apply,
        skipped=guard.skipped + ~apply,
        in_a_row=jnp.where(apply, 0, guard.in_a_row + 1),
        losses=jnp.where(apply, guard.losses.at[guard.applied % window].set(loss), guard.losses),
    )
