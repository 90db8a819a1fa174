"""Metrics against numbers worked out by hand, against scipy and scikit-learn, and against the real votes."""

import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance
from scipy.stats import entropy as scipy_entropy
from sklearn import metrics as sklearn_metrics

from ambijax import metrics
from ambijax.errors import NonFiniteError

# p, q, KL nats, JS bits, BC, R2, Brier
ORACLES = [
    ([2 / 3, 1 / 3, 0, 0], [0.5, 0.25, 0.125, 0.125], 0.287682, 0.137925, 0.866025, 0.969697, 0.016493),
    ([1, 0, 0, 0], [0.7, 0.1, 0.1, 0.1], 0.356675, 0.169195, 0.836660, 1.0, 0.030000),
    ([0, 0, 1, 0], [0.7, 0.1, 0.1, 0.1], 2.302585, 0.758277, 0.316228, 0.111111, 0.330000),
    ([1 / 3, 1 / 3, 1 / 3, 0], [0.25] * 4, 0.287682, 0.137925, 0.866025, 0, 0.020833),
    ([0.3, 0, 0, 0.1, 0.6, 0], [0.2, 0.05, 0.05, 0.1, 0.55, 0.05], 0.173846, 0.083047, 0.919405, 0.960031, 0.003333),
]


@st.composite
def distributions(draw, rows=2):
    """`rows` distributions over the same 2 to 7 classes, zeros included."""
    k = draw(st.integers(2, 7))
    counts = st.lists(st.just(0.0) | st.floats(1e-9, 12), min_size=k, max_size=k).filter(lambda c: sum(c) > 0.1)
    return [np.array(c) / np.sum(c) for c in (draw(counts) for _ in range(rows))]


@pytest.mark.parametrize(("p", "q", "kl", "js", "bc", "r2", "brier"), ORACLES)
def test_oracles(p, q, kl, js, bc, r2, brier):
    got = [f(np.array([p]), np.array([q]))[0] for f in (metrics.kl, metrics.js, metrics.bc, metrics.r2, metrics.brier)]
    np.testing.assert_allclose(got, [kl, js, bc, r2, brier], atol=5e-7, rtol=0)


def test_js_by_hand():
    # p = (1, 0), q = (1/2, 1/2), midpoint (3/4, 1/4):
    # KL(p||m) = log2(4/3) = .415037; KL(q||m) = (log2(2/3) + log2(2)) / 2 = .207519; their mean is .311278 bits.
    # In nats it would be .215762, as a distance .557923.
    np.testing.assert_allclose(metrics.js([1, 0], [0.5, 0.5]), 0.311278, atol=5e-7)
    # Disjoint distributions share nothing: one bit.
    assert metrics.js([1, 0], [0, 1]) == 1
    # The smallest float has no half: scipy says infinity here.
    assert metrics.js([5e-324, 1], [0, 1]) == 0


def test_kl_is_infinite_where_the_prediction_lacks_a_class_of_the_votes():
    np.testing.assert_array_equal(metrics.kl([[1, 0], [0.5, 0.5]], [[0.5, 0.5], [1, 0]]), [np.log(2), np.inf])


def test_entropy_by_hand():
    # (1/2, 1/4, 1/4): 1/2 * 1 + 2 * 1/4 * 2 = 1.5 bits
    np.testing.assert_allclose(
        metrics.entropy([[0.5, 0.25, 0.25, 0], [1, 0, 0, 0], [0.25] * 4]), [1.5, 0, 2], atol=1e-15
    )


def test_r2_is_zero_for_a_constant_up_to_rounding():
    # Equal logits need not be bit-equal after a softmax, and the R2 of rounding noise could be anything.
    nearly = np.array([1 / 3 + 1e-9, 1 / 3 - 1e-9, 1 / 3])
    assert metrics.r2(nearly, [0.2, 0.3, 0.5]) == 0
    assert metrics.r2([0.2, 0.3, 0.5], nearly) == 0


def test_measures_broadcast_a_group_of_readouts_against_one_soft_label():
    p = np.array([[2 / 3, 1 / 3, 0, 0], [0, 0, 1, 0]])
    readouts = np.array([[[0.5, 0.25, 0.125, 0.125]] * 3, [[0.7, 0.1, 0.1, 0.1]] * 3])
    for measure in (metrics.js, metrics.kl, metrics.bc, metrics.r2, metrics.brier):
        got = measure(p[:, None], readouts)
        assert got.shape == (2, 3)
        np.testing.assert_array_equal(got[:, 1], measure(p, readouts[:, 0]))


