"""A split -> predictions.jsonl, one record an utterance, written as they come.

    id, speaker, gender, audio, transcript    as in the manifest; audio below `root` of summary.json; gender may be null
    votes, annotators, target                 the votes, how many of them fall on the classes, and their soft label p
    readout, js                               phat after the model's own reasoning, and its JS to p in bits
    reasoning, format, forced, tokens         that reasoning, its format reward, whether it never came to an answer
    readout_gold, js_gold                     the same after the curated reasoning; null without one

With several sampled chains of thought, readout is their mean, reasoning the first of them, and format, forced and
tokens are means.

Beside the records lies `origin.json`: weights, settings, utterances and version that they come from. The same origin
goes on where it was killed, at a whole batch, so that every bit is as in one go; another origin starts anew.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tqdm

from ambijax import algorithms, assemble, convert, journal, manifest, metrics, sharding
from ambijax.algorithms import Setting
from ambijax.data import Dataset


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How many chains of thought the model writes about a clip, and how."""

    samples: int = 1
    temperature: float = 0.0  # 0 writes the likeliest


GREEDY = Decoding()


def predict(
    setting: Setting, variables: dict, dataset: Dataset, name: str, decoding: Decoding = GREEDY, first: int = 0
) -> Iterator[list[dict]]:
    """The records of a split, a batch at a time and in order, with a progress bar named `name`.

    Args:
      setting: the run's.
      variables: the policy's weights.
      dataset: the split.
      name: of the bar.
      decoding: what to read out after.
      first: index of the utterance to begin with.
    """
    size = sharding.round_up(setting.config.eval.batch_size, setting.mesh)
    key = jax.random.key(setting.config.seed)  # the roll-out folds in the number of the example and of the sample
    bar = tqdm.tqdm(total=len(dataset), initial=first, desc=name, unit="clip", mininterval=1.0)
    for start in range(first, len(dataset), size):
        wanted = [min(start + i, len(dataset) - 1) for i in range(size)]  # the last batch is filled up: one shape
        batch = dataset.batch(wanted)
        placed = sharding.place(batch, setting.mesh)
        rolled = setting.rollout(variables, placed.prompt, key, decoding.samples, decoding.temperature)
        judged = algorithms.judge(setting, sharding.fetch(rolled), batch.target)
        after_gold = setting.score(variables, placed.prompt, placed.gold, {}).readout
        readout = judged.readout.mean(axis=1)
        readout_gold = setting.distribution(sharding.fetch(after_gold)[:, 0])
        js, js_gold = metrics.js(batch.target, readout), metrics.js(batch.target, readout_gold)
        records = []
        for row, index in enumerate(wanted[: len(dataset) - start]):
            curated = dataset.examples[index].reasoned
            records.append(
                _described(dataset.utterances[index], setting.vocabulary.labels)
                | {
                    "target": batch.target[row].tolist(),
                    "readout": readout[row].tolist(),
                    "js": js[row].item(),
                    "reasoning": judged.texts[row][0],
                    "format": judged.fmt[row].mean().item(),
                    "forced": judged.forced[row].mean().item(),
                    "tokens": judged.lengths[row].mean().item(),
                    "readout_gold": readout_gold[row].tolist() if curated else None,
                    "js_gold": js_gold[row].item() if curated else None,
                }
            )
        yield records
        bar.update(len(records))
    bar.close()


def _described(utterance: manifest.Utterance, labels: tuple[str, ...]) -> dict:
    return {
        "id": utterance.id,
        "speaker": utterance.speaker,
        "gender": utterance.gender or None,
        "audio": utterance.audio,
        "transcript": utterance.transcript,
        "votes": utterance.votes,
        "annotators": sum(utterance.votes.get(label, 0) for label in labels),
    }


def collect(
    setting: Setting, variables: dict, dataset: Dataset, directory: Path, name: str, decoding: Decoding = GREEDY
) -> list[dict]:
    """All records of a split; writes those that are not yet in `directory/predictions.jsonl`."""
    size = sharding.round_up(setting.config.eval.batch_size, setting.mesh)
    path = directory / "predictions.jsonl"
    records = _begun(directory, origin(setting, variables, dataset, decoding))
    if len(records) < len(dataset):
        records = records[: len(records) // size * size]
    else:
        tqdm.tqdm.write(f"{name}: {len(records)} predictions are in {path} already; remove it to predict anew")
    lines = [_line(record) for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        for batch in predict(setting, variables, dataset, name, decoding, first=len(records)):
            file.writelines(map(_line, batch))
            file.flush()
            records += batch
    return records


def read(directory: Path) -> list[dict]:
    """The whole lines of `directory/predictions.jsonl`; none where there is no such file."""
    path = directory / "predictions.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines, which parts reasonings at U+2028
    return [json.loads(line) for line in lines[:-1]]  # a killed process may have cut the last one


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _begun(directory: Path, wanted: dict) -> list[dict]:
    """What is there of these predictions; whatever else is there is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    path, text = directory / "origin.json", json.dumps(wanted, indent=1) + "\n"
    if path.is_file() and path.read_text() == text:
        return read(directory)
    for name in ("summary.json", "predictions.jsonl"):
        (directory / name).unlink(missing_ok=True)
    path.write_text(text)
    return []


def origin(setting: Setting, variables: dict, dataset: Dataset, decoding: Decoding) -> dict:
    """All that a prediction depends on."""
    trained = hashlib.sha256()
    if not assemble.trains_base(setting.config):
        variables = {name: tree for name, tree in variables.items() if name != "params"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        trained.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    spoken = [dataclasses.asdict(utterance) for utterance in dataset.utterances]
    return {
        "commit": journal.commit(),
        "base": convert.digest(setting.config.model.checkpoint),
        "trained": trained.hexdigest(),
        "split": dataset.split,
        "utterances": hashlib.sha256(json.dumps(spoken).encode()).hexdigest(),
        "decoding": dataclasses.asdict(decoding),
        "config": setting.config.to_dict(),
    }
