"""A split -> predictions.jsonl, one record an utterance, written as they come.

    id, speaker, gender, audio, transcript    as in the manifest; audio below `root` of summary.json; gender may be null
    votes, annotators, target                 the votes, how many of them fall on the classes, and their soft label p
    readout, js                               phat after the model's own reasoning, and its JS to p in bits
    reasoning, format, forced, tokens         that reasoning, its format reward, whether it never came to an answer
    readout_gold, js_gold                     the same after the curated reasoning; null without one

With several sampled chains of thought, readout is their mean, reasoning the first of them, and format, forced and
tokens are means.

Beside the records lies `origin.json`: weights, settings, utterances, sounds and code that they come from, and the
sha256 of what is written so far. The same origin goes on where it was killed, at a whole batch, so that every bit is as
in one go; another origin, or a record that is not as it was written, starts anew.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm
from ml_collections import FrozenConfigDict

from ambijax import (
    agent,
    assemble,
    convert,
    data,
    hosts,
    journal,
    manifest,
    metrics,
    prompt,
    reasoning,
    sharding,
    workdir,
)
from ambijax.agent import Setting
from ambijax.data import Dataset
from ambijax.errors import ConfigError, DataError
from ambijax.structs import Completions, Prompt


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How many chains of thought the model writes about a clip, and how."""

    samples: int = 1
    temperature: float = 0.0  # 0 writes the likeliest


GREEDY = Decoding()


def collect(
    setting: Setting,
    variables: dict,
    dataset: Dataset,
    directory: Path,
    name: str,
    *,
    decoding: Decoding = GREEDY,
    after: Sequence[dict] = (),
    wait: bool = False,
) -> list[dict]:
    """All records of a split; computes and writes those that are not yet in `directory/predictions.jsonl`.

    Args:
      setting: the run's.
      variables: the policy's weights.
      dataset: the split.
      directory: where the records go.
      name: of the progress bar.
      decoding: how the model reasons.
      after: records of the split in any order, whose reasonings are read out after instead, one an utterance.
      wait: for another process that is writing there: a training does not end because somebody looks at it.

    Raises:
      ConfigError: another process is writing there, or nobody can, or the disk is full.
    """
    size = sharding.round_up(setting.config.eval.batch_size, setting.mesh)
    directory = hosts.notes(directory)
    path = directory / "predictions.jsonl"
    with workdir.lock(directory, wait=wait):
        origin = _origin(setting, variables, dataset, decoding, after)
        records = hosts.from_main(_begun(directory, origin))
        if len(records) < len(dataset):
            records = records[: len(records) // size * size]
        else:
            tqdm.tqdm.write(f"{name}: {len(records)} predictions are in {path} already; remove it to predict anew")
        text = _text(records)
        workdir.replace(path, text)
        sha = hashlib.sha256(text.encode())
        with path.open("ab", buffering=0) as file:
            for batch in _predict(setting, variables, dataset, name, decoding, after, len(records)):
                sha.update(_append(file, batch))
                _note(directory, origin, file.tell(), sha.hexdigest())
                records += batch
    return records


def read(directory: Path) -> list[dict]:
    """The whole lines of `directory/predictions.jsonl`; none where there is no such file.

    Raises:
      DataError: a line is not JSON; names it.
    """
    path = directory / "predictions.jsonl"
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")  # not splitlines, which parts reasonings at U+2028
    records = []
    for number, line in enumerate(lines[:-1], 1):  # a killed process may have cut the last one
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); remove the file and evaluate again") from None
    return records


