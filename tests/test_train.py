"""The real commands on the tiny model: training, evaluation, prediction, and users' mistakes."""

import itertools
import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from ambijax import algorithms, checkpoint, digest, emotions, manifest, metrics, settings
from ambijax import train as training
from ambijax.errors import ConfigError
from tests.command import assert_same_run, interrupt, lines, logged, needs_tiny, only_message, run, spent, train

pytestmark = needs_tiny
# Twelve training clips in batches of four: the epoch ends at step 3.
HOW = [
    *("--config.steps=4", "--config.data.batch_size=4", "--config.grpo.samples=2", "--config.optim.accumulate=2"),
    *("--config.eval.every=2", "--config.eval.checkpoint=best"),
    *("--config.eval.max_clips=2", "--config.eval.batch_size=2"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("corpus") / "tiny"


@pytest.fixture(scope="module")
def grpoz(tmp_path_factory, corpus) -> tuple[Path, str]:
    """A GRPOz run of four steps in two parts each, evaluated on dev at 0, 2 and 4, and what it printed."""
    workdir = tmp_path_factory.mktemp("grpoz") / "run"
    code, out, err = run(*train(workdir, corpus, "grpoz", *HOW))
    assert code == 0, err
    return workdir, out


@pytest.mark.parametrize(
    "phases",
    [
        ("imports", "weights, features, compilation", "evaluation"),
        pytest.param(("start-up", "training"), marks=pytest.mark.slow),
    ],
    ids=" and ".join,
)
def test_a_run_stopped_in_any_phase_ends_as_if_undisturbed(phases, grpoz, corpus, tmp_path):
    """F02, F06; more of this in test_faults_signals.py and test_faults_kill.py."""
    workdir = tmp_path / "run"
    command = train(workdir, corpus, "grpoz", *HOW)
    moments = {
        "imports": lambda process: spent(process) > 0.5,
        "start-up": lambda _: (workdir / "lock").exists(),
        "weights, features, compilation": lambda _: (workdir / "env.json").exists(),
        "training": logged(workdir, 2),
        "evaluation": lambda _: (workdir / "eval" / "test").exists(),
    }
    for phase, how in zip(phases, itertools.cycle((signal.SIGTERM, signal.SIGINT))):
        code, err, _ = interrupt(command, moments[phase], how)
        assert code == 75, (phase, err)
        assert "the same command resumes" in only_message(err), phase
    code, out, err = run(*command)
    assert code == 0, err
    assert "resumed" in out
    assert_same_run(grpoz[0], workdir)


def test_a_run_goes_on_from_the_middle_bit_for_bit(grpoz, corpus, tmp_path):
    """F06, every day: what a kill after step 2 would have left; every other moment is in the slow tests."""
    workdir = tmp_path / "run"
    shutil.copytree(grpoz[0], workdir)
    for newer in ("checkpoints/step_00000004", "eval"):
        shutil.rmtree(workdir / newer)
    code, out, err = run(*train(workdir, corpus, "grpoz", *HOW))
    assert code == 0, err
    assert f"resumed {workdir} at step 2" in out
    assert_same_run(grpoz[0], workdir)


def test_a_run_leaves_what_it_promises_and_prints_the_table(grpoz):
    workdir, out = grpoz
    for name in ("config.json", "env.json", "metrics.jsonl", "samples.jsonl", "eval/test/summary.json"):
        assert (workdir / name).exists(), name
    rows = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert {"uniform", "prior", "base", "GRPOz"} <= rows
    assert [line["step"] for line in lines(workdir / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    prediction = lines(workdir / "eval/test/predictions.jsonl")[0]
    assert {"id", "target", "votes", "readout", "js", "reasoning", "forced"} <= prediction.keys()
    np.testing.assert_allclose(sum(prediction["readout"]), 1, atol=1e-6)


def test_the_best_on_dev_is_the_runs_model(grpoz):
    workdir, out = grpoz
    scores = {line["step"]: line["dev/js"] for line in lines(workdir / "metrics.jsonl") if "dev/js" in line}
    assert scores.keys() == {0, 2, 4}
    noted = {step: digest.read_record(workdir / "checkpoints" / f"step_0000000{step}")["metric"] for step in (2, 4)}
    assert noted == {step: scores[step] for step in (2, 4)}
    assert f"GRPOz as of step {min(noted, key=noted.__getitem__)}, the best on dev" in out
    predicted = lines(workdir / "eval/dev/predictions.jsonl")  # of the last evaluation
    assert np.mean([record["js"] for record in predicted]) == pytest.approx(scores[4])
    spent = json.loads((workdir / "goodput.json").read_text())["seconds"]
    assert spent["evaluation"] > 0


def test_advantages_follow_from_the_rewards_that_were_written_down(grpoz, corpus):
    workdir, _ = grpoz
    groups = lines(workdir / "samples.jsonl")
    assert len(groups) == 4 * 4
    votes = {u.id: u.votes for u in manifest.read(corpus).utterances}
    for line in groups:
        group = line["group"]
        p = emotions.soft_label(votes[line["id"]], emotions.CREMAD)
        for member in group[:-1]:  # nor is a roll-out held against the votes of another clip
            assert member["js"] == pytest.approx(metrics.js(p, member["readout"]), abs=1e-6)
        assert [member.get("gold", False) for member in group] == [False] * 2 + [True]
        for member in group[:-1]:
            assert member["reward"] == pytest.approx(1 - member["js"] + member["format"])
        r = np.array([member["reward"] for member in group])
        assert r[-1] == 2.0  # the maximum: JS 0 and the format kept
        expected = (r - r.mean()) / (r.std(ddof=1) + 1e-4)
        np.testing.assert_allclose([member["advantage"] for member in group], expected, rtol=1e-5, atol=1e-6)


def test_only_adapters_are_trained(grpoz):
    workdir, _ = grpoz
    step, trained, _ = checkpoint.load_trained(workdir / "checkpoints", best=False)
    assert step == 4
    assert trained.keys() == {"lora"}
    projections = trained["lora"]["language_model"]["layers"]
    assert projections.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(np.any(p["b"]) for p in projections.values())  # they started at zero


def test_evaluate_reproduces_the_runs_own_numbers(grpoz):
    workdir, _ = grpoz
    before = json.loads((workdir / "eval/test/summary.json").read_text())
    (workdir / "eval/test/predictions.jsonl").unlink()  # else it would only read what is there
    code, out, err = run("ambijax.evaluate", "--run", workdir)
    assert code == 0, err
    assert "prior" in out
    assert json.loads((workdir / "eval/test/summary.json").read_text()) == before


@pytest.mark.slow  # its quick sibling is in test_evaluate.py
def test_swapped_audio_is_heard(grpoz):
    workdir, _ = grpoz
    code, _, err = run("ambijax.evaluate", "--run", workdir, "--swap_audio")
    assert code == 0, err
    own = lines(workdir / "eval/test/predictions.jsonl")
    swapped = lines(workdir / "eval/test-swap_audio/predictions.jsonl")
    assert sum(a["reasoning"] != b["reasoning"] for a, b in zip(own, swapped, strict=True)) >= len(own) // 2


def test_predict_gives_the_evaluated_distribution(grpoz, corpus):
    workdir, _ = grpoz
    expected = lines(workdir / "eval/test/predictions.jsonl")[:2]
    by_id = {u.id: u for u in manifest.read(corpus).utterances}
    clips = [by_id[r["id"]] for r in expected]
    transcripts = [f"--transcript={u.transcript}" for u in clips]
    paths = [corpus / u.audio for u in clips]
    code, out, err = run("ambijax.predict", "--model", workdir, *paths, *transcripts, "--json")
    assert code == 0, err
    for line, record in zip(out.splitlines(), expected, strict=True):
        found = json.loads(line)
        np.testing.assert_allclose(list(found["distribution"].values()), record["readout"], atol=1e-4)
        assert record["reasoning"].startswith(found["reasoning"])


def test_every_step_of_every_seed_draws_from_a_key_of_its_own(monkeypatch):
    """A peer hands every roll-out the same key."""
    keys = []

    def collected(setting: object, variables: dict, batch: object, key: jax.Array) -> tuple:
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return (), {}, []

    monkeypatch.setattr(algorithms, "collect", collected)
    state = SimpleNamespace(step=0, replace=lambda step: step)
    batches = SimpleNamespace(batch_at=lambda *_: SimpleNamespace(prompt=SimpleNamespace(example=[])))
    for seed, step in itertools.product((0, 1), (0, 1)):
        config = FrozenConfigDict(
            {"seed": seed, "algorithm": "grpo", "data": {"batch_size": 1}, "grpo": {"updates": 2}}
        )
        run = SimpleNamespace(
            setting=SimpleNamespace(config=config),
            sets={"train": batches},
            clock=SimpleNamespace(lap=lambda _: None),
            variables=lambda _: {},
            update=lambda state, frozen, parts, key: (state, {}),
            frozen={},
        )
        assert training.advance(run, state, step)[0] == 1
    assert len({*keys}) == 4


MISTAKES = [
    (["--workdir=W"], "--config is missing"),
    (["--config=configs/sft.py:tiny"], "--workdir is missing"),
    (["--config=configs/nope.py", "--workdir=W"], "no file configs/nope.py here, in "),
    (["--config=configs/sft.py:tony", "--workdir=W"], "no variant 'tony'; choose one of tiny, tiny_iemocap,"),
    (["--config=configs/sft.py:tiny", "--workdir=W", "--config.optim.lerning_rate=1"], "Did you mean"),
    (["--config=configs/sft.py:tiny", "--workdir=W", "--config.loss.nope=1"], "no such setting: nope"),
    (["--config=configs/sft.py:tiny", "--workdir=W", "--config.grpo.samples=4"], "no section grpo in it"),
    (
        ["--config=configs/sft.py:tiny", "--workdir=W", "--config.steps=-1", "--config.log_every=0"],
        "log_every=0 must be a whole number from 1 to 100000000; steps=-1 must be a whole",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_named(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        settings.parse(["train", *(a.replace("=W", f"={tmp_path / 'run'}") for a in arguments)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/grpoz.py:tiny", "--config.grpo.samples=1"], "a group needs at least 2"),
        (["--config=configs/sft.py:tiny", "--config.mesh.data=3"], "does not make 1 devices"),
    ],
    ids=["in the settings", "found with a device"],
)
def test_a_mistake_gets_one_line_and_its_code(arguments, message, tmp_path):
    corpus = tmp_path / "corpus"
    code, _, err = run("ambijax.train", f"--workdir={tmp_path / 'run'}", *arguments, f"--config.data.root={corpus}")
    assert code == 2, err
    assert not corpus.exists()  # writing it takes longer than finding the mistake
    assert message in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "grpoz", "pretrain"])
@pytest.mark.parametrize("variant", ["tiny", "tiny_iemocap", "cremad", "iemocap"])
def test_every_config_loads(name, variant):
    if (name, variant) in {("pretrain", v) for v in ("tiny_iemocap", "cremad", "iemocap")}:
        pytest.skip("the tiny model is made on the tiny corpus only")
    config, _ = settings.parse(["train", f"--config=configs/{name}.py:{variant}", "--workdir=unused"])
    assert config.algorithm == name.replace("pretrain", "sft")


def test_grpoz_differs_from_grpo_by_its_name():
    both = [
        settings.parse(["t", f"--config=configs/{n}.py:cremad", "--workdir=w"])[0].to_dict() for n in ("grpo", "grpoz")
    ]
    assert both[0].pop("algorithm") == "grpo"
    assert both[1].pop("algorithm") == "grpoz"
    assert both[0] == both[1]
