"""Evaluation of the tiny model: batching, resuming, sampling, controls, calibration, slices, another corpus."""

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from jax.sharding import AxisType
from ml_collections import FrozenConfigDict

from ambijax import (
    assemble,
    calibration,
    canaries,
    evaluate,
    manifest,
    metrics,
    predictions,
    settings,
    sharding,
    slices,
    workdir,
)
from ambijax.corpora import synthetic
from ambijax.errors import ConfigError, DataError
from ambijax.predictions import Decoding
from tests.command import needs_tiny, start


@dataclasses.dataclass(frozen=True)
class Bench:
    """The tiny model on one device, and eight clips of a speaker it never heard."""

    setting: object
    variables: dict
    test: object
    records: list[dict]  # greedy, all eight at once
    directory: Path

    def collect(self, directory: Path, batch: int = 8, test: object = None, **how) -> list[dict]:
        changed = self.setting.config.to_dict()
        changed["eval"]["batch_size"] = batch
        setting = dataclasses.replace(self.setting, config=FrozenConfigDict(changed))
        with jax.set_mesh(setting.mesh):
            return predictions.collect(setting, self.variables, test or self.test, directory, "x", **how)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    small = ["speakers=5", "clips_per_speaker=8", f"root={root / 'corpus'}"]
    argv = ["x", "--config=configs/sft.py:tiny", "--workdir=unused", *(f"--config.data.{s}" for s in small)]
    config, _ = settings.parse(argv)
    one = jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3)
    setting = dataclasses.replace(assemble.setting(config), mesh=one)
    with jax.set_mesh(one):
        variables = {"params": assemble.base(setting)}
        test = assemble.datasets(setting, variables["params"], ("test",))["test"]
    made = Bench(setting, variables, test, [], root / "eval")
    return dataclasses.replace(made, records=made.collect(root / "eval"))


def _from(dataset: object, i: int) -> object:
    """The split from clip i on, still numbered as before."""
    rest = {name: getattr(dataset, name)[i:] for name in ("utterances", "examples", "sounds")}
    return dataclasses.replace(dataset, **rest, first=dataset.first + i)


# Predictions ---------------------------------------------------------------------------------------------------------


@needs_tiny
def test_a_record_holds_what_its_readers_need(bench):
    by_id = {u.id: u for u in manifest.read(bench.test.root).utterances}
    for record in bench.records:
        u = by_id[record["id"]]
        assert (record["audio"], record["transcript"], record["gender"]) == (u.audio, u.transcript, u.gender)
        assert record["annotators"] == sum(u.votes.values())
        assert (bench.test.root / record["audio"]).is_file()
        target = np.array([u.votes.get(label, 0) for label in bench.setting.vocabulary.labels]) / record["annotators"]
        np.testing.assert_allclose(record["target"], target, atol=1e-6)
        assert record["js"] == pytest.approx(metrics.js(target, record["readout"]), abs=1e-6)
        assert record["js_gold"] == pytest.approx(metrics.js(target, record["readout_gold"]), abs=1e-6)
    assert bench.records == predictions.read(bench.directory)


