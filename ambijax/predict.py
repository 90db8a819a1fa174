"""How people would hear a clip: the distribution over emotions, and the reasoning that led to it.

    python -m ambijax.predict --model runs/tiny clip.wav [--transcript "..."]
    python -m ambijax.predict --model runs/tiny recordings/ 'more/**/*.flac' clips.csv --out heard.csv

A model is a run directory, a directory written by ambijax.export, a PEFT adapter, or any Qwen2-Audio checkpoint. In
Python: `ambijax.load(model).predict("clip.wav")`, see listener.py.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tqdm

from ambijax import audio, compilation, emotions, errors, listener, listing, predicted
from ambijax.errors import ConfigError, DataError
from ambijax.listener import Model, Prediction
from ambijax.workdir import check_writable

BAR = 30  # characters of a full bar


def _picture(prediction: Prediction) -> str:
    width = max(map(len, prediction.distribution))
    ranked = sorted(prediction.distribution.items(), key=lambda item: -item[1])
    bars = [f"  {label:<{width}} {p:5.2f} {'█' * round(p * BAR)}" for label, p in ranked]
    note = ["  (the answer was forced: the reasoning never came to one)"] if prediction.forced else []
    return "\n".join([*bars, *(f"  {line}" for line in prediction.reasoning.splitlines()), *note])


def _hear(model: Model, clips: Sequence[listing.Clip], options: dict) -> Iterator[tuple[Path, Prediction | DataError]]:
    """Predictions in order, a batch at a time, with a progress bar; a clip that cannot be heard gives its error."""
    size = options["batch_size"] or model.setting.config.eval.batch_size
    bar = tqdm.tqdm(total=len(clips), desc="predict", unit="clip", disable=None)
    for start in range(0, len(clips), size):
        batch = clips[start : start + size]
        heard, results = {}, {}
        for i, clip in enumerate(batch):
            try:
                heard[i] = audio.load(clip.path)
            except DataError as error:
                results[i] = error
        if heard:
            found = model.predict([*heard.values()], [batch[i].transcript for i in heard], **options)
            results |= zip(heard, found, strict=True)
        for i, clip in enumerate(batch):
            yield clip.path, results[i]
        bar.update(len(batch))
    bar.close()


def _record(path: Path, result: Prediction | DataError) -> dict:
    """One line of JSON."""
    return {"audio": str(path)} | (
        {"error": str(result)} if isinstance(result, DataError) else dataclasses.asdict(result)
    )


def _print(record: dict, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
    elif "error" not in record:
        path = record.pop("audio")
        print(f"{path}\n{_picture(Prediction(**record))}\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ambijax.predict", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("clips", nargs="+", help="sound files, folders, globs, .csv tables, or - for a list of these on stdin")
    add("--model", required=True, type=Path, help="run directory, export, PEFT adapter or Qwen2-Audio checkpoint")
    add("--transcript", action="append", help="what is said; once for each clip, in order")
    add("--columns", help="of a .csv table: paths[,transcripts]; by default audio and, if there, transcript")
    add("--out", type=Path, help="a .csv or .jsonl file to write; without it results are printed")
    add("--resume", action="store_true", help="go on in an --out that was begun with the same model and options")
    add("--json", action="store_true", help="print one JSON object a clip and line")
    add("--base", action="store_true", help="the model before training")
    add("--labels", help="class words, separated by commas, for a checkpoint that does not name its own")
    add("--checkpoint", type=Path, help="where the base weights lie, if not where the run or the adapter says")
    add("--batch_size", type=int, help="clips at once; changes nothing but speed and memory")
    add("--samples", type=int, default=1, help="chains of thought to average over; 1: the likeliest")
    add("--temperature", type=float, default=1.0, help="of several samples")
    add("--seed", type=int, default=0, help="of several samples")
    return parser.parse_args()


def _clips(
    names: Sequence[str], columns: tuple[str, ...] | None, transcripts: Sequence[str] | None
) -> list[listing.Clip]:
    """What is to be heard; if none of it can be, that is said before a model is read."""
    clips = list(listing.clips(names, columns))
    if not clips:
        raise DataError("no clip is named: the list is empty")
    if transcripts and len(transcripts) != len(clips):
        raise ConfigError(f"{len(transcripts)} transcripts for {len(clips)} clips; give one each, or none")
    if transcripts:
        clips = [clip._replace(transcript=said) for clip, said in zip(clips, transcripts, strict=True)]
    first = None
    for clip in clips:
        try:
            audio.load(clip.path)
            return clips
        except DataError as error:
            first = first or error
    others = f"; nor can any of the other {len(clips) - 1} be heard" if len(clips) > 1 else ""
    raise DataError(f"{first}{others}")


def _left(clips: Sequence[listing.Clip], begun: Sequence[dict]) -> list[listing.Clip]:
    """The clips that have no row yet, each as often as it is named."""

    def name(path: str) -> bytes:
        return path.encode(errors="backslashreplace")  # as it is written where it is no text

    there = collections.Counter(name(row["audio"]) for row in begun)
    left = []
    for clip in clips:
        there[name(str(clip.path))] -= 1
        if there[name(str(clip.path))] < 0:
            left.append(clip)
    return left


def main() -> None:
    args = _arguments()
    if args.out and args.out.suffix not in predicted.SUFFIXES:
        raise ConfigError(f"--out {args.out} must be a .csv or .jsonl file")
    if args.resume and not args.out:
        raise ConfigError("--resume goes on in the file that --out names")
    if args.out and args.out.exists() and not args.resume:
        raise ConfigError(f"--out {args.out} exists; choose another name, or go on after its rows with --resume")
    if args.out and not args.out.parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no directory {args.out.parent}")
    if args.out:
        check_writable(args.out.parent)
    columns = tuple(args.columns.split(",")) if args.columns else None
    if columns and (len(columns) > 2 or not all(columns)):
        raise ConfigError(f"--columns={args.columns} must name one of paths, and perhaps one of transcripts")
    options = {key: getattr(args, key) for key in ("batch_size", "samples", "temperature", "seed")}
    listener.check(**options)
    labels = emotions.classes(args.labels) if args.labels else None
    clips = _clips(args.clips, columns, args.transcript)
    begun = predicted.begun(args.out) if args.out and args.out.exists() else []
    if not (clips := _left(clips, begun)):
        print(f"{args.out} has all of its {len(begun)} clips")
        return
    compilation.keep()
    model = listener.load(args.model, base=args.base, labels=labels, checkpoint=args.checkpoint)
    bad = 0
    with contextlib.ExitStack() as files:
        write = functools.partial(_print, as_json=args.json)
        if args.out:
            write = files.enter_context(predicted.Predicted(args.out, model.setting.vocabulary.labels, begun)).write
        for path, result in _hear(model, clips, options):
            if isinstance(result, DataError):
                bad += 1
                tqdm.tqdm.write(f"ambijax: {result}", file=sys.stderr)
            write(_record(path, result))
    if bad:
        raise DataError(f"{bad} of {len(clips)} clips could not be heard, see above; the others are done")


if __name__ == "__main__":
    errors.run(main)
