"""Our side of benchmarks/compare.py: the package's own functions, with its own configs, on given weights."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from ambijax import agent, algorithms, audio, compilation, convert, data, features, policy, sharding, update
from ambijax.model import config as model_config
from ambijax.model import layers, qwen2_audio, transposed
from ambijax.structs import Batch, Completions, Preferences, Prompt
from benchmarks import shapes
from benchmarks.shapes import VOCABULARY, Shape
from configs import base, dpo, grpoz, sft

Step = Callable[[], object]  # one step, done when it returns; a dict it returns are the seconds of its parts

programs = compilation.Programs()
programs.__enter__()
compilation.give_back()  # as every command does, which here keeps no program


@dataclasses.dataclass(frozen=True, eq=False)
class Timed(agent.Setting):
    """A setting that measures how long its roll-outs and scores take."""

    parts: dict = dataclasses.field(default_factory=dict)

    def rollout(self, *args, **kwargs) -> object:
        with clock(self.parts, "rollout"):
            return jax.block_until_ready(super().rollout(*args, **kwargs))

    def score(self, *args, **kwargs) -> object:
        with clock(self.parts, "score"):
            return jax.block_until_ready(super().score(*args, **kwargs))


@contextlib.contextmanager
def clock(parts: dict, name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    parts[name] = parts.get(name, 0.0) + time.perf_counter() - began


class Side:
    """The model with fresh adapters, and the inputs of every row."""

    def __init__(self, shape: Shape, directory: Path) -> None:
        self.shape = shape
        lora = model_config.LoraConfig(shape.rank, shape.alpha, 0.0, audio_tower=False)
        self.remat = base.get_config("cremad").model.remat
        self.model = qwen2_audio.Qwen2Audio(
            model_config.load(directory),
            lora,
            jnp.dtype(shape.dtype),
            shape.remat or self.remat,
            decoding=shape.decoding,
        )
        self.mesh = sharding.make_mesh(1, 1, 1)
        jax.set_mesh(self.mesh)
        params = convert.load(directory, self.model, dtype=self.model.dtype)
        adapters = jax.jit(lambda key: qwen2_audio.init(self.model, key)["lora"])(jax.random.key(0))
        self.variables = {"params": params, "lora": adapters}
        self.windows = tuple(base.get_config("cremad").data.windows)

    def setting(self, module: object, *, pack: bool = False) -> Timed:
        """The settings of configs/`module`, for this shape."""
        c = module.get_config("tiny")
        c.data.pack = pack
        c.model.dtype = self.shape.dtype
        c.lora.dropout = 0.0
        c.loss.chunk = self.shape.chunk
        c.data.max_tokens = self.shape.new_tokens
        if "grpo" in c:
            c.grpo.samples = self.shape.samples
            c.grpo.keep_activations = self.shape.keep_activations
            c.optim.micro_batch = self.shape.together % self.shape.clips  # 0 is all
        return Timed(self.model, VOCABULARY, self.mesh, FrozenConfigDict(c))

    def mels(self, count: int) -> list[data.Sound]:
        """Log-mel of each clip in the smallest declared window that holds it."""
        clips = shapes.clips(self.shape, count)
        frames = [audio.mel_frames(len(clip)) for clip in clips]
        return [
            data.Sound(n, audio.log_mel(clip, audio.window(n, self.windows), audio.N_MELS))
            for n, clip in zip(frames, clips, strict=True)
        ]

    def prompt(self, count: int, *, live: bool = False) -> Prompt:
        """On the host; with the tower's output as it is kept while the tower is frozen, or as log-mel (`live`)."""
        asked = list(shapes.prompts(self.shape, count).astype(np.int32))
        sounds = self.mels(count) if live else self._heard(shapes.clips(self.shape, count))
        return self._prompt(asked, sounds, live=live)

    def _heard(self, clips: list[np.ndarray]) -> list[data.Sound]:
        read = (features.Clip(audio.mel_frames(len(c)), functools.partial(np.asarray, c)) for c in clips)
        found = dict(features.encode(self.model, self.variables, self.mesh, read, self.windows))
        return [found[i] for i in range(len(clips))]

    def _prompt(self, asked: list[np.ndarray], sounds: list[data.Sound], *, live: bool = False) -> Prompt:
        return data.prompts(
            asked,
            sounds,
            range(len(asked)),
            windows=self.windows,
            slots=data.prompt_slots([len(ids) for ids in asked], [s.frames for s in sounds], self.windows),
            pad=VOCABULARY.endoftext,
            live_tower=live,
        )

    def completions(self, per_prompt: int, length: int) -> Completions:
        tokens = shapes.completions(self.shape, self.shape.clips, per_prompt, length).astype(np.int32)
        anchor = np.full(tokens.shape[:2], tokens.shape[2] - 3, np.int32)
        return Completions(tokens, np.ones(tokens.shape, bool), anchor)

    def batch(self, length: int, *, live: bool = False) -> Batch:
        gold = self.completions(1, length)
        target = np.full((self.shape.clips, len(VOCABULARY.labels)), 1 / len(VOCABULARY.labels), np.float32)
        return Batch(self.prompt(self.shape.clips, live=live), gold, gold.mask.copy(), target)

    def mixed(self) -> Batch:
        """Examples of unequal length, padded to the declared lengths."""
        examples = shapes.mixed(self.shape)
        clips = [shapes.clips(one, 1)[0] for one in examples]
        golds = [shapes.completions(one, 1, 1, one.completion)[0, 0].astype(np.int32) for one in examples]
        gold = data.completions([(g, len(g) - 3) for g in golds], self.shape.completion, VOCABULARY.endoftext)
        target = np.full((len(golds), len(VOCABULARY.labels)), 1 / len(VOCABULARY.labels), np.float32)
        asked = [shapes.prompts(one, 1)[0].astype(np.int32) for one in examples]
        return Batch(self._prompt(asked, self._heard(clips)), gold, gold.mask.copy(), target)

    def updating(self, setting: Timed, loss: Callable) -> Callable[[tuple, jax.Array], None]:
        """(parts, key) -> one update of the adapters, done when it returns."""
        state, frozen, optimizer = update.start(setting.config, self.variables)
        plain = agent.Setting(setting.model, setting.vocabulary, setting.mesh, setting.config)
        updated = update.make_update(plain, loss, optimizer, state)

        def step(parts: tuple, key: jax.Array) -> None:
            nonlocal state
            state, aux = updated(state, frozen, parts, key)
            jax.block_until_ready((state, aux))

        return step


