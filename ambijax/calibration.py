"""One temperature for all predictions, fitted where nothing is reported.

    phat_T = softmax(log phat / T),   T = argmin over the dev split of mean KL(p || phat_T)

T > 1 flattens a model that is too certain. With b = 1 / T the objective is convex: its slope is
mean of E_phat_T[log phat] - E_p[log phat], which grows with b; the fit is the root of that slope.
Guo et al. 2017, arXiv 1706.04599, with the votes' distribution instead of a label.
"""

import numpy as np
import scipy.special

from ambijax.errors import NonFiniteError

# Beyond these all probability is on one class, or spread evenly: the root lies at zero or infinity when every vote
# agrees with the model, or none does.
COLDEST, HOTTEST = 0.02, 50.0


def fit(p: np.ndarray, q: np.ndarray) -> float:
    """The temperature at which q [N, K] comes closest to the votes p [N, K]; at most HOTTEST, at least COLDEST.

    Raises:
      NonFiniteError: a prediction is not a number.
    """
    import scipy.optimize  # a tenth of a command's start, and most calibrate nothing

    p, logits = np.asarray(p, np.float64), _logits(q)
    if not np.all(np.isfinite(logits)):
        raise NonFiniteError("a predicted distribution is not a number; evaluate an earlier checkpoint")
    wanted = np.sum(p * logits)

    def slope(b: float) -> float:
        return np.sum(scipy.special.softmax(b * logits, axis=-1) * logits) - wanted

    if slope(1 / HOTTEST) >= 0:
        return HOTTEST
    if slope(1 / COLDEST) <= 0:
        return COLDEST
    return 1 / scipy.optimize.brentq(slope, 1 / HOTTEST, 1 / COLDEST, xtol=1e-12)


def apply(q: np.ndarray, temperature: float) -> np.ndarray:
    """q [..., K] at a temperature, [..., K]."""
    return scipy.special.softmax(_logits(q) / temperature, axis=-1)


def _logits(q: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(q, np.float64), np.finfo(np.float64).tiny))
