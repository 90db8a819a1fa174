"""How people would hear a clip: the distribution over emotions, and the reasoning that led to it.

python -m ambijax.predict --model runs/tiny clip.wav [more.wav] [--transcript "..."] [--base] [--json]

>>> import ambijax
>>> model = ambijax.load("runs/tiny")  # doctest: +SKIP
>>> model.predict(["clip.wav"])[0].distribution  # doctest: +SKIP
{'anger': 0.62, 'happiness': 0.05, ...}
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ambijax import algorithms, assemble, audio, data, errors, features, metrics, prompt, reasoning, settings, sharding
from ambijax.algorithms import Setting
from ambijax.errors import ConfigError

BAR = 30  # characters of a full bar


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model makes of one clip."""

    distribution: dict[str, float]
    reasoning: str  # the chain of thought, without the answer line
    entropy: float  # of the distribution, bits
    forced: bool  # the model never came to an answer; the answer anchor was appended for it


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained run, ready to predict. Made by `load`."""

    setting: Setting
    variables: dict

    def predict(
        self, clips: Sequence[str | Path | np.ndarray], transcripts: Sequence[str] | None = None
    ) -> list[Prediction]:
        """Listens to clips. A clip's prediction does not depend on the others in the batch.

        Args:
          clips: sound files, or float samples [n] at 16 kHz.
          transcripts: what is said in each; '' or None: the model is told that no transcript is given.

        Raises:
          DataError: a clip cannot be heard; names it.
        """
        transcripts = transcripts or [""] * len(clips)
        if len(transcripts) != len(clips):
            raise ConfigError(f"{len(transcripts)} transcripts for {len(clips)} clips; give one each, or none")
        samples = [
            audio.check(clip, audio.SAMPLE_RATE, f"clip {i}") if isinstance(clip, np.ndarray) else audio.load(clip)
            for i, clip in enumerate(clips)
        ]
        c, v = self.setting.config, self.setting.vocabulary
        windows = (*c.data.windows, audio.N_FRAMES)  # a clip may be longer than any of the corpus
        mels = features.mels(samples, windows, self.setting.model.config.audio.num_mel_bins)
        with jax.set_mesh(self.setting.mesh):
            sounds = list(features.encode(self.setting.model, self.variables, self.setting.mesh, mels))
            tokens = [
                np.array(prompt.encode_prompt(v, text, sound.tokens, cot=c.data.cot), np.int32)
                for text, sound in zip(transcripts, sounds, strict=True)
            ]
            size = sharding.round_up(min(c.eval.batch_size, len(clips)), self.setting.mesh)
            return [
                prediction
                for start in range(0, len(clips), size)
                for prediction in self._batch(
                    tokens, sounds, range(start, min(start + size, len(clips))), size, windows
                )
            ]

    def _batch(
        self, tokens: list[np.ndarray], sounds: list[data.Sound], wanted: range, size: int, windows: tuple[int, ...]
    ) -> list[Prediction]:
        rows = [*wanted] + [wanted[0]] * (size - len(wanted))
        batch = data.prompts(
            [tokens[i] for i in rows],
            [sounds[i] for i in rows],
            rows,
            windows=windows,
            text_tokens=data.round_up(max(len(t) - s.tokens for t, s in zip(tokens, sounds, strict=True))),
            pad=self.setting.vocabulary.endoftext,
            live_tower=False,
        )
        placed = sharding.place(batch, self.setting.mesh)
        rolled = self.setting.rollout(self.variables, placed, jax.random.key(0), samples=1, temperature=0.0)
        texts, readout = algorithms.read(self.setting, sharding.fetch(rolled))
        return [
            Prediction(
                distribution=dict(zip(self.setting.vocabulary.labels, readout[row, 0].tolist(), strict=True)),
                reasoning=reasoning.split_answer(texts[row][0])[0],
                entropy=float(metrics.entropy(readout[row, 0])),
                forced=bool(rolled.forced[row, 0]),
            )
            for row in range(len(wanted))
        ]


def load(run: str | Path, *, base: bool = False) -> Model:
    """Opens a run directory.

    Args:
      run: written by ambijax.train.
      base: leave the adapters out.

    Raises:
      ConfigError: not a run directory, or its checkpoint or base weights are missing.
    """
    setting = assemble.setting(settings.load(run))
    with jax.set_mesh(setting.mesh):
        variables = {"params": assemble.base(setting)} if base else assemble.trained(setting, Path(run))
    return Model(setting, variables)


def _picture(prediction: Prediction) -> str:
    width = max(map(len, prediction.distribution))
    ranked = sorted(prediction.distribution.items(), key=lambda item: -item[1])
    bars = [f"  {label:<{width}} {p:5.2f} {'█' * round(p * BAR)}" for label, p in ranked]
    note = ["  (the answer was forced: the reasoning never came to one)"] if prediction.forced else []
    return "\n".join([*bars, *(f"  {line}" for line in prediction.reasoning.splitlines()), *note])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ambijax.predict", description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="+", type=Path, help="wav or flac files")
    parser.add_argument("--model", required=True, type=Path, help="run directory written by ambijax.train")
    parser.add_argument("--transcript", action="append", help="what is said; once for each clip, in order")
    parser.add_argument("--base", action="store_true", help="the model before training")
    parser.add_argument("--json", action="store_true", help="one JSON object a clip and line")
    args = parser.parse_args()
    predictions = load(args.model, base=args.base).predict(args.clips, args.transcript)
    for clip, prediction in zip(args.clips, predictions, strict=True):
        if args.json:
            print(json.dumps({"audio": str(clip), **dataclasses.asdict(prediction)}, ensure_ascii=False))
        else:
            print(f"{clip}\n{_picture(prediction)}\n")


if __name__ == "__main__":
    errors.run(main)
