"""How sure a mean, or a difference between two, is: resampling, in numpy, with no assumption about a distribution.

    interval   bootstrap interval of a mean over utterances, or over speakers and all they say
    paired     sign-flip test of a difference between two predictions of the same utterances, or of two runs' folds
    holm       p values of several tests -> p values that may be read side by side

Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval); Good 2005, Permutation,
Parametric and Bootstrap Tests of Hypotheses, chapter 3 (sign flips); Holm 1979, Scandinavian Journal of Statistics 6.
"""

import numpy as np

_ROUNDING = 1e-12  # relative; flips whose means differ by less are equal


def interval(
    values: np.ndarray, *, seed: int, samples: int, level: float, clusters: np.ndarray | None = None
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean.

    What one speaker says is alike, so that drawing utterances alone makes the interval too narrow for a claim about
    other speakers; with `clusters` whole speakers are drawn. Below about ten speakers that interval is too narrow
    itself.

    Args:
      values: one number an utterance [N].
      seed: of the draws.
      samples: how many.
      level: of confidence, as 0.95.
      clusters: speaker of each utterance [N]; None draws utterances.

    Returns:
      (low, high); None of a single utterance or cluster, which says nothing about others.
    """
    values = _numbers(values)
    if clusters is None:
        sums, sizes = values, np.ones(len(values))
    else:
        _, which = np.unique(np.asarray(clusters), return_inverse=True)
        sums, sizes = np.bincount(which, weights=values), np.bincount(which)
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for i in range(samples):
        drawn = rng.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(a: np.ndarray, b: np.ndarray, *, seed: int, samples: int, clusters: np.ndarray | None = None) -> float:
    """Two-sided p value of "a and b have the same mean", from flipping the sign of their differences.

    Exact when there are no more than `samples` ways to flip: five folds have 32, so that p is at least 2 / 32. Else
    that many random flips are drawn, and the observed one counts as one of them.

    Args:
      a: one number an utterance, or a fold [N].
      b: the other prediction's, in the same order [N].
      seed: of the flips.
      samples: how many at most.
      clusters: speaker of each utterance [N]; a speaker's differences flip together. None flips each alone.
    """
    difference = _numbers(a) - _numbers(b)
    if clusters is not None:
        _, which = np.unique(np.asarray(clusters), return_inverse=True)
        difference = np.bincount(which, weights=difference)
    n = len(difference)
    bound = np.abs(difference.sum()) - _ROUNDING * np.abs(difference).sum()
    if n < 63 and 2**n <= samples:
        flips = 1 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(flips @ difference) >= bound))
    rng = np.random.default_rng(seed)
    reached = sum(np.abs(rng.choice((-1.0, 1.0), n) @ difference) >= bound for _ in range(samples))
    return float((reached + 1) / (samples + 1))


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p values [M] of M tests: the chance that any true hypothesis falls below a bound is at most the bound.

    With p sorted, p~_(i) = max over j <= i of min(1, (M - j + 1) p_(j)).

    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    p = _numbers(p)
    order = np.argsort(p)
    stepped = np.minimum(1, (len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted


def _numbers(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(f"expected finite numbers [N], got shape {values.shape}")
    return values
