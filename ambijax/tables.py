"""The paper's Table 2, Table 3 and Figure 2, ours beside the paper's, and the tiny lab: the runs and what came out.

    python -m ambijax.tables --table 2 --corpus cremad --checkpoint Qwen2-Audio-7B-Instruct --out runs/tables [--plan]
    python -m ambijax.tables --lab --jobs 2 --out runs/lab [--quick]

Which runs these are stands in configs/tables.py. What is done is not done again: started again, or on another machine
that shares the directory, the command goes on. It first says what it is about to do; then it writes what there is, as
Markdown, LaTeX and PNG, and which runs are missing.
"""

import argparse
import dataclasses
import math
import runpy
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax

from ambijax import assemble, errors, journal, lab, manifest, preflight, prompt, results, runs, settings, typeset
from ambijax.errors import ConfigError
from ambijax.model import config as model_config
from ambijax.published import published
from ambijax.runs import Run
from ambijax.typeset import Sheet
from ambijax.workdir import existing

EXPERIMENTS = Path("configs", "tables.py")
OWNERS = {"dpo": ("dpo",), "grpo": ("grpo", "grpoz"), "reward": ("grpo", "grpoz")}  # of sections not all configs have
BOUNDS = ("prior", "another panel")  # below each table: what needs no model, and what people reach among themselves
TITLES = {"2": "Table 2", "3": "Table 3", "figure2": "Figure 2"}


def planned(
    experiments: SimpleNamespace, rows: Sequence[str], corpus: str, args: argparse.Namespace, fold: int, seed: int
) -> list[Run]:
    """The runs of one fold and seed for these rows of a table, in an order in which each finds what it needs."""
    found = []
    for row in rows:
        method, _, other = row.partition(" -> ")
        file, changes = experiments.METHODS[method]
        checkpoint = args.audio_reasoner if method == "Audio-Reasoner" else args.checkpoint
        if method == "Audio-Reasoner" and not checkpoint:
            continue  # the footer says how to add it
        values = {"seed": seed, "data.fold": fold, "eval.base": False}
        if args.lab:
            values |= (experiments.QUICK_SETTINGS if args.quick else experiments.LAB_SETTINGS)[file]
        if taken := [o for o in args.overrides if o[len("--config.") :].split("=")[0] in values]:
            raise ConfigError(f"{taken[0]}: the table sets this itself; see --seeds, --folds and {EXPERIMENTS}")
        values |= changes  # what makes the row what it is
        given = (f"--config.model.checkpoint={checkpoint}",) if checkpoint else ()
        overrides = [o for o in args.overrides if file in OWNERS.get(o[len("--config.") :].split(".")[0], (file,))]
        arguments = (f"--config=configs/{file}.py:{corpus}", *given, *overrides)
        found.append(
            Run(
                row=row,
                corpus=corpus,
                fold=fold,
                seed=seed,
                directory=args.out / corpus / _slug(method) / f"fold{fold}-seed{seed}",
                arguments=(*arguments, *(f"--config.{key}={value}" for key, value in values.items())),
                elsewhere=args.other or _root(experiments.OTHER[corpus]) if other else None,
            )
        )
    return found


def _slug(method: str) -> str:
    return method.lower().replace(", ", "-").replace(" ", "-")


def _root(corpus: str) -> Path:
    """Where a corpus of the configs lies."""
    return Path(settings.parse(["tables", f"--config=configs/sft.py:{corpus}", "--workdir=unused"])[0].data.root)


def all_runs(experiments: SimpleNamespace, args: argparse.Namespace) -> list[Run]:
    """Every run of the table or the lab, seed after seed: whenever it stops, whole seeds are there."""
    if args.lab:
        return [
            run
            for seed in range(args.seeds)
            for corpus, rows in experiments.LAB.items()
            for run in planned(experiments, rows, corpus, args, seed % experiments.FOLDS, seed)
        ]
    rows = experiments.TABLES[args.table]
    return [
        run
        for seed in range(args.seeds)
        for fold in range(args.folds)
        for run in planned(experiments, rows, args.corpus, args, fold, seed)
    ]


