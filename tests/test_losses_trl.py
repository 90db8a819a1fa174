"""DPO and GRPO losses against TRL's trainers: their `_compute_loss`, called on log-probabilities instead of a model.

TRL is no dependency of the tests, for it brings a training stack with it: `pip install trl==1.16.0` runs this file.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ambijax import losses

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl", minversion="1.16", reason="TRL is not installed")

PROMPTS, GROUP, TOKENS, LONGEST = 2, 3, 9, 12
LENGTHS = np.array([[9], [1], [4], [2], [7], [9]])
SAME = types.SimpleNamespace(
    num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, gather_for_metrics=lambda x: x
)


def likely(seed: int, *shape: int) -> np.ndarray:
    """Log-probabilities of tokens, in float32."""
    return np.log(np.random.default_rng(seed).uniform(0.2, 1, shape)).astype(np.float32)


def trl_grpo(kind: str, logp: torch.Tensor, inputs: dict, *, beta: float, parts: int = 1) -> torch.Tensor:
    """GRPOTrainer._compute_loss, in training, of one of `parts` accumulation steps."""
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=kind,
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=parts,
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=parts),
        model=types.SimpleNamespace(training=True),
        accelerator=SAME,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


def grpo_inputs(rows: slice, old: np.ndarray, ref: np.ndarray, advantages: np.ndarray, mask: np.ndarray) -> dict:
    n = len(mask[rows])
    return {
        "prompt_ids": torch.zeros(n, 1, dtype=torch.long),
        "prompt_mask": torch.ones(n, 1, dtype=torch.long),
        "completion_ids": torch.zeros(n, TOKENS, dtype=torch.long),
        "completion_mask": torch.tensor(mask[rows]).long(),
        "advantages": torch.tensor(advantages[rows]),
        "old_per_token_logps": torch.tensor(old[rows]),
        "ref_per_token_logps": torch.tensor(ref[rows]),
        "num_items_in_batch": torch.tensor(mask.sum()),  # of the whole batch
    }


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("how", "kind"), [("sequence_mean", "grpo"), ("token_mean", "dapo"), ("constant_length", "dr_grpo")]
)
def test_grpo(how, kind, beta, jit):
    n = PROMPTS * GROUP
    logp, old, ref = (likely(seed, n, TOKENS) for seed in range(3))
    advantages = np.random.default_rng(3).normal(size=n).astype(np.float32)
    mask = np.arange(TOKENS) < LENGTHS

    x = torch.tensor(logp, requires_grad=True)
    expected = trl_grpo(kind, x, grpo_inputs(slice(None), old, ref, advantages, mask), beta=beta)
    expected.backward()

    def loss(logp):
        per_token = losses.grpo(logp, grouped(old), grouped(advantages), 0.2, 0.28)
        per_token += beta * losses.k3(logp, grouped(ref))
        each = losses.aggregate(per_token, grouped(mask), how, tokens=mask.sum() / PROMPTS, max_length=LONGEST)
        return each.mean()

    f = jax.value_and_grad(loss)
    value, gradient = (jax.jit(f) if jit else f)(grouped(logp))
    assert expected.item() != 0
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.reshape(n, TOKENS), x.grad, rtol=1e-5, atol=1e-7)


def grouped(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x).reshape(PROMPTS, GROUP, *x.shape[1:])


@pytest.mark.parametrize(
    ("how", "kind"), [("sequence_mean", "grpo"), ("token_mean", "dapo"), ("constant_length", "dr_grpo")]
)
def test_parts_of_a_batch_add_up_as_trls_do(how, kind):
    # Two accumulation steps of one prompt each. A mean of the parts' token means would differ from DAPO's.
    n = PROMPTS * GROUP
    logp, old, ref = (likely(seed, n, TOKENS) for seed in range(3))
    advantages = np.random.default_rng(3).normal(size=n).astype(np.float32)
    mask = np.arange(TOKENS) < LENGTHS
    parts = [slice(0, GROUP), slice(GROUP, n)]
    expected = sum(
        trl_grpo(kind, torch.tensor(logp[p]), grpo_inputs(p, old, ref, advantages, mask), beta=0.0, parts=2).item()
        for p in parts
    )
    got = np.mean(
        [
            losses.aggregate(
                losses.grpo(jnp.array(logp[p]), jnp.array(old[p]), jnp.array(advantages[p]), 0.2, 0.28),
                jnp.array(mask[p]),
                how,
                tokens=mask.sum() / PROMPTS,
                max_length=LONGEST,
            )
            for p in parts
        ]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("jit", [True, False])
def test_dpo(jit):
    pairs, length = 4, 7
    logp, ref = likely(0, 2 * pairs, length), likely(1, 2 * pairs, length)
    mask = np.arange(length) < np.array([7, 3, 5, 1, 2, 7, 7, 4])[:, None]
    logp, ref = logp * mask, ref * mask

    x = torch.tensor(logp, requires_grad=True)
    zero, where = torch.zeros_like(x), torch.tensor(mask)
    outputs = types.SimpleNamespace(log_probs=x, entropy=zero, mean_logits=zero, is_top1=where)
    trainer = types.SimpleNamespace(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=0.1,
        use_weighting=False,
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(**vars(SAME), device="cpu"),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    ref_won, ref_lost = torch.tensor(ref.sum(-1)).chunk(2)
    with_first = np.concatenate([np.zeros((2 * pairs, 1), bool), mask], axis=1)  # TRL drops the first position
    inputs = {
        "input_ids": torch.zeros(2 * pairs, length + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * pairs, length + 1, dtype=torch.long),
        "completion_mask": torch.tensor(with_first).long(),
        "ref_chosen_logps": ref_won,
        "ref_rejected_logps": ref_lost,
    }
    expected = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    expected.backward()

    def loss(logp):
        won, lost = jnp.split(logp.sum(-1), 2)
        return losses.dpo(won, lost, *jnp.split(jnp.array(ref).sum(-1), 2), 0.1).mean()

    f = jax.value_and_grad(loss)
    value, gradient = (jax.jit(f) if jit else f)(jnp.array(logp))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, x.grad, rtol=1e-5, atol=1e-7)