@needs_tiny
def test_one_clip_at_a_time_predicts_as_eight_do_and_a_killed_evaluation_goes_on(bench, tmp_path, monkeypatch):
    one = bench.collect(tmp_path, batch=1)
    for a, b in zip(one, bench.records, strict=True):
        assert a["reasoning"] == b["reasoning"]
        np.testing.assert_allclose(a["readout"], b["readout"], atol=1e-5)
        np.testing.assert_allclose(a["readout_gold"], b["readout_gold"], atol=1e-5)
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    path.unlink()
    described, predicted = predictions._described, []

    def killed_at_the_fourth(utterance, labels):
        predicted.append(utterance.id)
        if len(predicted) == 4:
            raise KeyboardInterrupt
        return described(utterance, labels)

    monkeypatch.setattr(predictions, "_described", killed_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        bench.collect(tmp_path, batch=1)
    path.write_bytes(path.read_bytes() + whole.split(b"\n")[3][:50])  # it was writing it
    bench.collect(tmp_path, batch=1)
    assert path.read_bytes() == whole
    assert predicted == [record["id"] for record in [*one[:4], *one[3:]]]  # three were there, and were not done again
    # A digit that is not as it was written: nothing of what is there counts.
    path.write_bytes(whole.replace(b'"tokens": ', b'"tokens": 1', 1))
    bench.collect(tmp_path, batch=1)
    assert path.read_bytes() == whole
    assert len(predicted) == 9 + 8
    # One bit of one sound: it is another clip.
    shutil.copytree(bench.test.root, tmp_path / "corpus")
    elsewhere = dataclasses.replace(bench.test, root=tmp_path / "corpus")
    bench.collect(tmp_path, batch=1, test=elsewhere)
    assert len(predicted) == 9 + 8  # the same clips, wherever they lie
    sound = tmp_path / "corpus" / bench.test.utterances[5].audio
    sound.write_bytes(sound.read_bytes()[:-1] + bytes([sound.read_bytes()[-1] ^ 1]))
    bench.collect(tmp_path, batch=1, test=elsewhere)
    assert len(predicted) == 9 + 8 + 8
    # Other words, other predictions: nothing of the old ones stays.
    others = tuple(dataclasses.replace(u, cot="") for u in bench.test.utterances)
    bench.collect(tmp_path, batch=1, test=dataclasses.replace(bench.test, utterances=others))
    assert len(predicted) == 9 + 8 + 8 + 8
    # What cannot change a prediction throws none away; other code, committed or not, may change all.
    changed = bench.setting.config.to_dict()
    changed["log_every"], changed["eval"]["draws"], changed["checkpoint"]["keep"] = 7, 3, 9
    quiet = dataclasses.replace(bench.setting, config=FrozenConfigDict(changed))
    same = {"batch": 1, "test": dataclasses.replace(bench.test, utterances=others)}
    dataclasses.replace(bench, setting=quiet).collect(tmp_path, **same)
    assert len(predicted) == 9 + 8 + 8 + 8
    monkeypatch.setattr(predictions.journal, "sources", lambda: "edited")
    bench.collect(tmp_path, **same)
    assert len(predicted) == 9 + 8 + 8 + 8 + 8


@needs_tiny
def test_sampled_chains_of_thought_are_averaged_and_do_not_depend_on_their_neighbours(bench, tmp_path):
    decoding = Decoding(samples=2, temperature=1.0)
    everyone = bench.collect(tmp_path / "all", decoding=decoding)
    for a, b in zip(
        bench.collect(tmp_path / "part", decoding=decoding, test=_from(bench.test, 3)), everyone[3:], strict=True
    ):
        assert a["reasoning"] == b["reasoning"]
        np.testing.assert_allclose(a["readout"], b["readout"], atol=1e-5)
    setting = bench.setting
    with jax.set_mesh(setting.mesh):
        asked = sharding.place(bench.test.batch(range(8)).prompt, setting.mesh)
        rolled = setting.rollout(bench.variables, asked, jax.random.key(setting.config.seed), 2, 1.0)
        logits = np.asarray(rolled.readout, np.float64)
    written = np.asarray(rolled.completions.tokens)
    assert len(np.unique(written.reshape(16, -1), axis=0)) == 16  # no two samples share a key
    expected = scipy.special.softmax(logits, axis=-1).mean(axis=1)
    np.testing.assert_allclose([r["readout"] for r in everyone], expected, atol=1e-6)


@needs_tiny
def test_a_batch_that_is_half_written_is_computed_as_a_whole(bench, tmp_path):
    # Starting inside a batch would pad and group the clips otherwise, and change the last bits.
    shutil.copytree(bench.directory, tmp_path / "cut")
    path = tmp_path / "cut/predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(True)[:3]))
    with workdir.lock(tmp_path / "cut"), pytest.raises(ConfigError, match="in use by pid"):
        bench.collect(tmp_path / "cut")
    bench.collect(tmp_path / "cut")
    assert path.read_bytes() == whole


# Controls ------------------------------------------------------------------------------------------------------------


def _utterances(words: str) -> list[manifest.Utterance]:
    return [
        manifest.Utterance(f"u{i}", f"{i}.wav", f"say {w}", f"s{i}", 0, {"anger": i + 1}, cot=f"cot {i}")
        for i, w in enumerate(words)
    ]


@pytest.mark.parametrize(
    ("control", "field"), [(canaries.swap_audio, "audio"), (canaries.swap_transcript, "transcript")]
)
def test_a_swap_changes_one_field_of_every_utterance_and_nothing_else(control, field):
    utterances = _utterances("abcabcaac")  # half a split away the words are the same here and there
    swapped = control(utterances)
    for u, s in zip(utterances, swapped, strict=True):
        assert getattr(s, field) != getattr(u, field)
        assert getattr(s, field) in {getattr(o, field) for o in utterances}
        assert dataclasses.replace(s, **{field: getattr(u, field)}) == u


@pytest.mark.parametrize("speakers", [2, 4, 9, 18])
def test_a_swap_is_no_exchange_of_like_for_like(speakers):
    """Speakers say one list, each in the same ways: at any fixed distance the counterpart would sound alike."""
    ways = [f"{word}-{emotion}" for word in "abcde" for emotion in ("anger", "fear", "sadness", "neutral")]
    split = [manifest.Utterance(f"{s}{w}", w, w, f"{s}", 0, {"anger": 1}) for s in range(speakers) for w in ways]
    swapped = canaries.swap_audio(split)
    assert np.mean([s.audio == u.audio for s, u in zip(swapped, split, strict=True)]) < 0.2
    assert sorted(s.audio for s in swapped) == sorted(u.audio for u in split)
    assert swapped == canaries.swap_audio(split)
    others = canaries.exchanged(split)  # words go with sounds, unless they are the same
    words = [
        (s.transcript, o.transcript)
        for s, o, u in zip(canaries.swap_transcript(split), others, split, strict=True)
        if o.transcript != u.transcript
    ]
    assert all(s == o for s, o in words)


def test_swaps_that_would_swap_nothing_are_refused():
    with pytest.raises(DataError, match="the same words"):
        canaries.swap_transcript(_utterances("aaa"))
    with pytest.raises(DataError, match="at least two"):
        canaries.swap_audio(_utterances("a"))


@needs_tiny
def test_the_readout_after_the_own_reasoning_is_the_own_and_after_another_ones_it_is_not(bench, tmp_path):
    same = bench.collect(tmp_path / "same", after=bench.records)
    for own, again in zip(bench.records, same, strict=True):
        # Teacher-forced and re-encoded: a shift of the anchor by one token would change it altogether.
        np.testing.assert_allclose(again["readout"], own["readout"], atol=1e-4)
    shuffled = bench.collect(tmp_path / "shuffled", after=canaries.exchanged(bench.records))
    moved = 0
    for own, other, counterpart in zip(bench.records, shuffled, canaries.exchanged(bench.records), strict=True):
        assert other["reasoning"] == counterpart["reasoning"]
        for field in ("id", "audio", "transcript", "votes", "target", "readout_gold", "js_gold"):
            assert other[field] == own[field]
        moved += np.abs(np.subtract(other["readout"], own["readout"])).max() > 0.05
    assert moved >= 2


@needs_tiny
def test_swapped_sounds_and_swapped_words_are_noticed(bench, tmp_path):
    for control in (canaries.swap_audio, canaries.swap_transcript):
        with jax.set_mesh(bench.setting.mesh):
            sets = assemble.datasets(bench.setting, bench.variables["params"], ("test",), edit=control)
        swapped = bench.collect(tmp_path / control.__name__, test=sets["test"])
        assert [r["target"] for r in swapped] == [r["target"] for r in bench.records]
        # The curated reasoning is not swapped, so that after it only the sound, or the words, can move the read-out.
        pairs = list(zip(swapped, bench.records, strict=True))
        moved = [np.abs(np.subtract(a["readout_gold"], b["readout_gold"])).max() for a, b in pairs]
        assert max(moved) > 1e-3, control
        if control is canaries.swap_audio:
            assert sum(a["reasoning"] != b["reasoning"] for a, b in pairs) >= 4


# Calibration, slices, summary ----------------------------------------------------------------------------------------


def test_temperature_of_what_was_made_from_itself_is_one():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    assert calibration.fit(p, p) == pytest.approx(1, abs=1e-9)
    # Sharpened predictions are flattened back, and the other way round.
    for t in (0.4, 2.5):
        q = p ** (1 / t) / np.sum(p ** (1 / t), axis=1, keepdims=True)
        assert calibration.fit(p, q) == pytest.approx(1 / t, rel=1e-9)
        np.testing.assert_allclose(calibration.apply(q, 1 / t), p, atol=1e-9)


def test_temperature_is_the_minimum_of_the_divergence():
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(5), (2, 80))
    found = scipy.optimize.minimize_scalar(
        lambda t: np.mean(metrics.kl(p, scipy.special.softmax(np.log(q) / t, axis=-1))),
        bounds=(0.1, 40),
        method="bounded",
    )
    t = calibration.fit(p, q)
    assert np.mean(metrics.kl(p, calibration.apply(q, t))) <= found.fun + 1e-12


