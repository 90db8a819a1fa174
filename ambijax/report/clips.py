"""What the gallery shows of each clip: the sound as the model hears it, small, and every system's prediction.

Sound is linked, not copied: the licence of a corpus may forbid passing it on, and the page stays small. A picture of
`FRAMES` x `BANDS` bytes is enough to see the prosody and too little to hear anything.
"""

import base64
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ambijax import audio, manifest, metrics
from ambijax.errors import AmbijaxError
from ambijax.report import figures, style
from ambijax.report.runs import Report, Run, finite

PEAKS = 240  # columns of a waveform
FRAMES, BANDS = 160, 40  # columns and rows of a mel picture
_TYPES = {".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg"}


def gallery(report: Report, out: Path, *, embed_audio: bool) -> dict:
    """Everything the page's script needs, ready for JSON; texts are as they were written, untrusted.

    Args:
      report: the runs.
      out: directory of the page, where links to the sound start.
      embed_audio: puts the sound itself into the page.
    """
    utterances = {u.id: u for u in report.corpus.utterances} if report.corpus else {}
    own = utterances if report.split.split("-")[0] in manifest.SPLITS else {}  # another corpus may use the same names
    color = figures.colors(report)
    predictions = [{record["id"]: record for record in system.records} for system in report.systems]
    return {
        "labels": list(report.labels),
        "systems": [{"name": s.name, "base": s.base, "color": style.variable(color[s.name])} for s in report.systems],
        "clips": [
            _clip(record, utterances.get(name))
            | _sound(report.corpus, utterances.get(name), out, embed_audio)
            | {"predictions": [_prediction(of.get(name)) for of in predictions]}
            for name, record in report.clips.items()
        ],
        "rollouts": [
            {"run": system.name, "color": style.variable(color[system.name]), **_rollout(run, group, own)}
            for run, system in zip(report.runs, [s for s in report.systems if not s.base], strict=True)
            for group in run.rollouts
        ],
        "reward": _weights(report.runs),
    }


def _clip(record: dict, utterance: manifest.Utterance | None) -> dict:
    target = np.array(record["target"])
    return {
        "id": record["id"],
        "speaker": record["speaker"],
        "gender": str(record.get("gender") or (utterance.gender if utterance else "")),
        "transcript": str(record.get("transcript") or (utterance.transcript if utterance else "")),
        "votes": {str(emotion): count for emotion, count in record["votes"].items()},
        "target": _rounded(record["target"]),
        "entropy": round(abs(float(metrics.entropy(target))), 4),
        "majority": int(target.argmax()),
    }


def _prediction(record: dict | None) -> dict | None:
    if record is None:
        return None
    return {
        "readout": _rounded(record["readout"]),
        "js": round(record["js"], 4),
        "text": record["reasoning"],
        "format": record["format"],
        "forced": bool(record.get("forced")),
        "tokens": round(record["tokens"]),
    }


def _rollout(run: Run, group: dict, utterances: dict[str, manifest.Utterance]) -> dict:
    """One group of roll-outs of one step; the gold member has no read-out of its own."""
    utterance, labels = utterances.get(group["id"]), run.config.data.labels
    votes = utterance.votes if utterance else {}
    total = sum(votes.get(label, 0) for label in labels)
    return {
        "step": str(group.get("step")),
        "id": group["id"],
        "labels": list(labels),  # those it was trained on, which another corpus need not share
        "target": [votes.get(label, 0) / total for label in labels] if total else None,
        "transcript": utterance.transcript if utterance else "",
        "members": [
            {
                "gold": bool(member.get("gold")),
                "text": str(member.get("text", "")),
                "readout": _rounded(member["readout"]) if "readout" in member else None,
                **{
                    name: member[name] if finite(member.get(name)) else None  # NaN: there was no gold trajectory
                    for name in ("js", "format", "reward", "advantage")
                },
            }
            for member in group["group"]
        ],
    }


def _weights(runs: list[Run]) -> dict | None:
    """What a reward is made of, where a run has rewards; equal weights are all the page can show."""
    found = [dict(run.config.reward) for run in runs if "reward" in run.config]
    return found[0] if found and all(weights == found[0] for weights in found) else None


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _sound(corpus: manifest.Corpus | None, utterance: manifest.Utterance | None, out: Path, embed: bool) -> dict:
    """Link, duration and pictures of a clip's sound; or why there is none."""
    if corpus is None or utterance is None:
        why = "the corpus is not on this machine" if corpus is None else "the corpus has no such clip"
        return {"audio": None, "silence": why}
    try:
        path = corpus.path(utterance)
        samples = audio.load(path)
    except AmbijaxError as error:
        return {"audio": None, "silence": str(error)}
    if embed:
        kind = _TYPES.get(path.suffix.lower(), "audio/wav")
        link = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    else:
        link = quote(Path(os.path.relpath(path, out.resolve())).as_posix())
    peaks = np.array([np.abs(part).max() for part in np.array_split(samples, min(PEAKS, len(samples)))])
    return {
        "audio": link,
        "seconds": round(len(samples) / audio.SAMPLE_RATE, 3),
        "peaks": _bytes(peaks / max(peaks.max(), 1e-9)),
        **_mel(samples),
    }


def _mel(samples: np.ndarray) -> dict:
    """The log-mel spectrogram the model gets, as means of blocks, lowest band first, one byte a block."""
    frames = audio.mel_frames(len(samples))
    mel = audio.log_mel(samples, audio.N_FRAMES)[:frames]
    columns = min(FRAMES, frames)
    bands = np.stack([part.mean(axis=1) for part in np.array_split(mel, BANDS, axis=1)])
    blocks = np.stack([part.mean(axis=1) for part in np.array_split(bands, columns, axis=1)], axis=1)
    low, high = blocks.min(), blocks.max()
    return {"mel": _bytes((blocks - low) / max(high - low, 1e-9)), "columns": columns, "bands": BANDS}


def _bytes(values: np.ndarray) -> str:
    """Values in [0, 1] as base64 of one byte each."""
    return base64.b64encode(np.round(values * 255).astype(np.uint8).tobytes()).decode()
