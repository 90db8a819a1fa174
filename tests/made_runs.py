"""Run directories as `ambijax.train` leaves them, made up in a moment: for tests of what reads them."""

import json
from pathlib import Path

import numpy as np
import soundfile

from ambijax import manifest, metrics, settings

COT = "Keywords: {}\nStep 1 Text Analysis: a\nStep 2 Audio Analysis: b\nStep 3 Synthesis: c\nFinal emotion: neutral"
RATE = 16_000


def corpus(root: Path, count: int, speakers: int = 4, *, hostile: str = "") -> manifest.Corpus:
    """`count` clips of a few tenths of a second, in five folds; `hostile` is part of everything a corpus may say."""
    rng = np.random.default_rng(0)
    labels = settings_of("grpoz", root).data.labels
    (root / "wav").mkdir(parents=True)
    utterances = []
    for sound in range(min(count, 8)):
        t = np.arange(int(RATE * (0.3 + 0.05 * sound))) / RATE
        soundfile.write(root / f"wav/{sound}.wav", 0.3 * np.sin(2 * np.pi * (150 + 40 * sound) * t) * (1 - t), RATE)
    for i in range(count):
        counts = rng.multinomial(8, rng.dirichlet([0.6] * len(labels)))
        utterances.append(
            manifest.Utterance(
                id=f"clip{i:04}{hostile}",
                audio=f"wav/{i % 8}.wav",
                transcript=f"It is {i}.{hostile}",
                speaker=f"s{i % speakers}{hostile}",
                fold=i % speakers,
                votes={label: int(n) for label, n in zip(labels, counts, strict=True) if n},
                gender=("female", "male")[i % 2] + hostile,
            )
        )
    found = manifest.Corpus(root, tuple(utterances))
    manifest.write(found)
    return found


def settings_of(algorithm: str, root: Path):
    """The settings of the tiny lab on another corpus."""
    arguments = [f"--config=configs/{algorithm}.py:tiny", "--workdir=unused", f"--config.data.root={root}"]
    return settings.parse(["train", *arguments])[0]


def run(
    directory: Path, corpus: manifest.Corpus, algorithm: str = "grpoz", seed: int = 0, *, hostile: str = ""
) -> Path:
    """A finished run that was asked about every clip of the corpus: a sharp base, a softer trained model."""
    rng = np.random.default_rng(seed)
    config = settings_of(algorithm, corpus.root)
    labels = config.data.labels
    targets = manifest.soft_labels(corpus.utterances, labels).astype(float)
    directory.mkdir(parents=True)
    settings.save(config, directory)
    (directory / "env.json").write_text(json.dumps({"python": "3.11", "commit": hostile}))
    curves = [
        {"step": i, "loss": 2 / (i + 1), "rollout/js": 0.4 - i / 100, "reward/mean": 1 + i / 50} for i in range(20)
    ]
    lines(directory / "metrics.jsonl", curves)
    lines(
        directory / "samples.jsonl",
        [group(u, t, step, hostile) for step, (u, t) in enumerate(zip(corpus.utterances, targets, strict=False))],
    )
    for name, sharpness in (("test-base", 0.02), ("test", 2.0)):
        readout = rng.dirichlet([sharpness] * len(labels), len(targets)) * 0.7 + targets * 0.3
        records = [record(u, t, q, hostile) for u, t, q in zip(corpus.utterances, targets, readout, strict=False)]
        (directory / "eval" / name).mkdir(parents=True)
        lines(directory / "eval" / name / "predictions.jsonl", records)
    return directory


def record(u: manifest.Utterance, target: np.ndarray, readout: np.ndarray, hostile: str) -> dict:
    return {
        "id": u.id,
        "speaker": u.speaker,
        "gender": u.gender,
        "audio": u.audio,
        "transcript": u.transcript,
        "votes": u.votes,
        "annotators": sum(u.votes.values()),
        "target": target.tolist(),
        "readout": readout.tolist(),
        "js": float(metrics.js(target, readout)),
        "reasoning": COT.format(f"high pitch{hostile}"),
        "format": 1.0,
        "forced": 0.0,
        "tokens": 60.0,
        "readout_gold": None,
        "js_gold": None,
    }


def group(u: manifest.Utterance, target: np.ndarray, step: int, hostile: str) -> dict:
    """A group of two roll-outs, and gold that this prompt does not have."""
    members = [
        {
            "text": COT.format(f"roll-out{hostile}"),
            "readout": target.tolist(),
            "js": 0.0,
            "format": 1.0,
            "reward": 2.0,
            "advantage": advantage,
        }
        for advantage in (0.7, -0.7)
    ]
    return {"step": step, "id": u.id, "group": [*members, {"gold": True, "reward": float("nan"), "advantage": 0.0}]}


def lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in records))