def test_temperature_stays_finite():
    votes = np.eye(3)
    assert calibration.fit(votes, 0.7 * votes + 0.1) == calibration.COLDEST  # always right: ever more certain
    assert calibration.fit(np.roll(votes, 1, axis=1), 0.7 * votes + 0.1) == calibration.HOTTEST
    assert np.all(np.isfinite(calibration.apply(votes, 2.0)))


def _record(i: int, counts: list[int], q: list[float], **fields) -> dict:
    p = np.array(counts) / sum(counts)
    votes = {label: n for label, n in zip("abc", counts, strict=True) if n}
    return {"id": f"{i}", "target": p.tolist(), "readout": q, "votes": votes, "annotators": sum(counts)} | fields


def test_slices_by_hand():
    q = [0.6, 0.3, 0.1]
    records = [
        _record(0, [4, 0, 0], q, speaker="s2", gender="female", annotators=3.98),  # of votes in thirds
        _record(1, [5, 0, 0], q, speaker="s10", gender=None),
        _record(2, [2, 2, 0], q, speaker="s2", gender="female"),
        _record(3, [0, 6, 6], q, speaker="s2", gender="female"),
        _record(4, [1, 1, 1], q, speaker="s10", gender="male"),
        _record(5, [2, 2, 2], q, speaker="s10", gender="male"),
    ]
    found = slices.slices(records, seed=0, samples=50, level=0.9)
    n = {kind: {name: part["n"] for name, part in parts.items()} for kind, parts in found.items()}
    assert n == {
        # Entropies 0 0 1 1 1.58 1.58: the quantiles at 1/3 and 2/3 lie between them.
        "ambiguity": {"up to 0.67 bits": 2, "up to 1.19 bits": 2, "above 1.19 bits": 2},
        "classes": {"1": 2, "2": 2, "3": 2},
        "annotators": {"3": 1, "4": 2, "5": 1, "6": 1, "12": 1},
        "speaker": {"s10": 3, "s2": 3},
        "gender": {"female": 3, "male": 2, "unknown": 1},
    }
    js = [float(metrics.js(r["target"], q)) for r in records]
    assert found["gender"]["male"]["js"] == pytest.approx((js[4] + js[5]) / 2)
    assert found["annotators"]["3"]["js_interval"] is None
    assert f"unknown                 1{js[1]:>8.3f}{'':16}   0.775" in slices.table(found)
    assert list(found["annotators"]) == ["3", "4", "5", "6", "12"]  # by value, where letters would put 12 first
    low, high = found["classes"]["2"]["js_interval"]
    assert js[2] <= low + 1e-12 < high <= js[3] + 1e-12
    assert "up to 0.67 bits         2" in slices.table(found)


