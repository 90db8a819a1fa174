"""Comparison of runs: pairing by utterance, pooling of folds, and the correction, on predictions written by hand."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from ml_collections import FrozenConfigDict

from ambijax import compare, metrics
from ambijax.errors import ConfigError, DataError

CONFIG = FrozenConfigDict({"eval": {"resamples": 5000, "level": 0.9, "cluster": "utterance"}})


def _run(path, seed: int, ids: range, sharpness: float) -> None:
    """Predictions that come closer to the votes the sharper they are."""
    (path / "eval/test").mkdir(parents=True)
    lines = []
    for i in reversed(ids) if seed % 2 else ids:  # the order of the lines does not matter
        p = np.random.default_rng(i).dirichlet(np.ones(4))
        noise = np.random.default_rng([seed, i]).dirichlet(np.ones(4))
        q = sharpness * p + (1 - sharpness) * noise
        lines.append({"id": f"u{i}", "speaker": f"s{i % 3}", "target": p.tolist(), "readout": q.tolist()})
    (path / "eval/test/predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "eval/test/summary.json").write_text(json.dumps({"clips": len(lines), "labels": list("abcd")}))


@pytest.fixture
def systems(tmp_path) -> list[compare.System]:
    """Two systems of two folds each, ten utterances a fold."""
    for name, sharpness in (("low", 0.3), ("high", 0.6)):
        for fold in (0, 1):
            _run(tmp_path / f"{name}{fold}", fold + (name == "low"), range(10 * fold, 10 * fold + 10), sharpness)
    return [compare.read([tmp_path / f"{name}{fold}" for fold in (0, 1)], "test") for name in ("low", "high")]


def test_differences_are_paired_by_utterance(systems, tmp_path):
    found = {d.measure: d for d in compare.differences(systems, CONFIG)}
    assert list(found) == ["js", "bc", "r2", "brier", "accuracy"]
    js = {}
    for name in ("low", "high"):
        for fold in (0, 1):
            for line in (tmp_path / f"{name}{fold}/eval/test/predictions.jsonl").read_text().splitlines():
                record = json.loads(line)
                js[name, record["id"]] = float(metrics.js(record["target"], record["readout"]))
    ids = [f"u{i}" for i in range(20)]
    difference = np.array([js["high", i] - js["low", i] for i in ids])
    assert found["js"].mean == pytest.approx(difference.mean())
    drawn = scipy.stats.permutation_test(
        (difference, np.zeros(20)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=20_000, rng=0
    ).pvalue
    assert abs(found["js"].p - drawn) < 0.01  # four standard errors of a p near .01
    assert found["js"].low < found["js"].mean < found["js"].high < 0
    assert found["js"].p_runs == 2 / 4  # two folds, both better: two of four flips
    assert found["js"].adjusted >= found["js"].p


def test_runs_are_paired_by_what_they_were_asked(systems, tmp_path):
    """In another order of folds the test over runs would pair what does not belong together."""
    turned = compare.read([tmp_path / f"high{fold}" for fold in (1, 0)], "test")
    assert turned.ids == systems[0].ids
    with pytest.raises(DataError, match="the same utterances one by one; give both in the same order"):
        compare.differences([systems[0], turned], CONFIG)


def test_one_speaker_has_no_interval_over_speakers(systems):
    over = FrozenConfigDict({"eval": CONFIG.eval.to_dict() | {"cluster": "speaker"}})
    compare.differences(systems, over)
    alone = [dataclasses.replace(s, speakers=np.full(20, "s0")) for s in systems]
    with pytest.raises(DataError, match="was tested on one speaker"):
        compare.differences(alone, over)


def test_seeds_are_averaged_by_utterance(tmp_path):
    for seed in (0, 1):
        _run(tmp_path / f"run{seed}", seed, range(5), 0.5)
    alone = [compare.read([tmp_path / f"run{seed}"], "test").values["js"] for seed in (0, 1)]
    both = compare.read([tmp_path / "run0", tmp_path / "run1"], "test")
    np.testing.assert_allclose(both.values["js"], np.mean(alone, axis=0))


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: (d / "summary.json").unlink(),
        lambda d: (d / "summary.json").write_text(json.dumps({"clips": 9, "labels": list("abcd")})),
        lambda d: (d / "summary.json").write_text(json.dumps({"clips": 5, "labels": list("abc")})),
        lambda d: (d / "predictions.jsonl").write_text('{"id": "u0", "speaker": "s0", "target": [1, 0]}\n'),
    ],
)
def test_half_an_evaluation_is_not_compared(tmp_path, harm):
    _run(tmp_path / "a", 0, range(5), 0.5)
    harm(tmp_path / "a/eval/test")
    with pytest.raises(DataError, match="python -m ambijax"):
        compare.read([tmp_path / "a"], "test")


def test_other_classes_cannot_be_compared(tmp_path):
    for name in "ab":
        _run(tmp_path / name, 0, range(5), 0.5)
    (tmp_path / "b/eval/test/summary.json").write_text(json.dumps({"clips": 5, "labels": list("abce")}))
    with pytest.raises(DataError, match="different classes"):
        compare.differences([compare.read([tmp_path / name], "test") for name in "ab"], CONFIG)
    with pytest.raises(DataError, match="different classes"):
        compare.read([tmp_path / name for name in "ab"], "test")


def test_other_votes_cannot_be_compared(tmp_path):
    """As where a manifest was mended between two evaluations."""
    for name in "ab":
        _run(tmp_path / name, 0, range(5), 0.5)
    path = tmp_path / "b/eval/test/predictions.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[3]["target"] = [1, 0, 0, 0]
    path.write_text("".join(json.dumps(line) + "\n" for line in records))
    with pytest.raises(DataError, match="other votes, for one u3"):
        compare.differences([compare.read([tmp_path / name], "test") for name in "ab"], CONFIG)
    with pytest.raises(DataError, match="other votes, for one u3"):
        compare.read([tmp_path / name for name in "ab"], "test")


def test_other_utterances_cannot_be_compared(tmp_path):
    _run(tmp_path / "a", 0, range(5), 0.5)
    _run(tmp_path / "b", 0, range(1, 6), 0.5)
    a, b = (compare.read([tmp_path / name], "test") for name in "ab")
    with pytest.raises(DataError, match="2 stand in one alone, for one u0"):
        compare.differences([a, b], CONFIG)
    with pytest.raises(ConfigError, match=r"no run directory .*c$"):
        compare.read([tmp_path / "c"], "test")
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="no predictions in"):
        compare.read([tmp_path / "c"], "test")
    with (tmp_path / "a/eval/test/predictions.jsonl").open("a") as file:
        file.write("{\n{")
    with pytest.raises(DataError, match=r"predictions.jsonl:6: not JSON"):
        compare.read([tmp_path / "a"], "test")


def test_a_blank_behind_a_comma_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ambijax.compare", "runs/a,", "runs/b"])
    with pytest.raises(ConfigError, match="'runs/a,' names a run ''"):
        compare.main()
