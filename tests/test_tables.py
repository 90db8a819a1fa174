"""The drivers: which runs a table needs, doing what is not done, and the tables that come out of finished ones."""

import argparse
import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ambijax import errors, lab, results, runs, settings, tables, typeset
from ambijax.published import METRICS, PUBLISHED, published
from ambijax.typeset import Estimate, Line, Sheet

ROOT = Path(__file__).parents[1]
EXPERIMENTS = SimpleNamespace(**runpy.run_path(str(ROOT / "configs" / "tables.py")))


def wanted(out: Path, **changes: object) -> argparse.Namespace:
    given = {
        "lab": False, "quick": False, "table": "2", "corpus": "tiny", "checkpoint": "", "audio_reasoner": "",
        "other": None, "overrides": [], "folds": 2, "seeds": 2, "out": out,
    }  # fmt: skip
    return argparse.Namespace(**given | changes)


# Which runs


def test_a_table_is_folds_times_methods_seed_after_seed(tmp_path):
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path))
    assert [(r.seed, r.fold, r.row) for r in found] == [
        (seed, fold, row)
        for seed in (0, 1)
        for fold in (0, 1)
        for row in ("base", "SFT", "DPO", "GRPO", "GRPOz")  # Audio-Reasoner needs its checkpoint
    ]
    assert len({r.directory for r in found}) == len(found)


def test_what_makes_a_row_wins_over_what_all_runs_are_given(tmp_path):
    given = ["--config.steps=7", "--config.loss.lambda_kl=0.5"]
    by_row = {r.row: r.config for r in tables.all_runs(EXPERIMENTS, wanted(tmp_path, overrides=given, table="2"))}
    assert {row: c.steps for row, c in by_row.items()} == {"base": 0, "SFT": 7, "DPO": 7, "GRPO": 7, "GRPOz": 7}
    assert {row: c.algorithm for row, c in by_row.items() if row != "base"} == {
        "SFT": "sft",
        "DPO": "dpo",
        "GRPO": "grpo",
        "GRPOz": "grpoz",
    }
    without = tables.all_runs(EXPERIMENTS, wanted(tmp_path, overrides=given, table="figure2"))
    assert {r.row: r.config.loss.lambda_kl for r in without} == {
        "SFT": 0.5,
        "SFT, no KL": 0,
        "DPO": 0.5,
        "DPO, no KL": 0,
    }
    assert not any(r.config.eval.base for r in without)


def test_tables_share_their_runs(tmp_path):
    two, three = (tables.all_runs(EXPERIMENTS, wanted(tmp_path, table=t)) for t in ("2", "3"))
    assert {r for r in two if r.row == "SFT"} == {r for r in three if r.row == "SFT"}


def test_the_other_corpus_is_tested_with_what_was_trained_on_the_first(tmp_path):
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path, table="3", other=tmp_path / "there", folds=1, seeds=1))
    trained, crossed = ({r.row: r for r in found}[row] for row in ("SFT, no CoT", "SFT, no CoT -> other"))
    assert found.index(trained) < found.index(crossed)
    assert crossed.command[2:] == [
        "ambijax.evaluate",
        f"--run={trained.directory}",
        f"--corpus={tmp_path / 'there'}",
        "--fold=0",
    ]
    assert not trained.config.data.cot


def test_audio_reasoner_is_the_base_of_another_checkpoint(tmp_path):
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path, audio_reasoner="/models/ar", checkpoint="/models/q2a"))
    at = {r.row: (r.config.model.checkpoint, r.config.prompt.style) for r in found}
    assert at.pop("Audio-Reasoner") == ("/models/ar", "audio_reasoner")
    assert set(at.values()) == {("/models/q2a", "steps")}


def test_the_lab_moves_on_a_fold_with_every_seed(tmp_path):
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path, lab=True, seeds=6))
    assert [r.seed for r in found] == sorted(r.seed for r in found)
    assert all(r.fold == r.seed % 5 for r in found)
    rows = {(r.corpus, r.row) for r in found}
    stated = {(c, row) for _, low, high, _, corpora in EXPERIMENTS.ORDERINGS for c in corpora for row in (low, high)}
    assert stated <= rows  # else an ordering could never be judged
    first = [(r.row, r.config) for r in found if r.seed == 0]
    assert {row for row, config in first if config.steps == 0} == {"base"}
    configs = [config for _, config in first]
    for algorithm in ("sft", "dpo", "grpo", "grpoz"):  # the same prompts for everybody
        of_it = [c for c in configs if c.algorithm == algorithm and c.steps]
        assert {(c.steps, c.data.batch_size) for c in of_it} == {(40, 4)}