def test_equal_entropies_stay_in_one_third():
    records = [_record(i, [2, 1, 0], [0.5, 0.4, 0.1], speaker="s", gender=None) for i in range(3)]
    records.append(_record(3, [1, 1, 1], [0.5, 0.4, 0.1], speaker="s", gender=None))
    parts = slices.slices(records, seed=0, samples=5, level=0.9)["ambiguity"]
    assert {name: part["n"] for name, part in parts.items()} == {"up to 0.92 bits": 3, "above 0.92 bits": 1}


def test_a_corpus_is_read_out_over_the_classes_that_both_share(tmp_path):
    config, _ = settings.parse(["x", "--config=configs/sft.py:cremad", "--workdir=unused"])
    u = manifest.Utterance("a", "a.wav", "", "s", 2, {"anger": 1, "joy": 2, "fear": 1})
    corpus = manifest.Corpus(tmp_path, (u,))
    changed = evaluate.on_corpus(config, corpus, None)
    assert changed.data.labels == ("anger", "fear")  # joy is no class of the run
    assert changed.data.fold == -1
    named = dataclasses.replace(corpus, labels=("anger", "neutral", "joy"))
    assert evaluate.on_corpus(config, named, 2).data.labels == ("anger", "neutral")
    with pytest.raises(ConfigError, match="share fewer than two"):
        evaluate.on_corpus(config, dataclasses.replace(corpus, labels=("joy", "anger")), None)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --run or --checkpoint"),
        (["--run=r", "--checkpoint=c"], "either --run or --checkpoint"),
        (["--run=r", "--splitt=dev"], "unknown argument --splitt=dev"),
        (["--run=r", "--fold=1"], "--fold belongs to --corpus"),
        (["--run=r", "--corpus=c", "--split=dev"], "needs --fold"),
        (["--run=r", "--samples=4"], "needs a --temperature"),
        (["--run=r", "--samples=4", "--temperature=nan"], "must be 0 or a number from"),
        (["--run=r", "--temperature=-1"], "must be 0 or a number from"),
        (["--run=r", "--split=dev", "--calibrate"], "fits on dev"),
        (["--run=r", "--swap_audio", "--shuffle_cot"], "one control at a time"),
        (["--run=no/such/run"], "not a run directory"),
    ],
)
def test_a_mistake_is_named(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(ConfigError, match=message):
        evaluate.main()


def test_what_was_trained_on_is_no_other_corpus(tmp_path, monkeypatch):
    manifest.write(manifest.Corpus(tmp_path / "own", tuple(_utterances("ab"))))
    argv = ["x", "--config=configs/sft.py:tiny", "--workdir=unused", f"--config.data.root={tmp_path / 'own'}"]
    settings.save(settings.parse(argv)[0], tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--run={tmp_path}", f"--corpus={tmp_path / 'own/manifest.jsonl'}"])
    with pytest.raises(ConfigError, match="was trained on; leave --corpus out"):
        evaluate.main()
    # A run may have been given the manifest itself.
    argv[-1] += "/manifest.jsonl"
    settings.save(settings.parse(argv)[0], tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--run={tmp_path}", f"--corpus={tmp_path / 'own'}"])
    with pytest.raises(ConfigError, match="was trained on; leave --corpus out"):
        evaluate.main()
    for name, key, message in (
        ("test", "corpus", "is for results on the run's own corpus"),
        ("other", "corpus", "is of /elsewhere/other; move"),
        ("other", "root", "is of /elsewhere/other; move"),  # as earlier versions wrote it
    ):
        (tmp_path / "eval/other").mkdir(parents=True, exist_ok=True)
        (tmp_path / "eval/other/summary.json").write_text(json.dumps({key: "/elsewhere/other"}))
        manifest.write(manifest.Corpus(tmp_path / name, tuple(_utterances("ab"))))
        monkeypatch.setattr(sys, "argv", ["evaluate", f"--run={tmp_path}", f"--corpus={tmp_path / name}"])
        with pytest.raises(ConfigError, match=message):
            evaluate.main()


def _bare(workdir: Path, corpus: Path, clips: int) -> list[str]:
    small = ["speakers=5", f"clips_per_speaker={clips}", f"root={corpus}"]
    small = [f"--config.data.{s}" for s in small] + ["--config.eval.batch_size=2"]
    return ["--checkpoint=ambijax/tiny", "--config=configs/sft.py:tiny", f"--workdir={workdir}", *small]


@needs_tiny
@pytest.mark.slow
def test_an_evaluation_killed_at_any_moment_ends_as_if_it_never_was(tmp_path):
    straight = _bare(tmp_path / "straight", tmp_path / "corpus", 16)
    out, err = start("ambijax.evaluate", *straight).communicate(timeout=600)
    expected = (tmp_path / "straight/eval/test/predictions.jsonl").read_bytes()
    path, kills = tmp_path / "cut/eval/test/predictions.jsonl", 0
    cut = _bare(tmp_path / "cut", tmp_path / "corpus", 16)
    for lines in (1, 5, 11):  # written before the kill
        process = start("ambijax.evaluate", *cut)
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills >= 2
    again, err = start("ambijax.evaluate", *cut).communicate(timeout=600)
    assert path.read_bytes() == expected, err
    assert again.replace("/cut/", "/straight/") == out


@needs_tiny
def test_a_bare_checkpoint_on_another_corpus(tmp_path):
    spec = dataclasses.replace(synthetic.IEMOCAP_LIKE, speakers=5, clips_per_speaker=1)
    sounds = synthetic.write(tmp_path / "sounds", spec)  # as `ambijax.prepare` leaves it, the manifest lies elsewhere
    silent = dataclasses.replace(sounds.utterances[0], id="x", votes={"surprise": 3})
    everything = (*sounds.utterances, silent)
    other = manifest.Corpus(tmp_path / "other", everything, audio_root=sounds.root, labels=sounds.labels)
    manifest.write(other)
    arguments = [*_bare(tmp_path / "run", tmp_path / "own", 2), f"--corpus={other.root}", "--calibrate", "--slices"]
    process = start("ambijax.evaluate", *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    summary = json.loads((tmp_path / "run/eval/other/summary.json").read_text())
    assert (summary["clips"], summary["left_out"], summary["fold"]) == (5, 1, None)
    assert (summary["algorithm"], summary["labels"]) == ("base", ["anger", "happiness", "sadness", "neutral"])
    records = predictions.read(tmp_path / "run/eval/other")
    assert all(len(r["readout"]) == 4 and sum(r["readout"]) == pytest.approx(1) for r in records)
    # The temperature comes from the dev split of the run's own corpus, over its own classes.
    dev = predictions.read(tmp_path / "run/eval/dev")
    assert all(len(r["readout"]) == 6 for r in dev)
    p, q = (np.array([r[key] for r in dev]) for key in ("target", "readout"))
    assert summary["calibrated"]["temperature"] == pytest.approx(calibration.fit(p, q))
    p, q = (np.array([r[key] for r in records]) for key in ("target", "readout"))
    t = summary["calibrated"]["temperature"]
    js = np.mean(metrics.js(p, scipy.special.softmax(np.log(q) / t, axis=-1)))
    assert summary["calibrated"]["js"] == pytest.approx(js)
    assert summary["js"] == pytest.approx(np.mean([r["js"] for r in records]))
    low, high = summary["intervals"]["js"]
    assert low <= summary["js"] <= high
    rows = {line.split("  ")[0] for line in out.splitlines()}
    assert {"uniform", "prior", "one-hot", "one annotator", "half", "another panel", "other", "ambiguity"} <= rows
    assert (summary["corpus"], summary["root"]) == (str(other.root), str(sounds.root))
    evaluate._assert_own_place(other.root, tmp_path / "run/eval/other")  # the same command may be given again


def test_results_of_another_checkpoint_are_not_replaced(tmp_path, monkeypatch):
    config = settings.parse(["x", *_bare(tmp_path, tmp_path / "own", 2)[1:]])[0]
    settings.save(config, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint=elsewhere", *_bare(tmp_path, tmp_path / "own", 2)[1:]])
    with pytest.raises(ConfigError, match=r"holds results of .*tiny; choose another --workdir"):
        evaluate.main()
    assert (tmp_path / "config.json").read_bytes() == before


def test_sounds_are_looked_for_before_weights_are_read(tmp_path, monkeypatch):
    """F27; with 7B that is 17 GB read for nothing."""
    heard = tuple(dataclasses.replace(u, votes={"anger": 1, "sadness": 1}) for u in _utterances("ab"))
    for name in ("own", "other"):
        manifest.write(manifest.Corpus(tmp_path / name, heard))
    argv = ["x", "--config=configs/sft.py:tiny", "--workdir=unused", f"--config.data.root={tmp_path / 'own'}"]
    settings.save(settings.parse([*argv, "--config.data.corpus=manifest"])[0], tmp_path)
    monkeypatch.setattr(assemble, "base", lambda *_: pytest.fail("reads the weights"))
    monkeypatch.setattr(evaluate.hosts, "cluster", lambda **_: contextlib.nullcontext())  # jax runs here already
    monkeypatch.setattr(evaluate.compilation, "keep", lambda: None)
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--run={tmp_path}", f"--corpus={tmp_path / 'other'}"])
    with pytest.raises(DataError, match=r"^2 of 2 sounds in .*other are missing, such as .*other/0\.wav$"):
        evaluate.main()
