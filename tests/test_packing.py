"""Without padding the numbers are those with it."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ambijax import policy
from ambijax.packing import EIGHTHS, packing
from tests import small

B, G, T = 4, 3, 9


@pytest.fixture(scope="module")
def asked():
    """Prompts padded on either side."""
    prompt = small.prompts(B)
    return prompt.replace(tokens=np.pad(prompt.tokens, [(0, 0), (5, 11)]), mask=np.pad(prompt.mask, [(0, 0), (5, 11)]))


@pytest.fixture(scope="module")
def completions():
    return small.completions(B, G, T)


def _score(model, variables, asked, completions, words=()):
    given = {"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}, "words": words}
    return policy.score(model, variables, asked, completions, **given)


def _with_gradient(model, variables, asked, completions):
    def loss(lora):
        scores = _score(model, {"params": variables["params"], "lora": lora}, asked, completions)
        return (scores.logp.mean(-1) ** 2).mean() + (scores.readout**2).mean(), scores

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["lora"])


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_scores_and_gradients_are_those_with_padding(model, variables, asked, completions, parts):
    packed = completions.replace(packing=packing(asked.mask, completions.mask, parts))
    assert packed.packing.slots.size < 0.8 * packed.packing.tokens.size
    (_, plain), by_plain = _with_gradient(model, variables, asked, completions)
    (_, scores), by_packed = _with_gradient(model, variables, asked, packed)
    for name in ("logp", "entropy", "readout"):
        np.testing.assert_allclose(getattr(scores, name), getattr(plain, name), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), by_packed, by_plain)


def test_words_of_several_tokens_are_read_after_packed_ones(model, variables, asked, completions):
    words = ((10, 20), (11,), (12, 21))
    packed = completions.replace(packing=packing(asked.mask, completions.mask, 1))
    plain = _score(model, variables, asked, completions, words).readout
    np.testing.assert_allclose(_score(model, variables, asked, packed, words).readout, plain, atol=1e-5)


@pytest.mark.parametrize("field", ["slots", "tokens"])
def test_a_token_in_a_wrong_slot_changes_the_scores(model, variables, asked, completions, field):
    right = packing(asked.mask, completions.mask, 1)
    wrong = getattr(right, field).copy()
    wrong[0, [7, 8]] = wrong[0, [8, 7]]
    packed = completions.replace(packing=right.replace(**{field: wrong}))
    plain = _score(model, variables, asked, completions)
    assert np.abs(_score(model, variables, asked, packed).logp - plain.logp).max() > 1e-3


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.lists(st.booleans(), min_size=6 * 20, max_size=6 * 20))
def test_every_token_has_one_place(parts, exists):
    exists = np.array(exists).reshape(6, 20) & (np.arange(6)[:, None] % 2 > 0)
    found = packing(exists[:, :8], exists[:, 8:].reshape(6, 3, 4), parts)
    if found is None:
        assert exists.reshape(parts, -1).sum(axis=1).max() * 8 > max(EIGHTHS) * 120 // parts
        return
    marks = np.where(exists, np.arange(1, 121).reshape(6, 20), 0)[..., None]
    dense = found.pack(marks)
    assert dense.shape == (parts, found.slots.shape[1], 1)
    assert found.slots.shape[1] in [-(-120 // parts * n // 8) for n in EIGHTHS]
    np.testing.assert_array_equal(np.sort(dense[dense > 0]), marks[marks > 0])
    np.testing.assert_array_equal(found.unpack(dense, 6), marks)