def test_every_setting_of_the_tables_is_one(tmp_path):
    for args in (wanted(tmp_path, lab=True), wanted(tmp_path, lab=True, quick=True)):
        for run in tables.all_runs(EXPERIMENTS, args):
            _ = run.config  # raises on an unknown key


def test_the_plan_adds_up(tmp_path):
    root = tmp_path / "corpus"
    wants = wanted(tmp_path, overrides=[f"--config.data.root={root}"])
    text = tables.plan(tables.all_runs(EXPERIMENTS, wants), {"SFT": 2.0, "DPO": 3.0, "GRPO": 6.0})
    assert not root.exists()  # it only plans
    hours = (120 * 2 + 60 * 3 + 70 * 6) * 4 / 3600  # steps x seconds x (folds x seeds)
    assert f"at least {hours:.1f} hours" in text
    assert re.search(r"tiny GRPOz +4 +0 +70 +\? +\?$", text, re.MULTILINE)
    assert re.search(r"tiny base +4 +0 +0 +0.00 +0.0", text)


def test_seconds_per_step_are_those_of_training(tmp_path):
    """The last line of a run that is watched on dev has none."""
    (run, *_) = [run for run in tables.all_runs(EXPERIMENTS, wanted(tmp_path)) if run.row == "GRPOz"]
    assert runs.seconds_per_step([run]) is None
    run.directory.mkdir(parents=True)
    lines = [{"step": 0, "seconds": 3.0}, {"step": 1, "seconds": 5.0}, {"step": 2, "dev/js": 0.3}]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runs.seconds_per_step([run]) == 4.0


