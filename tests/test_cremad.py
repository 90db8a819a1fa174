"""CREMA-D: the real vote table where it is present, a miniature with the release's quirks elsewhere."""

import collections
import csv

import numpy as np
import pytest

from ambijax import manifest, metrics
from ambijax.corpora import cremad
from ambijax.emotions import CREMAD
from ambijax.errors import ConfigError, DataError
from tests import miniature

ALPHABETIC = ("anger", "disgust", "fear", "happiness", "neutral", "sadness")  # the order of the table's columns
PAIRS = (
    ("1006_TIE_HAP_XX", "1006_TIE_NEU_XX"),
    ("1013_WSI_DIS_XX", "1013_WSI_SAD_XX"),
    ("1017_IWW_ANG_XX", "1017_IWW_FEA_XX"),
)


@pytest.fixture(scope="module")
def real(shared_data):
    return cremad.read(shared_data / "cremad", votes="tabulated", ten_second_rule=False)


@pytest.fixture
def mini(tmp_path):
    miniature.cremad(tmp_path)
    return tmp_path


def read(root, votes="tabulated", ten_second_rule=False):
    return cremad.read(root, votes=votes, ten_second_rule=ten_second_rule)


def by_id(release):
    return {u.id: u for u in release.utterances}


def votes_of(release):
    return {u.id: u.votes for u in release.utterances}


# The real table ------------------------------------------------------------------------------------------------------


def test_real_counts(real):
    votes = np.array([[u.votes.get(emotion, 0) for emotion in CREMAD] for u in real.utterances])
    totals = votes.sum(axis=1)
    assert votes.shape == (7442, 6)
    assert totals.sum() == 68_568
    assert totals.mean() == pytest.approx(9.21, abs=0.005)
    histogram = {4: 2, 5: 9, 6: 57, 7: 316, 8: 1155, 9: 2663, 10: 2890, 11: 346, 12: 4}
    assert collections.Counter(totals.tolist()) == histogram
    top = votes == votes.max(axis=1, keepdims=True)
    tied = top.sum(axis=1) > 1
    assert tied.sum() == 644
    assert (votes.max(axis=1) == totals).sum() == 383
    unique = dict(zip(CREMAD, top[~tied].sum(axis=0).tolist(), strict=True))
    assert unique == {"neutral": 3897, "anger": 986, "fear": 645, "disgust": 547, "sadness": 370, "happiness": 353}
    assert metrics.entropy(votes / totals[:, None]).mean() == pytest.approx(1.196, abs=0.0005)
    assert real.notes == ("the acted emotion is the unique majority in 41.6 %",)


def test_real_folds_are_contiguous_and_speaker_independent(real, tmp_path):
    corpus = manifest.Corpus(tmp_path, real.utterances)
    borders = [(1001, 1018), (1019, 1036), (1037, 1054), (1055, 1072), (1073, 1091)]
    for fold, (first, last) in enumerate(borders):
        splits = manifest.split(corpus, fold, "next_fold")
        assert {int(u.speaker) for u in splits["test"]} == set(range(first, last + 1))
        first, last = borders[(fold + 1) % 5]
        assert {int(u.speaker) for u in splits["dev"]} == set(range(first, last + 1))
    sizes = collections.Counter(u.fold for u in real.utterances)
    assert [sizes[fold] for fold in range(5)] == [1463, 1470, 1476, 1476, 1557]


@pytest.mark.parametrize("dev", ["next_fold", "groups"])
def test_real_duplicate_pairs_stay_in_one_split(real, shared_data, tmp_path, dev):
    with (shared_data / "cremad" / "audiowav_lfs_manifest.csv").open() as file:
        same = collections.defaultdict(list)
        for row in csv.DictReader(file):
            same[row["sha256"]].append(row["file"].removeprefix("AudioWAV/").removesuffix(".wav"))
    assert tuple(sorted(tuple(clips) for clips in same.values() if len(clips) > 1)) == PAIRS
    for fold in range(5):
        splits = manifest.split(manifest.Corpus(tmp_path, real.utterances), fold, dev)
        where = {u.id: name for name, utterances in splits.items() for u in utterances}
        assert all(where[a] == where[b] for a, b in PAIRS)


def test_real_files_are_those_of_the_table(real, shared_data):
    with (shared_data / "cremad" / "audiowav_lfs_manifest.csv").open() as file:
        assert {row["file"] for row in csv.DictReader(file)} == {u.audio for u in real.utterances}
    assert list(real.known_bad) == ["1076_MTI_SAD_XX"]


def test_real_speakers(real):
    gender = {u.speaker: u.gender for u in real.utterances}
    assert collections.Counter(gender.values()) == {"male": 48, "female": 43}
    assert {u.transcript for u in real.utterances} == set(cremad.SENTENCES.values())


def test_real_floors(real):
    """The floors any trained model must beat. Ties go to the first class in the table's column order (accuracy)."""
    p = manifest.soft_labels(real.utterances, ALPHABETIC)

    def floor(q):
        measured = metrics.summary(p, q)
        return [round(measured[name], 3) for name in ("js", "bc", "r2", "brier", "accuracy")]

    hard = np.eye(6)[p.argmax(axis=1)]
    assert floor(metrics.prior(p, len(p))) == [0.290, 0.738, 0.470, 0.044, 0.539]
    assert floor(metrics.uniform(*p.shape))[:4] == [0.378, 0.657, 0.0, 0.060]
    # The one-hot vote with 2 % spread over all classes; without it JS is .223, BC .789 and Brier .042.
    assert floor(0.98 * hard + 0.02 / 6) == [0.206, 0.830, 0.768, 0.039, 1.0]
    assert floor(hard) == [0.223, 0.789, 0.768, 0.042, 1.0]


