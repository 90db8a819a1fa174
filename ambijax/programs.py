"""The programs that a run compiles, with the shapes and shardings of their arguments and no array behind them.

What is planned is what runs: each program is traced through the functions that training and evaluation call.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from ambijax import activations, assemble, features, optim, policy, prompt, sharding, update
from ambijax.activations import Activations, Known
from ambijax.agent import Setting
from ambijax.algorithms import ALGORITHMS
from ambijax.model import qwen2_audio
from ambijax.model.config import Qwen2AudioConfig
from ambijax.structs import Batch, Completions, Group, Preferences, Prompt, TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled step of a run."""

    name: str  # encode | roll-out | old policy | reference | update | evaluation
    function: Callable
    arguments: tuple  # pytrees of ShapeDtypeStruct
    trips: int  # most iterations of a loop whose end depends on the data: tokens of a stage of a roll-out
    prompts: int  # B
    completions: int  # G to each
    beside: dict  # what else lies in memory meanwhile: name -> pytree of ShapeDtypeStruct


@functools.lru_cache(maxsize=4)
def variables(setting: Setting) -> dict:
    """{'params', 'lora'} as a run reads them: base weights in model.dtype or int8, adapters in float32, in shards."""
    shapes = dict(qwen2_audio.shapes(setting.model))
    dtype = setting.model.dtype
    stored = lambda x: jax.ShapeDtypeStruct(x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)  # noqa: E731
    shapes["params"] = jax.tree.map(stored, shapes["params"])
    return _in_shards(shapes, setting.mesh)


@functools.lru_cache(maxsize=4)
def state(setting: Setting) -> tuple[TrainState, dict, object]:
    """The training state, what is frozen, and the optimizer."""
    both = variables(setting)
    labels = optim.labels(both, setting.config.optim.train)
    trained, frozen = optim.split(both, labels)
    optimizer = update.make_optimizer(setting.config, labels)
    fresh = jax.eval_shape(functools.partial(update.fresh, setting.config, optimizer), trained)
    return _in_shards(fresh, setting.mesh), frozen, optimizer


def setting(config: FrozenConfigDict, shape: Qwen2AudioConfig, devices: list | None) -> Setting:
    """A run's setting without a tokenizer: token ids are constants of a program and change none of its figures."""
    mesh = assemble.mesh(config, shape, devices)
    words = tuple((i,) for i in range(len(config.data.labels)))
    rows = np.zeros(shape.text.vocab_size, bool)
    labels = tuple(config.data.labels)
    ids = prompt.Vocabulary(None, 0, 1, shape.audio_token, 3, 4, 5, labels, words, (6,), (7, 8, 9), rows)
    return Setting(model=assemble.model(config, shape), vocabulary=ids, mesh=mesh, config=config)


def programs(setting: Setting, window: int, text: int) -> Iterator[Program]:
    """Every step kind of the configured run, but scoring gold alone, which takes less than those.

    Args:
      setting: from `setting` above.
      window: mel frames of the clips.
      text: prompt tokens beside the audio, of a clip that fills the window: as wide as a batch can become.
    """
    c = setting.config
    rows = functools.partial(_rows, setting.mesh)
    whole, frozen, _ = state(setting)
    both = optim.merge(whole.trained, frozen)  # as they lie in memory: what is trained in float32
    beside = {"optimizer": whole.optimizer}
    shapes = functools.partial(_prompt, setting, rows, window, text)
    part = c.data.batch_size // c.optim.accumulate  # a batch is collected in parts, one after another
    asked = shapes(part)
    key = _everywhere(jax.eval_shape(lambda: jax.random.key(0)), setting.mesh)

    yield _encode(setting, rows, both, window, beside)
    with jax.set_mesh(setting.mesh):
        tokens = max(policy.loops(setting.model, c.data.max_tokens))  # they differ by one token at most
    how = {"dpo": "dpo", "grpo": "grpo", "grpoz": "grpo"}.get(c.algorithm)
    if how:
        samples, temperature = c[how].samples, c[how].temperature
        keeps = how == "grpo" and c.grpo.keep_activations
        yield Program(
            "roll-out",
            jax.jit(lambda v, p, k: setting.rollout(v, p, k, samples, temperature, keeps)),
            (both, asked, key),
            tokens,
            part,
            samples,
            beside,
        )
    collected = _collected(setting, rows, asked)
    if getattr(collected, "logp_old", None) is not None:
        members = collected.logp_old.shape[1]
        yield Program(
            "old policy",
            jax.jit(lambda v, p, g: setting.score(v, p, g, {})),
            (both, asked, _completions(setting, rows, part, members)),
            1,
            part,
            members,
            beside,
        )
    if c.algorithm == "dpo" or (how == "grpo" and c.grpo.beta_kl > 0):
        members = collected.logp_ref.shape[1]
        yield Program(
            "reference",
            jax.jit(lambda v, p, g: setting.score(v, p, g, {})),
            ({"params": both["params"]}, asked, _completions(setting, rows, part, members)),
            1,
            part,
            members,
            {"adapters": both["lora"], "batch": getattr(collected, "known", None), **beside},
        )
    yield update_program(setting, (whole, frozen, (collected,) * c.optim.accumulate, key))
    size = sharding.round_up(c.eval.batch_size, setting.mesh)
    yield Program(
        "evaluation",
        jax.jit(lambda v, p, k: setting.rollout(v, p, k, 1, 0.0)),
        (both, shapes(size), key),
        tokens,
        size,
        1,
        beside,
    )


