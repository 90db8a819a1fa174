"""How much of the synthetic listeners' votes can be heard at all, and how easily.

    python benchmarks/synthetic_ideal.py [--like=cremad|iemocap] [--speakers=N] [--clips_per_speaker=N]

Prints JS / BC / R2 / Brier / accuracy on held-out speakers (every fold is the test fold once) of
    uniform, prior     the floors
    clip               softmax regression on the measured acoustics of the clip alone, without or with products
    speaker            the same on z-scores against the speaker's other clips
    listeners          the true probabilities over the whole pool of listeners: what no model can beat but by luck
beside what the corpus looks like. It renders every clip a second time: 3,000 clips take some two minutes.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from scipy.optimize import minimize

from ambijax import acoustics, manifest, metrics
from ambijax.corpora import synthetic

RIDGE = 1e-3
DRAWS = 8  # how often each listener of the pool hears each clip


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def regression(x: np.ndarray, p: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Softmax regression on x [N, D], trained on the rows outside `test`; predictions for `test`."""
    x = np.clip((x - x[~test].mean(0)) / x[~test].std(0), -4, 4)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    train_x, train_p = x[~test], p[~test]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(x.shape[1], p.shape[1])
        q = softmax(train_x @ w)
        value = -np.mean(np.sum(train_p * np.log(q + 1e-12), 1)) + RIDGE * np.sum(w**2)
        return value, (train_x.T @ (q - train_p) / len(train_x) + 2 * RIDGE * w).ravel()

    best = minimize(loss, np.zeros(x.shape[1] * p.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return softmax(x[test] @ best.x.reshape(x.shape[1], p.shape[1]))


def squares(x: np.ndarray) -> np.ndarray:
    """x and all its squares and products, [N, D + D(D+1)/2]."""
    x = (x - x.mean(0)) / x.std(0)
    i, j = np.triu_indices(x.shape[1])
    return np.concatenate([x, x[:, i] * x[:, j]], 1)


def listeners(spec: synthetic.Spec) -> np.ndarray:
    """The probability that a random listener of the pool chooses each class, [N, K], in manifest order."""
    rng = np.random.default_rng(0)
    pool = np.tile(np.arange(synthetic.POOL), DRAWS)
    rows = []
    for index in range(spec.speakers):
        who = synthetic.talker_of(spec, index)
        for take in range(spec.clips_per_speaker):
            clip = synthetic.act(spec, who, index, take)
            rows.append(synthetic.opinions(rng, spec, clip.tone, clip.sentence, pool).mean(0))
    return np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=("cremad", "iemocap"), default="cremad")
    parser.add_argument("--speakers", type=int)
    parser.add_argument("--clips_per_speaker", type=int)
    flags = parser.parse_args()
    spec = synthetic.LIKE[flags.like]
    asked = {name: getattr(flags, name) for name in ("speakers", "clips_per_speaker") if getattr(flags, name)}
    spec = dataclasses.replace(spec, **asked)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        corpus = synthetic.write(Path(folder) / "corpus", spec)
        print(f"{len(corpus.utterances)} clips written in {time.perf_counter() - start:.1f} s")
        clips = [acoustics.measure(soundfile.read(corpus.path(u), dtype="float32")[0]) for u in corpus.utterances]
        seconds = [soundfile.info(corpus.path(u)).duration for u in corpus.utterances]
    p = manifest.soft_labels(corpus.utterances, spec.labels).astype(np.float64)
    speakers = np.array([u.speaker for u in corpus.utterances])
    folds = np.array([u.fold for u in corpus.utterances])
    describe(spec, corpus, p, seconds)

    measured = np.stack([list(acoustics.Norm.of(clips).z(clip).values()) for clip in clips])
    norms = acoustics.speaker_norms(clips, speakers.tolist(), least=1)
    relative = np.stack([list(norms[s].z(clip).values()) for clip, s in zip(clips, speakers, strict=True)])
    guesses = {name: np.zeros_like(p) for name in ("uniform", "prior", "clip", "clip, squares", "speaker, squares")}
    for fold in np.unique(folds):
        test = folds == fold
        guesses["uniform"][test] = 1 / p.shape[1]
        guesses["prior"][test] = p[~test].mean(0)
        guesses["clip"][test] = regression(measured, p, test)
        guesses["clip, squares"][test] = regression(squares(measured), p, test)
        guesses["speaker, squares"][test] = regression(squares(relative), p, test)
    guesses["listeners"] = listeners(spec)
    print(f"{'':20}   JS    BC    R2  Brier  acc  JS/prior")
    for name, q in guesses.items():
        row = [metrics.js(p, q).mean(), metrics.bc(p, q).mean(), metrics.r2(p, q).mean(), metrics.brier(p, q).mean()]
        row += [metrics.accuracy(p, q), row[0] / metrics.js(p, guesses["prior"]).mean()]
        print(f"{name:20} " + " ".join(f"{value:.3f}" for value in row))


def describe(spec: synthetic.Spec, corpus: manifest.Corpus, p: np.ndarray, seconds: list[float]) -> None:
    top = p == p.max(1, keepdims=True)
    acted = np.array([[label[:3].upper() for label in spec.labels].index(u.id[-3:]) for u in corpus.utterances])
    unique = top.sum(1) == 1
    print(f"seconds {min(seconds):.2f} to {max(seconds):.2f}, mean {np.mean(seconds):.2f}")
    print(f"mean vote entropy {metrics.entropy(p).mean():.3f} bits, unanimous {np.mean(p.max(1) == 1):.3f},")
    share = np.mean(unique & (p.argmax(1) == acted))
    print(f"ties {1 - unique.mean():.3f}, acted emotion is the unique majority {share:.3f}")
    print("            votes argmax recognised")
    for k, label in enumerate(spec.labels):
        recognised = np.mean(unique[acted == k] & (p[acted == k].argmax(1) == k))
        print(f"  {label:10} {p[:, k].mean():.3f} {np.mean(p.argmax(1) == k):.3f} {recognised:.3f}")


if __name__ == "__main__":
    main()
