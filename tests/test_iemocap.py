"""IEMOCAP: a miniature with the release's quirks, at full size under the real utterance ids where they are present."""

import collections
import json
from pathlib import Path

import pytest

from ambijax import manifest
from ambijax.corpora import iemocap
from ambijax.emotions import IEMOCAP, soft_label
from ambijax.errors import ConfigError, DataError
from tests import miniature
from tests.conftest import SHARED


def read(root, keep="consensus", fractional=False):
    return iemocap.read(root, keep=keep, fractional=fractional)


def by_id(release):
    return {u.id: u for u in release.utterances}


@pytest.fixture
def mini(tmp_path):
    order = miniature.dialogs()
    turns = [turn for dialog in order.values() for turn in dialog]
    codes = dict(zip(turns, list(miniature.CODES) * len(turns), strict=False))
    miniature.iemocap(tmp_path, order, codes)
    return tmp_path, codes


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """151 dialogs and 10,039 turns, under their real ids where those are present, without sound."""
    root = tmp_path_factory.mktemp("iemocap")
    ids = SHARED / "iemocap" / "order.json"
    order = json.loads(ids.read_text()) if ids.is_file() else miniature.full_order()
    miniature.iemocap(root, order, miniature.real_codes(order), wavs=False)
    return root, order


# At full size --------------------------------------------------------------------------------------------------------


def test_full_size_counts(full):
    root, order = full
    release = read(root)
    assert len(release.utterances) == 5531
    sessions = collections.Counter(u.fold for u in release.utterances)
    assert [sessions[fold] for fold in range(5)] == [1085, 1023, 1151, 1031, 1241]
    assert release.notes == (
        "10039 turns: xxx 2507, fru 1849, neu 1708, ang 1103, sad 1084, exc 1041, hap 595, sur 107, fea 40, oth 3, "
        "dis 2",
        "consensus of those kept: neutral 1708, happiness 1636, anger 1103, sadness 1084",
    )
    assert (len(order), sum(map(len, order.values()))) == (151, 10_039)
    assert {u.speaker for u in release.utterances} == {f"Ses0{s}{g}" for s in range(1, 6) for g in "FM"}
    assert all(u.transcript for u in release.utterances)


def test_full_size_audio_paths_follow_the_layout(full):
    root, order = full
    expected = {f"Session{d[4]}/sentences/wav/{d}/{turn}.wav" for d, turns in order.items() for turn in turns}
    audio = {u.audio for u in read(root).utterances}
    assert audio <= expected
    odd = ("Ses03M_impro05a/", "Ses03M_impro05b/", "Ses03M_impro08a/", "Ses03M_impro08b/", "Ses05M_script01_1b/")
    assert all(any(name in path for path in audio) for name in odd)


def test_full_size_dev_set_is_a_tenth_of_the_training_dialogs(full):
    root, order = full
    corpus = manifest.Corpus(root, read(root).utterances)
    for session in range(5):
        splits = manifest.split(corpus, session, "groups")
        dialogs = {name: {u.group for u in utterances} for name, utterances in splits.items()}
        assert dialogs["test"] == {d for d in order if d.startswith(f"Ses0{session + 1}")}
        assert not dialogs["train"] & dialogs["dev"]
        assert len(dialogs["dev"]) / len(dialogs["train"] | dialogs["dev"]) == pytest.approx(0.1, abs=0.01)
        assert {u.speaker for u in splits["train"]} == {u.speaker for u in splits["dev"]}  # none is lost to dev


# A miniature ---------------------------------------------------------------------------------------------------------


def write_dialog(root, *lines, dialog="Ses01F_impro01"):
    session = root / "Session1" / "dialog"
    for part in ("EmoEvaluation", "transcriptions"):
        (session / part).mkdir(parents=True, exist_ok=True)
    (session / "EmoEvaluation" / f"{dialog}.txt").write_bytes("\n".join(lines).encode("latin-1"))
    (session / "transcriptions" / f"{dialog}.txt").write_text(f"{dialog}_F000 [0.0-1.0]: This is ours.\n")


SUMMARY = "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]"


def test_votes_of_one_block(tmp_path):
    """Comments hold spaces, semicolons and emotion words; the actor's own rating and the attributes do not count."""
    write_dialog(
        tmp_path,
        "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]",
        "",
        SUMMARY,
        "C-E2:\tNeutral;\t()",
        "C-E3:\tNeutral; Anger;\t(Sadness; mildly aggravated but staying polite)",
        "C-E17:\tExcited; Happiness; Frustration;\t(d\xe9j\xe0 vu)",
        "C-E4:\tNeutral state;\t()",
        "C-E5:\t;\t()",
        "C-F1:\tDisgust;\t(curious)",
        "C-M1:\tFear;\t()",
        "A-E3:\tval 3; act 2; dom  2;\t()",
        "",
    )
    one_each = by_id(read(tmp_path))["Ses01F_impro01_F000"]
    assert one_each.votes == {"neutral": 3, "anger": 1, "happiness": 1, "frustration": 1}
    assert one_each == manifest.Utterance(
        id="Ses01F_impro01_F000",
        audio="Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav",
        transcript="This is ours.",
        speaker="Ses01F",
        fold=0,
        votes=one_each.votes,
        group="Ses01F_impro01",
        gender="female",
    )
    shared = by_id(read(tmp_path, fractional=True))["Ses01F_impro01_F000"]
    assert shared.votes == {"neutral": 2.5, "anger": 0.5, "happiness": 0.5, "frustration": 0.5}
    assert soft_label(shared.votes, IEMOCAP).tolist() == pytest.approx([1 / 7, 1 / 7, 0, 5 / 7])
    assert read(tmp_path, keep="all_votes").utterances == ()  # frustration is outside


