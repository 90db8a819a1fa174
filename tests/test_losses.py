"""Losses against numbers worked out by hand, against torch, and on inputs a training run must survive."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ambijax import losses
from ambijax.errors import ConfigError
from ambijax.rewards import group_advantages

variants = chex.variants(with_jit=True, without_jit=True)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def log_probs(seed, *shape):
    """What a policy says of its own tokens: mostly likely ones, some not."""
    return -np.abs(normal(seed, *shape))


class SoftLabelKLTest(chex.TestCase):
    @variants
    @parameterized.parameters(
        ([2 / 3, 1 / 3, 0, 0], [0.5, 0.25, 0.125, 0.125], 0.287682),
        ([1, 0, 0, 0], [0.7, 0.1, 0.1, 0.1], 0.356675),
        ([0, 0, 1, 0], [0.7, 0.1, 0.1, 0.1], 2.302585),
        ([1 / 3, 1 / 3, 1 / 3, 0], [0.25, 0.25, 0.25, 0.25], 0.287682),
        ([0.3, 0, 0, 0.1, 0.6, 0], [0.2, 0.05, 0.05, 0.1, 0.55, 0.05], 0.173846),
    )
    def test_oracles(self, p, phat, nats):
        logits = jnp.log(jnp.array(phat)) + 3  # softmax takes the constant away again
        got = self.variant(losses.soft_label_kl)(jnp.array(p), logits)
        # Reversed it would be infinite here (p has zeros), without 0 log 0 = 0 not a number.
        np.testing.assert_allclose(got, nats, atol=1e-6)

    @variants
    def test_gradient_is_prediction_minus_label(self):
        # logits (ln 3, 0, 0): phat (.6, .2, .2); p (.5, .5, 0): gradient (.1, -.3, .2)
        p, logits = jnp.array([[0.5, 0.5, 0.0]]), jnp.log(jnp.array([[3.0, 1, 1]]))
        gradient = self.variant(jax.grad(lambda z: losses.soft_label_kl(p, z).sum()))(logits)
        np.testing.assert_allclose(gradient, [[0.1, -0.3, 0.2]], atol=1e-7)

    @variants
    def test_certain_and_wrong_is_finite(self):
        p, logits = jnp.array([0.0, 1.0]), jnp.array([1e4, -1e4])
        value, gradient = self.variant(jax.value_and_grad(losses.soft_label_kl, argnums=1))(p, logits)
        np.testing.assert_allclose(value, 2e4)
        np.testing.assert_allclose(gradient, [1, -1])

    @variants
    def test_one_result_an_utterance(self):
        p, logits = jax.nn.softmax(normal(0, 2, 3, 4)), normal(1, 2, 3, 4)
        got = self.variant(losses.soft_label_kl)(p, logits)
        expected = torch.nn.functional.kl_div(
            torch.log_softmax(torch.tensor(logits), -1), torch.tensor(np.array(p)), reduction="none"
        ).sum(-1)
        np.testing.assert_allclose(got, expected, atol=1e-6)


class ReverseKLTest(chex.TestCase):
    @variants
    def test_by_hand_and_scipy(self):
        # p (1, 0) with floor .2: q (.9, .1); phat (.5, .5): .5 ln(.5/.9) + .5 ln(.5/.1) = .510826. Forward: ln 2.
        f = functools.partial(losses.reverse_soft_label_kl, floor=0.2)
        np.testing.assert_allclose(self.variant(f)(jnp.array([1.0, 0]), jnp.zeros(2)), 0.510826, atol=1e-6)
        p, logits = np.array(jax.nn.softmax(normal(0, 5, 4))), normal(1, 5, 4)
        expected = scipy.stats.entropy(scipy.special.softmax(logits, -1), 0.8 * p + 0.2 / 4, axis=-1)
        np.testing.assert_allclose(self.variant(f)(p, logits), expected, atol=1e-6)

    @variants
    def test_no_votes_cost_something_finite(self):
        def loss(z):
            return losses.reverse_soft_label_kl(jnp.array([0.0, 1.0]), z, 0.01)

        value, gradient = self.variant(jax.value_and_grad(loss))(jnp.array([1e4, -1e4]))
        np.testing.assert_allclose(value, -math.log(0.005), rtol=1e-6)
        assert np.all(np.isfinite(gradient))


class CrossEntropyTest(chex.TestCase):
    @variants
    def test_by_hand(self):
        # (1 + 2 + 3) / 3; (4 + 6) / 2; nothing counts: 0. A token sum would give 6 and 10.
        logp = -jnp.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
        mask = jnp.array([[1, 1, 1], [1, 0, 1], [0, 0, 0]])
        np.testing.assert_allclose(self.variant(losses.cross_entropy)(logp, mask), [2, 5, 0])

    @variants
    def test_gradient_is_one_over_length_and_zero_without_tokens(self):
        mask = jnp.array([[1, 0, 1, 0], [0, 0, 0, 0]])
        gradient = self.variant(jax.grad(lambda x: losses.cross_entropy(x, mask).sum()))(-jnp.ones((2, 4)))
        np.testing.assert_array_equal(gradient, [[-0.5, 0, -0.5, 0], [0, 0, 0, 0]])


class DPOTest(chex.TestCase):
    @variants
    def test_policy_equal_to_reference_gives_ln_2(self):
        won, lost = log_probs(0, 5) * 100, log_probs(1, 5) * 100
        np.testing.assert_array_equal(
            self.variant(losses.dpo)(won, lost, won, lost, 0.1), np.full(5, np.log(2), np.float32)
        )

    @variants
    def test_by_hand(self):
        # Bracket (-10 + 12) - (-9 + 8) = 3; beta .5: softplus(-1.5) = .201413, gradient by the preferred one
        # -beta sigmoid(-1.5) = -.091213. Signs swapped it would be softplus(1.5) = 1.701413.
        args = [jnp.array([x]) for x in (-10.0, -9.0, -12.0, -8.0)]

        def loss(*args):
            return losses.dpo(*args, 0.5).sum()

        value, gradient = self.variant(jax.value_and_grad(loss, argnums=(0, 1)))(*args)
        np.testing.assert_allclose(value, 0.201413, atol=1e-6)
        np.testing.assert_allclose(gradient, [[-0.091213], [0.091213]], atol=1e-6)

    @variants
    def test_hopeless_pair_is_finite(self):
        def loss(w):
            return losses.dpo(w, jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), 1.0).sum()

        value, gradient = self.variant(jax.value_and_grad(loss))(jnp.array([-1e4]))
        np.testing.assert_allclose((value, gradient[0]), (1e4, -1))

    @variants
    def test_trl(self):
        # trl 1.16, DPOTrainer._compute_loss, loss_type="sigmoid", f_divergence_type="reverse_kl"
        args = [50 * log_probs(seed, 16) for seed in range(4)]
        won, lost, ref_won, ref_lost = map(torch.tensor, args)
        delta_score = (won - ref_won) - (lost - ref_lost)
        expected = -torch.nn.functional.logsigmoid(0.1 * delta_score)
        np.testing.assert_allclose(self.variant(losses.dpo)(*args, 0.1), expected, rtol=1e-5, atol=1e-6)


class K3Test(chex.TestCase):
    @variants
    def test_by_hand(self):
        # Reference twice as likely: 2 - ln 2 - 1; half as likely: 1/2 + ln 2 - 1; equal: 0. Gradient 1 - exp(d).
        logp, ref = jnp.log(jnp.array([0.25, 0.5, 0.5])), jnp.log(jnp.array([0.5, 0.25, 0.5]))
        np.testing.assert_allclose(self.variant(losses.k3)(logp, ref), [0.306853, 0.193147, 0], atol=1e-6)
        gradient = self.variant(jax.grad(lambda x: losses.k3(x, ref).sum()))(logp)
        np.testing.assert_allclose(gradient, [-1, 0.5, 0], atol=1e-6)

    @variants
    def test_its_mean_under_the_policy_is_the_kl(self):
        # sum_y pi k3 = sum ref - sum pi log(ref / pi) - 1 = KL(pi || ref)
        pi, ref = jax.nn.softmax(normal(0, 7)), jax.nn.softmax(normal(1, 7))
        got = (pi * self.variant(losses.k3)(jnp.log(pi), jnp.log(ref))).sum()
        np.testing.assert_allclose(got, (pi * jnp.log(pi / ref)).sum(), atol=1e-6)


class GRPOTest(chex.TestCase):
    @variants
    @parameterized.parameters(
        # ratio, advantage, loss, its gradient by logp; clipped to [.8, 1.28]
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 1.0, -1.25, -1.25),  # eps_low on both sides would clip at 1.2
        (1.5, 1.0, -1.28, 0.0),
        (1.5, -1.0, 1.5, 1.5),  # the pessimistic side is never clipped
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
    )
    def test_by_hand(self, ratio, advantage, loss, gradient):
        old = jnp.array([[-1.0]])

        def f(logp):
            return losses.grpo(logp, old, jnp.array([advantage]), 0.2, 0.28).sum()

        got = self.variant(jax.value_and_grad(f))(old + math.log(ratio))
        np.testing.assert_allclose((got[0], got[1][0, 0]), (loss, gradient), atol=1e-6)

    @variants
    def test_first_update_is_advantage_weighted_likelihood(self):
        # logp_old = logp is a constant: were it differentiated, the ratio would be 1 for good and the gradient 0.
        logp, a = log_probs(0, 2, 3, 5), normal(1, 2, 3)
        gradient = self.variant(jax.grad(lambda x: losses.grpo(x, x, a, 0.2, 0.2).sum()))(logp)
        np.testing.assert_allclose(gradient, np.broadcast_to(-a[..., None], logp.shape), atol=1e-6)

    @variants
    def test_gold_member_closed_form(self):
        # K = 3 equal rewards and a higher gold (ddof 1): advantages -1/2, -1/2, -1/2, 3/2. First update, sequence mean
        # over 4 completions of 2, 1, 2, 4 tokens: each token's gradient is -A / (4 * length).
        a = group_advantages(
            np.ones((1, 3)), np.array([2.0]), scale="std", ddof=1, eps=0, min_std=0, gold_adv_clip=math.inf
        )
        mask = np.arange(4) < np.array([[[2], [1], [2], [4]]])
        logp = log_probs(0, 1, 4, 4)

        def loss(x):
            per_token = losses.grpo(x, jnp.array(logp), jnp.asarray(a, jnp.float32), 0.2, 0.2)
            return losses.aggregate(per_token, jnp.array(mask), "sequence_mean", tokens=9.0, max_length=4).mean()

        weights = [0.5 / 8, 0.5 / 4, 0.5 / 8, -1.5 / 16]
        gradient = self.variant(jax.grad(loss))(logp)
        np.testing.assert_allclose(gradient[0], mask[0] * np.array(weights)[:, None], atol=1e-7)

    @variants
    @parameterized.parameters("sequence_mean", "token_mean", "constant_length")
    def test_trl(self, how):
        # trl 1.16, GRPOTrainer._compute_loss: loss_type "grpo", "bnpo" and "dr_grpo", one prompt, beta .04
        logp, old, ref = (np.log(np.random.default_rng(s).uniform(0.2, 1, (6, 9))) for s in range(3))
        a, mask = normal(3, 6).astype(np.float64), np.arange(9) < np.array([[9], [1], [4], [2], [7], [9]])

        x, m = torch.tensor(logp, requires_grad=True), torch.tensor(mask, dtype=torch.float64)
        t_old, t_ref, t_a = torch.tensor(old), torch.tensor(ref), torch.tensor(a)[:, None]
        coef_1 = torch.exp(x - t_old)
        coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
        per_token_loss = -torch.min(coef_1 * t_a, coef_2 * t_a)
        per_token_loss = per_token_loss + 0.04 * (torch.exp(t_ref - x) - (t_ref - x) - 1)
        expected = {
            "sequence_mean": ((per_token_loss * m).sum(-1) / m.sum(-1).clamp(min=1.0)).mean(),
            "token_mean": (per_token_loss * m).sum() / m.sum().clamp(min=1.0),
            "constant_length": (per_token_loss * m).sum() / (per_token_loss.size(0) * 12),
        }[how]
        expected.backward()

        def loss(logp, old, ref, a, mask):
            per_token = losses.grpo(logp, old, a, 0.2, 0.28) + 0.04 * losses.k3(logp, ref)
            return losses.aggregate(per_token, mask, how, tokens=mask.sum(), max_length=12)[0]

        args = [jnp.asarray(v[None], v.dtype if v.dtype == bool else jnp.float32) for v in (logp, old, ref, a, mask)]
        value, gradient = self.variant(jax.value_and_grad(loss))(*args)
        np.testing.assert_allclose(value, expected.detach(), atol=1e-6)
        np.testing.assert_allclose(gradient[0], x.grad, atol=1e-6)

    @variants
    def test_shaped_imitation_by_hand(self):
        # pi = gamma: half the advantage, gradient A / 4; pi = 3 gamma: 3/4 and 3/16
        logp = jnp.log(jnp.array([[0.1, 0.3]]))

        def f(x):
            return losses.shaped_imitation(x, jnp.array([2.0]), 0.1).sum()

        value, gradient = self.variant(jax.value_and_grad(f))(logp)
        np.testing.assert_allclose(value, -2.5, atol=1e-6)
        np.testing.assert_allclose(gradient, [[-0.5, -0.375]], atol=1e-6)


class AggregateTest(chex.TestCase):
    @variants
    @parameterized.parameters(
        # Completions of 3 and 1 tokens: (2 + 10) / 2; 16 / 2; 16 / (2 * 8). The second group is empty, the third has
        # one member of 2 tokens, as a prompt without gold has one less: 5; 10 / 2; 10 / (1 * 8).
        ("sequence_mean", [6.0, 0.0, 5.0]),
        ("token_mean", [8.0, 0.0, 5.0]),
        ("constant_length", [1.0, 0.0, 1.25]),
    )
    def test_by_hand(self, how, expected):
        per_token = jnp.array([[[1.0, 2, 3], [10, 20, 30]], [[5, 5, 5], [5, 5, 5]], [[5, 5, 5], [5, 5, 5]]])
        mask = jnp.array([[[1, 1, 1], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]]])
        f = functools.partial(losses.aggregate, how=how, tokens=mask.sum() / 3, max_length=8)
        got = self.variant(f)(per_token, mask)
        np.testing.assert_allclose(got, expected)
        # The batch's mean of 'token_mean' is the mean over its tokens: 26 / 6, not a mean of the groups' means.
        if how == "token_mean":
            np.testing.assert_allclose(got.mean(), 26 / 6, rtol=1e-6)

    def test_unknown_aggregation_is_named(self):
        with pytest.raises(ConfigError, match="'mean'"):
            losses.aggregate(jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1)), "mean", tokens=1.0, max_length=1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=3, max_size=3))
def test_masked_equals_subset(rows):
    # What stands where the mask is 0 does not matter, be it padding or not a number.
    mask = np.array(rows)
    x = log_probs(0, 3, 6)
    dirty = jnp.array(np.where(mask, x, np.nan))
    subsets = [row[keep] for row, keep in zip(x, mask, strict=True)]
    means = [row.mean() if len(row) else 0 for row in subsets]
    every = np.concatenate(subsets)
    np.testing.assert_allclose(losses.cross_entropy(dirty, mask), -np.array(means), rtol=1e-5)
    expected = {
        "sequence_mean": np.mean([row.mean() for row in subsets if len(row)]) if len(every) else 0,
        "token_mean": every.mean() if len(every) else 0,
        "constant_length": every.sum() / (10 * max(1, sum(len(row) > 0 for row in subsets))),
    }
    for how, value in expected.items():
        got = losses.aggregate(dirty, mask, how, tokens=mask.sum(), max_length=10)
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=48, max_size=48), st.sampled_from([1, 2, 4]))
def test_a_batch_in_parts_is_the_whole_batch(bits, parts):
    # Four prompts of two completions of six tokens. A token mean of each part would weigh a short part's tokens up.
    mask = np.array(bits).reshape(4, 2, 6)
    x = log_probs(0, 4, 2, 6)
    for how in ("sequence_mean", "token_mean", "constant_length"):
        f = functools.partial(losses.aggregate, how=how, tokens=mask.sum() / 4, max_length=10)
        pieces = zip(np.split(x, parts), np.split(mask, parts), strict=True)
        np.testing.assert_allclose(np.mean([f(a, b).mean() for a, b in pieces]), f(x, mask).mean(), rtol=1e-5)
    if mask.any():
        np.testing.assert_allclose(f(x, mask, how="token_mean").mean(), x[mask].mean(), rtol=1e-5)


@pytest.mark.parametrize("how", ["sequence_mean", "token_mean", "constant_length"])
@pytest.mark.parametrize(
    ("mask", "advantage"), [(0, 1.0), (0, -1.0), (1, 0.0)], ids=["no token", "no token", "no variance"]
)
def test_degenerate_groups_have_finite_gradients(how, mask, advantage):
    # Padding may differ by any amount between the policies: a ratio of exp(1e4) is infinite, and 0 * inf not a number.
    logp = jnp.array([[[-1.0, -1e4, 0.0]] * 2])
    other = jnp.array([[[-1.0, 0.0, -1e4]] * 2])
    masks = jnp.array([[[mask, 0, 0]] * 2])

    def loss(x):
        per_token = losses.grpo(x, other, jnp.full((1, 2), advantage), 0.2, 0.2) + 0.04 * losses.k3(x, other)
        grouped = losses.aggregate(per_token, masks, how, tokens=masks.sum(), max_length=3)
        return grouped.sum() + losses.cross_entropy(x, masks).sum() * 0

    value, gradient = jax.jit(jax.value_and_grad(loss))(logp)
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(logp))


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.soft_label_kl(jnp.ones((2, 3)), jnp.ones((3,))),
        lambda: losses.cross_entropy(jnp.ones((2, 3)), jnp.ones((2, 1))),
        lambda: losses.dpo(jnp.ones(2), jnp.ones((2, 1)), jnp.ones(2), jnp.ones(2), 0.1),
        lambda: losses.grpo(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), 0.2, 0.2),
        lambda: losses.k3(jnp.ones((2, 3)), jnp.ones(3)),
        lambda: losses.aggregate(
            jnp.ones((2, 3, 4)), jnp.ones((2, 3)), "constant_length", tokens=jnp.ones(2), max_length=4
        ),
        lambda: losses.reverse_soft_label_kl(jnp.ones((2, 3)), jnp.ones((3,)), 0.01),
        lambda: losses.token_log_probs(
            jnp.ones((2, 3, 4)), jnp.ones((5, 4)), jnp.ones((2, 2), int), temperature=1.0, chunk=2
        ),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(AssertionError):
        call()


B, G, T, D, V = 2, 3, 7, 8, 50


def scored(temperature, chunk, dtype=jnp.float32):
    """token_log_probs as a function of the arrays that may carry a gradient."""
    targets = np.random.default_rng(9).integers(0, V, (B, G, T))
    return targets, lambda hidden, head: losses.token_log_probs(
        hidden.astype(dtype), head.astype(dtype), jnp.array(targets), temperature=temperature, chunk=chunk
    )


def in_torch(hidden, head, targets, temperature, weights):
    """The plain way in float64: log-probabilities, entropies and the gradients of the weighted log-probabilities."""
    hidden, head = (torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (hidden, head))
    log_pi = torch.log_softmax(hidden @ head.T / temperature, -1)
    logp = log_pi.gather(-1, torch.tensor(targets)[..., None])[..., 0]
    (logp * torch.tensor(weights)).sum().backward()
    return [x.detach().numpy() for x in (logp, -(log_pi.exp() * log_pi).sum(-1), hidden.grad, head.grad)]


def compiled_gradient(argnums, shape, d, v, chunk):
    """The compiled gradient of summed log-probabilities by the hidden states (0), the head (1) or both."""

    def loss(hidden, head):
        return losses.token_log_probs(hidden, head, jnp.zeros(shape, int), temperature=1.0, chunk=chunk)[0].sum()

    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, d), (v, d))]
    return jax.jit(jax.grad(loss, argnums)).lower(*arrays).compile()


class TokenLogProbsTest(chex.TestCase):
    @variants
    @parameterized.parameters((1, 0.7), (3, 1.0), (4, 0.7), (7, 1.0), (100, 0.7))  # of 7 time steps
    def test_value_and_gradients_are_the_plain_ones(self, chunk, temperature):
        hidden, head, weights = normal(0, B, G, T, D), normal(1, V, D), normal(2, B, G, T)
        targets, f = scored(temperature, chunk)

        def loss(hidden, head):
            logp, entropy = f(hidden, head)
            return (logp * weights).sum() + entropy.sum(), (logp, entropy)  # the entropy must not add a gradient

        (_, out), gradients = self.variant(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
        expected = in_torch(hidden, head, targets, temperature, weights)
        for got, want in zip((*out, *gradients), expected, strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(self.variant(f)(hidden, head), out, atol=1e-6)  # without a gradient, too

    def test_any_axes_may_lead(self):
        hidden, head = normal(0, B, G, T, D), normal(1, V, D)
        targets, f = scored(1.0, 3)
        flat = losses.token_log_probs(
            jnp.array(hidden[0, 0]), jnp.array(head), jnp.array(targets[0, 0]), temperature=1.0, chunk=3
        )
        np.testing.assert_allclose(flat, [x[0, 0] for x in jax.jit(f)(hidden, head)], atol=1e-6)

    def test_entropy_of_a_uniform_policy_is_log_v(self):
        _, f = scored(1.0, 3)
        logp, entropy = jax.jit(f)(jnp.zeros((B, G, T, D)), jnp.array(normal(1, V, D)))
        np.testing.assert_allclose(entropy, np.full((B, G, T), math.log(V)), atol=1e-5)
        np.testing.assert_allclose(logp, np.full((B, G, T), -math.log(V)), atol=1e-5)

    def test_bfloat16_normalises_in_float32(self):
        # Inputs rounded beforehand, products are exact: what is left to bfloat16 is the gradient's rounding alone.
        def rounded(x):
            return jnp.array(x).astype(jnp.bfloat16).astype(jnp.float32)

        hidden, head = rounded(normal(0, B, G, T, D)), rounded(normal(1, V, D))
        targets, f = scored(1.0, 3, jnp.bfloat16)
        expected = in_torch(hidden, head, targets, 1.0, np.ones((B, G, T)))
        logp, entropy = jax.jit(f)(hidden, head)
        assert logp.dtype == entropy.dtype == jnp.float32
        np.testing.assert_allclose(logp, expected[0], atol=1e-5)  # logits in bfloat16 would be off by 1e-2
        np.testing.assert_allclose(entropy, expected[1], atol=1e-5)
        gradients = jax.jit(jax.grad(lambda *x: f(*x)[0].sum(), argnums=(0, 1)))(hidden, head)
        for got, want in zip(gradients, expected[2:], strict=True):
            np.testing.assert_allclose(got, want, atol=2**-7 * np.abs(want).max())

    def test_bfloat16_keeps_the_gradient_of_a_likely_token(self):
        # pi = 1 / (1 + e^-7) = .99909: in bfloat16 it rounds to 1, so e_y - pi must be formed in float32.
        head, target = jnp.eye(2, dtype=jnp.bfloat16), jnp.zeros((1,), int)

        def logp(hidden):
            return losses.token_log_probs(hidden, head, target, temperature=1.0, chunk=1)[0].sum()

        gradient = jax.jit(jax.grad(logp))(jnp.array([[7, 0]], jnp.bfloat16))
        np.testing.assert_allclose(np.asarray(gradient, np.float32), [[9.11e-4, -9.11e-4]], rtol=1e-2)

    def test_memory_is_a_slice_and_a_frozen_head_has_no_gradient(self):
        b, g, t, d, v, chunk = 2, 4, 64, 128, 8192, 2
        frozen, trained = (
            compiled_gradient(argnums, (b, g, t), d, v, chunk).memory_analysis().temp_size_in_bytes
            for argnums in (0, (0, 1))
        )
        hidden, slice_, head, everything = (4 * n for n in (b * g * t * d, b * g * chunk * v, d * v, b * g * t * v))
        # Logits and probabilities of a slice; the hidden states in slices and their gradient.
        assert frozen < 3 * slice_ + 3 * hidden < min(head, everything / 6)
        assert trained < 3 * slice_ + 3 * hidden + 2 * head

    def test_scoring_with_gradient_costs_two_products_with_a_frozen_head(self):
        # The logits, and e_y - pi with the head. Recomputing the slices in the backward pass would make it three.
        b, g, t, d, v = 2, 2, 4, 64, 4096
        flops = compiled_gradient(0, (b, g, t), d, v, chunk=t).cost_analysis()["flops"]
        assert 2 <= flops / (2 * b * g * t * d * v) < 2.5

    def test_prompts_stay_on_their_devices(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharded = NamedSharding(mesh, PartitionSpec("data"))
        hidden, head = normal(0, 8, G, T, D), normal(1, D, V).T
        targets = np.random.default_rng(2).integers(0, V, (8, G, T))
        step = jax.jit(
            jax.value_and_grad(
                lambda h, w, y: losses.token_log_probs(h, w, y, temperature=1.0, chunk=3)[0].sum(axis=(1, 2)).mean()
            )
        )
        args = (jax.device_put(hidden, sharded), jnp.array(head), jax.device_put(targets, sharded))
        for got, want in zip(step(*args), step(hidden, head, targets), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
        text = step.lower(*args).compile().as_text()
        assert "all-gather" not in text
        assert "all-to-all" not in text
