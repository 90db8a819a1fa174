"""The metrics of parts of a split: by ambiguity, by number of annotators, by speaker, by gender.

ambiguity    thirds by the entropy of the votes in bits; equal entropies stay together, so thirds may be unequal
classes      how many classes have a vote
annotators   how many votes
speaker, gender
"""

import numpy as np

from ambijax import metrics, significance


def slices(records: list[dict], *, seed: int, samples: int, level: float) -> dict[str, dict[str, dict]]:
    """Kind of slice -> name of the part -> its number of clips `n`, means, and `js_interval` over its utterances."""
    p, q = (np.array([record[key] for record in records]) for key in ("target", "readout"))
    values = metrics.per_utterance(p, q)
    entropy = metrics.entropy(p)
    kinds = {
        "ambiguity": _thirds(entropy),
        "classes": [f"{n}" for n in np.sum(p > 0, axis=1)],
        "annotators": [f"{round(record['annotators'], 1):g}" for record in records],  # sums of fractions are not exact
        "speaker": [record["speaker"] for record in records],
        "gender": [record["gender"] or "unknown" for record in records],
    }
    found = {}
    for kind, names in kinds.items():
        names = np.array(names)
        ordered = dict.fromkeys(names[np.argsort(entropy, kind="stable")]) if kind == "ambiguity" else _sorted(names)
        found[kind] = {}
        for name in ordered:
            rows = names == name
            means = {measure: float(each[rows].mean()) for measure, each in values.items()}
            spread = significance.interval(values["js"][rows], seed=seed, samples=samples, level=level)
            found[kind][str(name)] = {"n": int(rows.sum()), **means, "js_interval": spread and list(spread)}
    return found


def table(found: dict[str, dict[str, dict]]) -> str:
    """Slices as an aligned text table."""
    width = max(len(name) for parts in found.values() for name in parts) + 4
    lines = [
        f"{'':<{width}}{'clips':>8}{'JS ↓':>8}{'interval':>16}{'BC ↑':>8}{'R2 ↑':>8}{'Brier ↓':>9}{'accuracy ↑':>12}"
    ]
    for kind, parts in found.items():
        lines.append(kind)
        for name, s in parts.items():
            spread = "{:.3f} to {:.3f}".format(*s["js_interval"]) if s["js_interval"] else ""
            lines.append(
                f"  {name:<{width - 2}}{s['n']:>8}{s['js']:>8.3f}{spread:>16}"
                f"{s['bc']:>8.3f}{s['r2']:>8.3f}{s['brier']:>9.3f}{s['accuracy']:>12.3f}"
            )
    return "\n".join(lines)


def _thirds(entropy: np.ndarray) -> list[str]:
    low, high = np.quantile(entropy, [1 / 3, 2 / 3])
    names = [f"up to {low:.2f} bits", f"up to {high:.2f} bits", f"above {high:.2f} bits"]
    return [names[third] for third in np.digitize(entropy, [low, high], right=True)]


def _sorted(names: np.ndarray) -> list[str]:
    """Numbers by value, words by letter."""
    return sorted(set(names), key=lambda name: (float(name) if name.replace(".", "", 1).isdecimal() else 0, name))
