"""A run, or a bare checkpoint, on a split -> predictions.jsonl + summary.json, and a table between floors and ceilings.

    python -m ambijax.evaluate --run runs/tiny [--split dev] [--base] [--slices] [--calibrate]
    python -m ambijax.evaluate --run runs/tiny --samples 8 --temperature 1.0
    python -m ambijax.evaluate --run runs/tiny --swap_audio | --swap_transcript | --shuffle_cot
    python -m ambijax.evaluate --run runs/sft_cremad --corpus data/iemocap [--fold 0]
    python -m ambijax.evaluate --checkpoint Audio-Reasoner --config configs/audio_reasoner.py:cremad \\
      --workdir runs/audio_reasoner

Prediction is free-running: the model writes its chain of thought greedily, the distribution is read out after it.
Another corpus is read out over the classes it shares with the run's own; without --fold all of it is tested on.
Everything goes to eval/ in the run's directory (docs/evaluation.md).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from ambijax import (
    assemble,
    audio,
    bounds,
    calibration,
    canaries,
    compilation,
    emotions,
    errors,
    held_out,
    hosts,
    journal,
    manifest,
    metrics,
    predictions,
    rules,
    settings,
    significance,
    slices,
)
from ambijax.agent import Setting
from ambijax.data import Dataset
from ambijax.errors import ConfigError, NonFiniteError
from ambijax.predictions import GREEDY, Decoding
from ambijax.workdir import check_writable, replace

COLUMNS = {
    "JS ↓": "js",
    "JS gold ↓": "js_gold",  # teacher-forced: after the curated reasoning, which was written knowing the votes
    "BC ↑": "bc",
    "R2 ↑": "r2",
    "Brier ↓": "brier",
    "accuracy ↑": "accuracy",
    "format ↑": "format",
}


def summarise(records: list[dict]) -> dict[str, float]:
    """All metrics of method and format over predictions.

    Raises:
      NonFiniteError: some are not a number.
    """
    if broken := [r["id"] for r in records if not np.isfinite([*r["readout"], r["js_gold"] or 0.0]).all()]:
        said = f"the read-out of {len(broken)} of {len(records)} utterances is not a number, {broken[0]} say"
        raise NonFiniteError(f"{said}; evaluate an earlier checkpoint")
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


def intervals(records: list[dict], config: FrozenConfigDict) -> dict[str, list[float]]:
    """Bootstrap interval of each measure's mean, over utterances or over speakers as eval.cluster says; of a single
    one there is none."""
    values = metrics.per_utterance(*(np.array([r[key] for r in records]) for key in ("target", "readout")))
    speakers = np.array([r["speaker"] for r in records]) if config.eval.cluster == "speaker" else None
    how = {"seed": 0, "samples": config.eval.resamples, "level": config.eval.level, "clusters": speakers}
    found = {name: significance.interval(value, **how) for name, value in values.items()}
    return {name: list(ends) for name, ends in found.items() if ends}


def floors(
    config: FrozenConfigDict, train: Sequence[manifest.Utterance], test: Sequence[manifest.Utterance]
) -> dict[str, dict[str, float]]:
    """What `test` allows without a model; where there is nothing to train on, its own mean is the prior."""
    labels = config.data.labels
    counts = np.array([[utterance.votes.get(label, 0) for label in labels] for utterance in test])
    return bounds.bounds(manifest.soft_labels(train or test, labels), counts, draws=config.eval.draws)


def run(
    setting: Setting,
    variables: dict,
    dataset: Dataset,
    directory: Path,
    name: str,
    *,
    rows: dict[str, dict],
    base: bool,
    decoding: Decoding = GREEDY,
    after: Sequence[dict] = (),
    temperature: float | None = None,
    left_out: int = 0,
    wait: bool = False,
) -> dict:
    """Predicts a split and writes `directory/{predictions.jsonl,summary.json}`; returns the summary.

    Args:
      setting: the run's.
      variables: the policy's weights.
      dataset: the split.
      directory: where both files go.
      name: of the progress bar.
      rows: of `floors`, for the summary.
      base: whether these are weights that nothing was trained in.
      decoding: how the model reasons.
      after: as in `predictions.collect`.
      temperature: of the calibrated read-out, which is reported apart; None: there is none.
      left_out: utterances of the split that nobody gave one of these classes.
      wait: see `predictions.collect`.
    """
    config = setting.config
    how = {"decoding": decoding, "after": after, "wait": wait}
    records = predictions.collect(setting, variables, dataset, directory, name, **how)
    resamples = {"seed": 0, "samples": config.eval.resamples, "level": config.eval.level}
    summary = summarise(records) | {
        "algorithm": "base" if base else config.algorithm,
        "seed": config.seed,
        "labels": list(config.data.labels),
        "corpus": str(manifest.directory(config.data.root).resolve()),
        "root": str(dataset.root.resolve()),  # where its audio paths start
        "split": dataset.split,
        "fold": config.data.fold if config.data.fold >= 0 else None,
        "commit": journal.commit(),
        "left_out": left_out,
        "intervals": intervals(records, config),
        "bounds": rows,
        "slices": slices.slices(records, **resamples),
        "calibrated": None if temperature is None else calibrated(records, temperature),
    }
    replace(hosts.notes(directory) / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def calibrated(records: list[dict], temperature: float) -> dict[str, float]:
    """The metrics at another temperature, and that temperature."""
    p, q = (np.array([r[key] for r in records]) for key in ("target", "readout"))
    return metrics.summary(p, calibration.apply(q, temperature)) | {"temperature": temperature}


def table(rows: dict[str, dict]) -> str:
    """Named summaries as an aligned text table."""
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, summary in rows.items():
        values = [summary.get(key) for key in COLUMNS.values()]
        lines.append(f"{name:<{width}}" + "".join(f"{'':>12}" if v is None else f"{v:>12.3f}" for v in values))
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


# The command ---------------------------------------------------------------------------------------------------------

CONTROLS = {"swap_audio": canaries.swap_audio, "swap_transcript": canaries.swap_transcript}


def main() -> None:
    args, rest = _parse()
    config, asked, workdir = _settings(args, rest)
    with hosts.cluster(**config.hosts):
        _answer(args, config, asked, workdir)


def _answer(args: argparse.Namespace, config: FrozenConfigDict, asked: FrozenConfigDict, workdir: Path) -> None:
    """Evaluates, and prints the table."""
    compilation.keep()
    learned = None if args.base or not args.run else workdir
    _check_asked(asked, args.split, None if args.corpus else learned)
    if args.calibrate:
        _check_asked(config, "dev", learned)
    if not args.run and hosts.is_main():
        check_writable(workdir)
        settings.save(config, workdir)
    setting = assemble.setting(config)
    with jax.set_mesh(setting.mesh):
        base = args.base or not args.run
        variables = {"params": assemble.base(setting)}
        if not base:
            _, variables = assemble.trained(setting, variables, workdir)
        temperature = _temperature(setting, variables, workdir, args) if args.calibrate else None
        setting = setting if asked is config else assemble.setting(asked)
        name, summary = _evaluate(setting, variables, workdir, args, base, temperature)
    if not hosts.is_main():
        return
    rows = summary["bounds"] | {name: summary}
    if summary["calibrated"]:
        bound = " (bound)" if temperature in (calibration.COLDEST, calibration.HOTTEST) else ""
        rows[f"{name}, T = {temperature:.2f}{bound}"] = summary["calibrated"]
    print(f"{summary['clips']} clips, {summary['left_out']} left out without a vote on {', '.join(summary['labels'])}")
    print(table(rows))
    if "js" in summary["intervals"]:
        low, high = summary["intervals"]["js"]
        over = f"{setting.config.eval.level:.0%} interval over {setting.config.eval.cluster}s"
        print(f"JS {low:.3f} to {high:.3f} ({over})")
    if args.slices:
        print("\n" + slices.table(summary["slices"]))
    print(f"written to {workdir / 'eval' / name}")


def _check_asked(config: FrozenConfigDict, split: str, learned: Path | None) -> None:
    """What can be wrong with the clips that will be heard, before the weights are read.

    Raises:
      DataError: one is not there, or the run in `learned` has learned from it.
    """
    corpus = assemble.corpus(config)
    asked = manifest.voted(assemble.splits(config, corpus)[split], config.data.labels)
    if learned:
        held_out.check(learned, split, asked)
    manifest.check_sounds(dataclasses.replace(corpus, utterances=tuple(asked)))


def _settings(args: argparse.Namespace, rest: list[str]) -> tuple[FrozenConfigDict, FrozenConfigDict, Path]:
    """The model's own settings, those it is asked under, and the directory that takes the results."""
    if args.run:
        config, workdir = settings.load(args.run), args.run
    else:
        config, workdir = settings.parse([sys.argv[0], *rest, f"--config.model.checkpoint={args.checkpoint}"])
        if (workdir / "checkpoints").exists():
            raise ConfigError(f"{workdir} holds a trained run; choose another --workdir for {args.checkpoint}")
        if (workdir / "config.json").is_file():
            before = settings.load(workdir).model.checkpoint
            if Path(before).resolve() != Path(args.checkpoint).resolve():
                raise ConfigError(f"{workdir} holds results of {before}; choose another --workdir")
    if not args.corpus:
        return config, config, workdir
    corpus = manifest.read(args.corpus)
    if args.run and corpus.root.resolve() == manifest.directory(config.data.root).resolve():
        raise ConfigError(f"{args.corpus} is what {args.run} was trained on; leave --corpus out, and name a --split")
    _assert_own_place(corpus.root.resolve(), workdir / "eval" / _name(args))
    return config, on_corpus(config, corpus, args.fold), workdir


