"""The prepare command on miniatures of both releases and on own manifests: faults F27 to F33."""

import csv
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from ambijax import audio, manifest, prepare
from ambijax.corpora import own
from ambijax.errors import ConfigError, DataError
from tests import miniature


@pytest.fixture
def mini(tmp_path):
    miniature.cremad(tmp_path / "CREMA-D")
    return tmp_path / "CREMA-D"


def run(root, out, *flags, corpus="cremad"):
    prepare.main([f"--corpus={corpus}", f"--root={root}", f"--out={out}", *flags])
    return manifest.read(out)


def bad_files(out):
    with (out / "bad_files.csv").open(encoding="utf-8", newline="") as file:
        return {row["audio"]: row["reason"] for row in csv.DictReader(file)}


def table(text):
    """The printed count table: row name -> (in the tables, kept)."""
    rows = (line.rsplit(maxsplit=2) for line in text.splitlines())
    return {row[0].strip(): tuple(row[1:]) for row in rows if len(row) == 3}


def own_corpus(root, **clips):
    """An own manifest: name -> votes, each with a wav of its own."""
    root.mkdir(exist_ok=True)
    with (root / "manifest.jsonl").open("w") as file:
        for i, (name, votes) in enumerate(clips.items()):
            miniature.write_wav(root / "wav" / f"{name}.wav", name)
            row = {
                "id": name,
                "audio": f"wav/{name}.wav",
                "transcript": "hm",
                "speaker": name,
                "fold": i,
                "votes": votes,
            }
            file.write(json.dumps(row) + "\n")
    return root


