"""A split -> predictions.jsonl + summary.json, and a table against the floors.

    python -m ambijax.evaluate --run runs/tiny [--split test] [--base] [--swap_audio]

Prediction is free-running: the model writes its chain of thought greedily, the distribution is read out after it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tqdm

from ambijax import algorithms, assemble, errors, metrics, settings, sharding
from ambijax.algorithms import Setting
from ambijax.data import Dataset

COLUMNS = {"JS ↓": "js", "BC ↑": "bc", "R2 ↑": "r2", "Brier ↓": "brier", "accuracy ↑": "accuracy", "format ↑": "format"}


def predict(setting: Setting, variables: dict, dataset: Dataset, name: str) -> Iterator[dict]:
    """One record an utterance, in order, with a progress bar named `name`.

    Yields:
      id, target, votes, readout, js, reasoning, format, forced, js_gold (after the curated trajectory, None without).
    """
    size = sharding.round_up(setting.config.eval.batch_size, setting.mesh)
    bar = tqdm.tqdm(total=len(dataset), desc=name, unit="clip", mininterval=1.0)
    for start in range(0, len(dataset), size):
        wanted = [min(start + i, len(dataset) - 1) for i in range(size)]  # the last batch is filled up: one shape
        batch = dataset.batch(wanted)
        placed = sharding.place(batch, setting.mesh)
        rolled = setting.rollout(variables, placed.prompt, jax.random.key(0), samples=1, temperature=0.0)
        judged = algorithms.judge(setting, sharding.fetch(rolled), batch.target)
        after_gold = setting.score(variables, placed.prompt, placed.gold, {}).readout
        js_gold = metrics.js(batch.target, setting.distribution(sharding.fetch(after_gold)[:, 0]))
        for row, index in enumerate(wanted[: len(dataset) - start]):
            utterance = dataset.utterances[index]
            yield {
                "id": utterance.id,
                "speaker": utterance.speaker,
                "target": batch.target[row].tolist(),
                "votes": utterance.votes,
                "readout": judged.readout[row, 0].tolist(),
                "js": judged.js[row, 0].item(),
                "reasoning": judged.texts[row][0],
                "format": judged.fmt[row, 0].item(),
                "forced": judged.forced[row, 0].item(),
                "tokens": judged.lengths[row, 0].item(),
                "js_gold": js_gold[row].item() if dataset.examples[index].reasoned else None,
            }
            bar.update()
    bar.close()


def summarise(records: list[dict]) -> dict[str, float]:
    """All metrics of method and format over predictions."""
    p = np.array([r["target"] for r in records])
    q = np.array([r["readout"] for r in records])
    after_gold = [r["js_gold"] for r in records if r["js_gold"] is not None]
    return metrics.summary(p, q) | {
        "format": float(np.mean([r["format"] for r in records])),
        "forced": float(np.mean([r["forced"] for r in records])),
        "tokens": float(np.mean([r["tokens"] for r in records])),
        "js_gold": float(np.mean(after_gold)) if after_gold else None,
        "clips": len(records),
    }


def floors(train_target: np.ndarray, target: np.ndarray) -> dict[str, dict[str, float]]:
    """What needs no model: the uniform distribution, and the mean of the training votes."""
    n, k = target.shape
    return {
        "uniform": metrics.summary(target, metrics.uniform(n, k)),
        "prior": metrics.summary(target, metrics.prior(train_target, n)),
    }


def run(setting: Setting, variables: dict, dataset: Dataset, directory: Path, name: str) -> dict[str, float]:
    """Predicts a split and writes `directory/{predictions.jsonl,summary.json}`; returns the summary."""
    records = list(predict(setting, variables, dataset, name))
    directory.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (directory / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    summary = summarise(records)
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def table(rows: dict[str, dict[str, float]]) -> str:
    """Named summaries as an aligned text table."""
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, summary in rows.items():
        cells = [f"{summary[key]:>12.3f}" if key in summary else f"{'':>12}" for key in COLUMNS.values()]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ambijax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory written by ambijax.train")
    parser.add_argument("--split", choices=("train", "dev", "test"), default="test")
    parser.add_argument("--base", action="store_true", help="evaluate the model without its adapters")
    parser.add_argument("--swap_audio", action="store_true", help="control: every clip is heard with another's sound")
    args = parser.parse_args()
    config = settings.load(args.run)
    setting = assemble.setting(config)
    with jax.set_mesh(setting.mesh):
        variables = assemble.trained(setting, args.run)
        names = tuple({"train", args.split})
        sets = assemble.datasets(setting, variables["params"], names, swap_audio=args.swap_audio)
        if args.base:
            variables = {"params": variables["params"]}
        name = args.split + "-base" * args.base + "-swapped" * args.swap_audio
        summary = run(setting, variables, sets[args.split], args.run / "eval" / name, name)
    rows = floors(sets["train"].target, sets[args.split].target) | {name: summary}
    print(table(rows))
    print(f"written to {args.run / 'eval' / name}")


if __name__ == "__main__":
    errors.run(main)