@settings(deadline=None)
@given(distributions())
def test_js_is_symmetric_bounded_and_scipys(pair):
    p, q = pair
    js = metrics.js(p, q)
    assert 0 <= js <= 1
    np.testing.assert_allclose(js, metrics.js(q, p), atol=1e-15)
    assert metrics.js(p, p) == 0
    with np.errstate(invalid="ignore"):  # scipy takes the root of -1e-17 for equal distributions
        np.testing.assert_allclose(js, np.nan_to_num(distance.jensenshannon(p, q, base=2)) ** 2, atol=1e-12)
    np.testing.assert_allclose(metrics.kl(p, q), scipy_entropy(p, q), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(metrics.entropy(p), scipy_entropy(p, base=2), atol=1e-12)


@settings(deadline=None)
@given(distributions())
def test_js_and_bc_bound_each_other(pair):
    # 1 <= JS_bits / (1 - BC) <= 1 / ln 2. In nats the ratio never exceeds 1, so a JS in nats fails the lower bound.
    js, gap = metrics.js(*pair), 1 - metrics.bc(*pair)
    assert gap - 1e-12 <= js <= gap / math.log(2) + 1e-12


@settings(deadline=None)
@given(distributions())
def test_r2_is_numpys_correlation_squared(pair):
    p, q = pair
    if min(np.ptp(p), np.ptp(q)) < 1e-3:  # constants are tested above
        return
    np.testing.assert_allclose(metrics.r2(p, q), np.corrcoef(p, q)[0, 1] ** 2, atol=1e-9)


# Four utterances, three classes; the majority votes are 0, 0 (tied with 1: the first), 1, 2; predicted 0, 1, 1, 1.
VOTES = np.array([[0.8, 0.2, 0], [0.5, 0.5, 0], [0, 0.75, 0.25], [0.2, 0.2, 0.6]])
PREDICTED = np.array([[0.6, 0.3, 0.1], [0.35, 0.45, 0.2], [0.02, 0.96, 0.02], [0.3, 0.4, 0.3]])


def test_classification_by_hand():
    assert metrics.accuracy(VOTES, PREDICTED) == 0.5  # 0.75 if either of the tied classes counted
    # Recall: class 0 one of two, class 1 one of one, class 2 none of one: (1/2 + 1 + 0) / 3
    np.testing.assert_allclose(metrics.uar(VOTES, PREDICTED), 0.5)
    # F1 = 2 hits / (support + named): class 0 2/(2+1), class 1 2/(1+3), class 2 0; weights 2/4, 1/4, 1/4
    np.testing.assert_allclose(metrics.weighted_f1(VOTES, PREDICTED), 2 / 3 / 2 + 1 / 2 / 4)


def test_classification_is_scikit_learns():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), (2, 200))
    true, predicted = p.argmax(1), q.argmax(1)
    np.testing.assert_allclose(metrics.accuracy(p, q), sklearn_metrics.accuracy_score(true, predicted))
    np.testing.assert_allclose(metrics.uar(p, q), sklearn_metrics.recall_score(true, predicted, average="macro"))
    np.testing.assert_allclose(metrics.weighted_f1(p, q), sklearn_metrics.f1_score(true, predicted, average="weighted"))


def test_ece_by_hand():
    # Bins of 1/15: confidences .6, .45, .96, .4 fall into bins 9, 7, 15 and 6, one utterance each; right, wrong, right,
    # wrong: |1 - .6| + |0 - .45| + |1 - .96| + |0 - .4| = 1.29, each weighted 1/4.
    np.testing.assert_allclose(metrics.ece(VOTES, PREDICTED), 1.29 / 4)
    # Two utterances in the bin (9/15, 10/15], one right: |1 - (.61 + .64)| / 2. One by one it would be .515.
    p, q = np.array([[1, 0], [0, 1]]), np.array([[0.61, 0.39], [0.64, 0.36]])
    np.testing.assert_allclose(metrics.ece(p, q), 0.125)
    # One that is sure lies beside .95 in the last bin, (14/15, 1]: |(0 + 1) - (1 + .95)| / 2. Alone it would be .525.
    p, q = np.array([[1, 0], [0, 1]]), np.array([[0, 1], [0.05, 0.95]])
    np.testing.assert_allclose(metrics.ece(p, q), 0.475)


def test_entropy_correlation_by_hand():
    # Entropies of p 0, 1, 2 and of q 0, 2, 1 bits: covariance 1/3, variances 2/3: .5
    p = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    np.testing.assert_allclose(metrics.entropy_correlation(p, p[[0, 2, 1]]), 0.5)
    assert metrics.entropy_correlation(p, metrics.uniform(3, 4)) == 0


