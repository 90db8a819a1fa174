"""Intervals and tests against scipy, by hand, and against the definitions by brute force."""

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ambijax import significance


def test_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).gamma(2, size=60)
    got = significance.interval(values, seed=3, samples=4000, level=0.9)
    scipys = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    # The same draws: scipy takes them in one array, we take them row by row. A BCa interval is off by .02 here.
    np.testing.assert_allclose(got, scipys, rtol=1e-12)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        low, high = significance.interval(rng.normal(size=80), seed=trial, samples=300, level=0.8)
        hits += low <= 0 <= high
    # 400 trials at .8 have a standard error of .02; the bootstrap of 80 values is a little narrow.
    assert 0.72 <= hits / 400 <= 0.86


def test_clusters_are_drawn_whole():
    # Two speakers, one at 0 with three utterances, one at 1 with one: four equally likely draws of two speakers, whose
    # means are 0, 1/4, 1/4 and 1. By utterances the interval could not reach 1 (probability 1/256).
    values, speakers = np.array([0, 0, 0, 1.0]), np.array(["a", "a", "a", "b"])
    low, high = significance.interval(values, seed=0, samples=2000, level=0.98, clusters=speakers)
    assert (low, high) == (0, 1)
    # The middle 40 % are the 1/4: a mean over utterances, not over speakers, which would be 1/2.
    assert significance.interval(values, seed=0, samples=2000, level=0.4, clusters=speakers) == (0.25, 0.25)
    assert significance.interval(values, seed=0, samples=2000, level=0.98)[1] < 1


def test_clusters_of_one_are_utterances():
    values = np.random.default_rng(0).random(30)
    how = {"seed": 5, "samples": 200, "level": 0.95}
    alone = significance.interval(values, **how, clusters=np.arange(30))
    np.testing.assert_allclose(alone, significance.interval(values, **how), rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=8))
def test_paired_is_scipys_exact_test(pairs):
    a, b = np.array(pairs, float).T
    expected = scipy.stats.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    # scipy doubles the smaller tail; the null distribution is symmetric, so that is the same but for its cap at one.
    np.testing.assert_allclose(significance.paired(a, b, seed=0, samples=256), expected, rtol=1e-12)


def test_paired_by_hand():
    # Five folds, all better: 2 of the 32 ways to flip are as extreme.
    a, b = np.array([0.3, 0.31, 0.29, 0.33, 0.28]), np.array([0.2, 0.25, 0.21, 0.22, 0.24])
    assert significance.paired(a, b, seed=0, samples=2000) == 2 / 32
    assert significance.paired(b, a, seed=0, samples=2000) == 2 / 32
    assert significance.paired(a, a, seed=0, samples=2000) == 1
    # Ways that differ by rounding alone are equally extreme: tenths count as whole numbers do.
    tenths = np.array([1, 2, 4, 0, -1, -2])
    whole = significance.paired(tenths, np.zeros(6), seed=0, samples=64)
    assert significance.paired(0.1 * tenths, np.zeros(6), seed=0, samples=64) == whole
    # Three speakers of two utterances each flip together: 2 of 8, not 2 of 64.
    speakers = np.array([1, 1, 2, 2, 3, 3])
    assert significance.paired(np.arange(1, 7), np.zeros(6), seed=0, samples=2000, clusters=speakers) == 2 / 8


def test_random_flips_approach_the_exact_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 16), np.zeros(16)
    exact = significance.paired(a, b, seed=0, samples=2**16)
    drawn = significance.paired(a, b, seed=0, samples=20_000)
    assert exact != drawn
    assert abs(exact - drawn) < 4 * np.sqrt(exact * (1 - exact) / 20_000)
    # Never zero: the observed flip is one of those drawn.
    assert significance.paired(np.ones(100), np.zeros(100), seed=0, samples=50) == 1 / 51


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closed_test_of_bonferroni(p):
    # A hypothesis falls when every intersection that it is part of falls by Bonferroni's bound.
    m = len(p)
    sets = [s for size in range(1, m + 1) for s in itertools.combinations(range(m), size)]
    expected = [max(min(1, len(s) * min(p[i] for i in s)) for s in sets if j in s) for j in range(m)]
    np.testing.assert_allclose(significance.holm(np.array(p)), expected)


def test_holm_by_hand():
    # Sorted .01 .03 .04 times 3 2 1: .03 .06 .04, then never falling: .03 .06 .06.
    np.testing.assert_allclose(significance.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])


@pytest.mark.parametrize("values", [[], [0.1, np.nan], [[0.1, 0.2]]], ids=str)
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match="expected finite numbers"):
        significance.interval(np.array(values), seed=0, samples=10, level=0.9)


def test_one_speaker_says_nothing_about_others():
    values = np.arange(5.0)
    assert significance.interval(values, seed=0, samples=10, level=0.9, clusters=np.zeros(5)) is None
    assert significance.interval(values[:1], seed=0, samples=10, level=0.9) is None  # nor does one utterance