def matrix(side: Side) -> Step:
    n = shapes.matrix_size(jax.default_backend() == "cpu")
    x = jax.random.normal(jax.random.key(0), (n, n), side.model.dtype)  # ones would be faster: fewer bits change
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready([product(x, x) for _ in range(shapes.SQUARES)])


def products(side: Side) -> Step:
    """Every product of `shapes.products` once, each counted as often as a step has it."""
    kinds = list(shapes.products(side.shape).items())
    draw = lambda *size: jax.random.normal(jax.random.key(0), size, side.model.dtype)  # noqa: E731
    operands = [(draw(rows, inputs), draw(inputs, outputs)) for (rows, inputs, outputs), _ in kinds]
    product = jax.jit(jnp.matmul)

    def step() -> dict[str, float]:
        total = 0.0
        for (_, count), (x, w) in zip(kinds, operands, strict=True):
            began = time.perf_counter()
            product(x, w).block_until_ready()
            total += count * (time.perf_counter() - began)
        return {"total": total}

    return step


def attention(side: Side) -> Step:
    """What completions attend to: forward of all samples at once, then of a gradient's prompts, gold too, and back.

    One layer, counted as often as a step has it.
    """
    s = side.shape
    draw = lambda *size: jax.random.normal(jax.random.key(0), (*size, s.hidden // s.heads), side.model.dtype)  # noqa: E731
    causal, all_of_it = np.tril(np.ones((s.new_tokens, s.new_tokens), bool)), np.ones(s.prompt, bool)

    def operands(prompts: int, completions: int) -> tuple[jax.Array, ...]:
        shared, own = (prompts, s.heads, s.prompt), (prompts, s.heads, completions, s.new_tokens)
        return draw(prompts, completions, s.new_tokens, s.heads), *(draw(*size) for size in (shared, shared, own, own))

    def attend(q: jax.Array, k_prompt: jax.Array, v_prompt: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        prompt = layers.Segment(k_prompt, v_prompt, all_of_it[None, None, None])
        return layers.attention(q, [prompt, layers.Segment(k, v, causal[None, None], causal=True)])

    score, update = jax.jit(attend), jax.jit(jax.grad(lambda *given: attend(*given).sum(), argnums=range(5)))
    samples, groups = operands(s.clips, s.samples), operands(s.together, s.samples + 1)

    def step() -> dict[str, float]:
        parts = {}
        with clock(parts, "score"):
            jax.block_until_ready(score(*samples))
        with clock(parts, "update"):
            jax.block_until_ready(update(*groups))
        taken = {"score": s.layers * parts["score"], "update": s.layers * s.clips // s.together * parts["update"]}
        return {"total": sum(taken.values()), **taken}

    return step


def token(side: Side) -> Step:
    """Every frozen matrix times a token of all samples, each of what the one before made, as often as a roll-out."""
    sizes, columns = shapes.token(side.shape)
    draw = jax.jit(lambda key, size: jax.random.normal(key, size, side.model.dtype) / size[1] ** 0.5, static_argnums=1)
    weights = [draw(jax.random.key(i), size) for i, size in enumerate(sizes)]
    x = draw(jax.random.key(0), (side.shape.hidden, columns))
    meet = lambda x, w: transposed.product(w, x[: w.shape[1]], x.dtype)  # noqa: E731
    through = jax.jit(lambda x, weights: functools.reduce(meet, weights, x))

    def step() -> dict[str, float]:
        began = time.perf_counter()
        through(x, weights).block_until_ready()
        return {"total": side.shape.new_tokens * (time.perf_counter() - began)}

    return step


def read(side: Side) -> Step:
    x = jnp.ones(shapes.read_size(jax.default_backend() == "cpu"), jnp.float32)
    total = jax.jit(lambda x: x.sum(axis=1))
    return lambda: total(x).block_until_ready()


def logits(side: Side) -> Step:
    """From log-mel to all logits of a completion's tokens, computed in float32 whatever dtype the weights have."""
    model, prompt = side.model.clone(dtype=jnp.float32), side.prompt(1, live=True)
    tokens = shapes.completions(side.shape, 1, 1, shapes.LOGITS).astype(np.int32)

    @jax.jit
    @jax.default_matmul_precision("highest")
    def compute(variables: dict, prompt: Prompt) -> jax.Array:
        sound = model.apply(variables, prompt.mel, prompt.frames, method="encode")
        given = (prompt.tokens, prompt.mask, sound, tokens, np.ones(tokens.shape, bool), None)
        _, (hidden, _) = model.apply(variables, *given, method="prefill_and_extend")
        return hidden[:, 0] @ model.apply(variables, method="head").T.astype(jnp.float32)

    def step() -> None:
        step.output = sharding.fetch(compute(side.variables, sharding.place(prompt, side.mesh)))

    return step


def features_row(side: Side) -> Step:
    return lambda: side.mels(side.shape.feature_clips)


def tower(side: Side) -> Step:
    placed = sharding.place(side.prompt(side.shape.clips, live=True), side.mesh)
    encode = jax.jit(lambda variables, mel, frames: side.model.apply(variables, mel, frames, method="encode"))
    return lambda: encode(side.variables, placed.mel, placed.frames).block_until_ready()


def readout(side: Side) -> Step:
    """From log-mel to distributions of fresh clips: what prediction without a chain of thought computes."""
    n = side.shape.readout_clips
    prompt = side.prompt(n, live=True)
    tokens = np.broadcast_to(np.array(VOCABULARY.anchor, np.int32), (n, 1, len(VOCABULARY.anchor)))
    anchor = Completions(tokens, np.ones(tokens.shape, bool), np.full((n, 1), tokens.shape[-1] - 1, np.int32))
    setting = side.setting(sft)

    def step() -> dict[str, float]:
        placed = sharding.place((prompt, anchor), side.mesh)
        step.output = sharding.fetch(setting.score(side.variables, *placed, {}).readout)[:, 0]

    return step


def sft_row(side: Side, *, live: bool = False) -> Step:
    setting = side.setting(sft)
    batch = side.batch(side.shape.completion, live=live)
    one = side.updating(setting, algorithms.sft_loss)
    return lambda: one((sharding.place(batch, side.mesh),), jax.random.key(0))


def mixed_row(side: Side, *, packed: bool = True) -> Step:
    """An SFT step on examples of unequal length, several to a row."""
    setting = side.setting(sft, pack=packed)
    batch = side.mixed()
    one = side.updating(setting, algorithms.sft_loss)

    def step() -> None:
        collected, _, _ = algorithms.collect(setting, side.variables, batch, jax.random.key(0))
        one(collected, jax.random.key(0))

    return step


def dpo_row(side: Side) -> Step:
    """Pairs are given: reference log-probabilities, then the update."""
    setting = side.setting(dpo)
    b = side.shape.clips
    batch, pair = side.batch(side.shape.completion), side.completions(2, side.shape.completion)
    one = side.updating(setting, algorithms.dpo_loss)

    def step() -> dict[str, float]:
        prompt, completions, ce_mask, target = sharding.place(
            (batch.prompt, pair, batch.ce_mask, batch.target), side.mesh
        )
        reference = setting.score({"params": side.variables["params"]}, prompt, completions, {})
        pairs = sharding.place(np.ones((b, 1), bool), side.mesh)
        one((Preferences(prompt, completions, ce_mask, pairs, reference.logp, target),), jax.random.key(0))

    return step


def _prefill(side: Side) -> Callable[[dict, Prompt], object]:
    read = jax.jit(lambda variables, prompt: policy.prefill(side.model, variables, prompt, {}))
    return lambda variables, prompt: jax.block_until_ready(read(variables, prompt))


def rollout(side: Side) -> Step:
    setting = side.setting(grpoz)
    placed = sharding.place(side.prompt(side.shape.clips), side.mesh)
    prefill, keys = _prefill(side), iter(jax.random.split(jax.random.key(0), 1000))

    def step() -> dict[str, float]:
        setting.parts.clear()
        setting.rollout(side.variables, placed, next(keys), side.shape.samples, 1.0)
        whole = setting.parts["rollout"]
        with clock(setting.parts, "prefill"):
            prefill(side.variables, placed)
        return {"total": whole, "prefill": setting.parts["prefill"], "decode": whole - setting.parts["prefill"]}

    return step


def grpoz_row(side: Side) -> Step:
    """`collect` and `loss` of the algorithm as the training loop calls them."""
    setting = side.setting(grpoz)
    batch = side.batch(side.shape.new_tokens)
    one = side.updating(setting, algorithms.group_loss)
    prefill, keys = _prefill(side), iter(jax.random.split(jax.random.key(0), 1000))
    placed = sharding.place(batch.prompt, side.mesh)

    def step() -> dict[str, float]:
        parts, key = setting.parts, next(keys)
        parts.clear()
        with clock(parts, "total"):
            collected, _, _ = algorithms.collect(setting, side.variables, batch, key)
            with clock(parts, "update"):
                one(collected, key)
        with clock(parts, "prefill"):
            prefill(side.variables, placed)
        total, score, updating = parts["total"], parts.get("score", 0.0), parts["update"]
        return {
            "total": total,
            "prefill": parts["prefill"],
            "decode": parts["rollout"] - parts["prefill"],
            "score": score,
            "update": updating,
            "host": total - parts["rollout"] - score - updating,
        }

    return step


ROWS = {
    "matrix": matrix,
    "products": products,
    "attention": attention,
    "token": token,
    "read": read,
    "logits": logits,
    "features": features_row,
    "tower": tower,
    "readout": readout,
    "sft": sft_row,
    "sft_live": lambda side: sft_row(side, live=True),
    "sft_mixed": mixed_row,
    "sft_mixed_padded": lambda side: mixed_row(side, packed=False),
    "dpo": dpo_row,
    "rollout": rollout,
    "grpoz": grpoz_row,
}


def forget_peak() -> None:
    """JAX cannot: its peak is that of the process."""


def peak_device_bytes() -> int | None:
    statistics = jax.local_devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else None


def compiles() -> dict[str, float]:
    return {"compiles": programs.compiled, "compile_seconds": programs.seconds}
