"""A run on a split -> predictions.jsonl + summary.json, and a table against the floors.

    python -m ambijax.evaluate --run runs/tiny [--split dev] [--base] [--swap_audio]
    python -m ambijax.evaluate --run runs/sft_cremad --corpus data/iemocap [--fold 0]

Prediction is free-running: the model writes its chain of thought greedily, the distribution is read out after it.
Another corpus is read out over the classes it shares with the run's own; without --fold all of it is tested on.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from ambijax import assemble, audio, canaries, emotions, errors, journal, manifest, metrics, predictions, settings
from ambijax.algorithms import Setting
from ambijax.data import Dataset
from ambijax.errors import ConfigError

COLUMNS = {
    "JS ↓": "js",
    "BC ↑": "bc",
    "R2 ↑": "r2",
    "Brier ↓": "brier",
    "accuracy ↑": "accuracy",
    "format ↑": "format",
}


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


def run(setting: Setting, variables: dict, dataset: Dataset, directory: Path, name: str) -> dict:
    """Predicts a split and writes `directory/{predictions.jsonl,summary.json}`; returns the summary."""
    records = predictions.collect(setting, variables, dataset, directory, name)
    summary = summarise(records) | about(setting.config, dataset)
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def about(config: FrozenConfigDict, dataset: Dataset) -> dict:
    """What a reader of summary.json must know besides the metrics."""
    return {
        "algorithm": config.algorithm,
        "seed": config.seed,
        "labels": list(config.data.labels),
        "root": str(dataset.root.resolve()),
        "split": dataset.split,
        "fold": config.data.fold if config.data.fold >= 0 else None,
        "commit": journal.commit(),
    }


def table(rows: dict[str, dict]) -> str:
    """Named summaries as an aligned text table."""
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, summary in rows.items():
        cells = [f"{summary[key]:>12.3f}" if key in summary else f"{'':>12}" for key in COLUMNS.values()]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def on_corpus(config: FrozenConfigDict, corpus: manifest.Corpus, fold: int | None) -> FrozenConfigDict:
    """A run's settings on another corpus: its classes are those that both know, none of its clips is trained on.

    Args:
      config: the run's.
      corpus: the other one.
      fold: whose test utterances; None: all of the corpus.

    Raises:
      ConfigError: the two share fewer than two classes.
    """
    changed = config.to_dict()
    changed["data"] |= {
        "corpus": "manifest",
        "root": str(corpus.root),
        "labels": emotions.shared_classes(config.data.labels, corpus.classes()),
        "fold": -1 if fold is None else fold,
        "windows": (*config.data.windows, audio.N_FRAMES),  # a clip may be longer than any of the run's own
    }
    return FrozenConfigDict(changed)


def main() -> None:
    args = _parse()
    config = settings.load(args.run)
    name, edit = args.split, list
    if args.corpus:
        corpus = manifest.read(args.corpus)
        config = on_corpus(config, corpus, args.fold)
        name = corpus.root.resolve().name + f"-{args.split}{args.fold}" * (args.fold is not None)
        left = len(corpus.utterances) - len(manifest.voted(corpus.utterances, config.data.labels))
        print(f"{name}: {', '.join(config.data.labels)}; {left} utterances without a vote on them are left out")
    if args.swap_audio:
        edit = canaries.swap_audio
    name += "-base" * args.base + "-swap_audio" * args.swap_audio
    setting = assemble.setting(config)
    with jax.set_mesh(setting.mesh):
        variables = assemble.trained(setting, args.run)
        test = assemble.datasets(
            setting,
            variables["params"],
            (args.split,),
            edit=lambda utterances: edit(manifest.voted(utterances, config.data.labels)),
        )[args.split]
        if args.base:
            variables = {"params": variables["params"]}
        summary = run(setting, variables, test, args.run / "eval" / name, name)
    train = assemble.splits(config, assemble.corpus(config))["train"] or test.utterances
    prior = manifest.soft_labels(manifest.voted(train, config.data.labels), config.data.labels)
    print(table(floors(prior, test.target) | {name: summary}))
    print(f"written to {args.run / 'eval' / name}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ambijax.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory written by ambijax.train")
    parser.add_argument("--split", choices=("train", "dev", "test"), default="test")
    parser.add_argument("--corpus", type=Path, help="another corpus: a manifest, or the directory it lies in")
    parser.add_argument("--fold", type=int, help="with --corpus: the fold to test on; all of the corpus without it")
    parser.add_argument("--base", action="store_true", help="evaluate the model without its adapters")
    parser.add_argument("--swap_audio", action="store_true", help="control: every clip is heard with another's sound")
    args = parser.parse_args()
    if args.fold is not None and not args.corpus:
        raise ConfigError(f"--fold={args.fold} belongs to --corpus: a run has seen the other folds of its own")
    if args.corpus and args.fold is None and args.split != "test":
        raise ConfigError(f"--split={args.split} of another corpus needs its --fold; without one all of it is tested")
    return args


if __name__ == "__main__":
    errors.run(main)
