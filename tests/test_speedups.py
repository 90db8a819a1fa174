"""What makes a step fast changes nothing: each speed-up against the plain computation it replaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ambijax import losses, policy
from ambijax.model import lora
from ambijax.model.layers import Segment, attention
from ambijax.packing import packing
from tests import small

T = 6


def _loss_and_gradient(model, variables, prompt, completions, **known):
    def loss(lora):
        scores = policy.score(
            *(model, {"params": variables["params"], "lora": lora}, prompt, completions),
            **{"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}} | known,
        )
        kl = losses.soft_label_kl(jnp.full(scores.readout.shape, 1 / 3), scores.readout)
        return jnp.mean(losses.cross_entropy(scores.logp, completions.mask) + kl)

    return jax.jit(jax.value_and_grad(loss))(variables["lora"])


def test_a_group_in_one_row_has_the_loss_and_gradients_of_separate_rows(model, variables):
    # Completions that saw each other, or positions that went on after the first, would give other gradients.
    prompt, group = small.prompts(2), small.completions(2, 3, T)
    loss, gradient = _loss_and_gradient(model, variables, prompt, group)
    copies = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), prompt)  # what everybody else does: K copies of the prompt
    alone = jax.tree.map(lambda x: x.reshape(6, 1, *x.shape[2:]), group)
    plain_loss, plain_gradient = _loss_and_gradient(model, variables, copies, alone)
    np.testing.assert_allclose(loss, plain_loss, atol=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(plain_gradient))
    assert scale > 1e-2  # else the comparison says nothing
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, scale)), gradient, plain_gradient)


def test_a_kept_tower_output_is_that_of_the_live_tower(model, variables):
    # Gradients of the adapters too, for a window wider than the clips: what lies behind a clip must not be heard.
    rng = np.random.default_rng(0)
    prompt, given = small.prompts(2), small.completions(2, 2, T)
    mel, frames = rng.normal(size=(2, 24, 8)).astype(np.float32), np.array([13, 14], np.int32)  # 3 audio tokens each
    live = prompt.replace(audio=None, mel=mel, frames=frames)
    encode = jax.jit(lambda mel, frames: model.apply(variables, mel, frames, method="encode"))
    kept = prompt.replace(audio=np.array(encode(mel[:, :16], frames)))
    (loss, gradient), (kept_loss, kept_gradient) = (
        _loss_and_gradient(model, variables, p, given) for p in (live, kept)
    )
    np.testing.assert_allclose(loss, kept_loss, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, kept_gradient)
    other = _loss_and_gradient(model, variables, prompt, given)[0]
    assert abs(float(loss) - float(other)) > 1e-4  # it does listen


@pytest.mark.parametrize(("group", "packs"), [(3, False), (3, True), pytest.param(5, True, marks=pytest.mark.slow)])
def test_the_last_layer_for_a_prompt_of_which_one_token_goes_on(model, variables, group, packs):
    # Keys and values of the others must be there, and no gradient may be lost.
    prompt, given = small.prompts(4), small.completions(4, group, T)
    prompt = prompt.replace(tokens=np.pad(prompt.tokens, [(0, 0), (5, 9)]), mask=np.pad(prompt.mask, [(0, 0), (5, 9)]))
    given = given.replace(mask=given.mask & (np.arange(T) < 2))
    packed = packing(prompt.mask, given.mask, 1) if packs else None
    if packs:  # five completions have more slots than all tokens together need, so that all stay packed
        assert (packed.slots.size > 4 + given.mask.size) == (group == 3)
    last = prompt.mask.shape[1] - 1 - np.argmax(prompt.mask[:, ::-1], axis=1)

    def forward(lora, narrow):
        def run(m):
            blocks = [m._prompt(prompt.tokens, prompt.mask, prompt.audio)]
            start = prompt.mask.sum(1)[:, None, None]
            blocks.append(m._block(given.tokens, start + np.arange(T) + np.zeros_like(given.tokens), given.mask))
            if narrow:
                return m.language_model(blocks, packing=packed, last=last)
            (hidden, past), own = m.language_model(blocks)
            return [(hidden[np.arange(4), :, last][:, :, None], past), own]

        return model.apply({"params": variables["params"], "lora": lora}, method=run)

    def loss(lora, narrow):
        (prompt_hidden, past), (hidden, own) = forward(lora, narrow)
        hidden = jnp.where(given.mask[..., None], hidden, 0)
        kept = [jnp.where(p.mask[:, None, :, :, None], z, 0) for p in (past, own) for z in (p.k, p.v)]
        out = (prompt_hidden, hidden, kept)
        return sum(jnp.mean(jnp.sin(3 * z)) for z in jax.tree.leaves(out)), out

    results = [jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(variables["lora"], n) for n in (0, 1)]
    (_, gradient), (_, _) = results
    assert all(np.abs(g[-1]).max() > 1e-4 for g in jax.tree.leaves(gradient))  # those of the last layer, too
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_decoding_layer_by_layer_equals_the_scan(model, variables):
    # Through the forced read-out, which runs over everything that decoding left in the caches.
    prompt = small.prompts(2)
    rolled = policy.rollout(
        *(model, variables, prompt, jax.random.key(3), small.ENDS_LINE),
        **{"tokens": small.TOKENS, "samples": 3, "max_tokens": T, "temperature": 1.0},
    )
    assert rolled.forced.any()
    scores = policy.score(
        *(model, variables, prompt, policy.anchored(rolled, small.TOKENS)),
        **{"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}},
    )
    np.testing.assert_allclose(rolled.readout, scores.readout, atol=1e-4)
    tokens = np.asarray(rolled.completions.tokens)
    own = np.asarray(rolled.completions.mask) & ~np.isin(tokens, small.TOKENS.ends)  # the anchor is there
    assert own.sum() > T
    np.testing.assert_allclose(np.where(own, rolled.logp, 0), np.where(own, scores.logp[..., :T], 0), atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program that XLA makes for a CPU")
def test_decoding_reads_the_prompts_keys_by_channel(model, variables):
    # XLA puts them back in order where it can, and every token would pay for that.
    program = policy.rollout.lower(
        *(model, variables, small.prompts(2), jax.random.key(3), small.ENDS_LINE),
        **{"tokens": small.TOKENS, "samples": 3, "max_tokens": T, "temperature": 1.0},
    ).compile()
    products = [line for line in program.as_text().splitlines() if " dot(" in line and "/while/body/" in line]
    to_prompt = [line for line in products if "bkgrtd,bksd->bkgrts" in line]
    assert len(to_prompt) == model.config.text.num_hidden_layers
    assert all("rhs_contracting_dims={2}" in line for line in to_prompt)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program that XLA makes for a CPU")
def test_a_roll_out_does_not_copy_the_head():
    model = small.model(vocabulary=96)  # no other matrix has 96 rows or columns
    program = policy.rollout.lower(
        *(model, small.variables(model), small.prompts(2), jax.random.key(3), np.resize(small.ENDS_LINE, 96)),
        **{"tokens": small.TOKENS, "samples": 3, "max_tokens": 4, "temperature": 1.0},
    ).compile()
    heads = [line for line in program.as_text().splitlines() if "= f32[96,32]" in line or "= f32[32,96]" in line]
    assert any(" parameter(" in line for line in heads)
    assert not [line for line in heads if " copy(" in line or " transpose(" in line or " fusion(" in line]


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 4, 5)])
def test_gradients_of_an_adapters_products(shape):
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(size=s).astype(np.float32) for s in (shape, (5, 9), (5, 2), (2, 9)))
    by_y = rng.normal(size=(*shape[:-1], 9)).astype(np.float32)
    plain, back = jax.vjp(lambda x, w, a, b: x @ w + x @ a @ b, x, w, a, b)
    for ours in (lora.merged, lambda x, w, a, b: x @ w + lora.apart(x, a, b)):
        y, gradients = jax.vjp(ours, x, w, a, b)
        np.testing.assert_allclose(y, plain, atol=1e-5)
        for one, other in zip(gradients(by_y), back(by_y), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_adapters_merge_where_nothing_is_lost(monkeypatch):
    assert lora.merges(jnp.float32)
    assert not lora.merges(jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not lora.merges(jnp.float32)


def test_adapters_beside_their_matrices_are_those_in_them(model, variables, monkeypatch):
    # What other devices and dtypes compute, in training and in a roll-out.
    def run(model):
        rolled = policy.rollout(
            *(model, variables, prompt, jax.random.key(0), small.ENDS_LINE),
            **{"tokens": small.TOKENS, "samples": 3, "max_tokens": T, "temperature": 1.0},
        )
        return rolled, _loss_and_gradient(model, variables, prompt, small.completions(2, 3, T))

    prompt = small.prompts(2)
    merged = run(model)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    apart = run(model.clone(remat="everything_saveable"))  # another model, or jit takes what it has traced
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), apart, merged)
    without = _loss_and_gradient(
        model, variables | {"lora": jax.tree.map(jnp.zeros_like, variables["lora"])}, prompt, small.completions(2, 3, T)
    )
    assert abs(float(without[0] - merged[1][0])) > 1e-3  # the adapters do something


def _plain_attention(q, segments):
    """Every sequence by itself over copied and joined keys; softmax and its gradient are jax's own."""
    g, r = q.shape[1], q.shape[3] // segments[0].k.shape[1]

    def whole(z):
        z = z if z.ndim == 5 else jnp.repeat(z[:, :, None], g, axis=2)
        return jnp.repeat(z, r, axis=1)

    k, v = (jnp.concatenate([whole(getattr(s, name)) for s in segments], axis=3) for name in "kv")
    shape = (q.shape[0], g, q.shape[2])
    mask = jnp.concatenate([jnp.broadcast_to(s.mask, (*shape, s.k.shape[-2])) for s in segments], axis=-1)
    scores = jnp.einsum("bgthd,bhgsd->bhgts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhgts,bhgsd->bgthd", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30)), v)