def test_summary_holds_every_measure_and_is_json():
    p, q = np.array([[2 / 3, 1 / 3, 0, 0], [0, 0, 1, 0]]), np.array([[0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1]])
    summary = json.loads(json.dumps(metrics.summary(p, q)))
    js = np.array([0.137925, 0.758277])
    expected = {
        "js": js.mean(),
        "bc": (0.866025 + 0.316228) / 2,
        "r2": (0.969697 + 0.111111) / 2,
        "brier": (0.016493 + 0.330000) / 2,
        "kl": (0.287682 + 2.302585) / 2,
        "js_nats": js.mean() * 0.693147,
        "js_sqrt": np.sqrt(js).mean(),  # not the root of the mean, .669
        "brier_sum": (0.016493 + 0.330000) / 2 * 4,
        "ece": 0.6,  # bins 8 and 11, right at .5, wrong at .7: (.5 + .7) / 2
        "entropy_correlation": 1,  # of two points: .918 and 0 bits against 1.75 and 1.357
        "accuracy": 0.5,
        "weighted_f1": 1 / 3,  # class 0: 2/(1+2), weight 1/2
        "uar": 0.5,
    }
    assert summary.keys() == expected.keys()
    np.testing.assert_allclose([summary[k] for k in expected], list(expected.values()), atol=2e-6)


@pytest.mark.parametrize("q", [[[0.5, 0.6]], [[1.5, -0.5]], [[np.inf, 0]], np.zeros((0, 2))], ids=str)
def test_what_is_no_distribution_is_refused(q):
    with pytest.raises(ValueError, match=r"distribution|rows"):
        metrics.js([[0.5, 0.5]], q)


def test_a_broken_model_is_not_a_number_and_never_a_score():
    p, q = np.array([[0.6, 0.4], [1, 0]]), np.array([[np.nan, np.nan], [1, 0]])
    for measure in (metrics.js, metrics.kl, metrics.bc, metrics.r2, metrics.brier):
        np.testing.assert_array_equal(np.isnan(measure(p, q)), [True, False])
    np.testing.assert_array_equal(np.isnan(metrics.entropy(q)), [True, False])
    with pytest.raises(NonFiniteError, match="1 of 2"):
        metrics.summary(p, q)


def test_two_sets_of_different_size_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        metrics.accuracy(metrics.uniform(3, 4), metrics.uniform(2, 4))


def test_floors():
    np.testing.assert_array_equal(metrics.uniform(2, 4), [[0.25] * 4] * 2)
    np.testing.assert_allclose(metrics.prior([[1, 0], [0.5, 0.5], [0.6, 0.4]], 2), [[0.7, 0.3]] * 2)


def test_floors_on_the_real_votes_of_crema_d(shared_data):
    with (shared_data / "cremad/processedResults/tabulatedVotes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row[""]) < 200_000]  # voice only
    counts = np.array([[int(row[c]) for c in "ADFHNS"] for row in rows], float)
    p = counts / counts.sum(axis=1, keepdims=True)
    majority = np.eye(6)[p.argmax(axis=1)]
    floors = {
        "prior": (metrics.prior(p, len(p)), [0.290, 0.738, 0.470, 0.044, 0.539]),
        "uniform": (metrics.uniform(*p.shape), [0.378, 0.657, 0, 0.060]),
        # A label smoothed by 2 %; the bare one-hot has .223/.789/.768/.042.
        "smoothed majority": (0.98 * majority + 0.02 / 6, [0.206, 0.830, 0.768, 0.039, 1]),
        "majority": (majority, [0.223, 0.789, 0.768, 0.042, 1]),
    }
    for name, (q, expected) in floors.items():
        summary = metrics.summary(p, q)
        got = [summary[key] for key in ("js", "bc", "r2", "brier", "accuracy")][: len(expected)]
        np.testing.assert_allclose(got, expected, atol=5.1e-4, err_msg=name)


def test_what_is_resampled_has_the_means_that_are_reported():
    each, means = metrics.per_utterance(VOTES, PREDICTED), metrics.summary(VOTES, PREDICTED)
    assert list(each) == ["js", "bc", "r2", "brier", "accuracy"]
    np.testing.assert_array_equal(each["accuracy"], [1, 0, 1, 0])
    for name, values in each.items():
        assert values.shape == (4,)
        assert means[name] == pytest.approx(values.mean())
