"""The corpus shape: reading, checking, writing, splitting; votes to soft labels; class maps between corpora."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ambijax import manifest, workdir
from ambijax.emotions import CREMAD, IEMOCAP, rename, shared_classes, soft_label
from ambijax.errors import ConfigError, DataError
from ambijax.manifest import Corpus, Utterance

ROW = {"id": "a", "audio": "a.wav", "transcript": "hm", "speaker": "s", "fold": 0, "votes": {"anger": 2, "fear": 1}}


def write_lines(root, *records):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (root / "manifest.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def utterance(name, speaker, fold, group=""):
    return Utterance(name, f"{name}.wav", "hm", speaker, fold, {"anger": 1, "neutral": 1}, group)


# Reading and writing -------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines, but not in JSON."""
    full = Utterance("b", "x/b.wav", "one\u2028two\x85 \U0001f600", "s", 1, {"anger": 0.5}, "g", "Keywords: x", "male")
    corpus = Corpus(tmp_path / "new", (Utterance(**ROW), full), description="mine")
    manifest.write(corpus)
    assert manifest.read(tmp_path / "new") == corpus
    assert manifest.read(tmp_path / "new" / "manifest.jsonl") == corpus


def test_audio_may_lie_elsewhere(tmp_path):
    release, out = tmp_path / "release", tmp_path / "out"
    release.mkdir()
    manifest.write(Corpus(out, (Utterance(**ROW),), audio_root=release))
    corpus = manifest.read(out)
    assert corpus.path(corpus.utterances[0]) == release / "a.wav"
    release.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"corpus.json: audio_root .*release is no directory"):
        manifest.read(out)


def test_audio_root_that_is_the_manifest_directory_is_not_recorded(tmp_path):
    manifest.write(Corpus(tmp_path, (Utterance(**ROW),), audio_root=tmp_path))
    assert manifest.read(tmp_path).audio_root is None


def test_no_manifest_is_left_beside_what_is_said_of_another(tmp_path, monkeypatch):
    """A kill between the two files."""
    first = Corpus(tmp_path, (Utterance(**ROW),), description="one", labels=("anger", "neutral"))
    manifest.write(first)
    written = []

    def killed_at(count: int) -> None:
        def replace(path, text):
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(path.name)
            workdir.replace(path, text)

        written.clear()
        monkeypatch.setattr(manifest, "replace", replace)

    killed_at(1)
    with pytest.raises(KeyboardInterrupt):
        manifest.write(dataclasses.replace(first, description="two", labels=("fear", "neutral")))
    assert written == ["manifest.jsonl"]
    assert (manifest.read(tmp_path).description, manifest.read(tmp_path).labels) == ("", ())
    killed_at(9)
    manifest.write(first)
    killed_at(1)
    manifest.write(dataclasses.replace(first, utterances=(Utterance(**ROW | {"cot": "x"}),)))  # as --merge does
    assert (manifest.read(tmp_path).description, written) == ("one", ["manifest.jsonl"])


@pytest.mark.parametrize("about", ["[]", "{}", "{", '{"audio_root": 3, "description": ""}'])
def test_broken_corpus_json_is_named(tmp_path, about):
    write_lines(tmp_path, ROW)
    (tmp_path / "corpus.json").write_text(about)
    with pytest.raises(DataError, match=r"corpus.json must look like"):
        manifest.read(tmp_path)


