"""Runs in TensorBoard, Weights & Biases or trackio: what a run writes to disk, sent on. Off by default.

    python -m ambijax.train --config configs/grpoz.py:tiny --workdir runs/tiny --config.tracker=tensorboard
    python -m ambijax.trackers --run runs/tiny --tracker wandb             # afterwards, or to catch up

A thread follows metrics.jsonl as it grows and, at the end, sends a table of predictions. Training never waits for it:
a tracker that fails costs one warning, and the command above sends the rest later. What was sent is kept in
tracker.json, so that a resumed run goes on where it was.

With `tracker_audio` the table holds sounds, transcripts and reasonings, too. They leave the machine unless the tracker
is local, and a corpus' licence may forbid that (IEMOCAP's does); so it is a key of its own.
"""

import argparse
import contextlib
import importlib
import io
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from absl import logging
from ml_collections import FrozenConfigDict

from ambijax import audio, errors, manifest, preflight, rules, settings
from ambijax.errors import AmbijaxError, ConfigError
from ambijax.workdir import replace

STATE = "tracker.json"
ROWS = 32  # predictions in the table, the first ones: enough to read, and little to send
EVERY = 2.0  # seconds between looks at metrics.jsonl
PATIENCE = 60.0  # seconds that a run which is over waits for its tracker


@contextlib.contextmanager
def following(config: FrozenConfigDict, workdir: Path) -> Iterator[None]:
    """Sends what the run in `workdir` writes to `config.tracker` while the body runs, and the rest when it ends.

    Raises:
      ConfigError: the tracker's package is not installed.
    """
    if not config.tracker:
        yield
        return
    preflight.assert_tracker_installed(config.tracker)
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(config, workdir, over), name="tracker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(PATIENCE)
        if thread.is_alive():
            _warn(config.tracker, workdir, f"is not done after {PATIENCE:.0f} s")


def _warn(name: str, workdir: Path, reason: str) -> None:
    later = f"python -m ambijax.trackers --run {workdir} --tracker {name}"
    logging.warning("the tracker %s %s; the run goes on without it; send the rest later: %s", name, reason, later)


def _follow(config: FrozenConfigDict, workdir: Path, over: threading.Event) -> None:
    try:
        send(config, config.tracker, workdir, over)
    except Exception as error:  # whatever another package does, the run goes on
        _warn(config.tracker, workdir, f"failed ({errors.described(error)})")


def send(config: FrozenConfigDict, name: str, workdir: Path, over: threading.Event) -> None:
    """Sends metrics of steps that were not sent yet until `over` is set, then the table of predictions.

    Args:
      config: of the run.
      name: of the tracker.
      workdir: the run.
      over: nothing more will be written.

    Raises:
      ConfigError: what was sent before cannot be read.
    """
    state = _states(workdir / STATE).get(name, {"id": uuid.uuid4().hex[:8], "step": -1, "table": False})
    # Read anew each time: another tracker may be told of the run meanwhile.
    keep = lambda: replace(workdir / STATE, json.dumps(_states(workdir / STATE) | {name: state}) + "\n")  # noqa: E731
    keep()
    tracker = (_TensorBoard if name == "tensorboard" else _Board)(name, state["id"], config, workdir)
    try:
        last = False
        while not last:
            last, sent = over.wait(EVERY), state["step"]  # and look once more: what came between is sent, too
            for record in _records(workdir / "metrics.jsonl"):
                if record.get("step", -1) > state["step"]:
                    numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
                    tracker.metrics(record["step"], numbers)
                    state["step"] = record["step"]
            if state["step"] > sent:
                keep()
        if (workdir / "eval/test/summary.json").is_file() and not state["table"]:
            tracker.table(state["step"], *_table(config, workdir / "eval/test"))
            state["table"] = True
            keep()
    finally:
        tracker.close()


def _states(path: Path) -> dict[str, dict]:
    """For each tracker the name it knows the run by, the last step sent, and whether it has the table."""
    if not path.is_file():
        return {}
    try:
        states = json.loads(path.read_text(encoding="utf-8"))
        whole = all({"id", "step", "table"} <= state.keys() for state in states.values())
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ConfigError(f"{path} is damaged; remove it, and all of the run is sent again")
    return states


