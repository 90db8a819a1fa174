"""SIGTERM and Ctrl-C: a run leaves with code 75 in time, and goes on as if nothing had been. F05, F06.

In every phase of a run: test_train.py. With kill -9, at random moments and for all algorithms: test_faults_kill.py.
"""

import signal
import subprocess
import sys

import pytest

from tests.command import SHORT, assert_same_run, interrupt, logged, needs_tiny, only_message, run, train

pytestmark = needs_tiny


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus") / "tiny"


def test_a_second_signal_leaves_at_once(tmp_path, corpus):
    workdir = tmp_path / "run"
    command = train(workdir, corpus, "sft", *SHORT, "--config.checkpoint.grace=1000")
    code, err, _ = interrupt(command, logged(workdir, 1), signal.SIGINT, signal.SIGTERM)  # two of a kind may become one
    assert code == 75, err
    only_message(err)


LAST = """
import os, signal
from ambijax import signals
class Last:
    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGTERM):
        kill(me, number)  # when the interpreter has given signals back
last = Last()
signals.catch()
"""


@pytest.mark.parametrize(("end", "code"), [("", -signal.SIGTERM), ("signals.done()", 0)])
def test_a_signal_after_the_end_is_no_failure(end, code):
    assert subprocess.run([sys.executable, "-c", LAST + end], check=False).returncode == code


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "grpoz"])
def test_every_algorithm_resumes_bit_exactly(algorithm, tmp_path, corpus):
    """F06, with a window of accumulation under way in every step."""
    samples = {"sft": [], "dpo": ["--config.dpo.samples=2"]}.get(algorithm, ["--config.grpo.samples=2"])
    small = [*SHORT, *samples, "--config.optim.accumulate=2"]
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
