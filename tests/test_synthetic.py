"""The synthetic corpus: real files, votes that follow from the sound, and the same bytes every time."""

import collections
import csv
import dataclasses

import numpy as np
import pytest
import soundfile
from ml_collections import FrozenConfigDict

from ambijax import acoustics, assemble, manifest, metrics, prompt, reasoning, settings, teacher
from ambijax.corpora import synthetic, talker
from ambijax.errors import ConfigError

SPEC = dataclasses.replace(synthetic.CREMAD_LIKE, seed=3, speakers=8, clips_per_speaker=24, folds=4)
SMALL = dataclasses.replace(SPEC, speakers=2, clips_per_speaker=3, folds=2)
FREE = dataclasses.replace(synthetic.IEMOCAP_LIKE, speakers=2, clips_per_speaker=24, folds=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return synthetic.write(tmp_path_factory.mktemp("cremad") / "corpus", SPEC)


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    return synthetic.write(tmp_path_factory.mktemp("iemocap") / "corpus", FREE)


@pytest.fixture(scope="module")
def p(corpus):
    return manifest.soft_labels(corpus.utterances, SPEC.labels).astype(float)


@pytest.fixture(scope="module")
def measured(corpus):
    return [acoustics.measure(soundfile.read(corpus.path(u), dtype="float32")[0]) for u in corpus.utterances]


def contents(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_files_are_what_they_claim(corpus, free):
    for u in (*corpus.utterances, *free.utterances):
        path = (corpus if u in corpus.utterances else free).path(u)
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.format, info.subtype) == (16_000, 1, "WAV", "PCM_16")
        assert 1.0 <= info.duration <= 2.4
    assert len(list(corpus.root.rglob("*.wav"))) == len(corpus.utterances) == 8 * 24
    assert {u.transcript for u in corpus.utterances} == set(SPEC.sentences)


def test_equal_specs_give_equal_bytes_and_a_seed_changes_every_clip(tmp_path):
    once, again = synthetic.write(tmp_path / "once", SMALL), synthetic.write(tmp_path / "again", SMALL)
    assert contents(once.root) == contents(again.root)
    other = synthetic.write(tmp_path / "other", dataclasses.replace(SMALL, seed=4))
    for name, data in contents(other.root / "wav").items():
        assert data != contents(once.root / "wav")[name]


def test_a_larger_corpus_holds_the_smaller_one(tmp_path, corpus):
    small = synthetic.write(tmp_path / "small", dataclasses.replace(SMALL, folds=2))
    larger = {u.id: u for u in corpus.utterances}
    for u in small.utterances:
        assert small.path(u).read_bytes() == corpus.path(larger[u.id]).read_bytes()
        assert (u.votes, u.transcript) == (larger[u.id].votes, larger[u.id].transcript)


def test_votes_add_up_from_the_table_of_listeners(corpus, free):
    for c, spec in ((corpus, SPEC), (free, FREE)):
        with (c.root / "votes.csv").open() as file:
            rows = list(csv.DictReader(file))
        counted, panel = collections.defaultdict(collections.Counter), collections.defaultdict(list)
        for row in rows:
            counted[row["clip"]][row["response"]] += 1
            panel[row["clip"]].append(row["listener"])
        assert {u.id: u.votes for u in c.utterances} == counted
        sizes = {len(listeners) for listeners in panel.values()}
        assert min(sizes) == spec.listeners[0]
        assert max(sizes) == spec.listeners[1]
        assert all(len(set(listeners)) == len(listeners) for listeners in panel.values())
        assert {label for votes in counted.values() for label in votes} == set(spec.labels)


def test_folds_part_speakers_and_hold_both_genders(corpus):
    assert {u.fold for u in corpus.utterances} == {0, 1, 2, 3}
    for fold in range(4):
        splits = manifest.split(corpus, fold, "next_fold")
        speakers = {name: {u.speaker for u in split} for name, split in splits.items()}
        assert not speakers["train"] & speakers["test"]
        assert not speakers["dev"] & (speakers["test"] | speakers["train"])
        assert {u.gender for u in splits["test"]} == {"female", "male"}


def test_reasoning_is_well_formed_and_about_this_very_file(corpus, measured, p):
    norms = acoustics.speaker_norms(measured, [u.speaker for u in corpus.utterances], least=6)
    for u, clip, share in zip(corpus.utterances, measured, p, strict=True):
        assert reasoning.problems(u.cot) == []
        expected = teacher.reason(u.transcript, clip, norms[u.speaker], share.astype(np.float32), SPEC.labels)
        assert u.cot == expected.render()
    assert len({u.cot for u in corpus.utterances}) > 0.95 * len(corpus.utterances)


def test_listeners_disagree_and_often_with_the_actor(corpus, p):
    acted = np.array([[label[:3].upper() for label in SPEC.labels].index(u.id[-3:]) for u in corpus.utterances])
    assert (np.bincount(acted) == len(acted) / 6).all()
    alone = (p == p.max(1, keepdims=True)).sum(1) == 1
    assert 0.35 < np.mean(alone & (p.argmax(1) == acted)) < 0.65
    assert 1.0 < metrics.entropy(p).mean() < 1.4
    assert 0 < np.mean(p.max(1) == 1) < 0.15  # unanimous
    assert 0.03 < np.mean(~alone) < 0.25  # ties
    assert p.mean(0).argmax() == SPEC.labels.index("neutral")


def regression(x: np.ndarray, p: np.ndarray, test: np.ndarray) -> np.ndarray:
    x = np.column_stack([(x - x.mean(0)) / x.std(0), np.ones(len(x))])
    w = np.linalg.solve(x[~test].T @ x[~test] + 5 * np.eye(x.shape[1]), x[~test].T @ p[~test])
    guess = np.maximum(x[test] @ w, 0.01)
    return guess / guess.sum(1, keepdims=True)


def test_ambiguity_is_in_the_sound(corpus, measured, p):
    everyone = acoustics.Norm.of(measured)  # one clip is all that a model hears: no norms of speakers
    x = np.array([list(everyone.z(clip).values()) for clip in measured])
    folds = np.array([u.fold for u in corpus.utterances])
    heard, swapped, prior = [], [], []
    for fold in range(4):
        test = folds == fold
        heard.append(metrics.js(p[test], regression(x, p, test)))
        prior.append(metrics.js(p[test], np.tile(p[~test].mean(0), (test.sum(), 1))))
        x_swapped = x.copy()
        x_swapped[test] = np.roll(x[test], 7, axis=0)
        swapped.append(metrics.js(p[test], regression(x_swapped, p, test)))
    assert np.concatenate(heard).mean() < 0.75 * np.concatenate(prior).mean()
    assert np.concatenate(swapped).mean() > np.concatenate(prior).mean()


def test_the_other_corpus_is_another_one(free, corpus):
    assert {label for u in free.utterances for label in u.votes} <= set(FREE.labels)
    of_feeling = [u for u in free.utterances if teacher.lexical_cues(u.transcript)]
    assert 0.05 < len(of_feeling) / len(free.utterances) < 0.6
    for u in of_feeling:  # an actor of anger does not say 'I am so happy'
        assert all(emotion[:3].upper() == u.id[-3:] for _, emotion in teacher.lexical_cues(u.transcript))

    def floor(c):  # dB before anyone speaks
        return np.median([20 * np.log10(soundfile.read(c.path(u))[0][:320].std()) for u in c.utterances])

    assert floor(free) - floor(corpus) == pytest.approx(FREE.channel.noise - SPEC.channel.noise, abs=1)


def test_the_lab_has_both_corpora(tmp_path):
    """Each by a variant of the configs, in the shipped model's vocabulary and within its completion length."""
    found = {}
    for variant in ("tiny", "tiny_iemocap"):
        few = [
            "--config.data.speakers=5",
            "--config.data.clips_per_speaker=8",
            f"--config.data.root={tmp_path / variant}",
        ]
        config, _ = settings.parse(["t", f"--config=configs/sft.py:{variant}", "--workdir=unused", *few])
        corpus = assemble.corpus(config)
        found[variant] = corpus
        words = prompt.load(config.model.checkpoint, config.data.labels)
        lengths = [len(prompt.encode_gold(words, u.cot, config.data.labels[0])[0]) for u in corpus.utterances]
        assert np.mean(np.array(lengths) <= config.data.max_tokens) > 0.95
        assert {label for u in corpus.utterances for label in u.votes} <= set(config.data.labels)
    one, other = found.values()
    assert not {u.transcript for u in one.utterances} & {u.transcript for u in other.utterances}
    assert min(sum(u.votes.values()) for u in one.utterances) >= 4
    assert {sum(u.votes.values()) for u in other.utterances} == {3}
    with pytest.raises(ConfigError, match=r"data.like='msp' must be one of cremad, iemocap"):
        assemble.corpus(FrozenConfigDict(config.to_dict() | {"data": config.data.to_dict() | {"like": "msp"}}))


def test_a_channel_limits_the_band():
    who = talker.speaker(np.random.default_rng(0), "female")

    def outside(channel):
        samples, _ = talker.speak(np.random.default_rng(0), who, "She sees the shop.", np.zeros(8), channel)
        power, frequency = np.abs(np.fft.rfft(samples)) ** 2, np.fft.rfftfreq(len(samples), 1 / 16_000)
        return power[(frequency < 150) | (frequency > 5000)].sum() / power.sum()

    wide, narrow = (talker.Channel(low, high, noise=-120) for low, high in ((20, 8000), (400, 3000)))
    assert outside(narrow) < 0.05 * outside(wide)


def test_words_of_feeling_sway_the_listeners():
    panel, tone = np.arange(synthetic.POOL), np.zeros(len(talker.VOICE))

    def share(sentence: str) -> float:
        likely = synthetic.opinions(np.random.default_rng(0), FREE, tone, sentence, panel)
        assert likely.sum(1) == pytest.approx(1)
        return likely[:, FREE.labels.index("happiness")].mean()

    assert share("That is wonderful.") > 1.3 * share("That is it.")


# Writing


def test_a_complete_corpus_is_returned_untouched(tmp_path):
    first = synthetic.write(tmp_path / "c", SMALL)
    before = {path: path.stat().st_mtime_ns for path in first.root.rglob("*")}
    assert synthetic.write(tmp_path / "c", SMALL).utterances == first.utterances
    assert {path: path.stat().st_mtime_ns for path in first.root.rglob("*")} == before


def test_another_directory_is_refused_by_name(tmp_path):
    synthetic.write(tmp_path / "c", SMALL)
    with pytest.raises(ConfigError, match=str(tmp_path / "c")):
        synthetic.write(tmp_path / "c", dataclasses.replace(SMALL, seed=9))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=str(tmp_path / "mine")):
        synthetic.write(tmp_path / "mine", SMALL)
    assert contents(tmp_path / "mine") == {"thesis.tex": b"precious"}