def test_somebodys_own_manifest_is_not_overwritten(tmp_path):
    root = own_corpus(tmp_path / "own", a={"anger": 2}, b={"sadness": 1})
    other = own_corpus(tmp_path / "other", c={"anger": 1}, d={"sadness": 2})
    before = (other / "manifest.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"manifest\.jsonl is none of this command's, .* choose another --out"):
        run(root, other, corpus="manifest")
    assert (other / "manifest.jsonl").read_bytes() == before
    run(root, tmp_path / "out", corpus="manifest")
    (tmp_path / "out" / "corpus.json").unlink()  # ended in between: what is there is what is written
    run(root, tmp_path / "out", corpus="manifest")


# What it leaves ------------------------------------------------------------------------------------------------------


def test_cremad(mini, tmp_path, capsys):
    corpus = run(mini, tmp_path / "out")
    assert [u.id for u in corpus.utterances] == sorted(set(miniature.CREMAD) - {"1076_MTI_SAD_XX"})
    assert all(corpus.path(u).is_file() for u in corpus.utterances)
    assert corpus.description == "CREMA-D, voice-only votes of tabulatedVotes.csv"
    # The known clip without sound is left out by itself: the official release needs no --on_bad=skip.
    assert bad_files(tmp_path / "out") == {"AudioWAV/1076_MTI_SAD_XX.wav": "known: the released clip has no sound"}
    text = capsys.readouterr().out
    assert table(text)["utterances"] == ("12", "11")
    assert table(text)["votes"] == ("114", "105")  # sums of miniature.CREMAD; the silent clip has 9
    assert table(text)["ties"] == ("1", "1")
    assert table(text)["unanimous"] == ("1", "1")
    assert table(text)["neutral, sole majority"] == ("5", "4")
    assert "the same sound: 1006_TIE_HAP_XX = 1006_TIE_NEU_XX\n" in text  # and in one group, or it would say so
    assert "in different groups" not in text


def test_real_count_table(shared_data, capsys, tmp_path, monkeypatch):
    """The table a researcher checks against the literature, on the real votes; the audio is not there to decode."""
    root = tmp_path / "CREMA-D"
    (root / "processedResults").mkdir(parents=True)
    for name in ("processedResults/tabulatedVotes.csv", "VideoDemographics.csv"):
        (root / name).symlink_to(shared_data / "cremad" / name)
    monkeypatch.setattr(audio, "load", lambda path: np.array([hash(path)]))
    monkeypatch.setattr(soundfile, "info", lambda path: type("Info", (), {"duration": 2.5}))
    run(root, tmp_path / "out")
    text = capsys.readouterr().out
    expected = {
        "utterances": ("7442", "7441"), "speakers": ("91", "91"), "votes": ("68568", "68559"),
        "ties": ("644", "644"), "unanimous": ("383", "383"), "mean": ("9.21", "9.21"),
        "mean entropy in bits": ("1.196", "1.196"), "neutral, sole majority": ("3897", "3896"),
        "anger, sole majority": ("986", "986"), "fear, sole majority": ("645", "645"),
        "disgust, sole majority": ("547", "547"), "sadness, sole majority": ("370", "370"),
        "happiness, sole majority": ("353", "353"),
    }  # fmt: skip
    assert table(text).items() >= expected.items()
    assert "mean prior                     0.290   0.738   0.470   0.044" in text
    assert "uniform                        0.378   0.657   0.000   0.060" in text
    assert "prior of the other folds       0.291   0.737   0.470   0.044" in text
    folds = [line.split()[1] for line in text.splitlines() if " to 10" in line]
    assert folds == ["1463", "1470", "1476", "1476", "1556"]  # without the silent clip of actor 1076


def test_raw_votes(mini, tmp_path):
    everything = run(mini, tmp_path / "raw", "--votes=raw")
    ruled = run(mini, tmp_path / "ruled", "--votes=raw", "--ten_second_rule")
    tabulated = run(mini, tmp_path / "tabulated")
    assert [u.votes for u in ruled.utterances] == [u.votes for u in tabulated.utterances]
    assert [u.votes for u in everything.utterances] != [u.votes for u in tabulated.utterances]
    assert everything.description.endswith("finishedResponses.csv, no response dropped")


@pytest.mark.parametrize("flags", [(), ("--keep=all_votes",), ("--fractional",)])
def test_iemocap(tmp_path, capsys, flags):
    order = miniature.dialogs()
    turns = [turn for dialog in order.values() for turn in dialog]
    codes = {turn: list(miniature.CODES)[i % len(miniature.CODES)] for i, turn in enumerate(turns)}
    miniature.iemocap(tmp_path / "release", order, codes)
    corpus = run(tmp_path / "release", tmp_path / "out", *flags, corpus="iemocap")
    assert bad_files(tmp_path / "out") == {}
    assert "88 turns: xxx 8" in capsys.readouterr().out
    for fold in {u.fold for u in corpus.utterances}:
        splits = manifest.split(corpus, fold, "groups")
        assert {u.speaker[:5] for u in splits["test"]} == {f"Ses0{fold + 1}"}


def test_own_manifest(tmp_path, capsys):
    own_corpus(tmp_path / "own", a={"happy": 2, "joy": 1, "calm": 1}, b={"happy": 1, "calm": 3}, c={"calm": 4})
    corpus = run(
        tmp_path / "own", tmp_path / "out", "--rename=happy:happiness,joy:happiness,calm:neutral", corpus="manifest"
    )
    assert [u.votes for u in corpus.utterances] == [
        {"happiness": 3, "neutral": 1}, {"happiness": 1, "neutral": 3}, {"neutral": 4},
    ]  # fmt: skip
    assert corpus.path(corpus.utterances[0]) == tmp_path / "own" / "wav" / "a.wav"
    assert table(capsys.readouterr().out)["happiness, votes"] == ("4", "4")


def test_out_may_be_the_release_itself(mini):
    corpus = run(mini, mini)
    assert corpus.audio_root is None
    assert corpus.path(corpus.utterances[0]).is_file()


# F27 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_f27_pointers_are_named_and_counted_before_anything_is_decoded(mini, tmp_path, monkeypatch, policy):
    for wav in sorted((mini / "AudioWAV").glob("10*.wav"))[2:]:
        wav.write_bytes(miniature.POINTER)
    monkeypatch.setattr(audio, "load", lambda path: pytest.fail("a clip was decoded"))
    with pytest.raises(DataError, match=r"10 of 12 audio files are git-lfs pointers.*1006_TIE_HAP.*git lfs pull"):
        run(mini, tmp_path / "out", f"--on_bad={policy}")
    assert not (tmp_path / "out").exists()


# F28 -----------------------------------------------------------------------------------------------------------------


def rewrite(change, subtype="FLOAT"):
    """A defect in the samples, as a function of the path."""

    def spoil(path):
        samples, rate = soundfile.read(path, dtype="float32")
        soundfile.write(path, change(samples), rate, subtype=subtype)

    return spoil


def with_first(value):
    return rewrite(lambda samples: np.concatenate([np.float32([value]), samples]))


DEFECTS = {  # what the reason says -> what spoils the file
    "header or data is corrupt": lambda path: path.write_bytes(b"RIFF" + b"\7" * 400),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-301]),
    "holds no samples": rewrite(lambda samples: samples[:0]),
    "at least 25 ms": rewrite(lambda samples: samples[:300]),
    "NaN": with_first(np.nan),
    "infinite": with_first(np.inf),
    "silent": rewrite(lambda samples: 0 * samples, "PCM_16"),
    "scale them to": rewrite(lambda samples: np.round(samples * 32767)),
    "no such file": lambda path: path.unlink(),
    "the file is empty": lambda path: path.write_bytes(b""),
}


