"""The real commands on the tiny model, started as a user starts them, and how two runs are compared."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--config.data.speakers=5", "--config.data.clips_per_speaker=4", "--config.eval.batch_size=4"]
# 12 training clips, batches of 4: the run crosses the epoch boundary at step 3.
SHORT = ["--config.steps=5", "--config.data.batch_size=4", "--config.eval.max_clips=2", "--config.eval.base=False"]
LIMIT = 900  # seconds any command may take on a busy machine

needs_tiny = pytest.mark.skipif(
    not (ROOT / "ambijax/tiny/model.safetensors").exists(), reason="the tiny model is not in this checkout"
)


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """What a command sees of the environment."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Of a flag given twice the last counts.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # a restart takes seconds
        **more,
    }


def start(
    *arguments: str | Path,
    devices: int = 1,
    stdout: int | None = subprocess.PIPE,
    stderr: int | IO = subprocess.PIPE,
    **more: str,
) -> subprocess.Popen:
    """Starts `python -m ...`; `more` are environment variables. A pipe that nobody reads stops it after 64 KiB."""
    command = [sys.executable, "-m", *map(str, arguments)]
    env = environment(devices, **more)
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=stderr, text=True)


def run(*arguments: str | Path, devices: int = 1) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(*arguments, devices=devices)
    out, err = process.communicate(timeout=2 * LIMIT)
    return process.returncode, out, err


def train(workdir: Path, corpus: Path, algorithm: str, *extra: str) -> list[str | Path]:
    """The arguments of a small training."""
    return [
        "ambijax.train",
        f"--config=configs/{algorithm}.py:tiny",
        f"--workdir={workdir}",
        f"--config.data.root={corpus}",
        *SMALL,
        *extra,
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def interrupt(
    arguments: list, when: Callable[[subprocess.Popen], bool], *how: signal.Signals, devices: int = 1
) -> tuple[int, str, float]:
    """Starts a command and signals it once `when(process)` holds; exit code, stderr, seconds from signal to exit."""
    process = start(*arguments, devices=devices, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None and not when(process):
        time.sleep(0.02)
    began = time.monotonic()
    for signum in how:  # without a pause: a step can end within a tenth of a second
        process.send_signal(signum)
    _, err = process.communicate(timeout=LIMIT)
    return process.returncode, err, time.monotonic() - began


def logged(workdir: Path, steps: int) -> Callable[..., bool]:
    """Holds once so many steps stand in metrics.jsonl."""
    log = workdir / "metrics.jsonl"
    return lambda *_: log.exists() and len(log.read_bytes().splitlines()) >= steps


def spent(process: subprocess.Popen) -> float:
    """CPU seconds of a process that was not waited for: how far it is, however busy the machine."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def newest(workdir: Path) -> Path:
    """The newest checkpoint."""
    return max((workdir / "checkpoints").glob("step_????????"))


def assert_same_state(a: Path, b: Path) -> None:
    """Bit-equal adapters, optimizer and counters, equal dev score."""
    assert newest(a).name == newest(b).name
    records = [json.loads((newest(workdir) / "digest.json").read_text()) for workdir in (a, b)]
    for entry in ("arrays", "metric", "meta"):
        assert records[0][entry] == records[1][entry]


def assert_same_run(a: Path, b: Path) -> None:
    """The same state, metrics and samples."""
    assert_same_state(a, b)
    clocks = {"seconds", "clips_per_second"}
    metrics = [
        [{k: v for k, v in line.items() if k not in clocks} for line in lines(workdir / "metrics.jsonl")]
        for workdir in (a, b)
    ]
    assert metrics[0] == metrics[1]
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


def only_message(err: str) -> str:
    """The one line that ambijax says, beside progress bars."""
    (line,) = [line for line in err.splitlines() if line.startswith("ambijax: ")]
    assert "Traceback" not in err, err
    return line
