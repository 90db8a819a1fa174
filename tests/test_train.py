"""The real commands on the tiny model: training, resume, preemption, evaluation, prediction, and users' mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ambijax import checkpoint, manifest, settings

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not (ROOT / "ambijax/tiny/model.safetensors").exists(), reason="the tiny model is not in this checkout"
)
SMALL = ["--config.data.speakers=5", "--config.data.clips_per_speaker=4", "--config.eval.batch_size=4"]


def _start(*arguments: str | Path, stdout: int | None = subprocess.PIPE) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)


def _run(*arguments: str | Path) -> tuple[int, str, str]:
    process = _start(*arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def _train(workdir: Path, corpus: Path, algorithm: str, *extra: str) -> list[str | Path]:
    return [
        "ambijax.train",
        f"--config=configs/{algorithm}.py:tiny",
        f"--workdir={workdir}",
        f"--config.data.root={corpus}",
        *SMALL,
        *extra,
    ]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("corpus") / "tiny"


@pytest.fixture(scope="module")
def grpoz(tmp_path_factory, corpus) -> tuple[Path, str]:
    """A GRPOz run of three steps, and what it printed."""
    workdir = tmp_path_factory.mktemp("grpoz") / "run"
    code, out, err = _run(*_train(workdir, corpus, "grpoz", "--config.steps=3", "--config.grpo.samples=4"))
    assert code == 0, err
    return workdir, out


def test_a_run_leaves_what_it_promises_and_prints_the_table(grpoz):
    workdir, out = grpoz
    for name in ("config.json", "env.json", "metrics.jsonl", "samples.jsonl", "eval/test/summary.json"):
        assert (workdir / name).exists(), name
    rows = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert {"uniform", "prior", "base", "GRPOz"} <= rows
    assert [line["step"] for line in _lines(workdir / "metrics.jsonl")] == [0, 1, 2]
    prediction = _lines(workdir / "eval/test/predictions.jsonl")[0]
    assert {"id", "target", "votes", "readout", "js", "reasoning", "forced"} <= prediction.keys()
    np.testing.assert_allclose(sum(prediction["readout"]), 1, atol=1e-6)


def test_advantages_follow_from_the_rewards_that_were_written_down(grpoz):
    workdir, _ = grpoz
    groups = _lines(workdir / "samples.jsonl")
    assert len(groups) == 3 * 4
    for line in groups:
        group = line["group"]
        assert [member.get("gold", False) for member in group] == [False] * 4 + [True]
        for member in group[:-1]:
            assert member["reward"] == pytest.approx(1 - member["js"] + member["format"])
        r = np.array([member["reward"] for member in group])
        assert r[-1] == 2.0  # the maximum: JS 0 and the format kept
        expected = (r - r.mean()) / (r.std(ddof=1) + 1e-4)
        np.testing.assert_allclose([member["advantage"] for member in group], expected, rtol=1e-5, atol=1e-6)


def test_only_adapters_are_trained(grpoz):
    workdir, _ = grpoz
    step, trained, _ = checkpoint.load_adapters(workdir / "checkpoints", best=False)
    assert step == 3
    assert trained.keys() == {"lora"}
    projections = trained["lora"]["language_model"]["layers"]
    assert projections.keys() == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(np.any(p["b"]) for p in projections.values())  # they started at zero


def test_evaluate_reproduces_the_runs_own_numbers(grpoz):
    workdir, _ = grpoz
    before = json.loads((workdir / "eval/test/summary.json").read_text())
    (workdir / "eval/test/predictions.jsonl").unlink()  # else it would only read what is there
    code, out, err = _run("ambijax.evaluate", "--run", workdir)
    assert code == 0, err
    assert "prior" in out
    assert json.loads((workdir / "eval/test/summary.json").read_text()) == before


def test_swapped_audio_is_heard(grpoz):
    workdir, _ = grpoz
    code, _, err = _run("ambijax.evaluate", "--run", workdir, "--swap_audio")
    assert code == 0, err
    own = _lines(workdir / "eval/test/predictions.jsonl")
    swapped = _lines(workdir / "eval/test-swap_audio/predictions.jsonl")
    assert sum(a["reasoning"] != b["reasoning"] for a, b in zip(own, swapped, strict=True)) >= len(own) // 2


def test_predict_gives_the_evaluated_distribution(grpoz, corpus):
    workdir, _ = grpoz
    expected = _lines(workdir / "eval/test/predictions.jsonl")[:2]
    by_id = {u.id: u for u in manifest.read(corpus).utterances}
    clips = [by_id[r["id"]] for r in expected]
    transcripts = [f"--transcript={u.transcript}" for u in clips]
    paths = [corpus / u.audio for u in clips]
    code, out, err = _run("ambijax.predict", "--model", workdir, *paths, *transcripts, "--json")
    assert code == 0, err
    for line, record in zip(out.splitlines(), expected, strict=True):
        found = json.loads(line)
        np.testing.assert_allclose(list(found["distribution"].values()), record["readout"], atol=1e-4)
        assert record["reasoning"].startswith(found["reasoning"])
    code, out, err = _run("ambijax.predict", "--model", workdir, paths[0])
    assert code == 0, err
    assert "Step 2 Audio Analysis:" in out


def _same_run(a: Path, b: Path) -> None:
    """Bit-equal adapters and optimizer, equal metrics and samples."""
    newest = [sorted((run / "checkpoints").iterdir())[-1] / "digest.json" for run in (a, b)]
    assert newest[0].parent.name == newest[1].parent.name
    assert json.loads(newest[0].read_text())["arrays"] == json.loads(newest[1].read_text())["arrays"]
    clocks = {"seconds", "clips_per_second"}
    metrics = [
        [{k: v for k, v in line.items() if k not in clocks} for line in _lines(r / "metrics.jsonl")] for r in (a, b)
    ]
    assert metrics[0] == metrics[1]
    if (a / "samples.jsonl").exists():
        assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


def _interrupt(arguments: list, workdir: Path, after: int, how: signal.Signals) -> tuple[int, str]:
    """Starts a run, sends `how` once `after` steps are logged; returns exit code and stderr."""
    process = _start(*arguments, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    log = workdir / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= after:
            process.send_signal(how)
            break
        time.sleep(0.05)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.mark.parametrize("algorithm", ["sft", pytest.param("dpo", marks=pytest.mark.slow), "grpoz"])
def test_a_preempted_run_resumes_bit_exactly(algorithm, tmp_path, corpus):
    # 12 training clips, batches of 4: the run crosses the epoch boundary at step 3.
    short = ["--config.steps=5", "--config.data.batch_size=4", "--config.eval.max_clips=2"]
    code, _, err = _run(*_train(tmp_path / "straight", corpus, algorithm, *short))
    assert code == 0, err
    cut = _train(tmp_path / "cut", corpus, algorithm, *short)
    code, err = _interrupt(cut, tmp_path / "cut", after=2, how=signal.SIGTERM)
    assert code == 75, err
    assert "the same command resumes" in err
    code, out, err = _run(*cut)
    assert code == 0, err
    assert "resumed" in out
    _same_run(tmp_path / "straight", tmp_path / "cut")


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path, corpus):
    short = [
        "--config.steps=5",
        "--config.data.batch_size=4",
        "--config.eval.max_clips=2",
        "--config.checkpoint.every=1",
    ]
    code, _, err = _run(*_train(tmp_path / "straight", corpus, "sft", *short))
    assert code == 0, err
    cut = _train(tmp_path / "cut", corpus, "sft", *short)
    code, _ = _interrupt(cut, tmp_path / "cut", after=3, how=signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, _, err = _run(*cut)
    assert code == 0, err
    _same_run(tmp_path / "straight", tmp_path / "cut")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--workdir=W"], 2, "--config is missing"),
        (["--config=configs/sft.py:tiny"], 2, "--workdir is missing"),
        (["--config=configs/nope.py", "--workdir=W"], 2, "No such file or directory: 'configs/nope.py"),
        (["--config=configs/sft.py:tony", "--workdir=W"], 2, "no variant 'tony'; choose one of tiny, tiny_iemocap,"),
        (["--config=configs/sft.py:tiny", "--workdir=W", "--config.optim.lerning_rate=1"], 2, "Did you mean"),
        (["--config=configs/sft.py:tiny", "--workdir=W", "--config.steps=many"], 2, "steps"),
        (
            ["--config=configs/sft.py:tiny", "--workdir=W", "--config.steps=-1", "--config.log_every=0"],
            2,
            "steps=-1 must not be negative; 0 evaluates the start; log_every=0",
        ),
        (["--config=configs/grpoz.py:tiny", "--workdir=W", "--config.grpo.samples=1"], 2, "a group needs at least 2"),
        (["--config=configs/sft.py:cremad", "--workdir=W"], 2, "no model at Qwen2-Audio-7B-Instruct"),
        (
            ["--config=configs/sft.py:tiny", "--workdir=W", "--config.mesh.data=3"],
            2,
            "mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 does not make 1 devices",
        ),
    ],
)
def test_a_mistake_gets_one_line(arguments, code, message, tmp_path):
    arguments = [a.replace("=W", f"={tmp_path / 'run'}") for a in arguments]
    found, _, err = _run("ambijax.train", *arguments)
    assert found == code, err
    assert message in err
    assert len(err.strip().splitlines()) == 1, err


def test_a_workdir_of_another_experiment_is_refused(grpoz, corpus):
    workdir, _ = grpoz
    arguments = _train(workdir, corpus, "grpoz", "--config.steps=3", "--config.grpo.samples=4", "--config.lora.rank=4")
    code, _, err = _run(*arguments)
    assert code == 2
    assert "'rank': 8" in err
    assert "'rank': 4" in err


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