def test_real_floor_of_the_prior_of_the_other_folds(real):
    p = manifest.soft_labels(real.utterances, ALPHABETIC)
    folds = np.array([u.fold for u in real.utterances])
    q = np.concatenate([metrics.prior(p[folds != fold], (folds == fold).sum()) for fold in range(5)])
    p = np.concatenate([p[folds == fold] for fold in range(5)])
    measured = metrics.summary(p, q)
    expected = {"js": 0.2906, "bc": 0.7375, "r2": 0.4701, "brier": 0.0443, "accuracy": 0.539}
    assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=5e-5)


# A miniature ---------------------------------------------------------------------------------------------------------


def test_an_utterance(mini):
    assert by_id(read(mini))["1019_ITH_FEA_XX"] == manifest.Utterance(
        id="1019_ITH_FEA_XX",
        audio="AudioWAV/1019_ITH_FEA_XX.wav",
        transcript="I think I have a doctor's appointment.",
        speaker="1019",
        fold=1,
        votes={"fear": 6, "neutral": 1, "sadness": 2},
        group="1019",
        gender="male",
    )


def test_only_voice_votes_count_and_hidden_files_do_not(mini):
    release = read(mini)
    names = [cremad.EMOTIONS[letter] for letter in miniature.LETTERS]
    for clip, votes in miniature.CREMAD.items():
        assert votes_of(release)[clip] == {name: n for name, n in zip(names, votes, strict=True) if n}
    assert len(release.utterances) == len(miniature.CREMAD)
    assert release.unlabelled == ()
    assert release.known_bad.keys() == {"1076_MTI_SAD_XX"}


def test_raw_votes(mini):
    """The miniature has one vote more a clip in the raw table, for disgust, first clicked after 12 s."""
    tabulated, everything, ruled = read(mini), read(mini, "raw"), read(mini, "raw", True)
    assert votes_of(ruled) == votes_of(tabulated)
    for clip, votes in votes_of(everything).items():
        assert votes == votes_of(tabulated)[clip] | {"disgust": votes_of(tabulated)[clip].get("disgust", 0) + 1}
    assert "no response dropped" in everything.description
    assert "ttr of finishedEmoResponses.csv" in ruled.description


def test_ten_second_rule_without_the_table_of_first_clicks(mini):
    """Then the response's own time stands in: over 10 s for every clip's second vote, unknown (NA) for the first."""
    (mini / "finishedEmoResponses.csv").unlink()
    ruled = read(mini, "raw", True)
    assert "ttr of finishedResponses.csv" in ruled.description
    # 1001_IEO_NEU_XX: H N N N ..., and the late D that stays because its own ttr is short
    assert votes_of(ruled)["1001_IEO_NEU_XX"] == {"happiness": 1, "neutral": 9, "disgust": 1}


def test_odd_but_legal_tables(mini):
    """Another column order, CR LF line ends, a byte-order mark, everything in quotes."""
    path = mini / "processedResults" / "tabulatedVotes.csv"
    expected = votes_of(read(mini))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, sorted(rows[0], reverse=True), quoting=csv.QUOTE_ALL, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(reversed(rows))
    assert votes_of(read(mini)) == expected


def test_without_demographics_only_the_gender_is_missing(mini):
    (mini / "VideoDemographics.csv").unlink()
    assert {u.gender for u in read(mini).utterances} == {""}


def test_unlabelled_wav_is_named(mini):
    miniature.write_wav(mini / "AudioWAV" / "1002_IEO_ANG_HI.wav", "x")
    assert read(mini).unlabelled == ("AudioWAV/1002_IEO_ANG_HI.wav",)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"100001",0,0', '"100001",3,0', "do not add up"),
        ('"100001",0,0', '"100001",x,0', "tabulatedVotes.csv:2: expected a whole number, got 'x'"),
        ("1001_IEO_NEU_XX", "1001_IEO_NEU", "is no clip name"),
        ("1001_IEO_NEU_XX", "1099_IEO_NEU_XX", "is no clip name"),
        ("1001_IEO_NEU_XX", "1001_IEO_ANG_HI", "second voice-only row"),
        ('"numResponses"', '"responses"', "no column 'numResponses'"),
    ],
)
def test_broken_tables_are_named(mini, old, new, message):
    edit(mini / "processedResults" / "tabulatedVotes.csv", old, new)
    with pytest.raises(DataError, match=message):
        read(mini)


def test_missing_table_and_unknown_option(mini, tmp_path):
    (mini / "processedResults" / "tabulatedVotes.csv").unlink()
    with pytest.raises(ConfigError, match=r"no .*tabulatedVotes.csv; --root must be"):
        read(mini)
    with pytest.raises(ConfigError, match="must be 'tabulated' or 'raw'"):
        read(mini, "face")
    edit(mini / "finishedResponses.csv", '"H",50', '"Q",50')
    with pytest.raises(DataError, match="respEmo 'Q'"):
        read(mini, "raw")