def test_gradients_of_attention_over_shared_and_own_keys():
    # A sum over only one segment's row, or a mask left out of the weights, changes every gradient.
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, 4, 4, 5)).astype(np.float32)
    shared, own = (rng.normal(size=(2, *s)).astype(np.float32) for s in ((2, 2, 6, 5), (2, 2, 3, 4, 5)))
    seen, causal = rng.random((2, 1, 1, 6)) < 0.7, np.tril(np.ones((4, 4), bool))[None, None]
    by_out = rng.normal(size=q.shape).astype(np.float32)

    def pull(how):
        segments = lambda shared, own: [Segment(*shared, seen), Segment(*own, causal)]  # noqa: E731
        out, back = jax.vjp(lambda q, shared, own: how(q, segments(shared, own)), q, tuple(shared), tuple(own))
        return jax.tree.leaves((out, back(by_out)))

    for ours, plain in zip(pull(attention), pull(_plain_attention), strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("remat", ["products_saveable", "everything_saveable"])
def test_what_a_layer_keeps_changes_no_gradient(model, variables, remat):
    given = (variables, small.prompts(2), small.completions(2, 2, T))
    (loss, gradient), (kept_loss, kept) = (_loss_and_gradient(m, *given) for m in (model, model.clone(remat=remat)))
    np.testing.assert_allclose(loss, kept_loss, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, kept)


@pytest.mark.parametrize(
    ("gold", "layers"), [(1, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 3), (1, 1)])]
)
def test_an_update_from_what_the_roll_out_kept_has_the_loss_and_gradients_of_one_that_computes_all(gold, layers):
    # Another prompt's activations, another layer's or another token's would give other ones.
    model = small.model(layers=layers)
    variables, prompt = small.variables(model), small.prompts(3)
    how = {"tokens": small.TOKENS, "samples": 4, "max_tokens": 10, "temperature": 1.0, "keeps": True}
    rolled = policy.rollout(model, variables, prompt, jax.random.key(0), small.ENDS_LINE, **how)
    given = jax.tree.map(np.asarray, rolled.completions)
    assert len(set(given.mask.sum(axis=-1).ravel())) > 1  # some end early, and are padded
    if gold:
        given = jax.tree.map(lambda *x: np.concatenate(x, axis=1), given, small.completions(3, 1, 10))
    whole = given.replace(anchor=np.full(given.anchor.shape, 2, np.int32))

    plain = _loss_and_gradient(model, variables, prompt, whole)
    known = _loss_and_gradient(model, variables, prompt, whole, known=rolled.known)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), known, plain)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(plain[1]))
    assert scale > 1e-2  # else the comparison says nothing

    other = jax.tree.map(lambda z: np.roll(z, 1, axis=0), rolled.known)  # it is read
    assert abs(float(_loss_and_gradient(model, variables, prompt, whole, known=other)[0] - plain[0])) > 1e-3