def _assert_own_place(root: Path, results: Path) -> None:
    """Raises ConfigError: a corpus is called like a split, or like another corpus that has been evaluated here."""
    if root.name.split("-")[0] in manifest.SPLITS:
        raise ConfigError(f"{results} is for results on the run's own corpus; rename the directory {root}")
    summary = results / "summary.json"
    try:
        about = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {"corpus": str(root)}
        before = about.get("corpus") or about["root"]  # of earlier versions, which knew corpora by their sounds
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{summary} is not what an evaluation writes; move it away") from None
    if before != str(root):
        raise ConfigError(f"{results} is of {before}; move it away, or rename the directory {root}")


def _evaluate(
    setting: Setting, variables: dict, workdir: Path, args: argparse.Namespace, base: bool, temperature: float | None
) -> tuple[str, dict]:
    """The name and the summary of what the arguments ask for."""
    config, labels = setting.config, setting.config.data.labels
    parts = assemble.splits(config, assemble.corpus(config))
    voted = {split: manifest.voted(utterances, labels) for split, utterances in parts.items()}
    control = CONTROLS.get(args.control, list)
    test = assemble.datasets(
        setting, variables["params"], (args.split,), edit=lambda utterances: control(manifest.voted(utterances, labels))
    )[args.split]
    name = _name(args)
    decoding = Decoding(args.samples, args.temperature)
    after = []
    if args.control == "shuffle_cot":
        if not config.data.cot:
            raise ConfigError("--shuffle_cot needs a chain of thought; this run answers without one (data.cot=False)")
        plain = _name(args, control=None)
        own = predictions.collect(setting, variables, test, workdir / "eval" / plain, plain, decoding=decoding)
        after = canaries.exchanged(own)
    directory = workdir / "eval" / name
    rows = floors(config, voted["train"], voted[args.split])
    how = {"decoding": decoding, "after": after, "temperature": temperature}
    how["left_out"] = len(parts[args.split]) - len(test)
    return name, run(setting, variables, test, directory, name, rows=rows, base=base, **how)