def test_csv_is_the_same_manifest(tmp_path):
    """As a spreadsheet writes it: byte-order mark, CR LF, quoted line breaks, empty cells for no vote."""
    with (tmp_path / "manifest.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "audio", "transcript", "speaker", "fold", "votes.anger", "votes.fear", "group"])
        writer.writerow(["a", "a.wav", "hm, well\nyes", "s", "0", "2", "", "g"])
        writer.writerow(["b", "b.wav", "", "t", "1.0", "0.5", "1", ""])  # pandas' way with whole numbers
    assert manifest.read(tmp_path).utterances == (
        Utterance("a", "a.wav", "hm, well\nyes", "s", 0, {"anger": 2.0}, "g"),
        Utterance("b", "b.wav", "", "t", 1, {"anger": 0.5, "fear": 1.0}),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,audio,transcript,speaker,fold,votes.anger\na,a.wav,hm,s,zero,1\n",
            "csv:2: fold and votes must be numbers",
        ),
        (
            "id,audio,transcript,speaker,fold,votes.anger\na,a.wav,hm,s,0,many\n",
            "csv:2: fold and votes must be numbers",
        ),
        ("id,audio,transcript,speaker,fold,votes.anger\na,a.wav,hm,s,0,1_0\n", "csv:2: fold and votes must be numbers"),
        ("id,audio,transcript,speaker,fold,votes.anger\na,a.wav,hm,s,0,nan\n", "csv:2: the votes for 'anger' must be"),
        ("id,audio,transcript,speaker,fold,votes.anger\na,a.wav,hm,s,0.5,1\n", "csv:2: fold must be int, got 0.5"),
        (",id,audio\n0,a,a.wav\n", "csv: a column has no name; leave it out"),
        (
            "id,audio,transcript,speaker,fold,votes.anger\na,a.wav,hm,s,0\n",
            "csv:2: the row has another number of cells",
        ),
        ("id,audio,transcript,speaker,fold\na,a.wav,hm,s,0,1\n", "csv:2: the row has another number of cells"),
        ("id,audio,transcript,speaker\na,a.wav,hm,s\n", "csv:2: missing fold"),
        ("id,audio,transcript,speaker,fold,anger\na,a.wav,hm,s,0,1\n", "csv:2: unknown field anger"),
        ('id,audio\n"a"b,c\n', "csv:2: not CSV"),
        ("id,audio,votes.anger,votes.anger\na,a.wav,1,\n", "csv: a column stands twice in id, audio, votes"),
        ("id,audio,transcript,speaker,fold,votes.anger\n", "holds no utterance"),
        ('id,votes\na,"{""anger"": 1}"\n', "csv: votes is no column of a table; give each emotion its own"),
    ],
)
def test_broken_csv_is_named(tmp_path, text, message):
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        manifest.read(tmp_path)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_another_separator_is_named(tmp_path, separator):
    (tmp_path / "manifest.csv").write_text(separator.join(["id", "audio", "speaker"]) + "\n")
    with pytest.raises(DataError, match=r"columns are separated by .* save it with commas"):
        manifest.read(tmp_path)


def test_the_examples_of_the_documentation_are_manifests(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "corpora" / "manifest.md").read_text(encoding="utf-8")
    examples = [line.strip() for line in page.splitlines() if line.startswith(("    {", "    id,", "    a1,"))]
    for name, lines in (("jsonl", examples[:1]), ("csv", examples[1:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"manifest.{name}").write_text("\n".join(lines))
        read = manifest.read(tmp_path / name).utterances
        assert read == (Utterance("a1", "wav/a1.wav", "It is late.", "s1", 0, {"anger": 3, "neutral": 1}),)


def test_missing_and_doubled_manifests_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no manifest at .*manifest.jsonl; write one with"):
        manifest.read(tmp_path)
    write_lines(tmp_path, ROW)
    (tmp_path / "manifest.csv").write_text("id\n")
    for given in (tmp_path, tmp_path / "manifest.jsonl", tmp_path / "manifest.csv"):
        with pytest.raises(ConfigError, match="keep one"):
            manifest.read(given)
    (tmp_path / "manifest.csv").unlink()
    with pytest.raises(ConfigError, match=r"no manifest at .*manifest\.csv$"):
        manifest.read(tmp_path / "manifest.csv")


def test_a_manifest_in_capitals_is_named(tmp_path):
    (tmp_path / "Manifest.csv").touch()
    if (tmp_path / "manifest.csv").exists():
        pytest.skip("this disk does not tell capitals apart")
    with pytest.raises(ConfigError, match=r"Manifest\.csv: a manifest is called manifest\.csv, in small letters"):
        manifest.read(tmp_path)


def test_a_manifest_of_another_name_is_refused(tmp_path):
    """Its directory stands for a corpus everywhere: another manifest there would be read, or overwritten, for it."""
    write_lines(tmp_path, ROW)
    for name in ("hard.jsonl", "pilot.csv"):
        (tmp_path / name).write_text(json.dumps(ROW))
        with pytest.raises(ConfigError, match=rf"{name}: a manifest is called manifest.jsonl or manifest.csv; give it"):
            manifest.read(tmp_path / name)


@pytest.mark.parametrize("field", ["speaker", "group"])
def test_a_speaker_is_one_however_the_name_is_written(field, tmp_path):
    write_lines(tmp_path, ROW | {field: "Anna "})
    with pytest.raises(DataError, match=rf"jsonl:1: {field} is 'Anna '; a name has no blanks around it"):
        manifest.read(tmp_path)
    names = ["Jos\u00e9", "Jose\u0301"]
    write_lines(tmp_path, *(ROW | {"id": f"{i}", "fold": i, field: name} for i, name in enumerate(names)))
    corpus = manifest.read(tmp_path)
    assert len({getattr(u, field) for u in corpus.utterances}) == 1
    with pytest.raises(DataError, match=f"speakers .* stand in|groups {names[0]} stand in"):
        manifest.split(corpus, 0, "next_fold")


def without(name):
    return {key: value for key, value in ROW.items() if key != name}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without("votes"), "jsonl:2: missing votes"),
        (ROW | {"label": "anger"}, "jsonl:2: unknown field label; the fields are id, audio"),
        (ROW | {"fold": "0"}, "jsonl:2: fold must be int, got '0'"),
        (ROW | {"fold": True}, "jsonl:2: fold must be int, got True"),
        (ROW | {"votes": ["anger"]}, "jsonl:2: votes must be dict"),
        (ROW | {"transcript": None}, "jsonl:2: transcript must be str, got None"),
        (ROW | {"speaker": " "}, "jsonl:2: speaker must not be empty"),
        (ROW | {"votes": {"anger": "2"}}, "jsonl:2: the votes for 'anger' must be a number"),
        (ROW | {"votes": {"anger": -1}}, "jsonl:2: the votes for 'anger'"),
        (ROW | {"votes": {"anger": math.nan}}, "jsonl:2: the votes for 'anger'"),
        (ROW | {"votes": {"anger": 10**400}}, "jsonl:2: the votes for 'anger'"),
        (ROW | {"votes": {"anger": True}}, "jsonl:2: the votes for 'anger'"),
        (ROW | {"audio": "https://example.org/a.wav"}, "jsonl:2: audio must be a path .*, not the URL"),
        (ROW | {"audio": "/etc/a.wav"}, "jsonl:2: audio must be relative"),
        (ROW | {"audio": "x/../../a.wav"}, "jsonl:2: audio must be relative"),
        (ROW | {"audio": "a\0.wav"}, "jsonl:2: audio holds a control character"),
        (ROW | {"speaker": "a\0b"}, "jsonl:2: speaker holds a control character"),
        (ROW | {"id": "a\x1b[1m"}, "jsonl:2: id holds a control character"),
        (ROW | {"transcript": "ok \ud83d"}, "jsonl:2: holds half a character"),
        (ROW | {"votes": {"": 1}}, "jsonl:2: votes are for ''; an emotion has a name"),
        (ROW | {"votes": {" anger": 1}}, "jsonl:2: votes are for ' anger'"),
        (ROW | {"fold": -1}, "jsonl:2: fold must be 0 or more, got -1"),
        ('{"id": "a", "id": "b"}', "jsonl:2: not JSON: a key stands twice in id, id"),
        ([ROW], "jsonl:2: expected a JSON object, got list"),
        ('{"id": "a", "audio": "a.w', "jsonl:2: not JSON"),
        ("[" * 100_000, "jsonl:2: not JSON"),
        (ROW | {"id": "first"}, "jsonl:2: id first stands in the manifest already"),
    ],
)
def test_broken_lines_are_named(tmp_path, record, message):
    write_lines(tmp_path, ROW | {"id": "first"}, record)
    with pytest.raises(DataError, match=message):
        manifest.read(tmp_path)


