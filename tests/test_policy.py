"""Sampling, scoring and read-out against each other and against one plain forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ambijax import policy, sampling
from ambijax.model.decoder import Block
from ambijax.model.transposed import transposed_layers
from tests import small

N = 10  # completion length
MANY = 64  # samples: enough for whatever may happen in a roll-out


def _rollout(model, variables, prompt, *, samples, temperature, tokens=small.TOKENS, seed=0):
    return policy.rollout(
        model,
        variables,
        prompt,
        jax.random.key(seed),
        small.ENDS_LINE,
        tokens=tokens,
        samples=samples,
        max_tokens=N,
        temperature=temperature,
    )


def _score(model, variables, prompt, completions, *, chunk=4, temperature=1.0):
    return policy.score(
        model,
        variables,
        prompt,
        completions,
        class_ids=small.TOKENS.classes,
        temperature=temperature,
        chunk=chunk,
        rngs={},
    )


def _plain_logits(model, variables, prompt, row, completion):
    """Logits that predict each completion token, from one unpadded sequence without groups, caches or slices."""
    length = int(prompt.mask[row].sum())
    tokens = np.concatenate([prompt.tokens[row, :length], completion])
    embeddings = np.array(variables["params"]["language_model"]["embed_tokens"]["embedding"])[tokens]
    embeddings[:length][tokens[:length] == small.AUDIO] = prompt.audio[row, : (tokens[:length] == small.AUDIO).sum()]
    positions = np.arange(len(tokens))[None, None]
    block = Block(embeddings[None, None], positions, np.ones_like(positions, bool))
    return np.asarray(_plain(model, variables, block)[length - 1 :], np.float64)


@functools.partial(jax.jit, static_argnames="model")
def _plain(model, variables, block):
    [(hidden, _)] = model.apply(variables, [block], method=lambda m, blocks: m.language_model(blocks))
    return hidden[0, 0] @ model.apply(variables, method="head").T


def test_score_equals_a_plain_forward_pass(model, variables):
    prompt, given = small.prompts(3), small.completions(3, 4, N)
    scores = _score(model, variables, prompt, given)
    for b in range(3):
        for g in range(4):
            length = int(given.mask[b, g].sum())
            completion = given.tokens[b, g, :length]
            logits = _plain_logits(model, variables, prompt, b, completion)
            expected = scipy.special.log_softmax(logits, axis=-1)[np.arange(length), completion]
            np.testing.assert_allclose(scores.logp[b, g, :length], expected, atol=1e-4)
            assert not np.any(scores.logp[b, g, length:])
            after_anchor = logits[given.anchor[b, g] + 1]
            np.testing.assert_allclose(scores.readout[b, g], after_anchor[list(small.TOKENS.classes)], atol=1e-4)


def test_temperature_divides_the_logits(model, variables):
    prompt, given = small.prompts(3), small.completions(3, 4, N)
    scores = _score(model, variables, prompt, given, temperature=2.0)
    length = int(given.mask[0, 0].sum())
    logits = _plain_logits(model, variables, prompt, 0, given.tokens[0, 0, :length])
    expected = scipy.special.log_softmax(logits / 2, axis=-1)[np.arange(length), given.tokens[0, 0, :length]]
    np.testing.assert_allclose(scores.logp[0, 0, :length], expected, atol=1e-4)


def test_chunking_changes_nothing(model, variables):
    prompt, given = small.prompts(3), small.completions(3, 4, N)
    whole, sliced = (_score(model, variables, prompt, given, chunk=c) for c in (N, 4))
    np.testing.assert_allclose(whole.logp, sliced.logp, atol=1e-5)
    np.testing.assert_allclose(whole.entropy, sliced.entropy, atol=1e-5)


def test_sampled_log_probabilities_equal_teacher_forced_ones(model, variables):
    # Otherwise GRPO's ratio would not be one at its first update.
    prompt = small.prompts(3)
    rolled = _rollout(model, variables, prompt, samples=MANY, temperature=1.0)
    scores = _score(model, variables, prompt, rolled.completions)
    assert rolled.completions.mask.sum() > 1000  # the samples are not all empty
    np.testing.assert_allclose(np.where(rolled.completions.mask, rolled.logp, 0), scores.logp, atol=1e-4)


def test_a_cache_that_has_grown_holds_what_was_written(model, variables):
    stages = policy.cache_stages(300)
    assert len(stages) == 4
    endless = dataclasses.replace(small.TOKENS, ends=(-1,))
    prompt = small.prompts(2)
    given = {"tokens": endless, "samples": 3, "max_tokens": sum(stages), "temperature": 1.0}
    rolled = policy.rollout(model, variables, prompt, jax.random.key(0), small.ENDS_LINE, **given)
    assert rolled.completions.mask.sum() == 2 * 3 * 300
    forced = policy.anchored(rolled, endless)
    scores = _score(model, variables, prompt, forced)
    np.testing.assert_allclose(rolled.logp, scores.logp[..., :300], atol=1e-4)
    np.testing.assert_allclose(rolled.readout, scores.readout, atol=1e-4)


def test_stages_are_all_tokens_and_few_programs():
    for n in (8, 31, 32, 63, 64, 127, 128, 255, 256, 300, 513, 16384):
        stages = policy.cache_stages(n)
        assert sum(stages) == n
        assert len(stages) <= 4
        assert len(stages) == 1 or min(stages) >= 32
        assert max(stages) - min(stages) <= 1


def test_a_roll_out_in_bfloat16(variables):
    """The default of every real configuration, also where XLA has no product of bfloat16 outside a fusion: on a CPU."""
    model = small.model(dtype="bfloat16")
    halves = {"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"]), "lora": variables["lora"]}
    rolled = _rollout(model, halves, small.prompts(2), samples=2, temperature=0.0)
    assert np.isfinite(rolled.readout).all()
    # Weights that are trained lie there in float32, and are rounded before the first token.
    again = _rollout(model, variables, small.prompts(2), samples=2, temperature=0.0)
    np.testing.assert_array_equal(again.readout, rolled.readout)
    layers = transposed_layers(variables, model.config.text, model.lora, model.dtype)
    assert {layer.qkv.weight.dtype for layer in layers} == {jnp.dtype("bfloat16")}


def test_greedy_takes_the_most_likely_token(model, variables):
    prompt = small.prompts(3)
    rolled = _rollout(model, variables, prompt, samples=1, temperature=0.0)
    for b in range(3):
        length = int(rolled.completions.mask[b, 0].sum())
        completion = np.asarray(rolled.completions.tokens[b, 0, :length])
        logits = _plain_logits(model, variables, prompt, b, completion)
        np.testing.assert_array_equal(logits[:length].argmax(-1), completion)


def test_a_completion_depends_on_its_seed_example_and_sample_only(model, variables):
    prompt = small.prompts(3)
    every = _rollout(model, variables, prompt, samples=MANY, temperature=1.0)
    two = _rollout(model, variables, jax.tree.map(lambda x: x[1:3], prompt), samples=2, temperature=1.0)
    np.testing.assert_array_equal(every.completions.tokens[1:3, :2], two.completions.tokens)
    np.testing.assert_allclose(every.readout[1:3, :2], two.readout, atol=1e-4)
    # One key for every roll-out would repeat the first completion.
    assert len({tuple(row) for row in np.asarray(every.completions.tokens)[:, :4].reshape(12, N)}) == 12
    other = _rollout(model, variables, prompt, samples=MANY, temperature=1.0, seed=1)
    assert not np.array_equal(other.completions.tokens, every.completions.tokens)


def test_samples_follow_the_distribution(model, variables):
    # Chi-square of the first token of 4,000 samples against the model's own probabilities.
    prompt = small.prompts(1)
    rolled = _rollout(model, variables, prompt, samples=4000, temperature=4.0)
    logits = _plain_logits(model, variables, prompt, 0, np.zeros(0, np.int32))[0] / 4
    expected = scipy.special.softmax(logits) * 4000
    counts = np.bincount(np.asarray(rolled.completions.tokens[0, :, 0]), minlength=small.VOCABULARY)
    common = expected > 5  # chi-square wants no rarer cells; the rest is one cell, where there is a rest
    assert common.sum() > 5
    observed, wanted = counts[common] + 0.0, expected[common]
    if not common.all():
        observed, wanted = np.append(observed, counts[~common].sum()), np.append(wanted, expected[~common].sum())
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("vocabulary", [5, 256, 700])  # less than a block, a block, the last block not full
def test_a_draw_inverts_the_cumulative_distribution(vocabulary):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, vocabulary)).astype(np.float32)
    p = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    block, within = np.divmod(np.array([rng.choice(vocabulary, p=row) for row in p]), 256)
    masses = np.add.reduceat(p, np.arange(0, vocabulary, 256), axis=-1)
    # The middle of what each drawn token owns of the unit square must lead back to it.
    first = np.cumsum(masses, axis=-1)[np.arange(50), block] - masses[np.arange(50), block] / 2
    share = np.array([row[256 * b : 256 * b + 256] / m[b] for row, m, b in zip(p, masses, block, strict=True)], object)
    second = np.array([np.cumsum(s)[w] - s[w] / 2 for s, w in zip(share, within, strict=True)])
    token, log_sum = sampling.categorical(logits.T, np.stack([first, second], -1).astype(np.float32))
    np.testing.assert_array_equal(token, 256 * block + within)
    np.testing.assert_allclose(log_sum, scipy.special.logsumexp(logits, axis=-1), rtol=1e-5)


def test_a_draw_at_the_edges_takes_no_impossible_word():
    # With uniforms in [0, 1) and 'the first above', zero would take word 0 and rounding the padding after the last.
    logits = np.full((2, 600), -np.inf, np.float32)
    logits[:, 300:500] = np.random.default_rng(0).normal(size=(2, 200))
    u = np.array([[2.0**-24, 2.0**-24], [1.0, 1.0]], np.float32)
    np.testing.assert_array_equal(sampling.categorical(logits.T, u)[0], [300, 499])


def test_a_draw_between_two_words_takes_neither_impossible_neighbour():
    """A parallel scan's sums, here of as many blocks as Qwen2's vocabulary has, move also where nothing is added."""
    rng = np.random.default_rng(0)
    weights = np.exp(3 * rng.normal(size=(610, 4000))).astype(np.float32) * (rng.random((610, 4000)) < 0.3)
    running = np.asarray(jnp.cumsum(weights, axis=0))
    moved = (np.diff(running, axis=0) > 0) & (weights[1:] == 0)
    word, column = np.nonzero(moved)
    assert len(word) > 100
    u = jnp.asarray(running[word + 1, column] / running[-1, column])
    token, _ = sampling._first_reaching(jnp.asarray(weights[:, column]), u)
    assert weights[np.asarray(token), column].min() > 0


def test_mask_ends_with_the_end_token(model, variables):
    rolled = _rollout(model, variables, small.prompts(3), samples=MANY, temperature=1.0)
    tokens, mask = np.asarray(rolled.completions.tokens), np.asarray(rolled.completions.mask)
    assert 0 < rolled.ended.sum() < rolled.ended.size  # both kinds occur
    first = {row[np.isin(row, small.TOKENS.ends)][:1].item() for row in tokens[np.asarray(rolled.ended)]}
    assert first == set(small.TOKENS.ends)  # a pad that was sampled ends as well as the end token
    for row, valid, ended in zip(tokens.reshape(-1, N), mask.reshape(-1, N), np.ravel(rolled.ended), strict=True):
        ends = np.flatnonzero(np.isin(row, small.TOKENS.ends))
        assert ended == (len(ends) > 0)
        length = ends[0] + 1 if ended else N
        np.testing.assert_array_equal(valid, np.arange(N) < length)
        assert np.all(row[length:] == small.TOKENS.pad)


def _likely_anchor(model, variables, prompt):
    """Tokens whose anchor is what the model says greedily after its second token, so that anchors occur."""
    rolled = _rollout(model, variables, prompt, samples=1, temperature=0.0)
    said = tuple(np.asarray(rolled.completions.tokens[0, 0, 2:4]).tolist())
    assert rolled.completions.mask[0, 0, :5].all()  # it goes on after them
    return dataclasses.replace(small.TOKENS, anchor=said), int(rolled.completions.tokens[0, 0, 1])


def test_own_read_out_equals_the_teacher_forced_one(model, variables):
    prompt = small.prompts(3)
    tokens, before = _likely_anchor(model, variables, prompt)
    ends_line = np.arange(small.VOCABULARY) == before
    rolled = policy.rollout(
        model,
        variables,
        prompt,
        jax.random.key(0),
        ends_line,
        tokens=tokens,
        samples=1,
        max_tokens=N,
        temperature=0.0,
    )
    assert not rolled.forced[0, 0]
    assert rolled.completions.anchor[0, 0] == 3
    scores = _score(model, variables, prompt, rolled.completions)
    own = ~np.asarray(rolled.forced)
    np.testing.assert_allclose(rolled.readout[own], scores.readout[own], atol=1e-4)


def test_an_anchor_inside_a_line_is_none(model, variables):
    prompt = small.prompts(3)
    tokens, _ = _likely_anchor(model, variables, prompt)
    rolled = policy.rollout(
        model,
        variables,
        prompt,
        jax.random.key(0),
        np.zeros(small.VOCABULARY, bool),
        tokens=tokens,
        samples=1,
        max_tokens=N,
        temperature=0.0,
    )
    assert rolled.forced[0, 0]


def test_the_first_anchor_that_begins_a_line_counts(model, variables):
    # An anchor of one word that is said often, also at once, where the prompt's line break is before it.
    prompt = small.prompts(3)
    said = np.asarray(_rollout(model, variables, prompt, samples=MANY, temperature=1.0).completions.tokens)
    word = np.bincount(said[..., 0].ravel())[2:].argmax() + 2  # none that ends it
    tokens, ends_line = dataclasses.replace(small.TOKENS, anchor=(int(word),)), np.arange(small.VOCABULARY) % 2 == 1
    rolled = policy.rollout(
        *(model, variables, prompt, jax.random.key(0), ends_line | small.ENDS_LINE),
        **{"tokens": tokens, "samples": MANY, "max_tokens": N, "temperature": 1.0},
    )
    np.testing.assert_array_equal(rolled.completions.tokens, said)
    fresh = np.concatenate([np.ones((3, MANY, 1), bool), (ends_line | small.ENDS_LINE)[said[..., :-1]]], axis=-1)
    anchors = (said == word) & fresh & np.asarray(rolled.completions.mask)
    assert anchors[..., 0].any()
    assert (anchors.sum(-1) > 1).any()
    assert (anchors < (said == word)).any()
    np.testing.assert_array_equal(rolled.completions.anchor, np.where(anchors.any(-1), anchors.argmax(-1), -1))
    own = anchors.any(-1)
    scores = _score(model, variables, prompt, rolled.completions)
    np.testing.assert_allclose(rolled.readout[own], scores.readout[own], atol=1e-4)


def test_an_anchor_in_the_last_slot_is_read_out(model, variables):
    prompt = small.prompts(3)
    tokens, before = _likely_anchor(model, variables, prompt)
    rolled = policy.rollout(
        model,
        variables,
        prompt,
        jax.random.key(0),
        np.arange(small.VOCABULARY) == before,
        tokens=tokens,
        samples=1,
        max_tokens=4,
        temperature=0.0,
    )
    assert not rolled.forced[0, 0]
    logits = _plain_logits(model, variables, prompt, 0, np.asarray(rolled.completions.tokens[0, 0]))
    np.testing.assert_allclose(rolled.readout[0, 0], logits[4, list(tokens.classes)], atol=1e-4)


def test_forced_read_out_follows_the_completion_without_its_end(model, variables):
    prompt = small.prompts(3)
    rolled = _rollout(model, variables, prompt, samples=MANY, temperature=1.0)
    assert rolled.forced[:, :8].all()
    assert rolled.ended[:, :8].any()
    assert not rolled.ended[:, :8].all()
    for b in range(3):
        for g in range(8):
            length = int(rolled.completions.mask[b, g].sum()) - int(rolled.ended[b, g])
            said = np.asarray(rolled.completions.tokens[b, g, :length])
            logits = _plain_logits(model, variables, prompt, b, np.append(said, small.TOKENS.forced))
            np.testing.assert_allclose(rolled.readout[b, g], logits[-1, list(small.TOKENS.classes)], atol=1e-4)


def test_every_layer_drops_other_units(monkeypatch):
    model, draw, drawn = small.model(dropout=0.4), jax.random.bernoulli, []

    def seen(key, p, shape):
        mask = draw(key, p, shape)
        jax.debug.callback(lambda z: drawn.append(np.asarray(z).tobytes()), mask)
        return mask

    monkeypatch.setattr(jax.random, "bernoulli", seen)
    how = {"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {"dropout": jax.random.key(0)}}
    policy.score(model, small.variables(model), small.prompts(2), small.completions(2, 1, N), **how)
    jax.effects_barrier()
    assert len(drawn) == len({*drawn}) == 3 * 7


def test_without_adapters_it_is_the_base_model(model, variables):
    prompt, given = small.prompts(3), small.completions(3, 4, N)
    base = _score(model, {"params": variables["params"]}, prompt, given)
    zero = jax.tree.map(jnp.zeros_like, variables["lora"])
    same = _score(model, {"params": variables["params"], "lora": zero}, prompt, given)
    np.testing.assert_array_equal(base.logp, same.logp)
    assert not np.allclose(base.logp, _score(model, variables, prompt, given).logp, atol=1e-3)


def test_swapped_audio_changes_the_read_out(model, variables):
    prompt, given = small.prompts(3), small.completions(3, 4, N)
    swapped = prompt.replace(audio=prompt.audio[::-1])
    a, b = (_score(model, variables, p, given).readout for p in (prompt, swapped))
    assert np.abs(a - b).max() > 1e-2


def test_each_row_hears_its_own_clip(model, variables):
    # A peer tiles the audio but repeats the masks row by row: with more prompts than one, clips are mispaired.
    prompt, given = small.prompts(3), small.completions(3, 4, N)
    together = _score(model, variables, prompt, given)
    for b in range(3):
        alone = _score(model, variables, *jax.tree.map(lambda x, b=b: x[b : b + 1], (prompt, given)))
        np.testing.assert_allclose(together.logp[b], alone.logp[0], atol=1e-4)
        np.testing.assert_allclose(together.readout[b], alone.readout[0], atol=1e-4)


def _word_log_prob(model, variables, prompt, row, said, word):
    """Summed log-probability of a word after what was said, from plain forward passes."""
    logits = _plain_logits(model, variables, prompt, row, np.append(said, word))
    picked = scipy.special.log_softmax(logits, axis=-1)[len(said) : len(said) + len(word)]
    return picked[np.arange(len(word)), word].sum()


WORDS = ((10,), (11, 20, 21), (11, 22))


def test_split_words_are_scored_whole(model, variables):
    prompt, given = small.prompts(2), small.completions(2, 2, N)
    scores = policy.score(
        model,
        variables,
        prompt,
        given,
        class_ids=small.TOKENS.classes,
        words=WORDS,
        temperature=1.0,
        chunk=4,
        rngs={},
    )
    for b in range(2):
        for g in range(2):
            said = given.tokens[b, g, : given.anchor[b, g] + 1]  # what stands behind the anchor must not be seen
            expected = [_word_log_prob(model, variables, prompt, b, said, word) for word in WORDS]
            np.testing.assert_allclose(scores.readout[b, g], expected, atol=1e-4)


def test_words_of_one_token_read_out_as_class_logits_do(model, variables):
    # And the softmax over class logits is the full-vocabulary softmax renormalised.
    prompt, given = small.prompts(2), small.completions(2, 2, N)
    logits = _score(model, variables, prompt, given).readout
    words = (*((token,) for token in small.TOKENS.classes), (5, 6))  # the last one makes all be scored as words
    whole = policy.score(
        model,
        variables,
        prompt,
        given,
        class_ids=small.TOKENS.classes,
        words=words,
        temperature=1.0,
        chunk=4,
        rngs={},
    )
    np.testing.assert_allclose(jax.nn.softmax(whole.readout[..., :3]), jax.nn.softmax(logits), atol=1e-5)
    said = given.tokens[0, 0, : given.anchor[0, 0] + 1]
    full = scipy.special.softmax(_plain_logits(model, variables, prompt, 0, said)[-1])[list(small.TOKENS.classes)]
    np.testing.assert_allclose(jax.nn.softmax(logits[0, 0]), full / full.sum(), atol=1e-5)


def test_anchored_completions_read_out_as_the_roll_out_did(model, variables):
    # Own anchors and forced ones, ended and cut ones, of unequal lengths: one teacher-forced pass gives the same.
    prompt = small.prompts(3)
    tokens, before = _likely_anchor(model, variables, prompt)
    ends_line = np.arange(small.VOCABULARY) == before
    rolled = policy.rollout(
        model,
        variables,
        prompt,
        jax.random.key(0),
        ends_line,
        tokens=tokens,
        samples=16,
        max_tokens=N,
        temperature=0.5,
    )
    assert 0 < rolled.forced.sum() < rolled.forced.size
    assert len({*np.asarray(rolled.completions.mask.sum(-1)).ravel().tolist()}) > 3
    scores = _score(model, variables, prompt, policy.anchored(rolled, tokens))
    np.testing.assert_allclose(rolled.readout, scores.readout, atol=1e-4)
