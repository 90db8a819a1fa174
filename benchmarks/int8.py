"""What int8 costs in exactness: the model that ships with the package, against itself in float32.

    python benchmarks/int8.py                 teacher forcing over the curated trajectories of the tiny lab's test split

Prints, for int8 weights: the relative error of the logits (root mean square over all words and positions, the mean over
words taken off, which changes no probability), the mean change of a token's log-probability, and Jensen-Shannon
divergence of the two read-outs in bits, mean and largest.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from ambijax import assemble, metrics, settings
from ambijax.agent import Setting


def opened(*flags: str) -> tuple[Setting, dict]:
    """The tiny lab's setting and base weights."""
    config, _ = settings.parse(
        ["int8", "--config=configs/sft.py:tiny", "--workdir=unused", "--config.mesh.data=1", *flags]
    )
    setting = assemble.setting(config)
    with jax.set_mesh(setting.mesh):
        return setting, {"params": assemble.base(setting)}


def logits(setting: Setting, variables: dict, batch: object) -> jax.Array:
    """Of every token of the curated completions, [B, T, V]."""
    from ambijax import policy

    prefix = policy.prefill(setting.model, variables, batch.prompt, {})
    given = batch.gold
    positions = prefix.length[:, None, None] + jnp.arange(given.tokens.shape[-1])
    how = {"positions": jnp.broadcast_to(positions, given.tokens.shape), "mask": given.mask, "past": (prefix.past,)}
    hidden, _ = setting.model.apply(variables, given.tokens, **how, method="extend")
    return (hidden @ setting.model.apply(variables, method="head"))[:, 0]


def compare(clips: int, flags: list[str]) -> dict[str, float]:
    """int8 against float32."""
    plain, base = opened()
    rounded, int8 = opened("--config.model.weights=int8", *flags)
    with jax.set_mesh(plain.mesh):
        test = assemble.datasets(plain, base["params"], ("test",))["test"]
        batch = test.batch(range(min(clips, len(test))))
        (a, p), (b, q) = (
            (
                np.asarray(jax.jit(lambda v, s=s: logits(s, v, batch))(v), np.float64),
                s.score(v, batch.prompt, batch.gold, {}),
            )
            for s, v in ((plain, base), (rounded, int8))
        )
    mask = batch.gold.mask[:, 0]
    a, b = (x[mask] - x[mask].mean(axis=-1, keepdims=True) for x in (a, b))
    js = metrics.js(*(s.distribution(np.asarray(x.readout))[:, 0] for s, x in ((plain, p), (rounded, q))))
    change = np.abs(np.asarray(p.logp) - np.asarray(q.logp))[:, 0][mask]
    return {
        "clips": len(js),
        "tokens": int(mask.sum()),
        "relative error of logits": float(np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))),
        "mean change of log p": float(change.mean()),
        "largest change of log p": float(change.max()),
        "mean JS of read-outs, bits": float(js.mean()),
        "largest JS of read-outs, bits": float(js.max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=80)
    args, flags = parser.parse_known_args()
    for name, value in compare(args.clips, flags).items():
        print(f"{name:<32}{value:.4g}")
