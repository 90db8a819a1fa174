"""Kills, damage, full disks and two processes: the slow tier of the faults, about half an hour on two cores.

    python -m pytest -m slow tests/test_faults_kill.py

F01, F03, F04, F08, F09, F47. What the runs reached is in docs/reliability.md.
"""

import functools
import json
import math
import os
import random
import re
import resource
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
from tests.command import (
    assert_same_run,
    assert_same_state,
    interrupt,
    lines,
    logged,
    needs_tiny,
    newest,
    only_message,
    run,
    spent,
    train,
)

pytestmark = [needs_tiny, pytest.mark.slow]
KILLED, SIGNALLED, DAMAGED = 20, 8, 6  # starts of each algorithm that are killed, signalled, damaged after
STEPS = 8
SHORT = [
    f"--config.steps={STEPS}",
    "--config.data.batch_size=4",
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


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpus):
    """Of an algorithm: a run that nobody disturbed, and the CPU seconds of another, which is bit-equal to it (F07)."""

    @functools.cache
    def ran(algorithm: str) -> tuple[Path, float]:
        root = tmp_path_factory.mktemp(algorithm)
        for name in ("straight", "again"):  # the first one compiles
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            code, _, err = run(*train(root / name, corpus, algorithm, *SHORT, *SAMPLES[algorithm]))
            assert code == 0, err
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert_same_run(root / "straight", root / "again")
        return root / "straight", after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return ran


@pytest.mark.parametrize(
    ("how", "cuts"),
    [([signal.SIGKILL], KILLED), ([signal.SIGTERM, signal.SIGINT], SIGNALLED)],
    ids=["killed", "signalled"],
)
@pytest.mark.parametrize("algorithm", SAMPLES)
def test_a_run_cut_at_random_moments_ends_as_if_undisturbed(
    algorithm, how, cuts, tmp_path, corpus, straight, record_property
):
    """F01, F02, F05: kill -9, SIGTERM or Ctrl-C at random moments of starting, training, saving and evaluating.

    A moment is the CPU time that the process has spent, so that cuts are as many and as late on a busy machine.
    """
    expected, whole = straight(algorithm)
    cut, dice, lost, seconds, ended = tmp_path / "cut", random.Random(algorithm), [], [], 0
    arguments = train(cut, corpus, algorithm, *SHORT, *SAMPLES[algorithm])
    while len(lost) < cuts:
        saved, moment, signum = _steps_done(cut), dice.uniform(0.05, 0.9) * whole, dice.choice(how)
        code, err, took = interrupt(arguments, lambda process, at=moment: spent(process) > at, signum)
        if code == 0:  # it was done before that moment
            assert_same_run(expected, cut)
            shutil.rmtree(cut)
            ended += 1
            continue
        assert code == (-signum if signum == signal.SIGKILL else 75), err
        assert signum == signal.SIGKILL or "the same command resumes" in only_message(err)
        assert _steps_done(cut) >= saved
        lost.append(_steps_logged(cut) - _steps_done(cut))
        seconds.append(took)
    code, _, err = run(*arguments)
    assert code == 0, err
    assert_same_run(expected, cut)
    record_property("cuts", len(lost))
    record_property("runs they were part of", ended + 1)
    record_property("most steps lost", max(lost))
    record_property("slowest to leave, s", round(max(seconds), 1))
    assert max(lost) <= 3  # one interval, and the step under way


def _flip(file: Path, size: int, dice: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[dice.randrange(size)] ^= 1 << dice.randrange(8)
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": _flip,
    "cut short": lambda file, size, dice: os.truncate(file, dice.randrange(size)),
    "zeroed": lambda file, size, dice: file.write_bytes(bytes(size)),
    "removed": lambda file, size, dice: file.unlink(),
}


