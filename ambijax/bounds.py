"""What a model should beat, and what it can hope for: floors and ceilings in the terms of `metrics`, no model needed.

    uniform         1 / K
    prior           the mean of the training votes
    one-hot         the majority class and nothing else: the best that a classifier without a distribution can do
    one annotator   an annotator's own vote against the distribution of the others
    half            half of the annotators against the other half
    another panel   as many annotators, drawn anew from the votes, against the votes

With n_k votes for class k, N = sum n_k, and e_k the one-hot vote for k, an utterance's value of a measure m(p, q) is

    one annotator   sum_k n_k / N  m((n - e_k) / (N - 1), e_k)
    half            E_h m((n - h) / (N - |h|), h / |h|),   h a random half of the annotators, |h| = floor(N / 2)
    another panel   E_h m(h / N, n / N),                   h ~ Multinomial(N, n / N)

averaged over the utterances with N >= 2. The first is what a person gets who must give one label. The second compares
like with like, a distribution with a distribution, but each comes from half of the annotators and is less steady than
the whole panel that a model is held against: with few annotators a good model, and even the prior, may pass it. The
third is what remains for a model that knows the truth, were the votes the truth: with few annotators they look more
certain than it, so it is a little optimistic.

A vote counts as an annotator. Where votes are fractions (several tags of one annotator) they cannot be told apart, and
the utterance is left out of the three human rows; `clips` says how many are in.
"""

import numpy as np

from ambijax import metrics

Bound = dict[str, float]


def bounds(prior: np.ndarray, counts: np.ndarray, *, draws: int) -> dict[str, Bound]:
    """Name -> js, bc, r2, brier, accuracy and clips, in the order of the table.

    Args:
      prior: soft labels of the training utterances [M, K].
      counts: votes to measure [N, K].
      draws: random halves, and panels, of each utterance.
    """
    counts = np.asarray(counts, np.float64)
    p = counts / counts.sum(axis=1, keepdims=True)
    predicted = {
        "uniform": metrics.uniform(*p.shape),
        "prior": metrics.prior(prior, len(p)),
        "one-hot": np.eye(p.shape[1])[p.argmax(axis=1)],
    }
    rows = {name: _means(metrics.per_utterance(p, q), len(p)) for name, q in predicted.items()}
    whole = np.all(counts == np.round(counts), axis=1) & (counts.sum(axis=1) >= 2)
    if whole.any():
        panel = counts[whole].astype(int)
        rows["one annotator"] = one_annotator(panel)
        rows["half"] = half(panel, draws)
        rows["another panel"] = another_panel(panel, draws)
    return rows


def one_annotator(counts: np.ndarray) -> Bound:
    """One held-out annotator against the rest, exactly; votes [N, K], at least two each."""
    n, k = counts.shape
    votes = np.eye(k)
    total = counts.sum(axis=1)[:, None, None]
    cast = (counts > 0)[..., None]  # nobody can be held out of a class without votes
    rest = np.where(cast, (counts[:, None] - votes) / (total - 1), 1 / k)  # [N, held-out vote, K]
    values = _measure(rest, np.broadcast_to(votes, rest.shape))
    weights = counts / counts.sum(axis=1, keepdims=True)
    return _means({name: np.sum(weights * value, axis=1) for name, value in values.items()}, n)


def half(counts: np.ndarray, draws: int) -> Bound:
    """Half of the annotators against the other half, `draws` random halves an utterance; votes [N, K]."""
    rng = np.random.default_rng(0)  # the same halves for every run that is compared
    halves = np.stack([rng.multivariate_hypergeometric(row, row.sum() // 2, draws) for row in counts])
    return _mean_over_draws(counts[:, None] - halves, halves)


def another_panel(counts: np.ndarray, draws: int) -> Bound:
    """As many annotators drawn from the votes [N, K], `draws` times, against the votes."""
    rng = np.random.default_rng(0)
    total = counts.sum(axis=1, keepdims=True)
    panels = rng.multinomial(total, (counts / total)[:, None], (len(counts), draws))
    return _mean_over_draws(panels, np.broadcast_to(counts[:, None], panels.shape))


def _measure(p: np.ndarray, q: np.ndarray) -> dict[str, np.ndarray]:
    """`metrics.per_utterance` of p and q [N, M, K], each [N, M]."""
    flat = metrics.per_utterance(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]))
    return {name: value.reshape(p.shape[:2]) for name, value in flat.items()}


def _mean_over_draws(target: np.ndarray, prediction: np.ndarray) -> Bound:
    """Means of every measure of two sets of votes [N, draws, K]."""
    p, q = (part / part.sum(axis=-1, keepdims=True) for part in (target, prediction))
    return _means({name: value.mean(axis=1) for name, value in _measure(p, q).items()}, len(target))


def _means(values: dict[str, np.ndarray], clips: int) -> Bound:
    return {name: float(np.mean(value)) for name, value in values.items()} | {"clips": clips}
