"""Trackers get what a run wrote, once; whatever they do, the run goes on."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict

from ambijax import errors, preflight, settings, trackers
from ambijax.errors import ConfigError
from tests import trained

CANARY = "the quick brown canary"


def config(tracker: str, **changes: object) -> FrozenConfigDict:
    made, _ = settings.parse(["t", "--config=configs/sft.py:tiny", "--workdir=w", f"--config.tracker={tracker}"])
    return FrozenConfigDict(made.to_dict() | changes)


def metrics(workdir: Path, steps: range) -> None:
    with (workdir / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 1 / (1 + step), "note": "not a number"}) + "\n")


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A finished run with one prediction."""
    run = tmp_path / "run"
    (run / "eval/test").mkdir(parents=True)
    settings.save(config("tensorboard"), run)
    metrics(run, range(3))
    trained.wavs(tmp_path / "corpus", (0.3,))
    record = {"id": "one", "audio": "clip0.wav", "js": 0.25, "target": [0.5, 0.5, 0, 0, 0, 0], "readout": [1 / 6] * 6}
    record |= {"transcript": CANARY, "reasoning": f"Keywords: {CANARY}\u2028"}
    (run / "eval/test/predictions.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (run / "eval/test/summary.json").write_text(json.dumps({"root": str(tmp_path / "corpus")}))
    return run


def send(workdir: Path, name: str, **changes: object) -> None:
    over = threading.Event()
    over.set()
    trackers.send(config(name, **changes), name, workdir, over)


def everything(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def events(workdir: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(workdir / "tensorboard"))
    found.Reload()
    return found


@pytest.mark.parametrize("sound", [True, False])
def test_tensorboard(workdir, sound):
    pytest.importorskip("tensorboard")
    send(workdir, "tensorboard", tracker_audio=sound)
    found = events(workdir)
    assert [(e.step, round(e.value, 5)) for e in found.Scalars("loss")] == [(0, 1.0), (1, 0.5), (2, 0.33333)]
    assert found.Tags()["tensors"] == ["config/text_summary", "predictions/one/text_summary"]
    text = found.Tensors("predictions/one/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "anger 0.50" in text
    assert (CANARY in text) == sound
    assert found.Tags()["audio"] == ["predictions/one"] * sound
    if sound:
        assert found.Audio("predictions/one")[0].length_frames == 4800


def test_what_was_sent_is_not_sent_again(workdir):
    pytest.importorskip("tensorboard")
    send(workdir, "tensorboard")
    time.sleep(1.1)  # event files are named by the second
    metrics(workdir, range(2, 5))  # the run was resumed at step 2
    send(workdir, "tensorboard")
    assert [e.step for e in events(workdir).Scalars("loss")] == [0, 1, 2, 3, 4]
    assert len(events(workdir).Tensors("predictions/one/text_summary")) == 1


@pytest.mark.parametrize("sound", [True, False])
def test_wandb_offline(workdir, tmp_path, monkeypatch, sound):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # what `wandb sync` will upload
    send(workdir, "wandb", tracker_audio=sound)
    wandb.teardown()  # what the end of a process does: all is on the disk
    (run,) = (workdir / "wandb").glob("offline-run-*")
    assert b"loss" in next(run.glob("*.wandb")).read_bytes()
    (table,) = (run / "files/media/table").iterdir()
    shown = json.loads(table.read_text())
    assert shown["columns"][:4] == ["id", "js", "votes", "readout"]
    assert shown["data"][0][:2] == ["one", 0.25]
    assert (CANARY in table.read_text()) == (CANARY.encode() in everything(tmp_path / "data")) == sound
    staged = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert sum(content.startswith(b"RIFF") for content in staged) == sound


@pytest.mark.parametrize("sound", [True, False])
def test_trackio(workdir, tmp_path, monkeypatch, sound):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    places = {"TRACKIO_DIR": tmp_path / "trackio", "MEDIA_DIR": tmp_path / "trackio/media"}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "trackio"]:
        for name in places.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, places[name])
    send(workdir, "trackio", tracker_audio=sound)
    (name,) = sqlite_storage.SQLiteStorage.get_runs("ambijax")
    logs = sqlite_storage.SQLiteStorage.get_logs("ambijax", name)
    assert [(e["step"], e["loss"]) for e in logs if "loss" in e] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert any("predictions" in e for e in logs)
    assert (CANARY.encode() in everything(tmp_path / "trackio")) == sound
    sounds = [path for path in (tmp_path / "trackio").rglob("*") if path.is_file() and path.read_bytes()[:4] == b"RIFF"]
    assert len(sounds) == sound


class Recorder:
    """A tracker that needs no package."""

    def __init__(self, *_: object) -> None:
        self.steps = []
        Recorder.last = self

    def metrics(self, step: int, numbers: dict) -> None:
        self.steps.append(step)

    def table(self, *_: object) -> None:
        """Whoever sends it."""

    close = table


def test_the_record_of_what_was_sent_is_never_half_written(workdir, tmp_path, monkeypatch):
    """A kill while it is written must not leave a file that no later start can read: it is replaced, not rewritten."""
    monkeypatch.setattr(trackers, "_TensorBoard", Recorder)
    send(workdir, "tensorboard")
    (tmp_path / "earlier").hardlink_to(workdir / trackers.STATE)
    earlier = (tmp_path / "earlier").read_text()
    metrics(workdir, range(3, 5))
    send(workdir, "tensorboard")
    assert Recorder.last.steps == [3, 4]
    assert (tmp_path / "earlier").read_text() == earlier
    assert json.loads((workdir / trackers.STATE).read_text())["tensorboard"]["step"] == 4


def test_another_tracker_told_meanwhile_keeps_its_place(workdir, monkeypatch):
    """A lost place would be a second run there, with every step sent again."""

    class Slow(Recorder):
        def metrics(self, step: int, values: dict) -> None:
            super().metrics(step, values)
            if step == 0:
                monkeypatch.setattr(trackers, "_Board", Recorder)
                send(workdir, "wandb")

    monkeypatch.setattr(trackers, "_TensorBoard", Slow)
    send(workdir, "tensorboard")
    state = json.loads((workdir / trackers.STATE).read_text())
    assert {name: (one["step"], one["table"]) for name, one in state.items()} == {
        "tensorboard": (2, True),
        "wandb": (2, True),
    }


@pytest.mark.parametrize("damaged", ["", "[]", '{"tensorboard": {"id": "0"}}', '{"tensorboard": 1}'])
def test_a_damaged_record_of_what_was_sent_is_named(workdir, monkeypatch, damaged):
    monkeypatch.setattr(trackers, "_TensorBoard", Recorder)
    (workdir / trackers.STATE).write_text(damaged)
    with pytest.raises(ConfigError, match=f"{trackers.STATE} is damaged; remove it"):
        send(workdir, "tensorboard")


class Broken:
    def __init__(self, *_: object) -> None:
        raise OSError("no network\nat all")


class Hanging(Broken):
    def __init__(self, *_: object) -> None:
        time.sleep(30)


@pytest.mark.parametrize(("tracker", "reason"), [(Broken, "OSError: no network at all"), (Hanging, "is not done")])
def test_a_failing_tracker_does_not_stop_the_run(workdir, monkeypatch, caplog, tracker, reason):
    monkeypatch.setattr(trackers, "_TensorBoard", tracker)
    monkeypatch.setattr(preflight, "assert_tracker_installed", lambda name: None)
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    began = time.monotonic()
    with trackers.following(config("tensorboard"), workdir):
        time.sleep(0.1)
    assert time.monotonic() - began < 10
    (record,) = [r for r in caplog.records if "tracker" in r.message]
    assert reason in record.message
    assert f"--run {workdir} --tracker tensorboard" in record.message


def test_a_run_is_followed_while_it_goes(workdir, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(trackers, "EVERY", 0.05)
    state = workdir / trackers.STATE
    with trackers.following(config("tensorboard"), workdir):
        metrics(workdir, range(3, 6))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (not state.exists() or '"step": 5' not in state.read_text()):
            time.sleep(0.05)
        assert '"step": 5' in state.read_text()  # sent while the run still goes
    assert [e.step for e in events(workdir).Scalars("loss")] == [*range(6)]


def test_off_by_default(workdir):
    with trackers.following(config(""), workdir):
        pass
    assert not (workdir / trackers.STATE).exists()


def test_a_missing_package_is_one_line(workdir, monkeypatch, capsys):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'ambijax\[wandb\]'"),
        trackers.following(config("wandb"), workdir),
    ):
        raise AssertionError("nothing starts without it")
    monkeypatch.setattr(sys, "argv", ["trackers", "--run", str(workdir), "--tracker", "wandb"])
    with pytest.raises(SystemExit):
        errors.run(trackers.main)
    assert capsys.readouterr().err == "ambijax: tracker=wandb needs its package: pip install 'ambijax[wandb]'\n"


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="tracker='mlflow' must be one of tensorboard, wandb, trackio"):
        config("mlflow")
