"""SIGTERM and Ctrl-C at any moment of a run: it leaves with code 75 in time, and goes on as if nothing had been.

F02, F05, F06. The same with kill -9, at random moments and for all algorithms, is in test_faults_kill.py.
"""

import signal

import pytest

from tests.command import SHORT, assert_same_run, interrupt, logged, needs_tiny, only_message, run, spent, train

pytestmark = needs_tiny


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus") / "tiny"


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    code, _, err = run(*train(workdir, corpus, "sft", *SHORT))
    assert code == 0, err
    return workdir


def test_a_run_stopped_in_every_phase_ends_as_if_undisturbed(tmp_path, corpus, straight):
    workdir = tmp_path / "run"
    command = train(workdir, corpus, "sft", *SHORT)
    moments = {
        "imports": lambda process: spent(process) > 0.5,
        "start-up": lambda _: (workdir / "lock").exists(),
        "weights, features, compilation": lambda _: (workdir / "env.json").exists(),
        "training": logged(workdir, 2),
        "evaluation": lambda _: (workdir / "eval" / "test").exists(),
    }
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
    for (phase, moment), how in zip(moments.items(), signals, strict=True):
        code, err, _ = interrupt(command, moment, how)
        assert code == 75, (phase, err)
        assert "the same command resumes" in only_message(err), phase
    code, out, err = run(*command)
    assert code == 0, err
    assert "resumed" in out
    assert_same_run(straight, workdir)


def test_a_second_signal_leaves_at_once(tmp_path, corpus, straight):
    workdir = tmp_path / "run"
    command = train(workdir, corpus, "sft", *SHORT, "--config.steps=1000", "--config.checkpoint.grace=1000")
    code, err, _ = interrupt(command, logged(workdir, 1), signal.SIGINT, signal.SIGTERM)  # two of a kind may become one
    assert code == 75, err
    only_message(err)


@pytest.mark.parametrize(
    "algorithm", ["grpoz", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "grpo"))]
)
def test_every_algorithm_resumes_bit_exactly(algorithm, tmp_path, corpus):
    """F06, with a window of accumulation under way in every step. SFT is above, kills of all four are slow."""
    small = [
        *SHORT,
        f"--config.{algorithm.rstrip('z')}.samples=2",
        "--config.data.max_tokens=48",
        "--config.optim.accumulate=2",
    ]
    code, _, err = run(*train(tmp_path / "straight", corpus, algorithm, *small))
    assert code == 0, err
    cut = train(tmp_path / "cut", corpus, algorithm, *small)
    for steps in (2, 4):  # inside epoch 0, inside epoch 1
        code, err, _ = interrupt(cut, logged(tmp_path / "cut", steps), signal.SIGTERM)
        assert code == 75, err
    code, out, err = run(*cut)
    assert code == 0, err
    assert "resumed" in out
    assert_same_run(tmp_path / "straight", tmp_path / "cut")
