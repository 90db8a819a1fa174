"""What int8 costs in exactness, on the model that ships with the package and the tiny lab's test split, in float32.

    python benchmarks/int8.py weights    teacher forcing over the curated trajectories: int8 weights against float32
    python benchmarks/int8.py cache      roll-outs at T = 1: what decoding computed against teacher forcing of the same

Errors of logits are relative, root mean square over all words and positions, with the mean over words taken off, which
changes no probability. Read-outs are compared by Jensen-Shannon divergence in bits.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from ambijax import assemble, metrics, policy, settings
from ambijax.agent import Setting
from ambijax.data import Dataset


def opened(*flags: str) -> tuple[Setting, dict, Dataset]:
    """The tiny lab's setting, base weights and test split."""
    config, _ = settings.parse(["", "--config=configs/sft.py:tiny", "--workdir=unused", "--config.mesh.data=1", *flags])
    setting = assemble.setting(config)
    with jax.set_mesh(setting.mesh):
        variables = {"params": assemble.base(setting)}
        return setting, variables, assemble.datasets(setting, variables["params"], ("test",))["test"]


def logits(setting: Setting, variables: dict, batch: object) -> jax.Array:
    """Of every token of the curated completions, [B, T, V]."""
    prefix = policy.prefill(setting.model, variables, batch.prompt, {})
    given = batch.gold
    positions = prefix.length[:, None, None] + jnp.arange(given.tokens.shape[-1])
    how = {"positions": jnp.broadcast_to(positions, given.tokens.shape), "mask": given.mask, "past": (prefix.past,)}
    hidden, _ = setting.model.apply(variables, given.tokens, **how, method="extend")
    return (hidden @ setting.model.apply(variables, method="head").T)[:, 0]


def weights(clips: int) -> dict[str, float]:
    """int8 weights against float32."""
    found = []
    for kind in ("float", "int8"):
        setting, variables, test = opened(f"--config.model.weights={kind}")
        batch = test.batch(range(min(clips, len(test))))
        with jax.set_mesh(setting.mesh):
            raw = np.asarray(jax.jit(lambda v, s=setting, b=batch: logits(s, v, b))(variables), np.float64)
            scores = setting.score(variables, batch.prompt, batch.gold, {})
        mask = batch.gold.mask[:, 0]
        centred = raw[mask] - raw[mask].mean(axis=-1, keepdims=True)
        found.append((centred, np.asarray(scores.logp)[:, 0][mask], setting.distribution(np.asarray(scores.readout))))
    (a, p, x), (b, q, y) = found
    error = {"relative error of logits": np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))}
    return error | _differences(p - q, x[:, 0], y[:, 0])


def cache(clips: int) -> dict[str, float]:
    """Roll-outs of either cache against teacher forcing, which has none."""
    table = {}
    for kind in ("float", "int8"):
        setting, variables, test = opened(f"--config.model.cache={kind}")
        batch = test.batch(range(min(clips, len(test))))
        with jax.set_mesh(setting.mesh):
            rolled = setting.rollout(variables, batch.prompt, jax.random.key(0), 1, 1.0)
            whole = policy.anchored(rolled, setting.tokens)
            forced = setting.score(variables, batch.prompt, whole, {})
        rolled, forced = jax.tree.map(np.asarray, (rolled, forced))
        size = rolled.logp.shape[-1]
        ends = np.isin(rolled.completions.tokens, setting.tokens.ends)  # there the forced anchor was put
        own = rolled.completions.mask & ~(ends & rolled.forced[..., None])
        off = _differences(
            (rolled.logp - forced.logp[..., :size])[own],
            *(setting.distribution(r.readout)[:, 0] for r in (rolled, forced)),
        )
        table |= {f"{kind}: {name}": value for name, value in off.items()}
    return table


def _differences(logp: np.ndarray, p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    js = metrics.js(p, q)
    return {
        "tokens": logp.size,
        "mean |change| of log p": np.abs(logp).mean(),
        "largest |change| of log p": np.abs(logp).max(),
        "mean JS of read-outs": js.mean(),
        "largest JS of read-outs": js.max(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("weights", "cache"))
    parser.add_argument("--clips", type=int, default=80)
    args = parser.parse_args()
    for name, value in {"weights": weights, "cache": cache}[args.what](args.clips).items():
        print(f"{name:<36}{value:.4g}")
