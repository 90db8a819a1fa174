"""Emotion classes, and how annotators' votes become the soft label the model learns.

p_k = n_k / sum_j n_j   (paper, equation 1)
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ambijax.errors import ConfigError, DataError

# The order is the order of every [K] axis in the project.
IEMOCAP = ("anger", "happiness", "sadness", "neutral")
CREMAD = (*IEMOCAP, "disgust", "fear")


def classes(text: str) -> tuple[str, ...]:
    """Class words as a command line lists them.

    Raises:
      ConfigError: fewer than two words, an empty one, one that stands twice, or another separator than a comma.

    >>> classes("anger, neutral")
    ('anger', 'neutral')
    """
    words = tuple(word.strip() for word in text.split(","))
    if not all(words) or len(set(words)) < len(words) or len(words) < 2 or set(text) & set(";|()[]'\""):
        raise ConfigError(f"class words must be two or more, distinct, separated by commas, as anger,sad; not {text!r}")
    return words


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
    array([0.6666667 , 0.        , 0.        , 0.33333334], dtype=float32)
    """
    counts = np.array([votes.get(label, 0) for label in labels], np.float64)
    if not np.all(np.isfinite(counts)) or np.any(counts < 0):
        raise DataError(f"vote counts must be finite and not negative, got {dict(votes)}")
    if counts.sum() == 0:
        raise DataError(f"no vote falls on {', '.join(labels)}; votes are {dict(votes)}")
    return (counts / counts.sum()).astype(np.float32)


def rename(votes: Mapping[str, float], words: Mapping[str, str]) -> dict[str, float]:
    """Votes in another corpus' words: each emotion under the word it maps to, or its own; counts that meet add up.

    >>> rename({"happy": 2, "joy": 1, "anger": 3}, {"happy": "happiness", "joy": "happiness"})
    {'happiness': 3, 'anger': 3}
    """
    renamed: dict[str, float] = {}
    for emotion, count in votes.items():
        word = words.get(emotion, emotion)
        renamed[word] = renamed.get(word, 0) + count
    return renamed


def shared_classes(labels: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """The classes two corpora have in common, in the order of `labels`: what cross-corpus evaluation reads out.

    Raises:
      ConfigError: fewer than two, so that there is nothing to tell apart.

    >>> shared_classes(CREMAD, IEMOCAP)
    ('anger', 'happiness', 'sadness', 'neutral')
    """
    shared = tuple(label for label in labels if label in others)
    if len(shared) < 2:
        raise ConfigError(f"the classes {', '.join(labels)} and {', '.join(others)} share fewer than two words")
    return shared
