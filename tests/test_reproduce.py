"""What docs/reproduce.md promises, with the tiny model in the 7B's place: from a release to Table 2, and through kills.

Long: `pytest -m slow tests/test_reproduce.py`.
"""

import json
import signal
import subprocess
import time

import pytest

from tests import miniature
from tests.command import start

pytestmark = pytest.mark.slow
pytest.importorskip("matplotlib", reason="the tables draw with it: pip install 'ambijax[report]'")
TINY = [
    "--checkpoint=ambijax/tiny",
    "--config.model.dtype=float32",  # two CPU cores
    "--config.data.windows=(256,)",
    "--config.data.max_tokens=160",
    "--config.data.batch_size=2",
    "--config.grpo.samples=2",
    "--config.dpo.samples=2",
    "--config.eval.batch_size=4",
]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=3000)
    assert process.returncode == code, out + err
    return out


def test_a_release_and_weights_are_all_it_takes(tmp_path):
    """docs/reproduce.md, command by command."""
    order = miniature.dialogs()
    codes = {
        turn: ("ang", "hap", "exc", "sad", "neu", "xxx")[i % 6]
        for turns in order.values()
        for i, turn in enumerate(turns)
    }
    release, data, out = tmp_path / "IEMOCAP_full_release", tmp_path / "iemocap", tmp_path / "tables"
    miniature.iemocap(release, order, codes)
    finish(start("ambijax.prepare", "--corpus=iemocap", f"--root={release}", f"--out={data}"))
    curate = ["ambijax.curate", "--config=configs/curate.py:iemocap", "--config.teacher=template"]
    curate += [f"--manifest={data}", f"--out={tmp_path / 'cot.jsonl'}"]
    finish(start(*curate))
    finish(start(*curate, "--merge"))
    command = ["ambijax.tables", "--table=2", "--corpus=iemocap", "--folds=2", f"--out={out}", *TINY]
    command += [f"--config.data.root={data}", "--config.steps=2"]
    plan = finish(start(*command, "--plan"))
    assert "iemocap GRPOz" in plan
    assert not out.exists()
    said = finish(start(*command))
    assert "| GRPOz | .20 | ." in said
    assert "PARTIAL" not in said
    for suffix in (".md", ".tex", ".png"):
        assert (out / "table2_iemocap").with_suffix(suffix).stat().st_size > 1000
    config = json.loads((out / "iemocap" / "grpoz" / "fold1-seed0" / "config.json").read_text())
    assert (config["algorithm"], config["data"]["fold"], config["steps"]) == ("grpoz", 1, 2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("predictions.jsonl")}
    assert len(before) == 2 * 5
    finish(start(*command))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("predictions.jsonl")} == before


def test_a_kill_in_the_middle_costs_what_was_running(tmp_path):
    command = ["ambijax.tables", "--table=figure2", "--corpus=tiny", "--folds=1", f"--out={tmp_path / 'out'}"]
    command += [f"--config.data.root={tmp_path / 'corpus'}", "--config.data.speakers=5", "--config.steps=40"]
    command += ["--config.data.clips_per_speaker=4", "--config.data.batch_size=2", "--config.dpo.samples=2"]
    command += ["--config.eval.batch_size=4", "--config.checkpoint.every=5"]
    metrics = tmp_path / "out" / "tiny" / "sft-no-kl" / "fold0-seed0" / "metrics.jsonl"

    def wait_for(lines: int) -> None:
        until = time.monotonic() + 900
        while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
            assert time.monotonic() < until
            time.sleep(0.05)

    process = start(*command)
    wait_for(12)
    process.send_signal(signal.SIGTERM)  # a scheduler's: the run saves itself
    out = finish(process, 75)
    assert "exit code 75" in out
    steps = len(metrics.read_text().splitlines())
    assert 12 <= steps < 40
    first = tmp_path / "out" / "tiny" / "sft" / "fold0-seed0" / "eval" / "test" / "predictions.jsonl"
    made = first.stat().st_mtime_ns

    process = start(*command)
    wait_for(steps + 6)
    process.kill()  # no warning; its run lives on and holds its directory
    process.communicate()
    out = finish(start(*command))
    assert "PARTIAL" not in out
    assert first.stat().st_mtime_ns == made
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(40))
