"""Which variables are trained, and how: the Optax partition that trains adapters and freezes the base.

`optax.masked(adamw, mask)` alone does not freeze: raw gradients pass through to masked-out leaves. So every leaf is
labelled 'train' or 'frozen' by its name, `optax.partition` sends the frozen ones to `set_to_zero`, and gradients are
taken with respect to the trained leaves only: a frozen weight gets no gradient, no optimizer state and no copy.
"""

import re

import jax
import optax

from ambijax import sharding
from ambijax.errors import ConfigError


def labels(variables: object, patterns: tuple[str, ...]) -> object:
    """'train' for every leaf whose path one of the regular expressions matches whole, else 'frozen'.

    Args:
      variables: {'params': ..., 'lora': ...}; only its structure is read.
      patterns: a collection and an expression for paths in it; ('lora/.*',), or ('params/.*',) for full fine-tuning.

    Raises:
      ConfigError: a pattern matches nothing, or one factor of an adapter without the other.
    """
    paths = sharding.paths(variables)
    # 'lora/a|params/b' is not to reach what it does not begin with: who may train the base is decided by that.
    parts = [pattern.partition("/") for pattern in patterns]
    matches = [re.compile(f"{re.escape(collection)}/(?:{rest})") for collection, _, rest in parts]
    for pattern, match in zip(patterns, matches, strict=True):
        if not any(match.fullmatch(path) for path in jax.tree.leaves(paths)):
            raise ConfigError(f"optim.train: the pattern {pattern!r} matches no variable of the model")
    found = jax.tree.map(lambda path: "train" if any(m.fullmatch(path) for m in matches) else "frozen", paths)
    flat = dict(zip(jax.tree.leaves(paths), jax.tree.leaves(found), strict=True))
    for path, label in flat.items():  # what is frozen is kept nowhere, and half an adapter says nothing
        if path.startswith("lora/") and path.endswith("/a") and flat.get(path[:-1] + "b", label) != label:
            raise ConfigError(f"optim.train reaches one of {path} and {path[:-1]}b; train both or neither")
    return found


def split(variables: object, labels: object) -> tuple[object, object]:
    """Variables as (trained, frozen), each with None in the other's places."""

    def only(kind: str) -> object:
        return jax.tree.map(lambda x, label: x if label == kind else None, variables, labels)

    return only("train"), only("frozen")


def merge(trained: object, frozen: object) -> object:
    """The inverse of `split`."""
    return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None)


def schedule(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """Linear warm-up over the fraction `warmup` of `steps`, from zero unless it is none, then cosine to zero."""
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, max(steps, 1))
    rise = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, rise, max(steps, rise + 1))


def optimizer(
    *, learning_rate: optax.Schedule, b1: float, b2: float, eps: float, weight_decay: float, clip: float, labels: object
) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip for the trained leaves, nothing at all for the frozen ones."""
    train = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )
    return optax.partition({"train": train, "frozen": optax.set_to_zero()}, labels)