def _temperature(setting: Setting, variables: dict, workdir: Path, args: argparse.Namespace) -> float:
    """Fitted on the dev split of the run's own corpus."""
    dev = assemble.datasets(setting, variables["params"], ("dev",))["dev"]
    name = _name(args, split="dev", corpus=None, control=None)
    decoding = Decoding(args.samples, args.temperature)
    records = predictions.collect(setting, variables, dev, workdir / "eval" / name, name, decoding=decoding)
    return calibration.fit(*(np.array([r[key] for r in records]) for key in ("target", "readout")))


def _name(args: argparse.Namespace, **changes: str | None) -> str:
    """The directory under eval/ for what the arguments ask for."""
    a = argparse.Namespace(**vars(args) | changes)
    where = a.split
    if a.corpus:
        where = (a.corpus.parent if a.corpus.is_file() else a.corpus).resolve().name
        where += f"-{a.split}{a.fold}" if a.fold is not None else ""
    sampled = f"-{a.samples}samples-T{a.temperature:g}" if a.temperature else ""
    return where + "-base" * a.base + sampled + (f"-{a.control}" if a.control else "")


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m ambijax.evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--run", type=Path, help="run directory written by ambijax.train")
    add(
        "--checkpoint", type=Path, help="a model no run has trained; takes --config and --workdir as ambijax.train does"
    )
    add("--split", choices=manifest.SPLITS, default="test")
    add("--corpus", type=Path, help="another corpus: a manifest, or the directory it lies in")
    add("--fold", type=int, help="with --corpus: the fold to test on; all of the corpus without it")
    add("--base", action="store_true", help="evaluate the model without what the run trained")
    add("--samples", type=int, default=1, help="chains of thought a clip; their distributions are averaged")
    add("--temperature", type=float, default=0.0, help="of sampling them; 0 is greedy")
    add("--calibrate", action="store_true", help="also report a temperature fitted on the dev split")
    add("--slices", action="store_true", help="print the metrics by ambiguity, annotators, speaker and gender")
    for control, what in (
        ("swap_audio", "control: every clip is heard with another's sound"),
        ("swap_transcript", "control: every clip is shown with another's words"),
        ("shuffle_cot", "control: the read-out after what the model wrote about another clip"),
    ):
        add(f"--{control}", action="append_const", dest="controls", const=control, help=what)
    args, rest = parser.parse_known_args()
    controls = args.controls or [None]
    args.control = controls[0]
    drawn = rules.RULES["dpo.temperature"]
    wrong = [
        (bool(args.run) == bool(args.checkpoint), "give either --run or --checkpoint"),
        (bool(args.run and rest), f"unknown argument {' '.join(rest)}; a run brings its own config"),
        (
            args.fold is not None and not args.corpus,
            "--fold belongs to --corpus: a run has been trained on the other folds of its own",
        ),
        (
            bool(args.corpus) and args.fold is None and args.split != "test",
            f"--split={args.split} of another corpus needs --fold; without it all of the corpus is the test split",
        ),
        (args.samples < 1, "--samples must be at least 1"),
        (args.temperature != 0 and not drawn.holds(args.temperature), f"--temperature must be 0 or {drawn.what}"),
        (
            args.samples > 1 and args.temperature == 0,
            "--samples needs a --temperature: greedy samples are all the same",
        ),
        (args.calibrate and args.split == "dev" and not args.corpus, "--calibrate fits on dev: report another split"),
        (len(controls) > 1, f"one control at a time, not {' and '.join(map(str, controls))}"),
    ]
    if found := [message for holds, message in wrong if holds]:
        raise ConfigError("; ".join(found))
    return args, rest


if __name__ == "__main__":
    errors.run(main)
