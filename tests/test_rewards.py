"""Rewards and group advantages against closed forms, and what happens where a group says nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ambijax import rewards
from ambijax.errors import ConfigError

PAPER = {"scale": "std", "ddof": 1, "eps": 1e-4, "min_std": 0.0, "gold_adv_clip": math.inf}
EXACT = PAPER | {"eps": 0.0}  # the closed forms hold without eps

groups = st.integers(2, 9).flatmap(
    lambda k: st.lists(st.lists(st.floats(0, 2), min_size=k, max_size=k), min_size=1, max_size=4).map(np.array)
)


def test_reward_by_hand():
    # JS .25 bits and the format kept: 2 (1 - .25) + .5 = 2; broken format: 1.5; the worst read-out: .5
    got = rewards.reward(np.array([0.25, 0.25, 1]), np.array([1, 0, 1]), w_js=2, w_fmt=0.5)
    np.testing.assert_array_equal(got, [2, 1.5, 0.5])


def test_gold_reward_is_the_most_a_trajectory_can_earn_or_what_it_earns():
    js, present = np.array([0.25, 0.5, np.nan]), np.array([True, True, False])
    maximal = rewards.gold_reward("maximal", js, present, w_js=2, w_fmt=0.5)
    np.testing.assert_array_equal(maximal, [2.5, 2.5, np.nan])
    measured = rewards.gold_reward("measured", js, present, w_js=2, w_fmt=0.5)
    np.testing.assert_array_equal(measured, [2, 1.5, np.nan])


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_grpoz_closed_form(k):
    # K equal rewards r and gold r + d: mean r + d/(K+1), squares K d^2/(K+1)^2 + K^2 d^2/(K+1)^2 = K d^2/(K+1),
    # std (ddof 1) d/sqrt(K+1). With ddof 0 gold would be sqrt(K), over K members alone it would be infinite.
    gold = rewards.group_advantages(np.full((1, k), 0.7), np.array([2.0]), **EXACT)
    np.testing.assert_allclose(gold[0], [-1 / math.sqrt(k + 1)] * k + [k / math.sqrt(k + 1)], rtol=1e-12)
    ddof0 = rewards.group_advantages(np.full((1, k), 0.7), np.array([2.0]), **EXACT | {"ddof": 0})
    np.testing.assert_allclose(ddof0[0], [-1 / math.sqrt(k)] * k + [math.sqrt(k)], rtol=1e-12)


def test_grpo_by_hand():
    # Mean 2, squares 1 + 0 + 1, std 1 (ddof 1): -1, 0, 1. eps .5 divides by 1.5, without scale the distance stays.
    r = np.array([[1.0, 2.0, 3.0], [10.0, 12.0, 14.0]])
    np.testing.assert_allclose(rewards.group_advantages(r, **EXACT), [[-1, 0, 1]] * 2)
    half = rewards.group_advantages(r, **EXACT | {"eps": 0.5})
    np.testing.assert_allclose(half, [[-2 / 3, 0, 2 / 3], [-0.8, 0, 0.8]])
    unscaled = rewards.group_advantages(r, **PAPER | {"scale": "none"})
    np.testing.assert_array_equal(unscaled, [[-1, 0, 1], [-2, 0, 2]])
    # At least 4: the first group's std 1 and the second's 2 both count as 4.
    floored = rewards.group_advantages(r, **EXACT | {"min_std": 4.0})
    np.testing.assert_allclose(floored, [[-0.25, 0, 0.25], [-0.5, 0, 0.5]])


def test_gold_advantage_is_clipped_alone():
    r, gold = np.zeros((1, 8)), np.array([1.0])
    free = rewards.group_advantages(r, gold, **EXACT)
    clipped = rewards.group_advantages(r, gold, **EXACT | {"gold_adv_clip": 1.5})
    assert free[0, -1] == pytest.approx(8 / 3)
    assert clipped[0, -1] == 1.5
    np.testing.assert_array_equal(clipped[0, :-1], free[0, :-1])
    # A roll-out as good as gold keeps its advantage; without gold the last roll-out is nobody special.
    r = np.array([[0.0] * 8 + [1.0]])
    beside = rewards.group_advantages(r, gold, **EXACT | {"gold_adv_clip": 1.5})
    assert beside[0, -2] > beside[0, -1] == 1.5
    assert rewards.group_advantages(r, **EXACT | {"gold_adv_clip": 1.5})[0, -1] == pytest.approx(8 / 3)


@settings(deadline=None)
@given(groups)
def test_advantages_are_trls(r):
    # trl 1.16, GRPOTrainer._generate_and_score_completions, scale_rewards="group" and "none"
    t = torch.tensor(r, dtype=torch.float64)
    centred = t - t.mean(dim=1, keepdim=True)
    expected = centred / (t.std(dim=1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(rewards.group_advantages(r, **PAPER), expected, atol=1e-9)
    np.testing.assert_allclose(rewards.group_advantages(r, **PAPER | {"scale": "none"}), centred, atol=1e-12)


@settings(deadline=None)
@given(groups)
def test_gold_is_a_member_like_any_other(r):
    appended = rewards.group_advantages(np.concatenate([r, np.full((len(r), 1), 2.0)], axis=1), **PAPER)
    gold = rewards.group_advantages(r, np.full(len(r), 2.0), **PAPER)
    assert gold.shape == (len(r), r.shape[1] + 1)
    np.testing.assert_array_equal(gold, appended)
    np.testing.assert_allclose(gold.sum(axis=1), 0, atol=1e-7)
    assert np.all(gold[:, -1] >= gold.max(axis=1) - 1e-9)


@settings(deadline=None)
@given(groups)
def test_an_absent_gold_changes_nothing(r):
    got = rewards.group_advantages(r, np.full(len(r), np.nan), **PAPER)
    np.testing.assert_allclose(got[:, :-1], rewards.group_advantages(r, **PAPER), atol=1e-9)
    np.testing.assert_array_equal(got[:, -1], 0)


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_without_variance_is_finite_and_zero(eps, scale, ddof):
    options = PAPER | {"eps": eps, "scale": scale, "ddof": ddof}
    for r in (np.full((2, 4), 1.5), np.full((2, 1), 1.5)):
        np.testing.assert_array_equal(rewards.group_advantages(r, **options), np.zeros_like(r))
    # All earn the maximum already, gold included; and a prompt of whose group nothing is left.
    np.testing.assert_array_equal(rewards.group_advantages(np.full((1, 4), 2.0), np.array([2.0]), **options), [[0] * 5])
    np.testing.assert_array_equal(rewards.group_advantages(np.full((1, 4), np.nan), **options), [[0] * 4])


def test_equal_rewards_have_no_advantage_also_where_their_mean_is_rounded():
    for reward, k in ((0.1, 3), (0.1, 6), (1.9, 7)):
        found = rewards.group_advantages(np.full((1, k), reward), None, **EXACT)
        np.testing.assert_array_equal(found, np.zeros((1, k)))
        found = rewards.group_advantages(np.full((1, k), reward), np.array([np.nan]), **EXACT)  # a prompt without gold
        np.testing.assert_array_equal(found, np.zeros((1, k + 1)))


def test_group_std_by_hand():
    r = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [0.0, 2.0, np.nan]])
    np.testing.assert_allclose(rewards.group_std(r, 1), [1, 0, math.sqrt(2)])
    np.testing.assert_allclose(rewards.group_std(r, 0), [math.sqrt(2 / 3), 0, 1])


def test_unknown_options_are_named():
    with pytest.raises(ConfigError, match="'group'"):
        rewards.group_advantages(np.zeros((1, 2)), **PAPER | {"scale": "group"})
    with pytest.raises(ConfigError, match="'max'"):
        rewards.gold_reward("max", np.zeros(1), np.ones(1, bool), w_js=1, w_fmt=1)