def test_f28_every_defect_is_listed_with_its_reason(mini, tmp_path):
    known = "1076_MTI_SAD_XX"
    clips = [name for name in sorted(miniature.CREMAD) if name != known]
    spoiled = dict(zip(clips, DEFECTS, strict=False))
    for name, reason in spoiled.items():
        DEFECTS[reason](mini / "AudioWAV" / f"{name}.wav")
    with pytest.raises(DataError, match=r"10 bad files, see .*bad_files.csv; mend them, or leave them out"):
        run(mini, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    listed = bad_files(tmp_path / "out")
    assert listed.keys() == {f"AudioWAV/{name}.wav" for name in [*spoiled, known]}
    assert all(reason in listed[f"AudioWAV/{name}.wav"] for name, reason in spoiled.items())
    assert [u.id for u in run(mini, tmp_path / "out", "--on_bad=skip").utterances] == clips[len(DEFECTS) :]


def test_f28_nothing_usable_is_an_error_in_either_policy(mini, tmp_path):
    for path in (mini / "AudioWAV").glob("10*.wav"):
        path.unlink()
    with pytest.raises(DataError, match=r"none of the 12 clips can be used.*1001_IEO_ANG_HI.wav: no such file"):
        run(mini, tmp_path / "out", "--on_bad=skip")


# F29, F30 ------------------------------------------------------------------------------------------------------------


def test_f29_any_rate_width_and_channels(tmp_path):
    """Each clip is the same second of sound in another form; their features are compared in tests/test_audio.py."""
    forms = {
        "reference.wav": (16_000, "PCM_16", 1), "r8.wav": (8_000, "PCM_16", 1), "r22.wav": (22_050, "PCM_16", 1),
        "r44.wav": (44_100, "PCM_16", 2), "r48.wav": (48_000, "PCM_24", 6), "u8.wav": (16_000, "PCM_U8", 1),
        "s32.wav": (16_000, "PCM_32", 1), "f32.wav": (16_000, "FLOAT", 1), "flac.flac": (16_000, "PCM_16", 1),
    }  # fmt: skip
    root = own_corpus(tmp_path / "own", **{name.split(".")[0]: {"anger": 1, "neutral": 2} for name in forms})
    (root / "wav" / "flac.wav").unlink()
    (root / "manifest.jsonl").write_text((root / "manifest.jsonl").read_text().replace("flac.wav", "flac.flac"))
    for name, (rate, subtype, channels) in forms.items():
        t = np.arange(rate) / rate
        chirp = 0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t)
        soundfile.write(root / "wav" / name, np.stack([chirp] * channels, axis=1), rate, subtype=subtype)
    corpus = run(root, tmp_path / "out", corpus="manifest")
    heard = [audio.load(corpus.path(u)) for u in corpus.utterances]
    assert len(heard) == len(forms)
    assert all(np.corrcoef(samples, heard[0])[0, 1] > 0.999 for samples in heard)