def test_a_plan_finds_mistakes_first(tmp_path):
    for change in ({"checkpoint": "nowhere"}, {"corpus": "cremad"}, {"overrides": ["--config.stepps=3"]}):
        with pytest.raises(errors.AmbijaxError):
            tables.plan(tables.all_runs(EXPERIMENTS, wanted(tmp_path, **change)), {})
    for given in ("--config.seed=7", "--config.data.fold=3", "--config.eval.base=True"):  # would be ignored
        with pytest.raises(errors.ConfigError, match=f"{given}: the table sets this itself; see --seeds, --folds"):
            tables.all_runs(EXPERIMENTS, wanted(tmp_path, overrides=[given]))
    with pytest.raises(errors.ConfigError, match="no manifest at nowhere"):  # and not after all trainings
        tables.plan(tables.all_runs(EXPERIMENTS, wanted(tmp_path, table="3", other=Path("nowhere"))), {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table=2", "--corpus=tiny", "--quick"], "--quick: not without --lab"),
        (["--lab", "--corpus=tiny", "--folds=2"], "--corpus, --folds: not with --lab"),
        (["--table=2", "--corpus=tiny", "--seconds_per_step", "SFT=-5"], "wants ROW=S"),
        (["--table=2", "--corpus=tiny", "--seconds_per_step", "SFT=nan"], "wants ROW=S"),
        (["--table=2", "--corpus=tiny", "--seconds_per_step", "SFTT=5"], "no row SFTT; the rows are "),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ambijax.tables", *flags, f"--out={tmp_path}", "--plan"])
    with pytest.raises(errors.ConfigError, match=message):
        tables.main()


# Doing them: `finish` stands for a training, so that only the driver is tested; the real ones are below.

P, Q = [[2 / 3, 1 / 3, 0, 0], [1, 0, 0, 0]], [[0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1]]


def finish(run: runs.Run, readouts: list[list[float]] = Q) -> None:
    """Leaves what a finished run leaves, with two speakers."""
    run.evaluation.mkdir(parents=True, exist_ok=True)
    settings.save(run.config, run.directory)
    records = [
        {"id": f"{run.fold}{i}\u2028", "speaker": f"{run.fold}s{i % 2}", "target": P[i % 2], "readout": q}
        for i, q in enumerate(readouts)
    ]
    (run.evaluation / "predictions.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    )
    prior = {"js": 0.3, "bc": 0.7, "r2": 0.4, "brier": 0.1, "clips": len(records)}
    summary = {"clips": len(records), "commit": "c0ffee" * 7, "fold": run.fold, "bounds": {"prior": prior}}
    (run.evaluation / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def everything(tmp_path) -> list[runs.Run]:
    return tables.all_runs(EXPERIMENTS, wanted(tmp_path, folds=1, seeds=1, table="figure2"))


def test_done_is_a_complete_evaluation_with_these_settings(everything, tmp_path):
    run = everything[0]
    assert not runs.done(run)
    finish(run)
    assert runs.done(run)
    with (run.evaluation / "predictions.jsonl").open("a") as file:
        file.write("{}\n")
    assert not runs.done(run)
    finish(run)
    changed = wanted(tmp_path, folds=1, seeds=1, table="figure2", overrides=["--config.optim.learning_rate=0.5"])
    with pytest.raises(errors.ConfigError, match=r"optim.learning_rate is 0.002, not 0.5"):
        runs.done(tables.all_runs(EXPERIMENTS, changed)[0])
    config = run.directory / "config.json"
    older = json.loads(config.read_text())
    del older["eval"]["resamples"]
    config.write_text(json.dumps(older | {"given_up": 1}))
    assert runs.done(run)  # a version with other keys
    moved = wanted(tmp_path, folds=1, seeds=1, table="figure2", overrides=["--config.data.root=/elsewhere"])
    assert runs.done(tables.all_runs(EXPERIMENTS, moved)[0])


class Started(list):
    """The rows of the runs that were started, and how often each is to be cut short before it gets through."""

    def __init__(self) -> None:
        self.behaviour: dict[str, int] = {}


@pytest.fixture
def started(monkeypatch) -> Started:
    """Instead of processes."""
    rows = Started()

    class Process:
        def __init__(self, run: runs.Run) -> None:
            rows.append(run.row)
            self.returncode = 75 if rows.count(run.row) <= rows.behaviour.get(run.row, 0) else 0
            if self.returncode == 0:
                finish(run)

        def poll(self) -> int:
            return self.returncode

    def start(run: runs.Run, job: int, jobs: int) -> runs._Started:
        return runs._Started(run, Process(run), 0.0)

    monkeypatch.setattr(runs, "_start", start)
    monkeypatch.setattr(runs, "POLL", 0)
    return rows


def test_what_is_done_is_not_done_again(everything, started):
    finish(everything[1])
    assert runs.execute(everything, 1) == []
    assert started == ["SFT", "DPO", "DPO, no KL"]
    assert runs.execute(everything, 2) == []
    assert len(started) == 3


def test_a_run_that_was_cut_short_is_started_again_and_no_more_than_that(everything, started, capsys):
    started.behaviour["DPO"] = 2
    started.behaviour["SFT, no KL"] = 99
    failed = runs.execute(everything, 1)
    assert [run.row for run in failed] == ["SFT, no KL"]
    assert started.count("DPO") == 3
    assert started.count("SFT, no KL") == runs.ATTEMPTS
    assert "exit code 75" in capsys.readouterr().out
    assert runs.done(everything[-1])


def test_what_needs_a_failed_run_fails_with_it(tmp_path, started):
    started.behaviour["SFT"] = 99
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path, table="3", other=tmp_path / "o", folds=1, seeds=1))
    assert {run.row for run in runs.execute(found, 2)} == {"SFT", "SFT -> other"}
    assert runs.done(found[-1])


def test_a_run_that_another_machine_holds_is_left_to_it(everything, started, monkeypatch):
    held = everything[0]
    looks = []

    def elsewhere(directory: Path) -> bool:
        looks.append(directory)
        if len(looks) == 3:
            finish(held)  # the other machine is ready
        return directory == held.directory

    monkeypatch.setattr(runs, "_held", elsewhere)
    assert runs.execute(everything, 1) == []
    assert started == ["SFT, no KL", "DPO", "DPO, no KL"]


def test_a_directory_that_cannot_be_written_to_is_held_by_nobody(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigError, match=r"cannot write to .*choose another directory"):
        runs._held(tmp_path / "file" / "run")


# What comes out


def test_cells_are_the_means_of_the_measures(tmp_path):
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path, folds=2, seeds=1))
    sft = [run for run in found if run.row == "SFT"]
    finish(sft[0])
    finish(sft[1], [P[0], Q[1]])
    line = results.line("SFT", sft, published("2", "cremad", "SFT"), EXPERIMENTS.BOOTSTRAP)
    # By hand, from the oracles of the paper's formulas: JS .137925 and .169195, then 0 and .169195.
    expected = {
        "js": (0.137925 + 0.169195 + 0 + 0.169195) / 4,
        "bc": (0.866025 + 0.836660 + 1 + 0.836660) / 4,
        "r2": (0.969697 + 1 + 1 + 1) / 4,
        "brier": (0.016493 + 0.03 + 0 + 0.03) / 4,
    }
    for metric, estimate in zip(METRICS, line.ours, strict=True):
        assert estimate.mean == pytest.approx(expected[metric], abs=1e-6)
        assert estimate.low <= estimate.mean <= estimate.high
    assert (line.clips, line.seeds, line.extent) == (4, 1, "2 of 2")