def test_a_turn_whose_annotators_left_every_field_empty_has_no_vote_to_keep_it(tmp_path):
    write_dialog(tmp_path, SUMMARY, "C-E2:\t;\t()", "C-E3:\t\t(muffled)")
    assert read(tmp_path, keep="all_votes").utterances == ()


def test_the_block_of_the_documentation(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "corpora" / "iemocap.md").read_text(encoding="utf-8")
    write_dialog(tmp_path, *(line.removeprefix("    ") for line in page.splitlines() if "\t" in line))
    votes = [read(tmp_path, fractional=shared).utterances[0].votes for shared in (False, True)]
    assert votes[0] == {"neutral": 2, "anger": 1, "happiness": 1}
    assert votes[1] == {"neutral": 1.5, "anger": 0.5, "happiness": 1}


def test_consensus_filter(mini):
    root, codes = mini
    kept = {turn for turn, code in codes.items() if code in ("ang", "hap", "exc", "sad", "neu")}
    assert set(by_id(read(root))) == kept


def test_all_votes_filter(mini):
    root, _ = mini
    kept = by_id(read(root, keep="all_votes"))
    assert kept
    assert all(set(u.votes) <= set(IEMOCAP) for u in kept.values())
    # The filter looks at the votes, not at the consensus: no turn with such votes is missing.
    assert set(kept) == {u.id for u in _every_turn(root) if set(u.votes) <= set(IEMOCAP)}


def _every_turn(root):
    """All turns, by way of a release whose summary codes all say neutral."""
    for path in root.glob("Session*/dialog/EmoEvaluation/Ses*.txt"):
        text = path.read_bytes().decode("latin-1")
        for code in miniature.CODES:
            text = text.replace(f"\t{code}\t", "\tneu\t")
        path.write_bytes(text.encode("latin-1"))
    return read(root).utterances


def test_speaker_is_in_the_turn_not_in_the_dialog(mini):
    root, _ = mini
    for u in read(root).utterances:
        speaker = u.id.rsplit("_", 1)[1][0]
        assert u.speaker == u.id[:5] + speaker
        assert u.gender == {"F": "female", "M": "male"}[speaker]
        assert u.group == u.id.rsplit("_", 1)[0]
    assert "Ses01F" in {u.speaker for u in read(root).utterances if u.group == "Ses01M_script01_1"}


def test_hidden_files_subdirectories_and_xx_lines_do_no_harm(mini):
    root, codes = mini
    release = read(root)
    assert release.unlabelled == ()
    assert all(u.id in codes for u in release.utterances)
    assert all(u.transcript.startswith("This is turn") for u in release.utterances)


def test_wav_without_votes_is_named_but_not_one_the_filter_dropped(mini):
    root, _ = mini
    extra = root / "Session2" / "sentences" / "wav" / "Ses02F_impro02" / "Ses02F_impro02_F099.wav"
    miniature.write_wav(extra, "x")
    assert read(root).unlabelled == (extra.relative_to(root).as_posix(),)


def test_turn_without_transcription_keeps_its_votes(tmp_path):
    write_dialog(tmp_path, SUMMARY.replace("F000", "F001"), "C-E1:\tNeutral;\t()")
    assert by_id(read(tmp_path))["Ses01F_impro01_F001"].transcript == ""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([SUMMARY, "C-E2: Neutral; (spaces)"], r"impro01.txt:2: 'C-E2: Neutral; \(spaces\)' is no tag"),
        ([SUMMARY, "C-E2:\tBoredom;\t()"], r"impro01.txt:2: 'Boredom' is no tag"),
        (["C-E2:\tNeutral;\t()"], r"impro01.txt:1: a vote before the first turn"),
        ([SUMMARY.replace("neu", "wow")], r"impro01.txt:1: expected '\[start - end\]"),
        ([SUMMARY.replace("\t", " ")], r"impro01.txt:1: expected '\[start - end\]"),
        ([SUMMARY.replace("F000", "FXX0")], r"impro01.txt:1: expected '\[start - end\]"),
        ([SUMMARY, "", SUMMARY], r"impro01.txt:3: a second block for Ses01F_impro01_F000"),
    ],
)
def test_broken_files_are_named(tmp_path, lines, message):
    write_dialog(tmp_path, *lines)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no Session1 to Session5"):
        read(tmp_path)
    write_dialog(tmp_path, SUMMARY)
    with pytest.raises(ConfigError, match="keep='half'"):
        read(tmp_path, keep="half")
    (tmp_path / "Session1" / "dialog" / "transcriptions" / "Ses01F_impro01.txt").unlink()
    with pytest.raises(ConfigError, match=r"no .*transcriptions/Ses01F_impro01.txt"):
        read(tmp_path)