def test_names_of_files_in_any_script(tmp_path):
    """With what writers of Persian, French and macOS put between letters."""
    for name in ("wav/Rec 10.30\u202fAM.wav", "\u0645\u06cc\u200c\u062e.wav", "a\u00a0b.wav"):
        write_lines(tmp_path, ROW | {"audio": name})
        assert manifest.read(tmp_path).utterances[0].audio == name


def test_corpus_json_may_come_from_an_editor(tmp_path):
    write_lines(tmp_path, ROW)
    about = {"description": "d", "audio_root": "", "labels": ["anger", "fear"]}
    (tmp_path / "corpus.json").write_text(json.dumps(about), encoding="utf-8-sig")
    assert manifest.read(tmp_path).labels == ("anger", "fear")


def test_not_utf8_is_named(tmp_path):
    write_lines(tmp_path, ROW)
    (tmp_path / "manifest.jsonl").write_bytes(b"\n" + (tmp_path / "manifest.jsonl").read_bytes() + b'{"id": "\xe9"}')
    with pytest.raises(DataError, match=r"not UTF-8: .*; save it as UTF-8"):
        manifest.read(tmp_path)


def test_path_never_leaves_the_root_through_a_link(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "secret.wav").touch()
    (tmp_path / "corpus" / "link.wav").symlink_to(tmp_path / "secret.wav")
    corpus = Corpus(tmp_path / "corpus", (Utterance(**ROW | {"audio": "link.wav"}),))
    with pytest.raises(DataError, match="leaves the corpus root"):
        corpus.path(corpus.utterances[0])


