"""How far a predicted emotion distribution is from the annotators': numpy, float64, no model.

p is what the annotators say, q what is predicted; both end in a K axis of class probabilities. The per-utterance
measures take [..., K] (broadcast against each other) and return [...], NaN for a row of NaN; the others take [N, K] and
return one number.

Where the annotators' vote is tied, the majority class is the first of the tied ones in class order. Accuracy,
weighted F1, UAR and ECE all use it.
"""

import numpy as np

from ambijax.errors import NonFiniteError

ECE_BINS = 15  # Guo et al., arXiv 1706.04599
_CONSTANT = 1e-7  # probabilities closer than this are equal: the resolution of a float32 softmax
NORMALISED = 1e-4  # a row may miss one by this much: a distribution written with six digits


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats: sum_k p_k log(p_k / q_k), 0 log 0 = 0; infinite where q lacks a class of p."""
    p, q = _distributions(p, q)
    return np.sum(_relative_entropy(p, q), axis=-1)


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in bits, 0 (all agree) to log2 K (anything goes)."""
    (p,) = _distributions(p)
    return -np.sum(_relative_entropy(p, np.ones_like(p)), axis=-1) / np.log(2)


def js(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits, 0 to 1, no square root: the mean KL of p and q to their midpoint."""
    p, q = _distributions(p, q)
    m = (p + q) / 2
    nats = np.sum(_relative_entropy(p, m) + _relative_entropy(q, m), axis=-1) / 2
    return np.clip(nats / np.log(2), 0, 1)  # rounding leaves the range by 1e-16


def bc(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Bhattacharyya coefficient sum_k sqrt(p_k q_k), 0 (disjoint) to 1 (equal)."""
    p, q = _distributions(p, q)
    return np.sum(np.sqrt(p * q), axis=-1)


def r2(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Squared Pearson correlation of p and q across the classes of one utterance; 0 if either is constant."""
    p, q = np.broadcast_arrays(*_distributions(p, q))
    constant = (np.ptp(p, axis=-1) <= _CONSTANT) | (np.ptp(q, axis=-1) <= _CONSTANT)
    p = p - p.mean(axis=-1, keepdims=True)
    q = q - q.mean(axis=-1, keepdims=True)
    variances = np.sum(p**2, axis=-1) * np.sum(q**2, axis=-1)
    return np.where(constant, 0, np.sum(p * q, axis=-1) ** 2 / np.where(constant, 1, variances))


def brier(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Squared error, mean over the classes: 0 to 2 / K."""
    p, q = _distributions(p, q)
    return np.mean((q - p) ** 2, axis=-1)


def entropy_correlation(p: np.ndarray, q: np.ndarray) -> float:
    """Pearson correlation over utterances of the annotators' and the model's entropy; 0 if either is constant."""
    a, b = entropy(p), entropy(q)
    if np.ptp(a) <= _CONSTANT or np.ptp(b) <= _CONSTANT:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2)))


def accuracy(p: np.ndarray, q: np.ndarray) -> float:
    """Share of utterances whose likeliest class is the majority vote."""
    true, predicted = _hard(p, q)
    return float(np.mean(true == predicted))


def weighted_f1(p: np.ndarray, q: np.ndarray) -> float:
    """F1 of each class against the majority vote, weighted by how many utterances vote for it."""
    true, predicted = _hard(p, q)
    classes, support = np.unique(true, return_counts=True)
    hits = np.array([np.sum((true == c) & (predicted == c)) for c in classes])
    named = np.array([np.sum(predicted == c) for c in classes])
    return float(np.sum(support * 2 * hits / (support + named)) / len(true))


def uar(p: np.ndarray, q: np.ndarray) -> float:
    """Unweighted average recall over the classes that are some utterance's majority vote."""
    true, predicted = _hard(p, q)
    return float(np.mean([np.mean(predicted[true == c] == c) for c in np.unique(true)]))


def ece(p: np.ndarray, q: np.ndarray) -> float:
    """Expected calibration error: |accuracy - confidence| by bins of confidence max_k q_k, weighted by their size."""
    true, predicted = _hard(p, q)
    confidence = np.max(q, axis=-1)
    bins = np.ceil(confidence * ECE_BINS)  # bin m holds ((m - 1) / M, m / M]
    gaps = [np.abs(np.sum((true == predicted)[bins == m] - confidence[bins == m])) for m in set(bins)]
    return float(np.sum(gaps) / len(true))


def summary(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    """Every measure over a set of utterances, p and q [N, K]; the per-utterance ones as their mean.

    >>> p = np.array([[2 / 3, 1 / 3, 0, 0]])
    >>> round(summary(p, np.array([[0.5, 0.25, 0.125, 0.125]]))["js"], 6)
    0.137925
    """
    each = per_utterance(p, q)
    measures = each | {
        "kl": kl(p, q),
        "js_nats": each["js"] * np.log(2),
        "js_sqrt": np.sqrt(each["js"]),
        "brier_sum": each["brier"] * np.shape(p)[-1],
        "ece": ece(p, q),
        "entropy_correlation": entropy_correlation(p, q),
        "weighted_f1": weighted_f1(p, q),
        "uar": uar(p, q),
    }
    return {name: float(np.mean(values)) for name, values in measures.items()}


def per_utterance(p: np.ndarray, q: np.ndarray) -> dict[str, np.ndarray]:
    """The paper's measures and whether the likeliest class is the majority vote, [N] each, of p and q [N, K]."""
    true, predicted = _hard(p, q)
    measures = {"js": js(p, q), "bc": bc(p, q), "r2": r2(p, q), "brier": brier(p, q)}
    return measures | {"accuracy": (true == predicted).astype(float)}


def uniform(n: int, k: int) -> np.ndarray:
    """The floor that knows nothing: 1 / K for each of n utterances, [n, k]."""
    return np.full((n, k), 1 / k)


def prior(train_p: np.ndarray, n: int) -> np.ndarray:
    """The floor that never listens: the mean soft label of the training utterances [M, K], n times, [n, K]."""
    (train_p,) = _distributions(train_p)
    return np.tile(train_p.mean(axis=0), (n, 1))


def _distributions(*arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays in float64, after a look at whether they are distributions at all."""
    arrays = [np.asarray(array, np.float64) for array in arrays]
    for array in arrays:
        if array.size == 0:
            raise ValueError("no distribution to measure")
        if np.any(array < 0) or np.any(np.abs(array.sum(axis=-1) - 1) > NORMALISED):
            raise ValueError("rows must not be negative and must sum to one")
    # A probability that has no half would put an infinity into JS.
    return [np.where(array < np.finfo(np.float64).tiny, 0, array) for array in arrays]


def _hard(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Majority vote and likeliest class of each utterance, [N] each; the first of tied ones."""
    p, q = _distributions(p, q)
    if p.shape != q.shape or p.ndim != 2:
        raise ValueError(f"expected two arrays [N, K], got {p.shape} and {q.shape}")
    if broken := np.sum(np.any(np.isnan(q), axis=-1)):
        raise NonFiniteError(
            f"{broken} of {len(q)} predicted distributions are not a number; evaluate an earlier checkpoint"
        )
    return np.argmax(p, axis=-1), np.argmax(q, axis=-1)


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p log(p / q) elementwise, in nats; 0 where p is 0, infinite where only q is."""
    p, q = np.broadcast_arrays(p, q)
    present = p != 0  # NaN is, and stays
    with np.errstate(divide="ignore"):  # log 0 where q lacks a class of p: that infinity is the result
        return np.where(present, p * (np.log(np.where(present, p, 1)) - np.log(np.where(present, q, 1))), 0)
