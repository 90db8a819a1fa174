"""The launchers as an operator meets them: dry runs, missing variables, doing it twice, signals. No cloud is used."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
TPU = {
    "PROJECT": "p",
    "ZONE": "z",
    "ACCELERATOR": "v5litepod-8",
    "RUNTIME": "v2-alpha-tpuv5-lite",
    "REPOSITORY": "https://example.org/ambijax.git",
    "REVISION": "main",
    "BUCKET": "bucket",
    "CONFIG": "configs/grpoz.py",
    "CHECKPOINT": "/home/me/runs/checkpoints/base",
    "RUN_ID": "grpoz-0",
    "INTERVAL": "0",
}
GKE = {
    "RUN_ID": "grpoz-0",
    "IMAGE": "registry/ambijax:1",
    "CONFIG": "configs/grpoz.py",
    "BUCKET": "bucket",
    "DATA": "data/cremad",
    "SERVICE_ACCOUNT": "trainer",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "2x4",
    "HOSTS": "2",
    "CHIPS_A_HOST": "4",
}

TRAINING = """#!/bin/bash
trap 'echo stopped $JAX_PROCESS_ID >> stopped; exit 75' TERM
echo started $JAX_PROCESS_ID >> started
while :; do sleep 0.1; done
"""


@pytest.fixture
def fakes(tmp_path):
    """Commands that record how they were called; what they print and return is in files beside the record."""
    directory = tmp_path / "bin"
    directory.mkdir()

    def make(name: str, body: str = "") -> Path:
        path = directory / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >> {tmp_path}/calls\n{body}\n')
        path.chmod(0o755)
        return path

    for name in ("gcloud", "srun", "scontrol", "kubectl", "sky", "docker"):
        make(name, "cat > /dev/null" if name == "kubectl" else "")
    return make


def _calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.exists() else []


def _launch(tmp_path: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), **variables}
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    done = subprocess.run(["shellcheck", "-x", script], cwd=LAUNCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "shown"),
    [
        (
            "local.sh",
            (),
            {"CONFIG": "configs/sft.py:tiny", "RUN_ID": "a"},
            "ambijax.train --config=configs/sft.py:tiny",
        ),
        ("slurm.sbatch", (), {"CONFIG": "configs/sft.py", "RUN_ID": "a"}, "srun "),
        ("tpu.sh", ("babysit",), TPU, "queued-resources create grpoz-0"),
        ("gke.sh", ("apply",), GKE, "kubectl apply"),
        ("sky.sh", ("launch",), {"RUN_ID": "a", "CONFIG": "c", "BUCKET": "gs://b", "DATA": "d"}, "--env DATA=d"),
        ("docker.sh", ("run",), {"RUN_ID": "a", "IMAGE": "i", "CONFIG": "c", "RUNS": "/r"}, "docker run"),
    ],
)
def test_a_dry_run_prints_and_does_nothing(script, arguments, variables, shown, fakes, tmp_path):
    done = _launch(tmp_path, script, *arguments, **variables, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert shown in done.stderr
    assert _calls(tmp_path) == []


DOCKER = {"RUN_ID": "a", "IMAGE": "i", "CONFIG": "c", "RUNS": "/r"}
SKY = {"RUN_ID": "a", "CONFIG": "c", "BUCKET": "gs://b", "DATA": "data/cremad"}
ACTIONS = [("tpu.sh", a, TPU) for a in ("create", "setup", "run", "logs", "status", "babysit", "delete")]
ACTIONS += [("gke.sh", a, GKE) for a in ("apply", "status", "logs", "delete")]
ACTIONS += [("sky.sh", a, SKY) for a in ("launch", "status", "logs", "cancel")]
ACTIONS += [("docker.sh", a, DOCKER) for a in ("build", "run", "stop")]


@pytest.mark.parametrize(("script", "action", "variables"), ACTIONS)
def test_no_action_touches_anything_in_a_dry_run(script, action, variables, fakes, tmp_path):
    done = _launch(tmp_path, script, action, **variables, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("+ "), "the command that would run"
    assert _calls(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "arguments", "missing"),
    [
        ("local.sh", (), "CONFIG RUN_ID"),
        ("slurm.sbatch", (), "CONFIG RUN_ID"),
        ("tpu.sh", ("create",), "PROJECT ZONE RUN_ID"),
        ("tpu.sh", (), "PROJECT ZONE RUN_ID"),
        ("gke.sh", ("apply",), "RUN_ID"),
        ("sky.sh", ("launch",), "RUN_ID"),
        ("docker.sh", ("run",), "IMAGE RUN_ID"),
    ],
)
def test_what_is_missing_is_named(script, arguments, missing, fakes, tmp_path):
    done = _launch(tmp_path, script, *arguments)
    assert done.returncode == 2
    assert f"set {missing} " in done.stderr
    assert _calls(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "action", "missing"),
    [
        ("tpu.sh", "create", "ACCELERATOR RUNTIME"),
        ("tpu.sh", "setup", "REPOSITORY REVISION BUCKET"),
        ("tpu.sh", "run", "CONFIG CHECKPOINT"),
        ("tpu.sh", "babysit", "ACCELERATOR RUNTIME REPOSITORY REVISION BUCKET CONFIG CHECKPOINT"),
        ("gke.sh", "apply", "IMAGE CONFIG BUCKET DATA SERVICE_ACCOUNT ACCELERATOR TOPOLOGY HOSTS CHIPS_A_HOST"),
        ("sky.sh", "launch", "CONFIG BUCKET DATA"),
        ("docker.sh", "run", "CONFIG RUNS"),
    ],
)
def test_what_an_action_alone_needs_is_named(script, action, missing, fakes, tmp_path):
    known = {"PROJECT": "p", "ZONE": "z", "RUN_ID": "a"} | ({"IMAGE": "i"} if script == "docker.sh" else {})
    done = _launch(tmp_path, script, action, **known)
    assert done.returncode == 2
    assert f"set {missing} " in done.stderr
    assert _calls(tmp_path) == []


@pytest.mark.parametrize("processes", ["0", "-1", "two", ""])
def test_a_number_of_processes_is_one_or_more(processes, tmp_path):
    done = _launch(tmp_path, "local.sh", CONFIG="c", RUN_ID="a", PROCESSES=processes, DRY_RUN="1")
    assert (done.returncode, done.stderr) == (
        (0, done.stderr) if processes == "" else (2, f"local.sh: PROCESSES={processes} must be a whole number from 1\n")
    )


def test_what_a_dry_run_of_several_processes_prints_can_be_run(tmp_path):
    done = _launch(tmp_path, "local.sh", CONFIG="c", RUN_ID="a", PROCESSES="3", PYTHON="echo", DRY_RUN="1")
    lines = [line.removeprefix("+ ") for line in done.stderr.splitlines()]
    for i, line in enumerate(lines):
        names = {"JAX_COORDINATOR_ADDRESS=127.0.0.1:12345", "JAX_NUM_PROCESSES=3", f"JAX_PROCESS_ID={i}"}
        assert names <= set(line.split())
    assert len(lines) == 3


def test_slurm_says_from_where_it_wants_to_be_submitted(tmp_path):
    done = _launch(tmp_path, "slurm.sbatch", CONFIG="c", RUN_ID="a", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"slurm.sbatch: submit it from the root of the repository, not from {tmp_path}\n"


@pytest.mark.parametrize(("running", "launched"), [("a-0", True), ("b", True), ("a", False)])
def test_a_managed_job_is_launched_unless_one_of_its_name_runs(running, launched, fakes, tmp_path):
    # A long list after the name: whoever stops reading early breaks the pipe.
    fakes("sky", f'case "$*" in *queue*) printf "1  %s  RUNNING\\n" {running}; seq 200000;; esac')
    done = _launch(tmp_path, "sky.sh", "launch", **SKY)
    assert done.returncode == 0, done.stderr
    assert any(" launch " in call for call in _calls(tmp_path)) == launched


def test_a_container_gets_sigterm_and_absolute_directories(tmp_path):
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(TRAINING.replace(">> st", f">> {tmp_path}/st").replace("started $JAX_PROCESS_ID", "$*"))
    docker.chmod(0o755)
    variables = DOCKER | {"RUNS": str(tmp_path / "sub" / ".." / "runs"), "CHECKPOINT": "weights", "DATA": "corpus"}
    environment = {**os.environ, **variables, "PATH": f"{docker.parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", str(LAUNCH / "docker.sh"), "run"], env=environment)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    call = (tmp_path / "started").read_text()
    assert f"-v {tmp_path}/runs:/runs " in call
    assert f"-v {LAUNCH.parent}/weights:/checkpoint:ro " in call
    assert f"-v {LAUNCH.parent}/corpus:/data:ro " in call
    assert call.split()[-2:] == ["--config.model.checkpoint=/checkpoint", "--config.data.root=/data"]
    assert (tmp_path / "runs").is_dir()


def test_a_tpu_host_runs_the_command_as_it_was_given(fakes, tmp_path):
    """What would be run on a host is run here: arguments survive three shells, SIGTERM is forwarded, the code kept."""
    home = tmp_path / "home"
    python = home / "ambijax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n{TRAINING.split(chr(10), 1)[1]}')
    python.write_text(python.read_text().replace(">> st", f">> {tmp_path}/st"))
    python.chmod(0o755)
    fakes(
        "gcloud",
        f'for a in "$@"; do case $a in --command=*) printf %s "${{a#--command=}}" > {tmp_path}/command;; esac; done',
    )
    labels = "--config.data.labels=('calm', 'it\"s')"
    assert _launch(tmp_path, "tpu.sh", "run", labels, **TPU).returncode == 0
    on_host = {"cwd": home, "env": {**os.environ, "HOME": str(home)}, "timeout": 30, "check": True}
    subprocess.run(["bash", str(tmp_path / "command")], **on_host)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:3] == ["-m", "ambijax.train", "--config=configs/grpoz.py"]
    assert arguments[-2:] == [labels, f"--workdir={home}/runs/grpoz-0"]
    again = subprocess.run(["bash", str(tmp_path / "command")], **on_host, capture_output=True, text=True)
    assert again.stdout == "runs already\n"
    os.kill(int((home / "grpoz-0.pid").read_text()), signal.SIGTERM)
    while not (home / "grpoz-0.exit").exists():
        time.sleep(0.05)
    assert (home / "grpoz-0.exit").read_text() == "75\n"


def test_a_run_id_that_no_cloud_takes_is_refused(fakes, tmp_path):
    done = _launch(tmp_path, "sky.sh", "launch", RUN_ID="My Run", CONFIG="c", BUCKET="b")
    assert done.returncode == 2
    assert "RUN_ID=My Run must be" in done.stderr


def test_slurm_comes_back_only_when_it_was_preempted(fakes, tmp_path):
    job = {"CONFIG": "configs/sft.py", "RUN_ID": "a", "SLURM_JOB_ID": "7"}
    for code, requeued in ((0, False), (2, False), (75, True)):
        (tmp_path / "calls").unlink(missing_ok=True)
        fakes("srun", f"exit {code}")
        assert _launch(tmp_path, "slurm.sbatch", **job).returncode == code
        assert ("scontrol requeue 7" in _calls(tmp_path)) == requeued
    assert "--workdir=runs/a" in _calls(tmp_path)[0]
    (tmp_path / "calls").unlink()
    assert _launch(tmp_path, "slurm.sbatch", **job, SLURM_RESTART_COUNT="20").returncode == 75
    assert len(_calls(tmp_path)) == 1, "no more than MAX_RESTARTS"


def test_a_slice_is_created_once(fakes, tmp_path):
    fakes("gcloud", 'case "$*" in *describe*) echo "no route" >&2; exit 1;; esac')
    assert _launch(tmp_path, "tpu.sh", "create", **TPU).returncode == 1  # there may be one
    assert not [c for c in _calls(tmp_path) if " create " in c]
    fakes("gcloud", 'case "$*" in *describe*) echo "NOT_FOUND: it was not found" >&2; exit 1;; esac')
    assert _launch(tmp_path, "tpu.sh", "create", **TPU).returncode == 0
    (create,) = [c for c in _calls(tmp_path) if " create " in c]
    assert "--accelerator-type=v5litepod-8" in create
    (tmp_path / "calls").unlink()
    fakes("gcloud", 'case "$*" in *describe*) echo ACTIVE;; esac')
    assert _launch(tmp_path, "tpu.sh", "create", **TPU).returncode == 0
    assert not [c for c in _calls(tmp_path) if " create " in c]


def test_babysitting_goes_through_a_preemption_to_the_end(fakes, tmp_path):
    # What the cloud says, one answer a call: no answer; nothing there; active, host knows nothing; active, preempted by
    # SIGTERM; no answer; suspended; nothing there again, and no answer to its being created; active and done.
    states, ends = tmp_path / "states", tmp_path / "ends"
    states.write_text(
        "DOWN\nABSENT\nABSENT\nACTIVE\nACTIVE\nDOWN\nSUSPENDED\nSUSPENDED\nABSENT\nDOWN\nABSENT\nABSENT\nACTIVE\nACTIVE\n"
    )
    ends.write_text("lost\n75\n0\n")
    nothing = (
        f'line=$(head -1 {states}); sed -i 1d {states}; [ "$line" = DOWN ] && {{ echo "no route" >&2; exit 1; }}; '
        f'[ "$line" = ABSENT ] && {{ echo "NOT_FOUND: it was not found" >&2; exit 1; }}; echo "$line"'
    )
    ended = f"head -1 {ends}; sed -i 1d {ends}"
    fakes("gcloud", f'case "$*" in *describe*) {nothing};; *"cat grpoz-0.exit"*) {ended};; esac')
    done = _launch(tmp_path, "tpu.sh", "babysit", **TPU)
    assert done.returncode == 0, done.stderr
    did = re.findall(r" create |git clone|nohup| delete ", (tmp_path / "calls").read_text())
    run = ["git clone", "nohup"]
    assert did == [" create ", *run, *run, " delete ", " create ", " delete "]


def test_babysitting_stops_at_a_final_error(fakes, tmp_path):
    fakes("gcloud", 'case "$*" in *describe*) echo ACTIVE;; *grpoz-0.exit*) echo 2;; esac')
    done = _launch(tmp_path, "tpu.sh", "babysit", **TPU)
    assert done.returncode == 1
    assert "exit code 2" in done.stderr


def test_manifests_parse(fakes, tmp_path):
    yaml = pytest.importorskip("yaml")
    fakes("kubectl", f"cat > {tmp_path}/manifest")
    done = _launch(tmp_path, "gke.sh", "apply", **GKE)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "manifest").read_text()
    assert "${" not in text
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 2, 0)
    pod = job["template"]["spec"]
    assert {"--workdir=/runs/grpoz-0", "--config.data.root=/runs/data/cremad"} <= {*pod["containers"][0]["args"]}
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    sky = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


def test_no_launcher_takes_a_secret():
    for path in (path for path in LAUNCH.iterdir() if path.suffix != ".md"):
        text = path.read_text().lower()
        assert not any(word in text for word in ("api_key", "hf_token", "password", "secret")), path


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_reaches_training_and_its_code_comes_back(processes, tmp_path):
    training = tmp_path / "python"
    training.write_text(TRAINING.replace(">> st", f">> {tmp_path}/st"))
    training.chmod(0o755)
    environment = {**os.environ, "CONFIG": "c", "RUN_ID": "a", "PYTHON": str(training), "PROCESSES": str(processes)}
    process = subprocess.Popen(["bash", str(LAUNCH / "local.sh")], env=environment)
    started = tmp_path / "started"
    while not (started.exists() and len(started.read_text().splitlines()) == processes):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert len((tmp_path / "stopped").read_text().splitlines()) == processes


@pytest.mark.slow
def test_sigterm_ends_a_real_run_with_75(tmp_path):
    environment = {**os.environ, "CONFIG": "configs/sft.py:tiny", "RUN_ID": "a", "RUNS": str(tmp_path)}
    environment |= {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), f"--config.data.root={tmp_path / 'c'}"], env=environment
    )
    metrics = tmp_path / "a" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
