"""Several processes on the loopback give the run of one process, leave together, and name whoever is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from ambijax import hosts, signals
from ambijax.errors import ConfigError

ROOT = Path(__file__).parents[1]
HEARTBEAT = 6  # seconds

# A run of a few seconds: whatever jax.distributed does, without a model.
STEPS = """
import sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from ambijax import errors, hosts, signals

def main():
    with hosts.cluster(heartbeat={heartbeat}, start=60), signals.guarding(lambda: True, 30):
        assert hosts.from_main([jax.process_index(), "ü"]) == [0, "ü"]
        for step in range(600):
            total = multihost_utils.process_allgather(np.int32(1)).sum()
            assert total == jax.process_count()
            print("step", step, flush=True)
            if step == 3 and jax.process_index() == {broken}:
                raise errors.DataError("its disk is gone")
            if hosts.leave_requested():
                raise errors.Preempted(f"left after step {{step}}")
            time.sleep(0.1)

errors.run(main)
"""


def test_word_that_all_leave_is_no_second_signal(monkeypatch):
    """It may come from the store while the loop learns the same by itself: the save under way must not be cut."""
    left = []
    monkeypatch.setattr(signals, "_leave", left.append)
    monkeypatch.setattr(signals, "_asked", threading.Event())
    monkeypatch.setattr(signals, "_agreed", threading.Event())
    with signals.guarding(lambda: True, 30):
        signals.heard()
        assert signals.wanted()
        signals.ask()
    assert not left


def _environment(process: int, processes: int, port: int, devices: int) -> dict[str, str]:
    cluster = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }
    # XLA gives the others 30 seconds to come to a collective; on fewer cores than processes one may still compile then.
    patience = [f"--xla_cpu_{what}_timeout_seconds=600" for what in ("collective", "collective_call_terminate")]
    flags = [f"--xla_force_host_platform_device_count={devices}", *patience]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)} | (cluster if processes > 1 else {})


def _start(arguments: list[str], processes: int, devices: int = 1) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *arguments], env=_environment(i, processes, port, devices), **how)
        for i in range(processes)
    ]


def _steps(broken: int = -1) -> list[subprocess.Popen]:
    """Two processes that have gone through three steps."""
    started = _start(["-c", STEPS.format(heartbeat=HEARTBEAT, broken=broken)], 2)
    for process in started:
        while (line := process.stdout.readline()) and "step 2" not in line:
            pass
    return started


def _ends(process: subprocess.Popen, timeout: float) -> tuple[int, str]:
    _, err = process.communicate(timeout=timeout)
    return process.returncode, err


def test_a_signal_to_one_process_makes_both_leave_at_the_same_step():
    first, second = _steps()
    second.send_signal(signal.SIGTERM)
    ends = [_ends(process, 60) for process in (first, second)]
    assert [code for code, _ in ends] == [75, 75]
    lines = [[line for line in err.splitlines() if line.startswith("ambijax:")] for _, err in ends]
    assert lines[0] == lines[1]
    assert "left after step" in lines[0][0]


def test_a_failing_process_tells_the_others_why():
    first, second = _steps(broken=1)
    code, err = _ends(first, 60)
    assert code == 3
    assert f"process 1 (pid {second.pid}" in err
    assert "stopped: its disk is gone" in err
    assert _ends(second, 60)[0] == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_within_the_heartbeat(lost, how):
    both = _steps()
    both[lost].send_signal(how)
    began = time.monotonic()
    try:
        code, err = _ends(both[1 - lost], 60)
        assert time.monotonic() - began < HEARTBEAT + 5
        assert code != 0
        if lost == 0 and how == signal.SIGKILL:  # jax itself aborts at once: process 0 is its coordinator
            assert "leader" in err
        else:
            assert f"process {lost} (pid {both[lost].pid}" in err
            assert "no sign of life" in err
    finally:
        both[lost].kill()
        both[lost].communicate()


@pytest.mark.slow
def test_processes_that_end_leave_their_threads_behind_in_order():
    # One that is inside the store's client when Python ends would abort its process; so often they always are.
    code = STEPS.replace("def main", "hosts.PERIOD = 0.002\ndef main").replace("range(600)", "range(3)")
    for _ in range(4):
        ends = [_ends(process, 600) for process in _start(["-c", code.format(heartbeat=60, broken=-1)], 3)]
        assert [exit_code for exit_code, _ in ends] == [0, 0, 0], ends


def _training(workdir: Path, corpus: Path, algorithm: str, *extra: str) -> list[str]:
    keys = ["data.speakers=5", "data.clips_per_speaker=4", "eval.batch_size=4", "steps=3", "hosts.heartbeat=60"]
    keys += [f"data.root={corpus}", "checkpoint.every=2", *extra]
    return ["-m", "ambijax.train", f"--config=configs/{algorithm}.py:tiny", f"--workdir={workdir}"] + [
        f"--config.{key}" for key in keys
    ]


def _lines(path: Path) -> list[dict]:
    clocks = ("seconds", "clips_per_second")
    return [{k: v for k, v in json.loads(x).items() if k not in clocks} for x in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "several", "devices", "mesh"),
    [
        ("sft", (2, 4), 8, ("data.batch_size=8", "mesh.data=2", "mesh.fsdp=4")),
        ("grpoz", (2, 4), 8, ("data.batch_size=8", "mesh.data=2", "mesh.fsdp=4")),
        ("sft", (3, 6), 6, ("data.batch_size=6", "mesh.data=3", "mesh.tensor=2")),
    ],
)
def test_several_processes_give_the_run_of_one(tmp_path, algorithm, several, devices, mesh):
    # As many devices each time, so that all sum in the same order but for what crosses processes.
    few = ["grpo.samples=2", "grpo.gold_adv_clip=10.0"] if algorithm == "grpoz" else []
    corpus = tmp_path / "corpus"
    for processes in (1, *several):
        training = _training(tmp_path / str(processes), corpus, algorithm, *mesh, *few)
        started = _start(training, processes, devices // processes)
        try:
            ends = [_ends(process, 3600) for process in started]
        finally:
            for process in started:
                process.kill()
        assert [code for code, _ in ends] == [0] * processes, ends
    for processes in several:
        _assert_same_run(tmp_path / "1", tmp_path / str(processes))


def _assert_same_run(one: Path, several: Path) -> None:
    for a, b in zip(_lines(one / "metrics.jsonl"), _lines(several / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-5, atol=1e-6)
    if (one / "samples.jsonl").exists():
        texts = [[m.get("text") for s in _lines(r / "samples.jsonl") for m in s["group"]] for r in (one, several)]
        assert texts[0] == texts[1]
    wanted, found = (_lines(r / "eval/test/predictions.jsonl") for r in (one, several))
    assert [p["id"] for p in wanted] == [p["id"] for p in found]
    np.testing.assert_allclose([p["readout"] for p in wanted], [p["readout"] for p in found], atol=1e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not set"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_PROCESS_ID=2 must"),
        ({"JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "h:1"}, "whole numbers"),
    ],
)
def test_an_incomplete_cluster_is_named(names, message, monkeypatch):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        hosts.connect(heartbeat=60, start=60)


def _alone(code: str, **environment: str) -> subprocess.Popen:
    """A program that nobody told of a cluster."""
    code = "import time, jax; from ambijax import hosts; hosts.connect(heartbeat=1, start=10); " + code
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    env = {key: value for key, value in os.environ.items() if key not in names} | {"JAX_PLATFORMS": "cpu"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-u", "-c", code], cwd=ROOT, env=env | environment, **streams)


def test_a_plain_machine_is_a_cluster_of_one_behind_a_proxy_too():
    # gRPC asks the proxy even for 127.0.0.1, and would wait five minutes for it.
    proxy = "http://127.0.0.1:1"
    process = _alone(
        "print(jax.distributed.is_initialized(), jax.process_count())", http_proxy=proxy, https_proxy=proxy
    )
    out, err = process.communicate(timeout=100)
    assert out.strip() == "True 1", err


@pytest.mark.slow
def test_a_process_alone_survives_a_suspension():
    """A laptop that sleeps, a job that the scheduler suspends: twice the heartbeat and ten seconds would end it."""
    process = _alone("print('here'); [time.sleep(1) for _ in range(20)]; print(jax.numpy.ones(3).sum())")
    assert process.stdout.readline().strip() == "here"
    process.send_signal(signal.SIGSTOP)
    time.sleep(45)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out.strip()) == (0, "3.0"), err


class _Store:
    """A key-value store in which process 0 lives, and which does not answer every third call."""

    def __init__(self) -> None:
        self.calls, self.asked = 0, threading.Event()

    def _answer(self) -> None:
        self.calls += 1
        if self.calls > 60:
            self.asked.set()
        if self.calls % 3 == 0:
            raise RuntimeError("UNAVAILABLE")

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool) -> None:
        del key, value, allow_overwrite
        self._answer()

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        self._answer()
        return [(f"{prefix}beat/{process}", str(self.calls)) for process in range(2)]

    def key_value_try_get(self, key: str) -> str:
        raise RuntimeError(key)


def test_a_store_that_does_not_answer_once_ends_nobody(monkeypatch):
    state = types.SimpleNamespace(client=_Store(), process_id=1, num_processes=2)
    monkeypatch.setattr(hosts.distributed, "global_state", state)
    monkeypatch.setattr(hosts.signals, "share", lambda linger: None)
    ended = []
    monkeypatch.setattr(hosts._Watch, "_exit", lambda watch, code: ended.append(code))
    watch = hosts._Watch(heartbeat=1.0)
    assert state.client.asked.wait(60)
    watch._over.set()
    for thread in watch._threads:
        thread.join()
    assert not ended
