"""What a roll-out earns, and what that means within its group: equation 6 of the paper, and GRPOz's gold member.

    R_i = w_js (1 - JS(p, phat_i)) + w_fmt format(r_i)
    A_i = (R_i - mean R) / (std R + eps)

Axes: B prompts, K roll-outs of a prompt. GRPOz puts the gold trajectory into the group: pass `gold` and it is the
last of K + 1. Nothing else differs from GRPO.
"""

import numpy as np

from ambijax.errors import ConfigError


def reward(js: np.ndarray, fmt: np.ndarray, *, w_js: float, w_fmt: float) -> np.ndarray:
    """Equation 6.

    Args:
      js: divergence of each read-out from the soft label, bits, [...].
      fmt: format reward of each completion, 0 to 1, [...].
      w_js: weight of the read-out.
      w_fmt: weight of the format.

    Returns:
      [...], at most w_js + w_fmt.
    """
    return w_js * (1 - np.asarray(js, np.float64)) + w_fmt * np.asarray(fmt, np.float64)


def gold_reward(how: str, js: np.ndarray, present: np.ndarray, *, w_js: float, w_fmt: float) -> np.ndarray:
    """The reward of each prompt's gold trajectory, whose format is right by construction.

    The paper gives gold "the maximum" and no number. 'maximal' reads it as the most any trajectory can earn,
    w_js + w_fmt, whatever the model's read-out after it: so gold stands out of every group that is not perfect.
    'measured' is what the read-out after the gold trajectory earns today; a roll-out may then beat it.

    Args:
      how: 'maximal' or 'measured'.
      js: divergence of the read-out after the gold trajectory, bits, [B]; 'maximal' does not look at it.
      present: whether the prompt has a gold trajectory [B].
      w_js: as in `reward`.
      w_fmt: as in `reward`.

    Returns:
      [B], NaN where there is no gold trajectory.

    Raises:
      ConfigError: `how` is neither.
    """
    if how not in ("maximal", "measured"):
        raise ConfigError(f"gold reward '{how}' is unknown; choose maximal or measured")
    js = np.zeros(np.shape(present)) if how == "maximal" else js
    return np.where(present, reward(js, 1, w_js=w_js, w_fmt=w_fmt), np.nan)


def group_advantages(
    rewards: np.ndarray,
    gold: np.ndarray | None = None,
    *,
    scale: str,
    ddof: int,
    eps: float,
    min_std: float,
    gold_adv_clip: float,
) -> np.ndarray:
    """How much better a completion is than its group.

    A NaN reward stands for a member that is not there: it is left out of mean and std, its advantage is 0.

    Args:
      rewards: of the roll-outs [B, K].
      gold: of the gold trajectories [B] (GRPOz), or None (GRPO).
      scale: 'std' divides by the group's standard deviation (GRPO), 'none' does not (Dr. GRPO).
      ddof: 1 divides the squares by n - 1, 0 by n.
      eps: added to the standard deviation.
      min_std: the standard deviation counts as at least this, lest the noise of a group whose completions are
        all alike is blown up to advantages of one; 0 leaves it as it is.
      gold_adv_clip: the gold advantage is at most this; infinity leaves it as it is.

    Returns:
      float64 [B, K], or [B, K + 1] with gold last; finite, 0 in a group without variance.

    Raises:
      ConfigError: `scale` is neither.
    """
    if scale not in ("std", "none"):
        raise ConfigError(f"advantage scale '{scale}' is unknown; choose std or none")
    group = np.asarray(rewards, np.float64)
    if gold is not None:
        group = np.concatenate([group, np.asarray(gold, np.float64)[:, None]], axis=1)
    centred = _centred(group)
    if scale == "std":
        deviation = np.maximum(group_std(group, ddof), min_std)[:, None] + eps
        centred = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    if gold is not None:
        centred[:, -1] = np.minimum(centred[:, -1], gold_adv_clip)
    return centred


def group_std(rewards: np.ndarray, ddof: int) -> np.ndarray:
    """Standard deviation of each group's rewards [B, G] -> [B], NaN members left out; 0 for fewer than two."""
    members = np.sum(~np.isnan(rewards), axis=1)
    return np.sqrt(np.sum(_centred(rewards) ** 2, axis=1) / np.maximum(members - ddof, 1))


def _centred(rewards: np.ndarray) -> np.ndarray:
    """Rewards [B, G] less their group's mean; 0 for NaN members and in groups that are all equal."""
    present = ~np.isnan(rewards)
    total = np.sum(np.where(present, rewards, 0), axis=1, keepdims=True)
    mean = total / np.maximum(np.sum(present, axis=1, keepdims=True), 1)
    low = np.min(np.where(present, rewards, np.inf), axis=1, keepdims=True)
    high = np.max(np.where(present, rewards, -np.inf), axis=1, keepdims=True)
    return np.where(present & (low < high), rewards - mean, 0)  # equal rewards differ from their mean by rounding
