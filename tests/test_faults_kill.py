"""Kills, full disks and two processes: the slow tier of the faults, about half an hour on two cores.

    python -m pytest -m slow tests/test_faults_kill.py

F01, F03, F04, F08, F09, F47. What the runs reached is in docs/reliability.md.
"""

import json
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import command
from tests.command import assert_same_run, interrupt, lines, logged, needs_tiny, newest, only_message, run, train

pytestmark = [needs_tiny, pytest.mark.slow]
KILLS = 20
STEPS = 12
SHORT = [
    f"--config.steps={STEPS}",
    "--config.data.batch_size=4",
    "--config.data.max_tokens=48",
    "--config.eval.max_clips=2",
    "--config.eval.base=False",
    "--config.checkpoint.every=2",
    "--config.eval.every=4",
    "--config.eval.checkpoint=best",
    "--config.eval.batch_size=2",  # two batches of the four clips of dev: an evaluation can be cut in the middle
    "--config.optim.accumulate=2",
]
SAMPLES = {"sft": [], **{name: [f"--config.{name.rstrip('z')}.samples=2"] for name in ("dpo", "grpo", "grpoz")}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus") / "tiny"


@pytest.mark.parametrize("algorithm", SAMPLES)
def test_a_killed_run_resumes_from_its_last_checkpoint(algorithm, tmp_path, corpus, record_property):
    """F01: kill -9 at random moments of starting, training, saving and evaluating."""
    extra = [*SHORT, *SAMPLES[algorithm]]
    code, _, err = run(*train(tmp_path / "straight", corpus, algorithm, *extra))
    assert code == 0, err
    cut = tmp_path / "cut"
    began = time.monotonic()
    code, _, err = run(*train(tmp_path / "again", corpus, algorithm, *extra))  # F07, and how long a start takes
    assert code == 0, err
    assert_same_run(tmp_path / "straight", tmp_path / "again")
    whole = time.monotonic() - began
    dice, lost, kills = random.Random(algorithm), [], 0
    while kills < KILLS:
        done = _steps_done(cut)
        moment = time.monotonic() + dice.uniform(0.1, 0.9) * whole
        code, err, _ = interrupt(
            train(cut, corpus, algorithm, *extra), lambda at=moment: time.monotonic() > at, signal.SIGKILL
        )
        assert code in (0, -signal.SIGKILL), err
        kills += code != 0
        logged_steps, saved = _steps_logged(cut), _steps_done(cut)
        assert saved >= done
        lost.append(logged_steps - saved)
        if code == 0:
            assert_same_run(tmp_path / "straight", cut)
            shutil.rmtree(cut)
    code, _, err = run(*train(cut, corpus, algorithm, *extra))
    assert code == 0, err
    assert_same_run(tmp_path / "straight", cut)
    record_property("kills", kills)
    record_property("most steps lost", max(lost))
    assert max(lost) <= 3  # one interval, and the step under way


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_evaluation_during_training_goes_on_where_it_was_cut(how, tmp_path, corpus):
    """F01, F02 in the middle of every evaluation on dev: no step is done again, and no clip of whole batches."""
    code, _, err = run(*train(tmp_path / "straight", corpus, "sft", *SHORT))
    assert code == 0, err
    cut = tmp_path / "cut"
    predictions = cut / "eval" / "dev" / "predictions.jsonl"
    for step in (0, 4, 8, 12):
        before = predictions.read_bytes() if predictions.is_file() else b""

        def begun(before=before, step=step) -> bool:
            found = predictions.read_bytes() if predictions.is_file() and _steps_done(cut) == step else before
            return found != before and len(found.splitlines()) in (2, 3)

        code, err, _ = interrupt(train(cut, corpus, "sft", *SHORT), begun, how)
        assert code == (75 if how == signal.SIGTERM else -how), err
        assert _steps_done(cut) == step
        assert how == signal.SIGKILL or "stopped; every finished step is saved" in only_message(err)
    code, _, err = run(*train(cut, corpus, "sft", *SHORT))
    assert code == 0, err
    assert_same_run(tmp_path / "straight", cut)
    assert (cut / "eval/test/predictions.jsonl").read_bytes() == (
        tmp_path / "straight/eval/test/predictions.jsonl"
    ).read_bytes()


def _steps_done(workdir: Path) -> int:
    saved = (workdir / "checkpoints").glob("step_????????")
    return max((int(path.name.removeprefix("step_")) for path in saved), default=0)


def _steps_logged(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("algorithm", SAMPLES)
def test_signals_at_random_moments(algorithm, tmp_path, corpus, record_property):
    """F02, F05: SIGTERM or Ctrl-C at random moments; every process leaves with 75 in time or is done."""
    extra = [*SHORT, *SAMPLES[algorithm]]
    began = time.monotonic()
    code, _, err = run(*train(tmp_path / "straight", corpus, algorithm, *extra))
    assert code == 0, err
    whole = time.monotonic() - began
    dice, waits = random.Random(algorithm), []
    for _ in range(10):
        moment = time.monotonic() + dice.uniform(0.0, 0.6) * whole
        how = dice.choice([signal.SIGTERM, signal.SIGINT])
        arguments = train(tmp_path / "cut", corpus, algorithm, *extra)
        code, err, seconds = interrupt(arguments, lambda at=moment: time.monotonic() > at, how)
        if code == -how:  # before Python ran its first line
            continue
        assert code in (0, 75), err
        if code == 75:
            waits.append(seconds)
            only_message(err)
    code, _, err = run(*train(tmp_path / "cut", corpus, algorithm, *extra))
    assert code == 0, err
    assert_same_run(tmp_path / "straight", tmp_path / "cut")
    record_property("signals", len(waits))
    record_property("slowest, s", round(max(waits), 1))


def test_another_number_of_devices_continues_within_rounding(tmp_path, corpus, record_property):
    """F08: 8 -> 4 -> 1 and 1 -> 8 devices; the losses of a run on one device within 1e-5."""
    eight = ["--config.steps=6", "--config.data.batch_size=8", "--config.eval.max_clips=2", "--config.eval.base=False"]
    code, _, err = run(*train(tmp_path / "straight", corpus, "sft", *eight))
    assert code == 0, err
    expected = lines(tmp_path / "straight" / "metrics.jsonl")
    largest = 0.0
    for name, devices in (("down", (8, 4, 1)), ("up", (1, 8))):
        workdir = tmp_path / name
        for count, stop in zip(devices, (2, 4, None), strict=False):
            arguments = train(workdir, corpus, "sft", *eight)
            if count == devices[-1]:
                code, _, err = run(*arguments, devices=count)
                assert code == 0, err
            else:
                code, err, _ = interrupt(arguments, logged(workdir, stop), signal.SIGTERM, devices=count)
                assert code == 75, err
        for one, other in zip(expected, lines(workdir / "metrics.jsonl"), strict=True):
            largest = max(largest, abs(one["loss"] - other["loss"]) / one["loss"])
    record_property("largest relative difference of a loss", largest)
    assert largest < 1e-5


def test_a_disk_that_fills_up_does_not_stop_training(tmp_path, corpus):
    """F09: three saves do not fit; the run goes on, says so in a line each, and refuses to call itself done."""
    private = ["unshare", "--map-root-user", "--mount"]  # a mount needs no privilege in its own namespace
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare") or subprocess.run([*private, "mount", "-t", "tmpfs", "none", disk]).returncode:
        pytest.skip("needs a mount namespace")
    code, _, err = run(*train(tmp_path / "straight", corpus, "sft", *SHORT))
    assert code == 0, err
    size = sum(file.stat().st_size for file in newest(tmp_path / "straight").rglob("*") if file.is_file())
    keep = "--config.checkpoint.keep=100"
    arguments = shlex.join([sys.executable, "-m", *map(str, train(disk, corpus, "sft", *SHORT, keep))])
    rescued = tmp_path / "rescued"
    script = (
        f"mount -t tmpfs -o size={int(3.7 * size) + 2**20} none {disk} && {arguments}; code=$?; "
        f"cp -r {disk} {rescued}; exit $code"
    )
    env = command.environment()
    done = subprocess.run([*private, "sh", "-c", script], capture_output=True, text=True, cwd=command.ROOT, env=env)
    assert done.returncode == 2, done.stderr
    assert "make room" in only_message(done.stderr)
    warnings = [line for line in done.stderr.splitlines() if "is not written" in line]
    assert warnings
    for line in warnings:
        assert re.search(r"needs \d+ bytes, \d+ are free", line)
        assert str(disk) in line
    code, _, err = run(*train(rescued, corpus, "sft", *SHORT))  # on a disk with room
    assert code == 0, err
    assert_same_run(tmp_path / "straight", rescued)


def _pair(workdir: Path, corpus: Path, *extra: str) -> list[subprocess.Popen]:
    """One run on two processes of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    return [
        command.start(
            *train(workdir, corpus, "sft", *SHORT, *extra),
            stdout=subprocess.DEVNULL,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]


def _wait(holds, *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + command.LIMIT
    while not holds() and time.monotonic() < deadline and all(p.poll() is None for p in processes):
        time.sleep(0.05)


def test_two_processes_leave_at_the_same_step(tmp_path, corpus):
    """F03: SIGTERM to one of two; both save the same step and exit 75; together they resume."""
    code, _, err = run(*train(tmp_path / "straight", corpus, "sft", *SHORT))
    assert code == 0, err
    workdir = tmp_path / "pair"
    pair = _pair(workdir, corpus, f"--config.checkpoint.grace={command.LIMIT}")  # the machine may be busy
    _wait(logged(workdir, 3), *pair)
    pair[1].send_signal(signal.SIGTERM)
    errs = [p.communicate(timeout=command.LIMIT)[1] for p in pair]
    assert [p.returncode for p in pair] == [75, 75], errs
    stopped = {re.search(r"after step (\d+)", only_message(err))[1] for err in errs}
    assert stopped == {str(_steps_done(workdir))}
    pair = _pair(workdir, corpus)
    errs = [p.communicate(timeout=2 * command.LIMIT)[1] for p in pair]
    assert [p.returncode for p in pair] == [0, 0], errs
    steps = ([r for r in lines(w / "metrics.jsonl") if "loss" in r] for w in (tmp_path / "straight", workdir))
    for one, other in zip(*steps, strict=True):  # the other lines are evaluations
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_who_is_left_of_two_processes_stops(tmp_path, corpus):
    """F04: kill -9 of one of two; the other names it and leaves."""
    workdir = tmp_path / "pair"
    pair = _pair(workdir, corpus, "--config.hosts.heartbeat=5")
    _wait(logged(workdir, 2), *pair)
    pair[1].kill()
    _, err = pair[0].communicate(timeout=command.LIMIT)
    pair[1].communicate()
    assert pair[0].returncode not in (0, -signal.SIGKILL), err
    assert "no sign of life" in err


def test_memory_does_not_grow(tmp_path, corpus, record_property):
    """F47: host memory grows by less than 50 MB over 500 steps."""
    workdir = tmp_path / "run"
    many = ["--config.steps=600", "--config.data.batch_size=1", "--config.checkpoint.every=50", "--config.log_every=1"]
    many += ["--config.optim.accumulate=1", "--config.eval.every=100"]
    process = command.start(*train(workdir, corpus, "sft", *SHORT, *many), stdout=subprocess.DEVNULL)
    resident = {}
    for step in (100, 600):
        _wait(logged(workdir, step), process)
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident[step] = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
    process.kill()
    process.communicate()
    record_property("MB grown", round(resident[600] - resident[100], 1))
    assert resident[600] - resident[100] < 50, json.dumps(resident)
