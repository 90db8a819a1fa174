"""Every mesh gives what one device gives: losses, gradients and sampled tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ambijax import activations, cost, losses, optim, policy, sampling, sharding
from ambijax.activations import Known
from ambijax.errors import ConfigError
from ambijax.structs import Completions
from tests import small

EVERY_AXIS = (2, 2, 2)
# Every other way to split eight with four key-value heads.
OTHERS = [(1, 2, 4), (8, 1, 1), (1, 8, 1), (4, 1, 2), (4, 2, 1), (2, 4, 1), (1, 4, 2), (2, 1, 4)]
UNEVEN = [(3, 1, 1), (3, 2, 1), (3, 1, 2), (6, 1, 1), (1, 2, 2), (1, 1, 4)]  # of three, four and six devices
B, G, T = 8, 3, 6


def _mesh(shape: tuple[int, int, int]) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def _run(shape: tuple[int, int, int], b: int = B, learns: bool = False) -> dict:
    """Loss, adapter gradients and roll-outs of the small model on one mesh, as numpy; and what it `learns` of these."""
    model = small.model()
    mesh = _mesh(shape)
    variables = small.variables(model)
    variables = jax.device_put(variables, sharding.shardings(variables, mesh))
    with jax.set_mesh(mesh):
        prompt = sharding.place(small.prompts(b), mesh)
        given = sharding.place(small.completions(b, G, T), mesh)

        @jax.jit
        @jax.value_and_grad
        def loss(lora: dict, given: Completions, **known: Known) -> jax.Array:
            both = {"params": variables["params"], "lora": lora}
            how = {"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}}
            scores = policy.score(model, both, prompt, given, **how, **known)
            p = jnp.broadcast_to(jnp.array([0.2, 0.5, 0.3]), scores.readout.shape)
            kl = losses.soft_label_kl(p, scores.readout)
            return (losses.cross_entropy(scores.logp, given.mask) + kl).mean()

        value, gradients = loss(variables["lora"], given)
        rolled = policy.rollout(
            model,
            variables,
            prompt,
            jax.random.key(0),
            small.ENDS_LINE,
            tokens=small.TOKENS,
            samples=G,
            max_tokens=T,
            temperature=1.0,
            keeps=True,
        )
        found = {"loss": value, "gradients": gradients, "tokens": rolled.completions.tokens, "readout": rolled.readout}
        found |= {"known": rolled.known}
        if learns:
            found["update"] = [loss(variables["lora"], rolled.completions, **k) for k in ({}, {"known": rolled.known})]
    for made in rolled.known:  # each device has what it made, and nothing else
        for z, spec in zip(made, activations.partitions(made.q.ndim), strict=True):
            assert z.sharding.is_equivalent_to(NamedSharding(mesh, spec), z.ndim)
    return jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def one_device():
    return _run((1, 1, 1))


@pytest.mark.parametrize("shape", [EVERY_AXIS, *(pytest.param(shape, marks=pytest.mark.slow) for shape in OTHERS)])
def test_meshes_agree_with_one_device(shape, one_device):
    _assert_agree(_run(shape), one_device)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [EVERY_AXIS, (1, 2, 4)])
def test_what_a_roll_out_kept_is_learned_from_where_it_lies(shape):
    plain, known = _run(shape, learns=True)["update"]
    largest = max(np.abs(g).max() for g in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), plain, known)


@pytest.mark.slow
def test_meshes_of_three_four_and_six_devices_agree_with_one_device():
    one = _run((1, 1, 1), b=12)
    for shape in UNEVEN:
        _assert_agree(_run(shape, b=12), one)


def _assert_agree(found: dict, one_device: dict) -> None:
    np.testing.assert_allclose(found["loss"], one_device["loss"], rtol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(one_device["gradients"]))
    for a, b in zip(*map(jax.tree.leaves, (found["gradients"], one_device["gradients"])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)
    np.testing.assert_array_equal(found["tokens"], one_device["tokens"])
    np.testing.assert_allclose(found["readout"], one_device["readout"], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found["known"], one_device["known"])


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 4)])
def test_drawing_a_token_gathers_no_logits(shape):
    # 156,032 words are 610 blocks of 256, which neither four nor eight devices can share.
    mesh, words = _mesh(shape), 156032
    rng = np.random.default_rng(0)
    logits, u = rng.normal(size=(words, 4, 2)).astype(np.float32), rng.uniform(0.01, 1, (4, 2, 2)).astype(np.float32)
    with jax.set_mesh(mesh):
        placed = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
        draw = jax.jit(sampling.categorical).lower(placed, sharding.place(u, mesh)).compile()
        tokens, _ = draw(placed, sharding.place(u, mesh))
    gathered = [c.payload for c in cost.Compiled(draw.as_text()).collectives() if c.kind == "all-gather"]
    assert sum(gathered) < logits.nbytes / 50, "the masses of the blocks, not the words in them"
    np.testing.assert_array_equal(tokens, jax.jit(sampling.categorical)(logits, u)[0])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 2, 4)])
def test_a_words_log_probability_gathers_no_logits(shape):
    # It is taken by its index, also where the vocabulary is in parts.
    mesh = _mesh(shape)
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=size).astype(np.float32) for size in ((8, 3, 4, 32), (1024, 32)))
    targets = rng.integers(0, 1024, (8, 3, 4)).astype(np.int32)
    score = jax.jit(functools.partial(losses.token_log_probs, temperature=1.0, chunk=4))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("tensor"))
        placed = (*sharding.place((hidden,), mesh), jax.device_put(head, split), sharding.place(targets, mesh))
        compiled = score.lower(*placed).compile()
        logp, _ = compiled(*placed)
    moved = [c.payload for c in cost.Compiled(compiled.as_text()).collectives()]
    assert sum(moved) < 4 * targets.size * 1024 / 50, "sums of rows, not the logits in them"
    expected = scipy.special.log_softmax(hidden.astype(np.float64) @ head.T, axis=-1)
    np.testing.assert_allclose(logp, np.take_along_axis(expected, targets[..., None], -1)[..., 0], atol=1e-4)


def test_large_matrices_are_split_over_fsdp_and_tensor():
    variables = small.variables(small.model())
    mesh = _mesh((1, 2, 4))
    for path, array in zip(
        jax.tree.leaves(sharding.paths(variables["params"])),
        jax.tree.leaves(jax.device_put(variables, sharding.shardings(variables, mesh))["params"]),
        strict=True,
    ):
        if "language_model/layers" in path and path.endswith("kernel"):
            assert array.addressable_shards[0].data.size * 8 == array.size, path
        if "lm_head" in path or "embed_tokens" in path:
            assert array.addressable_shards[0].data.size * 8 == array.size, path


def test_adapters_and_their_moments_follow_their_matrix():
    assert sharding.parameter("params/language_model/layers/q_proj/kernel") == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.parameter("lora/language_model/layers/q_proj/a") == PartitionSpec(None, "fsdp", None)
    assert sharding.parameter("optimizer/0/mu/lora/language_model/layers/q_proj/b") == PartitionSpec(
        None, None, "tensor"
    )
    assert sharding.parameter("step") == PartitionSpec()


def test_place_and_fetch_are_inverse():
    mesh = _mesh((4, 2, 1))
    rows = np.arange(16.0).reshape(8, 2)
    placed = sharding.place(rows, mesh)
    assert placed.sharding == NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    np.testing.assert_array_equal(sharding.fetch(placed), rows)


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 2)])
def test_a_micro_batch_has_rows_of_every_device_and_none_moves(shape):
    mesh = _mesh(shape)
    rows = sharding.place(np.arange(8), mesh)
    of_two = jax.jit(lambda parts, i: sharding.micro_batch(jnp.stack(parts), i, 2))
    with jax.set_mesh(mesh):
        split = of_two.lower((rows, rows + 8), 0).compile()
        found = [split((rows, rows + 8), i) for i in range(4)]
    assert cost.Compiled(split.as_text()).collectives() == []
    assert [x.tolist() for x in found] == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert all(x.sharding.is_equivalent_to(NamedSharding(mesh, sharding.partition("batch")), 1) for x in found)


def test_a_micro_batch_leaves_features_where_they_are():
    mesh, spec = _mesh((2, 2, 2)), (None, ("data", "fsdp"), None, "tensor")
    kept = jax.device_put(jnp.zeros((1, 8, 3, 4)), NamedSharding(mesh, PartitionSpec(*spec)))
    with jax.set_mesh(mesh):
        of_two = jax.jit(lambda x, i: sharding.micro_batch(x, i, 2)).lower(kept, 0).compile()
        found = of_two(kept, 1)
    assert cost.Compiled(of_two.as_text()).collectives() == []
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec[1:])), 3)


def test_a_mesh_that_is_not_the_devices_is_refused():
    with pytest.raises(ConfigError, match=r"mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 does not make 8 devices"):
        sharding.make_mesh(3, 1, 1)
    with pytest.raises(ConfigError, match="does not make 8 devices"):
        sharding.make_mesh(4, 1, 1)  # fewer than there are
    with pytest.raises(ConfigError, match="does not make 8 devices"):
        sharding.make_mesh(-1, -1, 1)
    with pytest.raises(ConfigError, match=r"try mesh.data=4 or mesh.fsdp=2 or"):
        sharding.make_mesh(2, 1, 2)
    with pytest.raises(ConfigError, match=r"; try -1 for one of them"):  # and not what was given
        sharding.make_mesh(-1, -1, 8)
    assert dict(sharding.make_mesh(-1, 2, 1).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


def test_what_does_not_divide_names_the_key_and_what_would():
    mesh = _mesh((2, 2, 2))
    sizes = {"heads": 8, "kv_heads": 3, "hidden": 33, "mlp": 64, "vocab": 64, "tower": 15, "tower_mlp": 64}
    found = sharding.check(mesh, batch=6, accumulate=1, micro_batch=0, **sizes)
    assert found[0] == "data.batch_size=6 is not a multiple of mesh.data x mesh.fsdp = 4; try 4 or 8"
    found_in_parts = sharding.check(mesh, batch=8, accumulate=3, micro_batch=0, **sizes)[0]
    assert found_in_parts == (
        "data.batch_size=8 is not a multiple of optim.accumulate x mesh.data x mesh.fsdp = 12; try 12"
    )
    assert "mesh.tensor=2 does not divide the model's 3 key-value heads; try 1" in found
    assert "mesh.fsdp=2 does not divide the model's 33 hidden width; try 1" in found
    assert "mesh.fsdp=2 does not divide the model's 15 audio tower's width; try 1" in found
    assert "mesh.tensor=2 does not divide the model's 15 audio tower's width; try 1" in found
    sizes = {"heads": 8, "kv_heads": 4, "hidden": 32, "mlp": 64, "vocab": 64, "tower": 16, "tower_mlp": 64}
    assert sharding.check(mesh, batch=16, accumulate=2, micro_batch=4, **sizes) == []
    assert sharding.check(mesh, batch=12, accumulate=1, micro_batch=6, **sizes) == [
        "optim.micro_batch=6 is not a multiple of mesh.data x mesh.fsdp = 4; try 4 or 8"
    ]


def test_labels_split_and_merge():
    variables = {"params": {"w": jnp.ones(2)}, "lora": {"a": jnp.zeros(3)}}
    labels = optim.labels(variables, ("lora/.*",))
    assert labels == {"params": {"w": "frozen"}, "lora": {"a": "train"}}
    trained, frozen = optim.split(variables, labels)
    assert trained["params"]["w"] is None
    assert frozen["lora"]["a"] is None
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, optim.merge(trained, frozen), variables))
    with pytest.raises(ConfigError, match="'typo' matches no variable"):
        optim.labels(variables, ("lora/.*", "typo"))
    assert optim.labels(variables, ("lora/.*|params/.*",)) == labels  # or a reference would move without a word
    pair = {"lora": {"q": {"a": jnp.ones(1), "b": jnp.ones(1)}, "v": {"a": jnp.ones(1), "b": jnp.ones(1)}}}
    assert optim.labels(pair, ("lora/v/.*",))["lora"] == {
        "q": {"a": "frozen", "b": "frozen"},
        "v": {"a": "train", "b": "train"},
    }
    for half in ("lora/.*/b", "lora/q/a"):  # no checkpoint would hold the other one
        with pytest.raises(ConfigError, match="one of lora/q/a and lora/q/b; train both or neither"):
            optim.labels(pair, (half,))


def test_the_schedule_begins_at_zero_only_to_warm_up():
    peak = optim.schedule(1.0, 0.25, 8)
    assert [float(peak(step)) for step in (0, 1, 2, 8)] == [0, 0.5, 1, 0]
    assert float(optim.schedule(1.0, 0.03, 10)(1)) == 1  # one step of it at least
    assert float(optim.schedule(1.0, 0.0, 1)(0)) == 1
    assert float(optim.schedule(1.0, 0.0, 0)(0)) == 1  # of a run that evaluates its start
    assert float(optim.schedule(1.0, 0.0, 8)(4)) == pytest.approx(0.5)


def test_the_frozen_part_gets_no_gradient_no_state_and_no_change():
    # optax.masked alone would pass raw gradients through to the frozen leaves.
    variables = {"params": {"w": jnp.ones(2)}, "lora": {"a": jnp.ones(3)}}
    labels = optim.labels(variables, ("lora/.*",))
    trained, frozen = optim.split(variables, labels)
    optimizer = optim.optimizer(
        learning_rate=optim.schedule(0.1, 0.0, 10),
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
        labels=labels,
    )
    state = optimizer.init(trained)
    assert sorted({leaf.size for leaf in jax.tree.leaves(state)}) == [1, 3]  # counters and moments of the adapter
    gradients = jax.grad(lambda t: sum(x.sum() for x in jax.tree.leaves(optim.merge(t, frozen))))(trained)
    assert jax.tree.leaves(gradients)[0].shape == (3,)
    assert len(jax.tree.leaves(gradients)) == 1
    for _ in range(2):
        changes, state = optimizer.update(gradients, state, trained)
    assert np.all(changes["lora"]["a"] < 0)
    assert jax.tree.leaves(changes["params"]) == []


def test_the_optimizer_is_torchs_adamw_behind_a_clip_of_the_gradients():
    torch = pytest.importorskip("torch")
    # Clipped after Adam, whose steps do not depend on a gradient's size, the first gradient would count as the others.
    trained = {"a": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    adamw = {"eps": 1e-3, "weight_decay": 0.1}
    labels = jax.tree.map(lambda _: "train", trained)
    optimizer = optim.optimizer(learning_rate=lambda _: 0.1, b1=0.8, b2=0.9, clip=1.0, labels=labels, **adamw)
    state = optimizer.init(trained)
    theirs = [torch.tensor(np.array(x), requires_grad=True) for x in trained.values()]
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.8, 0.9), **adamw)
    rng = np.random.default_rng(0)
    for size in (100.0, 0.1, 1.0, 0.01):
        gradients = jax.tree.map(lambda x, size=size: size * rng.normal(size=x.shape).astype(np.float32), trained)
        for parameter, gradient in zip(theirs, gradients.values(), strict=True):
            parameter.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        changes, state = optimizer.update(gradients, state, trained)
        trained = jax.tree.map(jnp.add, trained, changes)
        for ours, parameter in zip(trained.values(), theirs, strict=True):
            np.testing.assert_allclose(ours, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_the_schedule_is_linear_then_cosine_to_zero():
    rate = optim.schedule(1e-3, 0.1, 100)
    np.testing.assert_allclose(rate(0), 0.0)
    np.testing.assert_allclose(rate(5), 5e-4, rtol=1e-6)
    np.testing.assert_allclose(rate(10), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(rate(55), 5e-4, rtol=1e-6)  # half way down
    np.testing.assert_allclose(rate(100), 0.0, atol=1e-12)