def _damage(workdir: Path, dice: random.Random) -> set[str]:
    """Damages three files of a run, whichever, and names them."""
    files = sorted(path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = dice.sample(files, 3)
    for file in chosen:
        DAMAGE[dice.choice([*DAMAGE])](file, file.stat().st_size, dice)
    return {file.relative_to(workdir).as_posix() for file in chosen}


@pytest.mark.parametrize("algorithm", SAMPLES)
def test_damaged_files_are_mended_or_refused_in_one_line(algorithm, tmp_path, corpus, straight, record_property):
    """Between a kill and the next start files of the run are damaged: it goes on, in the end bit for bit, or refuses.

    A refusal is one line and names the directory; the files are put back then.
    """
    expected, whole = straight(algorithm)
    cut, copy, dice = tmp_path / "cut", tmp_path / "copy", random.Random(algorithm)
    arguments = train(cut, corpus, algorithm, *SHORT, *SAMPLES[algorithm])
    damaged, refused, said, done = [], 0, "", False
    while not done:
        last = len(damaged) == DAMAGED
        moment = math.inf if last else dice.uniform(0.3, 0.9) * whole
        code, err, _ = interrupt(arguments, lambda process, at=moment: spent(process) > at, signal.SIGKILL)
        said += err
        if code in (2, 3):
            assert str(cut) in only_message(err)
            shutil.rmtree(cut)
            copy.rename(cut)
            refused += 1
            continue
        assert code in (0, -signal.SIGKILL), err
        done = last and code == 0
        if not last:  # also where it was done before that moment
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(cut, copy)
            damaged.append(_damage(cut, dice))
    names = set.union(*damaged)
    (assert_same_state if names & {"metrics.jsonl", "samples.jsonl"} else assert_same_run)(expected, cut)
    chosen = [(workdir / "eval/test/predictions.jsonl").read_bytes() for workdir in (expected, cut)]
    assert (
        chosen[0] == chosen[1] or "can no longer be chosen" in said
    )  # the best checkpoint was lost, and that was said
    record_property("damaged", sum(map(len, damaged)))
    record_property("of them different", len(names))
    record_property("refused", refused)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_evaluation_during_training_goes_on_where_it_was_cut(how, tmp_path, corpus, straight):
    """F01, F02 in the middle of every evaluation on dev: no step is done again, and no clip of whole batches."""
    expected, _ = straight("sft")
    cut = tmp_path / "cut"
    predictions = cut / "eval" / "dev" / "predictions.jsonl"
    for step in (0, 4, 8):
        before = predictions.read_bytes() if predictions.is_file() else b""

        def begun(_, before=before, step=step) -> bool:
            found = predictions.read_bytes() if predictions.is_file() and _steps_done(cut) == step else before
            return found != before and len(found.splitlines()) in (2, 3)

        code, err, _ = interrupt(train(cut, corpus, "sft", *SHORT), begun, how)
        assert code == (75 if how == signal.SIGTERM else -how), err
        assert _steps_done(cut) == step
        assert how == signal.SIGKILL or "stopped; every finished step is saved" in only_message(err)
    code, _, err = run(*train(cut, corpus, "sft", *SHORT))
    assert code == 0, err
    assert_same_run(expected, cut)
    tests = [(workdir / "eval/test/predictions.jsonl").read_bytes() for workdir in (expected, cut)]
    assert tests[0] == tests[1]


def _steps_done(workdir: Path) -> int:
    saved = (workdir / "checkpoints").glob("step_????????")
    return max((int(path.name.removeprefix("step_")) for path in saved), default=0)


def _steps_logged(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"  # whose last line may be an evaluation's
    return sum(b'"loss":' in line for line in path.read_bytes().splitlines()) if path.exists() else 0


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


def test_a_disk_that_fills_up_does_not_stop_training(tmp_path, corpus, straight):
    """F09: three saves do not fit; the run goes on, says so in a line each, and refuses to call itself done."""
    private = ["unshare", "--map-root-user", "--mount"]  # a mount needs no privilege in its own namespace
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare") or subprocess.run([*private, "mount", "-t", "tmpfs", "none", disk]).returncode:
        pytest.skip("needs a mount namespace")
    expected, _ = straight("sft")
    size = sum(file.stat().st_size for file in newest(expected).rglob("*") if file.is_file())
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
    assert_same_run(expected, rescued)


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


def test_two_processes_leave_at_the_same_step(tmp_path, corpus, straight):
    """F03: SIGTERM to one of two; both save the same step and exit 75; together they resume."""
    expected, _ = straight("sft")
    workdir = tmp_path / "pair"
    pair = _pair(workdir, corpus, f"--config.checkpoint.grace={command.LIMIT}")  # the machine may be busy
    _wait(logged(workdir, 3), *pair)
    pair[1].send_signal(signal.SIGTERM)
    errs = [p.communicate(timeout=command.LIMIT)[1] for p in pair]
    assert [p.returncode for p in pair] == [75, 75], errs
    where = f"after step {_steps_done(workdir)};"
    assert all(where in only_message(err) for err in errs), errs
    pair = _pair(workdir, corpus)
    errs = [p.communicate(timeout=2 * command.LIMIT)[1] for p in pair]
    assert [p.returncode for p in pair] == [0, 0], errs
    steps = ([r for r in lines(w / "metrics.jsonl") if "loss" in r] for w in (expected, workdir))
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


@pytest.mark.parametrize(("algorithm", "last"), [("sft", 600), ("grpoz", 300)])
def test_memory_does_not_grow(algorithm, last, tmp_path, corpus, record_property):
    """F47: host memory grows by less than 50 MB over 500 steps, and by as little a step where they are fewer."""
    workdir = tmp_path / "run"
    many = [
        *SAMPLES[algorithm],
        f"--config.steps={last}",
        "--config.data.batch_size=1",
        "--config.checkpoint.every=50",
        "--config.log_every=1",
    ]
    many += ["--config.optim.accumulate=1", "--config.eval.every=100"]
    resident = {}
    with (tmp_path / "said").open("w") as said:  # of 600 steps' progress
        process = command.start(
            *train(workdir, corpus, algorithm, *SHORT, *many), stdout=subprocess.DEVNULL, stderr=said
        )
        for step in (100, last):
            _wait(logged(workdir, step), process)
            assert process.poll() is None, (tmp_path / "said").read_text()
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident[step] = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024
        process.kill()
        process.wait()
    record_property("MB grown", round(resident[last] - resident[100], 1))
    assert resident[last] - resident[100] < 50 * (last - 100) / 500, json.dumps(resident)