def plan(everything: Sequence[Run], stated: dict[str, float]) -> str:
    """What there is to do: runs, hours of training, disk. Finds mistakes before anything starts.

    Args:
      everything: the runs.
      stated: seconds a step by row, for rows that have not run yet.

    Raises:
      ConfigError, DataError: a setting is wrong, or checkpoint or corpus are not there.
    """
    lines = [f"{'row':<34}{'runs':>6}{'done':>6}{'steps':>8}{'s a step':>10}{'hours left':>12}"]
    hours, disk, known = 0.0, 0, True
    rows = dict.fromkeys((run.corpus, run.row) for run in everything)
    written = {Path(run.config.data.root) for run in everything if run.config.data.corpus == "synthetic"}
    for other in {run.elsewhere for run in everything} - {None} - written:
        manifest.check_sounds(manifest.read(other))  # that is what comes last, after all trainings
    for corpus, row in rows:
        mine = [run for run in everything if (run.corpus, run.row) == (corpus, row)]
        left = [run for run in mine if not runs.done(run)]
        config = mine[0].config
        steps = 0 if mine[0].elsewhere else config.steps
        seconds = stated.get(row) or runs.seconds_per_step(mine) if steps else 0.0
        known &= seconds is not None or not left
        need = len(left) * steps * (seconds or 0.0) / 3600
        hours += need
        disk += 0 if mine[0].elsewhere else len(left) * _disk(mine[0])
        pace = "?" if seconds is None else f"{seconds:.2f}"
        name, took = f"{corpus} {row}", "?" if seconds is None and left else f"{need:.1f}"
        lines.append(f"{name:<34}{len(mine):>6}{len(mine) - len(left):>6}{steps:>8}{pace:>10}{took:>12}")
    lines.append(
        f"{'at least ' * (not known)}{hours:.1f} hours of training, one after another; evaluation comes on top"
        + "; --seconds_per_step ROW=S completes the rows marked ?" * (not known)
    )
    free = shutil.disk_usage(existing(everything[0].directory)).free
    lines.append(f"{disk / 1e9:.1f} GB to be written, {free / 1e9:.1f} GB free")
    if disk > free:
        raise ConfigError(f"the runs need {disk / 1e9:.1f} GB, {free / 1e9:.1f} are free; choose another --out")
    return "\n".join(lines)


def _disk(run: Run) -> int:
    """Bytes of a run's checkpoints."""
    config = run.config
    if not preflight.is_to_be_written(config):
        assemble.corpus(config)  # that it is there, and a tokenizer beside the weights
    prompt.load(config.model.checkpoint, config.data.labels)
    model = assemble.model(config, model_config.load(config.model.checkpoint))
    checkpoints = min(config.checkpoint.keep + 1, 1 + config.steps // config.checkpoint.every)
    return preflight.checkpoint_bytes(model, config.optim.train) * checkpoints


def sheet(experiments: SimpleNamespace, title: str, table: str, corpus: str, everything: Sequence[Run]) -> Sheet:
    """One table on one corpus from those of its runs that are done."""
    rows = experiments.TABLES[table] if table else experiments.LAB[corpus]
    lines = []
    for row in rows:
        mine = [run for run in everything if (run.corpus, run.row) == (corpus, row)]
        lines.append(results.line(row, mine, published(table, corpus, row), experiments.BOOTSTRAP))
    trained = [run for run in everything if run.corpus == corpus]
    own, other = ([run for run in trained if (run.elsewhere is None) == here] for here in (True, False))
    bounds = [results.bound(name, own) for name in BOUNDS]
    for line in (results.bound(name, other) for name in BOUNDS):  # of rows that were tested on another corpus
        bounds.append(dataclasses.replace(line, label=f"{line.label} -> other"))
    lines += [line for line in bounds if line.ours]
    return Sheet(title, lines, footer(everything) if table else ())


def footer(everything: Sequence[Run]) -> list[str]:
    """What a table must say about itself: what is missing, the command, the commits."""
    finished = [run for run in everything if runs.done(run)]
    commits = sorted({str(results.commit(run))[:12] for run in finished})
    missing = [f"{r.corpus} {r.row} fold {r.fold} seed {r.seed}" for r in everything if r not in finished]
    notes = [
        "In brackets: 95 % interval, bootstrap over speakers; an utterance is its mean over seeds. –: nothing to state."
    ]
    if missing:
        more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
        notes.append(f"PARTIAL, {len(missing)} of {len(everything)} runs are missing: {'; '.join(missing[:12])}{more}")
    notes.append(f"command: python -m ambijax.tables {shlex.join(sys.argv[1:])}")
    notes.append(f"commit: tables {str(journal.commit())[:12]}, runs {', '.join(commits) or 'none yet'}")
    return notes


def write_table(args: argparse.Namespace, experiments: SimpleNamespace, everything: Sequence[Run]) -> None:
    """Writes DIR/table2_cremad.{md,tex,png} and prints the first."""
    made = sheet(experiments, f"{TITLES[args.table]}, {args.corpus}", args.table, args.corpus, everything)
    stem = args.out / f"{TITLES[args.table].lower().replace(' ', '')}_{args.corpus}"
    stem.with_suffix(".md").write_text(typeset.markdown(made))
    stem.with_suffix(".tex").write_text(typeset.latex(made))
    print(typeset.markdown(made))
    typeset.picture([made], made.title, stem.with_suffix(".png"))
    print(f"written to {stem}.md, .tex, .png")


def write_lab(args: argparse.Namespace, experiments: SimpleNamespace, everything: Sequence[Run]) -> None:
    """Writes DIR/lab.{md,csv,png} and DIR/orderings.png, and prints the first."""
    made = [sheet(experiments, corpus, "", corpus, everything) for corpus in experiments.LAB]
    found = lab.orderings(experiments.ORDERINGS, everything, experiments.CLOSE, experiments.BOOTSTRAP)
    text = lab.markdown(made, found, experiments.CLOSE, experiments.ALPHA, footer(everything))
    (args.out / "lab.md").write_text(text)
    lab.write_csv(everything, args.out / "lab.csv")
    print(text)
    typeset.picture(made, "The tiny lab", args.out / "lab.png")
    lab.picture(found, experiments.CLOSE, experiments.ALPHA, args.out / "orderings.png")
    print(f"written to {args.out}/lab.md, lab.csv, lab.png, orderings.png")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ambijax.tables", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", choices=tuple(TITLES), help="of the paper")
    what.add_argument("--lab", action="store_true", help="the tiny lab, on synthetic speech")
    parser.add_argument("--out", type=Path, required=True, help="directory of runs and tables")
    parser.add_argument("--corpus", choices=("iemocap", "cremad", "tiny", "tiny_iemocap"), help="with --table")
    parser.add_argument("--checkpoint", help="base model; default: that of the configs")
    parser.add_argument("--audio_reasoner", help="checkpoint directory of Audio-Reasoner, for its row of Table 2")
    parser.add_argument("--other", type=Path, help="the corpus of rows '-> other'; default: data.root of its config")
    parser.add_argument("--folds", type=int, help="the first so many of five")
    parser.add_argument("--seeds", type=int, help="default: 1, in the lab 5")
    parser.add_argument("--quick", action="store_true", help="with --lab: ten minutes, for gross differences")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each on its share of the CPU cores")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    how.add_argument("--report", action="store_true", help="write the tables from what is there, run nothing")
    parser.add_argument(
        "--seconds_per_step", nargs="+", default=[], metavar="ROW=S", help="for the plan; measured where there are runs"
    )
    args, args.overrides = parser.parse_known_args()
    if wrong := [a for a in args.overrides if not a.startswith("--config.") or "=" not in a]:
        raise ConfigError(f"unexpected argument {wrong[0]!r}; settings for all runs are --config.KEY=VALUE")
    strangers = ("corpus", "audio_reasoner", "folds") if args.lab else ("quick",)
    if given := [f"--{name}" for name in strangers if getattr(args, name)]:
        raise ConfigError(f"{', '.join(given)}: not {'with' if args.lab else 'without'} --lab; leave it out")
    if args.table and not args.corpus:
        raise ConfigError("--table needs --corpus=iemocap or --corpus=cremad")
    if min(n for n in (args.jobs, args.seeds, args.folds) if n is not None) < 1:
        raise ConfigError("--jobs, --seeds and --folds must be at least 1")
    return args