def test_f30_long_clips_are_counted_and_warned_of(tmp_path, capsys):
    root = own_corpus(tmp_path / "own", a={"anger": 1, "fear": 1}, b={"fear": 1}, c={"anger": 1})
    miniature.write_wav(root / "wav" / "b.wav", "b", seconds=31)
    miniature.write_wav(root / "wav" / "c.wav", "c", seconds=30)
    corpus = run(root, tmp_path / "out", corpus="manifest")
    assert len(corpus.utterances) == 3
    assert "warning: 1 longer than 30 s; only the first 30 s are used" in capsys.readouterr().out


# F31, F32 ------------------------------------------------------------------------------------------------------------


def test_f31_files_of_file_managers_are_ignored(mini, tmp_path):
    run(mini, tmp_path / "cremad")
    assert not any("/." in name for name in bad_files(tmp_path / "cremad"))
    root = own_corpus(tmp_path / "own", a={"anger": 1}, b={"fear": 1})
    for name in ("._a.wav", ".DS_Store", ".hidden.wav"):
        (root / "wav" / name).write_bytes(b"\0\5\x16\7")
    run(root, tmp_path / "out", corpus="manifest")
    assert bad_files(tmp_path / "out") == {}


def test_f32_votes_and_files_without_each_other_are_named(tmp_path):
    root = own_corpus(
        tmp_path / "own", a={"anger": 2, "neutral": 1}, b={"joy": 3}, c={}, d={"neutral": 1}, e={"anger": 1}
    )
    (root / "wav" / "e.wav").unlink()
    miniature.write_wav(root / "wav" / "nobody.wav", "x")
    flags = ("--labels=anger,neutral", "--on_bad=skip")
    corpus = run(root, tmp_path / "out", *flags, corpus="manifest")
    assert [u.id for u in corpus.utterances] == ["a", "d"]
    assert bad_files(tmp_path / "out") == {
        "wav/b.wav": "no vote falls on anger, neutral; votes are {'joy': 3}",
        "wav/c.wav": "no vote falls on anger, neutral; votes are {}",
        "wav/e.wav": "no such file",
        "wav/nobody.wav": "nobody voted on this file",
    }
    assert manifest.soft_labels(corpus.utterances, ("anger", "neutral")).sum(axis=1).tolist() == [1, 1]
    with pytest.raises(DataError, match="4 bad files"):
        run(root, tmp_path / "out", flags[0], corpus="manifest")


def test_f32_duplicate_ids_are_named(tmp_path):
    root = own_corpus(tmp_path / "own", a={"anger": 1}, b={"fear": 1})
    path = root / "manifest.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"manifest.jsonl:3: id a stands in the manifest already"):
        run(root, tmp_path / "out", corpus="manifest")


# F33 -----------------------------------------------------------------------------------------------------------------


