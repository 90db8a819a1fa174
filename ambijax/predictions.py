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

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm

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
from ambijax.errors import DataError
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

    Raises:
      ConfigError: another process is writing there, or nobody can.
    """
    size = sharding.round_up(setting.config.eval.batch_size, setting.mesh)
    directory = hosts.notes(directory)
    path = directory / "predictions.jsonl"
    with workdir.lock(directory):
        records = hosts.from_main(_begun(directory, _origin(setting, variables, dataset, decoding, after)))
        if len(records) < len(dataset):
            records = records[: len(records) // size * size]
        else:
            tqdm.tqdm.write(f"{name}: {len(records)} predictions are in {path} already; remove it to predict anew")
        workdir.replace(path, "".join(map(_line, records)))
        with path.open("a", encoding="utf-8") as file:
            for batch in _predict(setting, variables, dataset, name, decoding, after, len(records)):
                file.writelines(map(_line, batch))
                file.flush()
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
        except ValueError as error:
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


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _begun(directory: Path, wanted: dict) -> list[dict]:
    """What is there of these predictions; whatever else is there is removed."""
    path, text = directory / "origin.json", json.dumps(wanted, indent=1) + "\n"
    with contextlib.suppress(DataError):  # damaged ones are predicted anew
        if path.is_file() and path.read_bytes() == text.encode():
            return read(directory)
    for name in ("summary.json", "predictions.jsonl"):
        (directory / name).unlink(missing_ok=True)
    workdir.replace(path, text)
    return []


def _origin(setting: Setting, variables: dict, dataset: Dataset, decoding: Decoding, after: Sequence[dict]) -> dict:
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
        "utterances": _sha256(spoken),
        "decoding": dataclasses.asdict(decoding),
        "after": _sha256([record["reasoning"] for record in after]) if after else None,
        "config": setting.config.to_dict(),
    }


def _sha256(value: list) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