def test_a_place_that_cannot_be_written_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        synthetic.write(tmp_path / "file" / "c", SMALL)


def test_two_writers_of_one_corpus_both_succeed(tmp_path, monkeypatch):
    write_alone = synthetic._write

    def meanwhile(root, spec):  # the other process is faster
        write_alone(root, spec)
        monkeypatch.setattr(synthetic, "_write", write_alone)
        synthetic.write(tmp_path / "c", spec)

    monkeypatch.setattr(synthetic, "_write", meanwhile)
    assert len(synthetic.write(tmp_path / "c", SMALL).utterances) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    heard = []

    def measure(samples):
        heard.append(samples)
        if len(heard) == 3:
            raise KeyboardInterrupt
        return acoustics_measure(samples)

    acoustics_measure = acoustics.measure
    monkeypatch.setattr(acoustics, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write(tmp_path / "c", SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"folds": 9}, "folds=9"),
        ({"listeners": (5, 3)}, "listeners"),
        ({"listeners": (0, 3)}, "listeners"),
        ({"labels": ("anger", "boredom")}, "boredom"),
        ({"clips_per_speaker": 0}, "clips_per_speaker=0"),
        ({"sentences": ()}, "no sentences"),
        ({"sentences": ("...",)}, "vowel"),
    ],
)
def test_a_spec_that_cannot_work_is_a_configuration_error(change, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SPEC, **change)