def test_f33_a_speaker_in_two_folds_is_an_error(tmp_path):
    root = own_corpus(tmp_path / "own", a={"anger": 1}, b={"fear": 1}, c={"fear": 1})
    path = root / "manifest.jsonl"
    path.write_text(path.read_text().replace('"speaker": "c"', '"speaker": "a"'))
    with pytest.raises(DataError, match=r"speakers a stand in (train|dev) and in test"):
        run(root, tmp_path / "out", corpus="manifest")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_f33_the_same_sound_in_two_groups_is_pointed_out(tmp_path, capsys):
    root = own_corpus(tmp_path / "own", a={"anger": 1}, b={"fear": 1}, c={"fear": 1})
    (root / "wav" / "c.wav").write_bytes((root / "wav" / "a.wav").read_bytes())
    run(root, tmp_path / "out", corpus="manifest")
    assert "the same sound: a = c; warning: in different groups" in capsys.readouterr().out


# Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--corpus=cremad", "--keep=consensus"), "--keep belongs to --corpus=iemocap, not to cremad"),
        (("--corpus=iemocap", "--ten_second_rule"), "--ten_second_rule belongs to --corpus=cremad"),
        (("--corpus=cremad", "--root=/nowhere"), "--root=/nowhere is no directory"),
        (("--corpus=manifest", "--rename=happy"), "must look like happy:happiness"),
        (("--corpus=manifest", "--rename=happy:"), "must look like happy:happiness"),
        (("--corpus=manifest", "--rename=a:b,a:c"), "gives a word two names"),
        (("--corpus=cremad", "--ten_second_rule"), "--ten_second_rule belongs to --votes=raw"),
        (("--corpus=cremad", "--out="), "--out is empty"),
        (("--corpus=manifest",), "--out must not be --root"),
        (("--corpus=iemocap",), "no Session1 to Session5"),
    ],
)
def test_flags_that_cannot_work(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        prepare.main([f"--root={tmp_path}", f"--out={tmp_path}", *flags])


def test_out_that_cannot_be_made_is_named_before_anything_is_decoded(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "load", lambda path: pytest.fail("a clip was decoded"))
    (tmp_path / "file").touch()
    for out in ("file", "file/out"):
        with pytest.raises(ConfigError, match=f"--out=.*{out} cannot be made"):
            run(mini, tmp_path / out)


def test_a_filter_that_leaves_nothing_is_named(tmp_path):
    order = {"Ses01F_impro01": ["Ses01F_impro01_F000"]}
    miniature.iemocap(tmp_path / "release", order, {"Ses01F_impro01_F000": "fru"})
    with pytest.raises(DataError, match="no utterance in IEMOCAP, consensus filter"):
        run(tmp_path / "release", tmp_path / "out", corpus="iemocap")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"labels": "anger,neutrall"}, "no vote on the class neutrall; votes are on anger, neutral"),
        ({"labels": "anger,anger"}, "must be two or more, distinct"),
        ({"labels": "anger,"}, "must be two or more, distinct, separated by commas"),
        ({"rename": "angr:happiness"}, "no vote on the word to rename angr; votes are on anger, neutral"),
    ],
)
def test_class_words_that_nobody_voted_on_are_named(tmp_path, flags, message):
    own_corpus(tmp_path / "own", a={"anger": 1}, b={"neutral": 1})
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "own", tmp_path / "out", *(f"--{k}={v}" for k, v in flags.items()), corpus="manifest")