def test_an_utterance_counts_once_however_many_seeds_predicted_it(tmp_path):
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path, folds=1, seeds=2))
    sft = [run for run in found if run.row == "SFT"]
    finish(sft[0])
    finish(sft[1], [P[0], P[1]])
    line = results.line("SFT", sft, (None,) * 4, EXPERIMENTS.BOOTSTRAP)
    assert line.clips == 2
    assert line.seeds == 2
    assert line.ours[0].mean == pytest.approx((0.137925 + 0.169195) / 4, abs=1e-6)


def test_a_floor_is_one_over_the_clips_of_all_folds(tmp_path):
    two, six = [run for run in tables.all_runs(EXPERIMENTS, wanted(tmp_path, folds=2, seeds=1)) if run.row == "SFT"]
    finish(two)
    finish(six, Q * 3)
    path = six.evaluation / "summary.json"
    summary = json.loads(path.read_text())
    summary["bounds"]["prior"]["js"] = 0.7
    path.write_text(json.dumps(summary))
    line = results.bound("prior", [two, six])
    assert line.ours[0].mean == pytest.approx((2 * 0.3 + 6 * 0.7) / 8)  # a mean of the folds would be .5
    assert line.clips == 8


def test_rows_of_another_corpus_stand_above_its_own_floors(tmp_path):
    found = [r for r in tables.all_runs(EXPERIMENTS, wanted(tmp_path, lab=True, seeds=1)) if r.corpus == "tiny"]
    text = typeset.markdown(tables.sheet(EXPERIMENTS, "tiny", "", "tiny", found))
    assert "prior" not in text
    own, other = (next(r for r in found if (r.elsewhere is None) == here) for here in (True, False))
    finish(own)
    finish(other)
    path = other.evaluation / "summary.json"
    summary = json.loads(path.read_text())
    summary["bounds"]["prior"]["js"] = 0.333
    path.write_text(json.dumps(summary))
    text = typeset.markdown(tables.sheet(EXPERIMENTS, "tiny", "", "tiny", found))
    assert re.search(r"\| prior \| \.300 \|", text)
    assert re.search(r"\| prior -> other \| \.333 \|", text)


def test_a_partial_table_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables", "--table", "2", "--out", "a b"])
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path, folds=1, seeds=1))
    finish(found[1])
    sheet = tables.sheet(EXPERIMENTS, "Table 2, tiny", "2", "tiny", found)
    text = typeset.markdown(sheet)
    assert "PARTIAL, 4 of 5 runs are missing: tiny base fold 0 seed 0; tiny DPO" in text
    assert "command: python -m ambijax.tables --table 2 --out 'a b'" in text
    assert "runs c0ffeec0ffee" in text
    assert re.search(r"\| SFT \| \.154 \[", text)
    assert re.search(r"\| DPO \| – \| – \| – \| – \|", text)
    assert re.search(r"\| Audio-Reasoner \| .* \| 0 \|  \|  \|", text)
    assert re.search(r"\| prior \| \.300 \| \.700 \| .* \| 2 \|  \|  \|", text)
    pytest.importorskip("matplotlib")
    typeset.picture([sheet, sheet], sheet.title, tmp_path / "partial.png")