# The talker does what it is told, as far as independent measurement can tell.


def spoken(gender: str = "female", **tone: float) -> acoustics.Acoustics:
    """Measures averaged over a few sentences in one tone of voice."""
    who = talker.speaker(np.random.default_rng(5), gender)
    wanted = np.array([tone.get(name, 0.0) for name in talker.VOICE])
    clips = []
    for i, sentence in enumerate(SPEC.sentences[:8]):
        samples, _ = talker.speak(np.random.default_rng(i), who, sentence, wanted, SPEC.channel)
        clips.append(dataclasses.astuple(acoustics.measure(samples)))
    return acoustics.Acoustics(*np.mean(clips, axis=0))


@pytest.mark.parametrize("gender", ["female", "male"])
def test_the_talker_obeys(gender):
    even = spoken(gender)
    high = spoken(gender, pitch=1.5)
    assert 12 * np.log2(high.pitch / even.pitch) == pytest.approx(1.5 * talker.PITCH_STEP, abs=0.5)
    assert spoken(gender, energy=1.0).energy - even.energy == pytest.approx(talker.ENERGY_STEP, abs=0.5)
    rising = spoken(gender, pitch_slope=1.5).pitch_slope - even.pitch_slope
    assert rising == pytest.approx(1.5 * talker.SLOPE_STEP, abs=1.5)
    assert spoken(gender, pitch_range=1.5).pitch_range > 1.4 * even.pitch_range
    assert spoken(gender, rate=1.5).rate > 1.15 * even.rate
    assert spoken(gender, pauses=2.0).pauses > even.pauses + 0.06
    assert spoken(gender, tilt=1.5).tilt > even.tilt + 2
    assert spoken(gender, harmonicity=-2.0).harmonicity < even.harmonicity - 2


def test_women_speak_higher_through_shorter_tracts():
    women = [talker.speaker(np.random.default_rng(i), "female") for i in range(40)]
    men = [talker.speaker(np.random.default_rng(i), "male") for i in range(40)]
    assert min(w.tract for w in women) > np.mean([m.tract for m in men])
    assert np.median([w.pitch for w in women]) > 1.5 * np.median([m.pitch for m in men])


@pytest.mark.parametrize("sentence", ["I", "Ooh?", "supercalifragilistic expialidocious " * 4])
@pytest.mark.parametrize("rate", [-9.0, 9.0])
def test_any_sentence_fits_the_time(sentence, rate):
    who = talker.speaker(np.random.default_rng(0), "male")
    tone = np.full(len(talker.VOICE), 9.0)
    tone[talker.VOICE.index("rate")] = rate
    samples, reached = talker.speak(np.random.default_rng(0), who, sentence, tone, SPEC.channel)
    assert 16_000 <= len(samples) <= 2.4 * 16_000
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() < 1
    assert np.isfinite(reached).all()