def test_chains_of_thought_that_are_there_are_not_overwritten(tmp_path):
    own_corpus(tmp_path / "own", a={"anger": 1}, b={"neutral": 1})
    first = run(tmp_path / "own", tmp_path / "out", corpus="manifest")
    run(tmp_path / "own", tmp_path / "out", corpus="manifest")  # nothing is lost
    reasoned = dataclasses.replace(first.utterances[1], cot="because")
    manifest.write(dataclasses.replace(first, utterances=(first.utterances[0], reasoned)))
    before = (tmp_path / "out" / "manifest.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"manifest.jsonl has 1 chains of thought .* for one that of b; move it away"):
        run(tmp_path / "own", tmp_path / "out", corpus="manifest")
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before
    (tmp_path / "own").rename(tmp_path / "moved")  # what is there cannot be read any more
    with pytest.raises(ConfigError, match=r"audio_root .* is no directory; .* it has chains of thought"):
        run(tmp_path / "moved", tmp_path / "out", corpus="manifest")
    assert (tmp_path / "out" / "manifest.jsonl").read_bytes() == before
    (tmp_path / "out" / "manifest.jsonl").write_bytes(before.replace(b"because", b""))
    run(tmp_path / "moved", tmp_path / "out", corpus="manifest")  # nothing is lost


def test_two_manifests_in_one_directory_are_refused(tmp_path):
    own_corpus(tmp_path / "own", a={"anger": 1}, b={"neutral": 1})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.csv").write_text("id\n")
    with pytest.raises(ConfigError, match=r"holds a manifest.csv.*choose another --out"):
        prepare.main(["--corpus=manifest", f"--root={tmp_path / 'own'}", f"--out={tmp_path / 'out'}"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.csv"]


def test_a_reader_who_leaves_costs_no_manifest(tmp_path, monkeypatch):
    def left(*_):
        raise BrokenPipeError

    own_corpus(tmp_path / "own", a={"anger": 1}, b={"neutral": 1})
    monkeypatch.setattr("builtins.print", left)
    with pytest.raises(BrokenPipeError):
        prepare.main(["--corpus=manifest", f"--root={tmp_path / 'own'}", f"--out={tmp_path / 'out'}"])
    assert len(manifest.read(tmp_path / "out").utterances) == 2


def test_directories_that_are_not_utf_8(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    own_corpus(tmp_path / "own", a={"anger": 1}, b={"neutral": 1}).rename(odd)
    with pytest.raises(ConfigError, match="its name is not UTF-8; rename it"):
        prepare.main(["--corpus=manifest", f"--root={odd}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    (odd / "wav").rename(tmp_path / "wav")
    wav = tmp_path / "root" / odd.name
    wav.parent.mkdir()
    (tmp_path / "wav").rename(wav)
    assert not prepare._decode({"a": wav / "a.wav"}).bad


def test_one_emotion_in_two_spellings_is_named(tmp_path):
    own_corpus(tmp_path / "own", a={"Anger": 1}, b={"anger": 1, "neutral": 1})
    with pytest.raises(DataError, match="votes on 'Anger' and on 'anger' would be two classes"):
        run(tmp_path / "own", tmp_path / "out", corpus="manifest")
    with pytest.raises(DataError, match="votes on 'Anger' and on 'anger' would be two classes"):
        manifest.read(tmp_path / "own")
    found = run(tmp_path / "own", tmp_path / "out", "--rename=Anger:anger", corpus="manifest")
    assert found.labels == ("anger", "neutral")


def test_class_words_may_have_spaces_around_them(tmp_path):
    own_corpus(tmp_path / "own", a={"angry": 1}, b={"neutral": 1})
    run(tmp_path / "own", tmp_path / "out", "--labels=anger, neutral", "--rename=angry : anger", corpus="manifest")
    assert manifest.read(tmp_path / "out").labels == ("anger", "neutral")


def test_an_own_manifest_needs_two_classes(tmp_path):
    own_corpus(tmp_path / "own", a={"anger": 1})
    with pytest.raises(ConfigError, match="at least two classes are needed, got anger"):
        run(tmp_path / "own", tmp_path / "out", corpus="manifest")


def test_the_audio_of_an_own_manifest_may_lie_elsewhere(tmp_path):
    """On a read-only disk, say: corpus.json beside the manifest says where, and what could be chosen besides."""
    people = manifest.read(own_corpus(tmp_path / "own", a={"anger": 1}, b={"neutral": 2})).utterances
    miniature.write_wav(tmp_path / "own" / "wav" / "nobody.wav", "x")
    manifest.write(manifest.Corpus(tmp_path / "refers", people, tmp_path / "own", labels=("anger", "joy", "neutral")))
    found = run(tmp_path / "refers", tmp_path / "out", "--on_bad=skip", "--rename=joy:happiness", corpus="manifest")
    assert [found.path(u).is_file() for u in found.utterances] == [True, True]
    assert found.labels == ("anger", "happiness", "neutral")
    assert bad_files(tmp_path / "out") == {"wav/nobody.wav": "nobody voted on this file"}
    with pytest.raises(ConfigError, match=r'class fear; votes are on .*; a class that nobody chose .* "labels" of'):
        run(tmp_path / "refers", tmp_path / "out", "--labels=anger,fear", corpus="manifest")
    flags = ("--labels=anger,joy", "--on_bad=skip")
    assert run(tmp_path / "refers", tmp_path / "two", *flags, corpus="manifest").labels == ("anger", "joy")


def test_clips_without_a_line_are_found_below_and_in_capitals(tmp_path):
    root = own_corpus(tmp_path / "own", **{"s1/caf\u00e9": {"anger": 1}, "s2/b": {"neutral": 2}})
    for name in ("wav/s3/c.WAV", "wav/d.wav", "raw/session.wav", "wav/s1/notes.flac", "wav/s1/._e.wav"):
        (root / name).parent.mkdir(exist_ok=True)
        miniature.write_wav(root / name, name)
    (root / "wav/s1/caf\u00e9.wav").rename(root / "wav/s1/cafe\u0301.wav")  # as some disks spell it
    release = own.read(root, labels=(), words={})
    assert release.unlabelled == ("wav/d.wav", "wav/s3/c.WAV")
    top = manifest.Utterance("t", "t.wav", "", "s", 0, {"anger": 1})  # beside the manifest: all below that
    found = own._unlisted(root, [*manifest.read(root).utterances, top])
    assert found == ("raw/session.wav", "wav/d.wav", "wav/s3/c.WAV")


def test_a_sound_that_is_only_spelled_otherwise_is_named(tmp_path):
    root = own_corpus(tmp_path / "own", a={"anger": 1}, **{"caf\u00e9": {"neutral": 2}})
    (root / "wav").rename(root / "WAV")
    for corpus in (manifest.read(root), manifest.Corpus(root, manifest.read(root).utterances[1:])):
        with pytest.raises(
            DataError, match=r"sounds in .* are missing, such as .*; 'WAV' is there, with other capitals"
        ):
            manifest.check_sounds(corpus)
    (root / "WAV").rename(root / "wav")
    (root / "wav/caf\u00e9.wav").rename(root / "wav/Cafe\u0301.wav")
    with pytest.raises(DataError, match=r"1 of 2 sounds .*; 'Cafe\u0301.wav' is there, .* rename one"):
        manifest.check_sounds(manifest.read(root))
    with pytest.raises(DataError, match=r"no such file; 'Cafe\u0301\.wav' is there"):
        audio.load(root / "wav/caf\u00e9.wav")
    with pytest.raises(DataError, match=r"no such file; the parts of a path are separated by /"):
        audio.load(root / "wav\\a.wav")
    with pytest.raises(DataError, match=r"no such file$"):
        audio.load(root / "wav/other.wav")


def test_the_command_exits_with_a_code_and_one_line(mini, tmp_path):
    command = [
        sys.executable,
        "-m",
        "ambijax.prepare",
        "--corpus=cremad",
        f"--root={mini}",
        f"--out={tmp_path / 'out'}",
    ]
    (mini / "AudioWAV" / "1001_IEO_NEU_XX.wav").write_bytes(b"")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 3
    assert failed.stderr.splitlines()[-1].startswith("ambijax: 1 bad files, see ")
    assert "Traceback" not in failed.stderr
    skipped = subprocess.run([*command, "--on_bad=skip"], capture_output=True, text=True)
    assert skipped.returncode == 0
    assert "decoding: 100%" in skipped.stderr  # the progress bar
    missing = subprocess.run([*command, "--root=nowhere"], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (2, "ambijax: --root=nowhere is no directory\n")