def update_program(setting: Setting, arguments: tuple) -> Program:
    """The optimisation step on (state, frozen, parts, key)."""
    whole, _, optimizer = state(setting)
    part = arguments[2][0]
    b, g, _ = (part.gold if isinstance(part, Batch) else part.completions).tokens.shape
    step = update.make_update(setting, ALGORITHMS[setting.config.algorithm].loss, optimizer, whole)
    return Program("update", step, arguments, 1, b * len(arguments[2]), g, {})


def cache(setting: Setting, program: Program) -> int:
    """Bytes a device of the keys and values of a roll-out: prompts once, completions for themselves."""
    text, mesh = setting.model.config.text, setting.mesh
    asked = next(a for a in program.arguments if isinstance(a, Prompt))
    tokens = program.prompts * (asked.tokens.shape[1] + program.completions * setting.config.data.max_tokens)
    float_size = setting.model.dtype.itemsize
    a_head = text.head_dim + float_size if setting.model.cache == "int8" else text.head_dim * float_size
    return tokens * 2 * text.num_hidden_layers * text.num_key_value_heads * a_head // mesh.size


def bytes_a_device(tree: object) -> int:
    """Bytes of a pytree of ShapeDtypeStruct on one device of its mesh."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _encode(setting: Setting, rows: Callable, both: dict, window: int, beside: dict) -> Program:
    size = sharding.round_up(features.CLIPS, setting.mesh)
    bins = setting.model.config.audio.num_mel_bins
    mel, frames = rows((size, window, bins), jnp.float32), rows((size,), jnp.int32)
    encode = jax.jit(lambda v, m, f: setting.model.apply(v, m, f, method="encode"))
    return Program("encode", encode, ({"params": both["params"]}, mel, frames), 1, size, 0, beside)


def _prompt(setting: Setting, rows: Callable, window: int, text: int, size: int) -> Prompt:
    p = window // 4 + text
    if assemble.trains_tower(setting):
        bins = setting.model.config.audio.num_mel_bins
        heard = {"mel": rows((size, window, bins), jnp.float32), "frames": rows((size,), jnp.int32)}
    else:
        heard = {"audio": rows((size, window // 4, setting.model.config.text.hidden_size), setting.model.dtype)}
    return Prompt(rows((size, p), jnp.int32), rows((size, p), bool), rows((size,), jnp.int32), **heard)


def _collected(setting: Setting, rows: Callable, asked: Prompt) -> Batch | Preferences | Group:
    """What the update of the configured algorithm gets."""
    c = setting.config
    b, t, k = asked.tokens.shape[0], c.data.max_tokens, len(c.data.labels)

    given = functools.partial(_completions, setting, rows, b)
    target = rows((b, k), jnp.float32)
    if c.algorithm == "sft":
        return Batch(asked, given(1), rows((b, 1, t), bool), target)
    if c.algorithm == "dpo":
        r = c.dpo.samples if c.dpo.negatives == "all" else 1
        logp = rows((b, 1 + r, t), jnp.float32)
        return Preferences(asked, given(1 + r), rows((b, 1, t), bool), rows((b, r), bool), logp, target)
    g = c.grpo.samples + (c.algorithm == "grpoz")
    return Group(
        prompt=asked,
        completions=given(g),
        loss_mask=rows((b, g, t), bool),
        tokens=rows((b,), jnp.float32),
        ce_mask=rows((b, 1, t), bool),
        advantages=rows((b, g), jnp.float32),
        logp_drawn=rows((b, c.grpo.samples, t), jnp.float32),
        target=target,
        logp_old=rows((b, g, t), jnp.float32) if c.grpo.updates > 1 else None,
        logp_ref=rows((b, c.grpo.samples, t), jnp.float32) if c.grpo.beta_kl > 0 else None,
        known=_known(setting, asked) if c.grpo.keep_activations else None,
    )


def _known(setting: Setting, asked: Prompt) -> Known:
    """What the roll-out keeps of its prompts and completions."""
    c, text = setting.config, setting.model.config.text
    b, p = asked.tokens.shape
    heads, kv_heads = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    features = (heads, kv_heads, kv_heads, text.hidden_size, *[text.intermediate_size] * 2, text.hidden_size)

    def made(*shape: int) -> Activations:
        where = [NamedSharding(setting.mesh, spec) for spec in activations.partitions(len(shape) + 1)]
        each = zip(features, where, strict=True)
        return Activations(*(jax.ShapeDtypeStruct((*shape, f), setting.model.dtype, sharding=s) for f, s in each))

    count = text.num_hidden_layers
    return Known(made(b, count - 1, p), made(b, count, c.grpo.samples, c.data.max_tokens))


def _completions(setting: Setting, rows: Callable, b: int, g: int) -> Completions:
    t = setting.config.data.max_tokens
    return Completions(rows((b, g, t), jnp.int32), rows((b, g, t), bool), rows((b, g), jnp.int32))


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.partition("batch")))


def _everywhere(x: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _in_shards(tree: object, mesh: Mesh) -> object:
    where = sharding.shardings(tree, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)
