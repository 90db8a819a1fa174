"""Floors and the human ceiling, against lists of annotators that are taken apart one by one."""

import csv
import itertools

import numpy as np
import pytest
from scipy.spatial import distance

from ambijax import bounds

DRAWS = 1000


def _annotators(counts) -> np.ndarray:
    """The class that each annotator chose."""
    return np.repeat(np.arange(len(counts)), counts)


def _share(chosen, k: int) -> np.ndarray:
    return np.bincount(chosen, minlength=k) / len(chosen)


def _js(p, q) -> float:
    with np.errstate(invalid="ignore"):  # scipy takes the root of -1e-17 for equal distributions
        return np.nan_to_num(distance.jensenshannon(p, q, base=2)) ** 2


@pytest.fixture(scope="module")
def real_votes(shared_data) -> np.ndarray:
    """Voice-only votes of 61 clips of CREMA-D, A D F H N S, one in 124."""
    with (shared_data / "cremad/processedResults/tabulatedVotes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row[""]) < 200_000]
    return np.array([[int(row[c]) for c in "ADFHNS"] for row in rows[::124]])


def test_one_annotator_by_hand():
    # Votes (2, 1, 0): holding out a first-class vote leaves (1/2, 1/2, 0), twice of three; holding out the other one
    # leaves (1, 0, 0). Brier: (1/4 + 1/4) / 3 = 1/6 and (1 + 1) / 3 = 2/3: (2 * 1/6 + 2/3) / 3 = 1/3.
    # BC: sqrt(1/2) twice, then 0. Accuracy: the rest's majority, the first of the tied, is the held-out class twice.
    got = bounds.one_annotator(np.array([[2, 1, 0]]))
    assert got["brier"] == pytest.approx(1 / 3)
    assert got["bc"] == pytest.approx(2 * np.sqrt(1 / 2) / 3)
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert got["js"] == pytest.approx((2 * _js([0.5, 0.5], [1, 0]) + 1) / 3)


def test_one_annotator_of_the_real_votes(real_votes):
    expected = []
    for counts in real_votes:
        chosen = _annotators(counts)
        rest = [np.delete(chosen, i) for i in range(len(chosen))]
        expected.append(np.mean([_js(_share(r, 6), np.eye(6)[c]) for c, r in zip(chosen, rest, strict=True)]))
    assert bounds.one_annotator(real_votes)["js"] == pytest.approx(np.mean(expected), rel=1e-9)


def test_halves_of_the_real_votes(real_votes):
    means, variances = [], []
    for counts in real_votes:
        chosen = _annotators(counts)
        everyone = set(range(len(chosen)))
        values = [
            _js(_share(chosen[list(everyone - set(h))], 6), _share(chosen[list(h)], 6))
            for h in itertools.combinations(range(len(chosen)), len(chosen) // 2)
        ]
        means.append(np.mean(values))
        variances.append(np.var(values))
    error = np.sqrt(np.sum(variances) / DRAWS) / len(means)
    # The error is about 6e-4; the mean is .23, and with halves drawn with replacement it would be .17.
    assert abs(bounds.half(real_votes, DRAWS)["js"] - np.mean(means)) < 4 * error < 4e-3


def test_another_panel_by_enumeration():
    counts = np.array([[2, 1, 1], [3, 1, 0]])
    expected, variances = [], []
    for row in counts:
        p, chosen = row / 4, _annotators(row)
        panels = itertools.product(chosen, repeat=4)  # 4 ^ 4, equally likely
        values = [_js(_share(np.array(panel), 3), p) for panel in panels]
        expected.append(np.mean(values))
        variances.append(np.var(values))
    error = np.sqrt(np.sum(variances) / 20_000) / 2
    assert abs(bounds.another_panel(counts, 20_000)["js"] - np.mean(expected)) < 4 * error


def test_annotators_who_agree_leave_nothing_to_chance():
    counts = np.array([[5, 0], [0, 2]])
    for row in (bounds.one_annotator(counts), bounds.half(counts, 3), bounds.another_panel(counts, 3)):
        assert (row["js"], row["bc"], row["brier"], row["accuracy"]) == (0, 1, 0, 1)


def test_the_rows_of_the_table_on_the_real_votes(real_votes):
    p = real_votes / real_votes.sum(axis=1, keepdims=True)
    rows = bounds.bounds(p, real_votes, draws=50)
    assert list(rows) == ["uniform", "prior", "one-hot", "one annotator", "half", "another panel"]
    assert rows["one-hot"]["accuracy"] == 1
    # A whole panel is steadier than half of one, and that steadier than one person.
    assert rows["another panel"]["js"] < rows["half"]["js"] < rows["one annotator"]["js"]


def test_who_cannot_be_held_out_is_left_out_and_counted():
    votes = np.array([[3, 1], [1, 1], [1, 0], [0.5, 1.5]])  # four annotators; two; one; two who share their votes
    rows = bounds.bounds(np.array([[0.5, 0.5]]), votes, draws=10)
    assert [rows[name]["clips"] for name in ("prior", "one annotator", "half")] == [4, 2, 2]
    assert list(bounds.bounds(np.array([[0.5, 0.5]]), votes[2:], draws=10)) == ["uniform", "prior", "one-hot"]