def main() -> None:
    args = _parse()
    if not EXPERIMENTS.is_file():
        raise ConfigError(f"{EXPERIMENTS} is not here; run from the root of a clone")
    experiments = SimpleNamespace(**runpy.run_path(str(EXPERIMENTS)))
    args.seeds = args.seeds or (experiments.LAB_SEEDS if args.lab and not args.quick else 1)
    args.folds = min(args.folds or experiments.FOLDS, experiments.FOLDS)
    jax.config.update("jax_platforms", "cpu")  # this process only plans; accelerators are for the runs
    try:
        stated = {row: float(s) for row, s in (pair.split("=") for pair in args.seconds_per_step)}
    except ValueError:
        stated = {"": 0.0}
    if not all(row and 0 < s < math.inf for row, s in stated.items()):
        raise ConfigError("--seconds_per_step wants ROW=S, as in 'SFT=1.2'")
    typeset.pyplot()  # whether it is there, before days of training and not after
    everything = all_runs(experiments, args)
    if unknown := stated.keys() - (rows := {run.row: None for run in everything}).keys():
        raise ConfigError(f"--seconds_per_step: no row {', '.join(sorted(unknown))}; the rows are {', '.join(rows)}")
    failed = []
    if not args.report:
        print(plan(everything, stated), flush=True)
        if args.plan:
            return
        for config in {run.config.data.root: run.config for run in everything}.values():
            assemble.corpus(config)  # one that is to be written, once and not by several runs at a time
        failed = runs.execute(everything, args.jobs)
    args.out.mkdir(parents=True, exist_ok=True)
    (write_lab if args.lab else write_table)(args, experiments, everything)
    if failed:
        raise ConfigError(
            f"{len(failed)} runs failed; see console.log in {', '.join(str(r.directory) for r in failed)}"
        )


if __name__ == "__main__":
    errors.run(main)
