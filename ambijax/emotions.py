"""Emotion classes, and how annotators' votes become the soft label the model learns.

p_k = n_k / sum_j n_j   (paper, equation 1)
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ambijax.errors import DataError

# The order is the order of every [K] axis in the project.
IEMOCAP = ("anger", "happiness", "sadness", "neutral")
CREMAD = (*IEMOCAP, "disgust", "fear")


def soft_label(votes: Mapping[str, float], labels: Sequence[str]) -> np.ndarray:
    """Vote counts to the distribution p over `labels`.

    Args:
      votes: emotion -> number of annotators (fractions allowed); emotions outside `labels` are not counted.
      labels: the K class names.

    Returns:
      float32 [K], non-negative, sums to one.

    Raises:
      DataError: a negative or non-finite count, or no vote inside `labels`.

    >>> soft_label({"anger": 2, "neutral": 1, "surprise": 4}, ("anger", "happiness", "sadness", "neutral"))
    array([0.6666667, 0.       , 0.       , 0.33333334], dtype=float32)
    """
    counts = np.array([votes.get(label, 0) for label in labels], np.float64)
    if not np.all(np.isfinite(counts)) or np.any(counts < 0):
        raise DataError(f"vote counts must be finite and not negative, got {dict(votes)}")
    if counts.sum() == 0:
        raise DataError(f"no vote falls on {', '.join(labels)}; votes are {dict(votes)}")
    return (counts / counts.sum()).astype(np.float32)