def _records(path: Path) -> Iterator[dict]:
    """The whole lines of a file that may still grow, or not be there yet."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []  # not at U+2028, as splitlines does
    yield from map(json.loads, lines[:-1])


def _table(config: FrozenConfigDict, directory: Path) -> tuple[list[dict], list[np.ndarray | None]]:
    """The first predictions of a split as rows, and their sounds, None where they are not wanted."""
    corpus = manifest.Corpus(Path(json.loads((directory / "summary.json").read_text())["root"]), ())
    records = [record for record, _ in zip(_records(directory / "predictions.jsonl"), range(ROWS), strict=False)]
    labels = config.data.labels
    rows = []
    for record in records:
        said = {label: f"{p:.2f}" for label, p in zip(labels, record["target"], strict=True)}
        heard = {label: f"{p:.2f}" for label, p in zip(labels, record["readout"], strict=True)}
        words = {key: record.get(key) or "" for key in ("transcript", "reasoning")} if config.tracker_audio else {}
        rows.append({"id": record["id"], "js": record["js"], "votes": _line(said), "readout": _line(heard)} | words)
    return rows, [audio.load(corpus.sound(r["id"], r["audio"])) if config.tracker_audio else None for r in records]


def _line(distribution: dict[str, str]) -> str:
    return ", ".join(f"{label} {p}" for label, p in distribution.items())


class _Board:
    """Weights & Biases, and trackio, which has its interface."""

    def __init__(self, name: str, run_id: str, config: FrozenConfigDict, workdir: Path) -> None:
        self._package: ModuleType = importlib.import_module(name)
        options = {"project": "ambijax", "name": workdir.name, "config": config.to_dict(), "resume": "allow"}
        if name == "wandb":
            options |= {"id": run_id, "dir": workdir, "settings": self._package.Settings(silent=True)}
        else:
            options |= {"name": f"{workdir.name}-{run_id}", "embed": False}
        self._run = self._package.init(**options)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def table(self, step: int, rows: list[dict], sounds: list[np.ndarray | None]) -> None:
        data = [
            [*row.values(), *[self._sound(sound)] * (sound is not None)]
            for row, sound in zip(rows, sounds, strict=True)
        ]
        columns = [*rows[0], *["sound"] * (len(data[0]) - len(rows[0]))]
        self._run.log({"predictions": self._package.Table(columns=columns, data=data)}, step=max(step, 0))

    def _sound(self, samples: np.ndarray | None) -> object:
        if samples is None:
            return None
        integers = (samples.clip(-1, 1) * 32767).astype(np.int16)  # trackio warns of floats
        return self._package.Audio(integers, sample_rate=audio.SAMPLE_RATE)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files in `workdir/tensorboard`; TensorBoard has no tables, so a row is a text, and a sound beside it."""

    def __init__(self, name: str, run_id: str, config: FrozenConfigDict, workdir: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(workdir / name))
        self._text(0, "config", f"```\n{json.dumps(config.to_dict(), indent=1)}\n```")

    def _add(self, step: int, value: dict) -> None:
        import time

        from tensorboard.compat.proto import event_pb2, summary_pb2

        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(**value)])
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _text(self, step: int, tag: str, text: str) -> None:
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2

        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
        tensor = tensor_pb2.TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
        self._add(step, {"tag": f"{tag}/text_summary", "metadata": metadata, "tensor": tensor})

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._add(step, {"tag": tag, "simple_value": value})

    def table(self, step: int, rows: list[dict], sounds: list[np.ndarray | None]) -> None:
        import soundfile
        from tensorboard.compat.proto import summary_pb2

        for row, sound in zip(rows, sounds, strict=True):
            tag = f"predictions/{row['id']}"
            self._text(step, tag, "\n\n".join(f"**{key}** {value}" for key, value in row.items()))
            if sound is not None:
                wav = io.BytesIO()
                soundfile.write(wav, sound, audio.SAMPLE_RATE, format="WAV")
                about = {"sample_rate": audio.SAMPLE_RATE, "num_channels": 1, "length_frames": len(sound)}
                encoded = {"encoded_audio_string": wav.getvalue(), "content_type": "audio/wav"}
                self._add(step, {"tag": tag, "audio": summary_pb2.Summary.Audio(**about, **encoded)})

    def close(self) -> None:
        self._writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ambijax.trackers", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run directory written by ambijax.train")
    parser.add_argument("--tracker", choices=rules.TRACKERS, required=True)
    parser.add_argument("--audio", action="store_true", help="send sounds, transcripts and reasonings, too")
    args = parser.parse_args()
    preflight.assert_tracker_installed(args.tracker)
    config = FrozenConfigDict(settings.load(args.run).to_dict() | {"tracker_audio": args.audio})
    over = threading.Event()
    over.set()
    try:
        send(config, args.tracker, args.run, over)
    except AmbijaxError:
        raise
    except Exception as error:
        raise ConfigError(f"the tracker {args.tracker} failed ({errors.described(error)}); try again") from error
    print(f"{args.run} is in {args.tracker}")


if __name__ == "__main__":
    errors.run(main)