# Splits (F33) --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dev", ["next_fold", "groups"])
def test_every_utterance_is_in_one_split_and_no_speaker_leaks(tmp_path, dev):
    utterances = tuple(utterance(f"{s}-{i}", f"s{s}", s // 12, f"s{s}-{i // 4}") for s in range(60) for i in range(8))
    for fold in range(5):
        splits = manifest.split(Corpus(tmp_path, utterances), fold, dev)
        ids = [u.id for part in splits.values() for u in part]
        assert sorted(ids) == sorted(u.id for u in utterances)
        assert {u.fold for u in splits["test"]} == {fold}
        assert not {u.speaker for u in splits["train"] + splits["dev"]} & {u.speaker for u in splits["test"]}
        groups = [{u.group for u in part} for part in splits.values()]
        assert not groups[0] & groups[1]
        if dev == "next_fold":
            assert {u.fold for u in splits["dev"]} == {(fold + 1) % 5}
        else:
            assert len(groups[1]) == math.ceil(len(groups[0] | groups[1]) / 10)


@pytest.mark.parametrize(
    ("leaking", "dev", "message"),
    [
        (utterance("x", "s0", 1), "groups", "speakers s0 stand in (train|dev) and in test"),
        (utterance("x", "s9", 1, "s0"), "groups", "groups s0 stand in more than one split"),
        (utterance("x", "s4", 1), "next_fold", "groups s4 stand in more than one split"),
    ],
)
def test_a_leak_is_an_error(tmp_path, leaking, dev, message):
    corpus = Corpus(tmp_path, tuple(utterance(f"u{s}", f"s{s}", s // 2) for s in range(6)))
    manifest.split(corpus, 0, dev)
    with pytest.raises(DataError, match=message):
        manifest.split(dataclasses.replace(corpus, utterances=(*corpus.utterances, leaking)), 0, dev)


def test_unknown_fold_and_dev_are_named(tmp_path):
    corpus = Corpus(tmp_path, (utterance("a", "s", 0), utterance("b", "t", 1)))
    with pytest.raises(ConfigError, match=r"data.fold=6 is not one of the folds \[0, 1\]"):
        manifest.split(corpus, 6, "groups")
    with pytest.raises(ConfigError, match=r"data.dev='random'"):
        manifest.split(corpus, 0, "random")


# Soft labels (F32) ---------------------------------------------------------------------------------------------------

COUNTS = st.one_of(st.integers(0, 10_000), st.floats(1e-3, 1e6))


@hypothesis.settings(deadline=None)  # no timing: machines are busy
@hypothesis.given(st.dictionaries(st.sampled_from([*CREMAD, "surprise"]), COUNTS))
def test_the_soft_label_always_sums_to_one_or_is_refused(votes):
    if not any(votes.get(label, 0) for label in CREMAD):
        with pytest.raises(DataError, match="no vote falls on"):
            soft_label(votes, CREMAD)
        return
    p = soft_label(votes, CREMAD)
    assert p.shape == (6,)
    assert p.min() >= 0
    assert p.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    for a in CREMAD:  # shares are in the ratio of the votes
        for b in CREMAD:
            expected = p[CREMAD.index(b)] * votes.get(a, 0)
            assert p[CREMAD.index(a)] * votes.get(b, 0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("votes", [{}, {"anger": 0}, {"surprise": 4}, {"anger": -1, "fear": 2}, {"anger": math.inf}])
def test_votes_without_a_soft_label_name_their_utterance(votes):
    good, bad = utterance("good", "s", 0), dataclasses.replace(utterance("bad", "s", 0), votes=votes)
    with pytest.raises(DataError, match="bad: "):
        manifest.soft_labels([good, bad], CREMAD)


# Class maps ----------------------------------------------------------------------------------------------------------


def test_shared_classes_in_the_order_of_the_first():
    assert shared_classes(CREMAD, IEMOCAP) == IEMOCAP
    assert shared_classes(("fear", "joy", "anger"), CREMAD) == ("fear", "anger")
    with pytest.raises(ConfigError, match="share fewer than two"):
        shared_classes(("joy", "anger"), CREMAD)


def test_rename_adds_what_meets():
    assert rename({"happy": 2, "joy": 1, "fear": 3}, {"happy": "happiness", "joy": "happiness"}) == {
        "happiness": 3,
        "fear": 3,
    }


def test_another_corpus_classes_leave_fewer_utterances():
    """A CREMA-D clip that everybody heard as disgust or fear has no vote among IEMOCAP's classes."""
    disgust = dataclasses.replace(utterance("d", "s", 0), votes={"disgust": 5, "fear": 4})
    mixed = dataclasses.replace(utterance("m", "s", 0), votes={"disgust": 5, "anger": 4, "neutral": 1})
    assert manifest.voted([disgust, mixed], IEMOCAP) == [mixed]
    assert manifest.soft_labels([mixed], IEMOCAP).tolist() == [pytest.approx([0.8, 0, 0, 0.2])]