def test_published_numbers_stand_beside_ours():
    line = Line("GRPOz", published("2", "iemocap", "GRPOz"), (Estimate(0.2049, 0.19, 0.22),) * 4, 10, 1, 5, 5)
    row = typeset.markdown(Sheet("t", [line], [])).splitlines()[4]
    assert row.startswith("| GRPOz | .20 | .205 [.190, .220] | .82 | .205 [.190, .220] |")


def test_published_numbers_are_possible():
    """JS in bits lies between 1 - BC and (1 - BC) / ln 2, up to the rounding of both to two digits."""
    for corpora in PUBLISHED.values():
        for rows in corpora.values():
            for js, bc, _, _ in rows.values():
                assert 1 - bc - 0.0101 <= js <= (1 - bc + 0.0101) / np.log(2)


def test_latex_is_balanced_and_escaped():
    lines = [Line("SFT, λ_kl & 50 % {x} ~^\\", (0.2, None, 0.3, 0.1), (), 0, 0, 0, 3)]
    lines.append(Line("DPO -> other", (None,) * 4, (Estimate(0.1, 0.05, 0.2), *(Estimate(0.5),) * 3), 9, 2, 3, 3))
    text = typeset.latex(Sheet("Table 2: 100 % & more", lines, ["command: a_b #1 $HOME"]))
    bare = re.sub(r"\\[\\{}%&#$_]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert text.count(r"\begin{") == text.count(r"\end{")
    body = [row for row in text.splitlines() if row.endswith(r"\\")]
    columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", text).group(1))
    for row in body[1:]:  # the first spans columns
        assert len(re.findall(r"(?<!\\)&", row)) == columns - 1, row
    for raw in ("λ_kl", "50 %", "a_b", "#1 $"):
        assert raw not in text


def test_orderings_are_judged_by_paired_differences(tmp_path):
    found = tables.all_runs(EXPERIMENTS, wanted(tmp_path, lab=True, seeds=5))
    for run in found:
        if run.corpus == "tiny" and run.row in ("SFT", "base", "DPO"):
            better, worse = P[0], Q[0]
            shown = {"SFT": [better, P[1]] * 3, "base": [worse, Q[1]] * 3, "DPO": [worse, P[1]] * 3}[run.row]
            finish(run, shown)
    stated = (
        ("less", "SFT", "base", False, ("tiny",)),
        ("more", "base", "SFT", False, ("tiny",)),
        ("near", "SFT", "DPO", True, ("tiny",)),
        ("absent", "GRPO", "base", False, ("tiny",)),
    )
    less, more, near, absent = lab.orderings(stated, found, 0.05, EXPERIMENTS.BOOTSTRAP)
    assert less.difference.mean == pytest.approx(-(0.137925 + 0.169195) / 2, abs=1e-6)
    assert (less.agreeing, less.seeds, less.clips) == (5, 5, 30)
    assert less.p == pytest.approx(2 / 2**10 * 3)  # ten speakers, all agree; three tests
    assert less.verdict(0.05, 0.05) == "holds"
    assert more.verdict(0.05, 0.05) == "does not hold"
    # -.138 for one of two speakers in each fold and 0 for the other: the mean is -.069, the interval holds -.05.
    assert near.difference.mean == pytest.approx(-0.137925 / 2, abs=1e-6)
    assert near.agreeing == 0  # no seed's mean is that near, on either side
    assert near.verdict(0.05, 0.05) == "undecided"
    assert near.verdict(0.2, 0.05) == "holds"
    assert near.verdict(0.01, 0.05) == "does not hold"
    assert absent.verdict(0.05, 0.05) == "no runs yet"
    one_speaker = dataclasses.replace(near, difference=dataclasses.replace(near.difference, low=None, high=None))
    assert one_speaker.verdict(0.05, 0.05) == "undecided"
    text = lab.markdown([], [less, more, near, absent], 0.05, 0.05, ["a note"])
    assert "Of 4 orderings: 1 holds, 1 does not hold, 1 undecided" in text
    lab.write_csv(found, tmp_path / "lab.csv")
    rows = (tmp_path / "lab.csv").read_text().splitlines()
    assert len(rows) == 1 + 15
    assert rows[1].startswith("tiny,base,0,0,6,0.15")
    pytest.importorskip("matplotlib")
    lab.picture([less, more, near, absent], 0.05, 0.05, tmp_path / "orderings.png")
