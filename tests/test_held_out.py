"""Whoever a run has learned from is not tested on, also when the folds of the manifest change afterwards."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from ambijax import assemble, checkpoint, errors, evaluate, held_out, manifest, preflight, settings
from ambijax.errors import DataError
from tests import made_runs


def config(corpus: manifest.Corpus, *flags: str):
    arguments = ["--config=configs/sft.py:cremad", "--workdir=unused", f"--config.data.root={corpus.root}"]
    labels = f"--config.data.labels={corpus.classes()}"
    return settings.parse(["t", *arguments, labels, "--config.data.cot=False", *flags])[0]


@pytest.fixture
def corpus(tmp_path) -> manifest.Corpus:
    """Five speakers, a fold each."""
    return made_runs.corpus(tmp_path / "corpus", 15, 5)


def refolded(corpus: manifest.Corpus) -> None:
    """Another cross-validation over the same clips: speaker s1 is tested on first."""
    manifest.write(
        dataclasses.replace(
            corpus, utterances=tuple(dataclasses.replace(u, fold=(u.fold - 1) % 5) for u in corpus.utterances)
        )
    )


def test_changed_folds_are_found_before_an_evaluation(corpus, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    asked = config(corpus)  # dev is s1
    for split in manifest.SPLITS:
        evaluate._check_asked(asked, split, run)  # of an earlier version, which did not say
    held_out.note(run, assemble.splits(asked, corpus))
    assert set(json.loads((run / "splits.json").read_text())["test"].values()) == {"s0"}
    for split in manifest.SPLITS:
        evaluate._check_asked(asked, split, run)
    refolded(corpus)
    evaluate._check_asked(asked, "train", run)
    evaluate._check_asked(asked, "test", None)  # the base has learned from nobody here
    with pytest.raises(DataError, match=r"run has learned from 3 of the 3 utterances that are the test split now"):
        evaluate._check_asked(asked, "test", run)  # s1, by whom its checkpoint was chosen
    with pytest.raises(DataError, match=r"3 of the 3 utterances that are the dev split now, .*such as clip0002"):
        evaluate._check_asked(asked, "dev", run)
    # Another clip of a speaker who was trained on.
    new = [dataclasses.replace(u, id=f"new-{u.id}", fold=0) for u in corpus.utterances if u.speaker == "s2"]
    with pytest.raises(DataError, match=r"learned from 3 of the 3 .* such as new-clip0002"):
        held_out.check(run, "test", new)
    held_out.check(run, "dev", new)


def test_the_command_says_so_before_it_reads_weights(corpus, tmp_path, monkeypatch):
    run, asked = tmp_path / "run", config(corpus)
    run.mkdir()
    settings.save(asked, run)
    held_out.note(run, assemble.splits(asked, corpus))
    refolded(corpus)
    for flags, said in (([], "are the test split now"), (["--split=dev"], "are the dev split now")):
        monkeypatch.setattr("sys.argv", ["evaluate", f"--run={run}", *flags])
        args, rest = evaluate._parse()
        with pytest.raises(DataError, match=said):
            evaluate._answer(args, *evaluate._settings(args, rest))


def test_a_run_does_not_start_from_one_that_heard_its_test_speakers(corpus, tmp_path):
    start = tmp_path / "start"
    first = config(corpus)
    with checkpoint.Checkpoints(start / "checkpoints", 1) as saved:
        saved.save(1, {checkpoint.TRAINED: {"x": jnp.zeros(1)}}, {})
    settings.save(first, start)
    held_out.note(start, assemble.splits(first, corpus))
    begins = f"--config.init_from={start}"
    preflight._check_start(config(corpus, begins), tmp_path / "next")
    with pytest.raises(DataError, match="start has learned from 3 of the 3 utterances that are the test split"):
        preflight._check_start(config(corpus, begins, "--config.data.fold=2"), tmp_path / "next")
    other = made_runs.corpus(tmp_path / "other", 15, 5)  # with speakers of the same names
    preflight._check_start(config(other, begins, "--config.data.fold=2"), tmp_path / "next")


def test_splits_that_somebody_wrote_are_one_line(tmp_path, corpus):
    for text in ("[]", '{"train": 3}', '{"train": {"a": ["b"]}}', '{"train": {"a": 1}, "dev": []}'):
        (tmp_path / "splits.json").write_text(text)
        with pytest.raises(errors.AmbijaxError, match=r"splits\.json"):
            held_out.check(tmp_path, "test", corpus.utterances)