def _predict(
    setting: Setting,
    variables: dict,
    dataset: Dataset,
    name: str,
    decoding: Decoding,
    after: Sequence[dict],
    first: int,
) -> Iterator[list[dict]]:
    """The records from utterance `first` on, a batch at a time and in order."""
    size = sharding.round_up(setting.config.eval.batch_size, setting.mesh)
    bar = tqdm.tqdm(total=len(dataset), initial=first, desc=name, unit="clip", mininterval=1.0)
    for start in range(first, len(dataset), size):
        wanted = [min(start + i, len(dataset) - 1) for i in range(size)]  # the last batch is filled up: one shape
        batch = dataset.batch(wanted)
        placed = sharding.place(batch, setting.mesh)
        if after:
            reasoned = _given(setting, variables, placed.prompt, [after[i] for i in wanted])
        else:
            reasoned = _own(setting, variables, placed.prompt, batch.target, decoding)
        readout_gold = _read_out(setting, variables, placed.prompt, placed.gold)
        js_gold = metrics.js(batch.target, readout_gold)
        records = []
        for row, index in enumerate(wanted[: len(dataset) - start]):
            p, curated = batch.target[row], dataset.examples[index].reasoned
            records.append(
                _described(dataset.utterances[index], setting.vocabulary.labels)
                | {"target": p.tolist()}
                | reasoned[row]
                | {"js": float(metrics.js(p, reasoned[row]["readout"]))}
                | {"readout_gold": readout_gold[row].tolist() if curated else None}
                | {"js_gold": js_gold[row].item() if curated else None}
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


def _own(setting: Setting, variables: dict, asked: Prompt, target: np.ndarray, decoding: Decoding) -> list[dict]:
    """What the model writes, and the read-out after it."""
    key = jax.random.key(setting.config.seed)  # the roll-out folds in the number of the example and of the sample
    rolled = setting.rollout(variables, asked, key, decoding.samples, decoding.temperature)
    judged = agent.judge(setting, sharding.fetch(rolled), target)
    return [
        {
            "readout": judged.readout[row].mean(axis=0).tolist(),
            "reasoning": judged.texts[row][0],
            "format": judged.fmt[row].mean().item(),
            "forced": judged.forced[row].mean().item(),
            "tokens": judged.lengths[row].mean().item(),
        }
        for row in range(len(target))
    ]


def _given(setting: Setting, variables: dict, asked: Prompt, others: Sequence[dict]) -> list[dict]:
    """The read-out after reasonings of other records, put in the model's mouth."""
    v = setting.vocabulary
    room = setting.config.data.max_tokens + len(v.forced_anchor)
    written = []
    for other in others:
        ids, anchor = prompt.encode_gold(v, reasoning.split_answer(other["reasoning"])[0], v.labels[0])
        ids = ids[: anchor + 1]  # what is read out stands before the class word
        if len(ids) > room:  # special tokens that the model wrote are spelled out, and longer so
            ids = ids[: room - len(v.forced_anchor)] + ids[-len(v.forced_anchor) :]
        written.append((np.array(ids, np.int32), len(ids) - 1))
    completions = data.completions(written, room, v.endoftext)
    readout = _read_out(setting, variables, asked, sharding.place(completions, setting.mesh))
    kept = ("reasoning", "format", "forced", "tokens")
    return [
        {"readout": q.tolist()} | {key: other[key] for key in kept} for q, other in zip(readout, others, strict=True)
    ]


def _read_out(setting: Setting, variables: dict, asked: Prompt, completions: Completions) -> np.ndarray:
    """phat after one given completion of each prompt, [B, K]."""
    return setting.distribution(sharding.fetch(setting.score(variables, asked, completions, {}).readout)[:, 0])


def _text(records: Sequence[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _append(file: io.FileIO, records: Sequence[dict]) -> bytes:
    """Writes records, down to the disk before origin.json speaks of them; returns their bytes."""
    waiting = written = _text(records).encode()
    try:
        while waiting:
            waiting = waiting[file.write(waiting) :]
        os.fsync(file.fileno())
    except OSError as error:
        advice = "make room and start the same command again"
        raise ConfigError(f"cannot write {file.name}: {error.strerror}; {advice}") from None
    return written


def _note(directory: Path, origin: dict, size: int, sha256: str) -> None:
    """Writes origin.json; the predictions that count are the first `size` bytes."""
    told = {"origin": origin, "bytes": size, "sha256": sha256}
    workdir.replace(directory / "origin.json", json.dumps(told, indent=1) + "\n")


def _begun(directory: Path, origin: dict) -> list[dict]:
    """What is there of these predictions, if it is as it was written; whatever else is there is removed."""
    path = directory / "predictions.jsonl"
    with contextlib.suppress(
        OSError, ValueError, TypeError, KeyError, RecursionError
    ):  # there is none, or it is damaged
        told = json.loads((directory / "origin.json").read_bytes())
        written = path.read_bytes()[: told["bytes"]]
        same = json.dumps(told["origin"], sort_keys=True) == json.dumps(origin, sort_keys=True)
        if same and hashlib.sha256(written).hexdigest() == told["sha256"]:
            return [json.loads(line) for line in written.split(b"\n")[:-1]]
    for file in (directory / "summary.json", path):
        file.unlink(missing_ok=True)
    _note(directory, origin, 0, hashlib.sha256().hexdigest())
    return []


def _origin(setting: Setting, variables: dict, dataset: Dataset, decoding: Decoding, after: Sequence[dict]) -> dict:
    """All that a prediction depends on."""
    trained = hashlib.sha256()
    if not assemble.trains_base(setting.config):
        variables = {name: tree for name, tree in variables.items() if name != "params"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        trained.update(jax.tree_util.keystr(path).encode() + sharding.fetch(leaf).tobytes())
    return {
        "code": journal.sources(),
        "base": convert.digest(setting.config.model.checkpoint),
        "trained": trained.hexdigest(),
        "split": dataset.split,
        "utterances": manifest.digest(manifest.Corpus(dataset.root, dataset.utterances)),
        "decoding": dataclasses.asdict(decoding),
        "after": _sha256([record["reasoning"] for record in after]) if after else None,
        "config": _asks(setting.config),
    }


# Settings that change nothing of a prediction, which may have taken hours.
_ELSEWHERE = ("hosts", "checkpoint", "warn", "guard", "log_every", "watchdog_seconds", "tracker", "tracker_audio")


def _asks(config: FrozenConfigDict) -> dict:
    """The settings that a prediction may depend on; of `eval`, whose others say when and what for, the batch's size."""
    kept = {key: value for key, value in config.to_dict().items() if key not in _ELSEWHERE}
    return kept | {"eval": {"batch_size": config.eval.batch_size}}


def _sha256(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
