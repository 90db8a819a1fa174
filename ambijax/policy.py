"""The model as a policy: log-probabilities of given completions, and sampling new ones, as pure jitted functions.

    B prompts   G completions of one prompt   P prompt tokens   T completion tokens   K classes   V vocabulary

A prompt is computed once, however many completions share it: in sampling, in scoring and in the update. A token's
log-probability comes from the hidden state before it, so the first one comes from the prompt's last token.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ambijax import losses, readout, sampling
from ambijax.activations import Known, split
from ambijax.model.cache import Past
from ambijax.model.decoder import decoding_kernel
from ambijax.model.qwen2_audio import Qwen2Audio
from ambijax.model.transposed import TransposedLayer, product, transposed_layers
from ambijax.structs import Completions, Prompt, Rollout, Scores


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The few token ids a policy must know; hashable, so that it can be a static argument."""

    ends: tuple[int, ...]  # each ends a completion, as in the model's generation_config.json
    pad: int  # stands after the end; may be one of them
    classes: tuple[int, ...]  # K class words
    anchor: tuple[int, ...]  # 'Final emotion:' as sampled at the start of a line
    forced: tuple[int, ...]  # the same with its line break, appended to a completion that never got there
    newline: int  # a token that ends a line


class Prefix(NamedTuple):
    """B prompts as the model has read them."""

    last: jax.Array  # [B, D] hidden state of each prompt's last token
    past: Past
    length: jax.Array  # [B] prompt tokens without padding


def prefill(model: Qwen2Audio, variables: dict, prompt: Prompt, rngs: dict, *, keeps: bool = False) -> Prefix:
    """Computes each prompt once: from its mel frames, or from the tower's output where that is given."""
    audio = _heard(model, variables, prompt, rngs)
    read = model.apply(variables, prompt.tokens, prompt.mask, audio, keeps, method="prefill", rngs=rngs)
    return Prefix(*read, prompt.mask.sum(axis=1))


def _heard(model: Qwen2Audio, variables: dict, prompt: Prompt, rngs: dict) -> jax.Array:
    if prompt.audio is not None:
        return prompt.audio
    return model.apply(variables, prompt.mel, prompt.frames, method="encode", rngs=rngs)


@functools.partial(jax.jit, static_argnames=("model", "class_ids", "words", "temperature", "chunk"))
def score(
    model: Qwen2Audio,
    variables: dict,
    prompt: Prompt,
    completions: Completions,
    *,
    class_ids: tuple[int, ...],
    temperature: float,
    chunk: int,
    rngs: dict,
    words: tuple[tuple[int, ...], ...] = (),
    known: Known | None = None,
) -> Scores:
    """Log-probabilities, entropies and class read-out of given completions (teacher forcing).

    Args:
      model: the model.
      variables: {'params', 'lora'} for the policy, {'params'} for the reference.
      prompt: B prompts.
      completions: G to each prompt, and how they and the prompts are packed.
      class_ids: token ids of the K class words.
      temperature: divides the logits of the log-probabilities (not of the read-out).
      chunk: completion positions per slice of vocabulary logits; bounds memory at B x G x chunk x V.
      rngs: {'dropout': key} while training with adapter dropout, else {}.
      words: token ids of K class words of several tokens. Given, the read-out is each whole word's log-probability
        after the anchor, instead of one logit.
      known: what a roll-out by the same policy kept of the prompts and of the first completions of each; they are
        differentiated and not computed. Nothing is packed then.
    """
    b, g, t = completions.tokens.shape
    asked = (prompt.tokens, prompt.mask, _heard(model, variables, prompt, rngs))
    given = (completions.tokens, completions.mask, completions.packing, known)
    read, (hidden, own) = model.apply(variables, *asked, *given, method="prefill_and_extend", rngs=rngs)
    prefix = Prefix(*read, prompt.mask.sum(axis=1))
    first = jnp.broadcast_to(prefix.last[:, None, None], (b, g, 1, prefix.last.shape[-1]))
    before = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)
    head = model.apply(variables, method="head")
    logp, entropy = losses.token_log_probs(before, head, completions.tokens, temperature=temperature, chunk=chunk)
    at_anchor = jnp.take_along_axis(hidden, jnp.maximum(completions.anchor, 0)[..., None, None], axis=2)[:, :, 0]
    if words:
        length = completions.anchor + 1
        own = own.replace(mask=own.mask & (jnp.arange(t) < length[..., None]))
        forward = functools.partial(model.apply, variables, past=(prefix.past, own), method="extend", rngs=rngs)
        class_logits = readout.word_log_probs(at_anchor, head, words, forward, prefix.length[:, None] + length)
    else:
        class_logits = readout.logits(at_anchor, head, jnp.array(class_ids))
    return Scores(
        logp=jnp.where(completions.mask, logp, 0.0),
        entropy=jnp.where(completions.mask, entropy, 0.0),
        readout=class_logits,
    )


@functools.partial(jax.jit, static_argnames="tokens")
def anchored(rolled: Rollout, tokens: Tokens) -> Completions:
    """A roll-out's completions with the anchor appended to those that never wrote it, as the forced read-out has it."""
    n, forced = rolled.completions.tokens.shape[-1], jnp.array(tokens.forced)
    length = (rolled.completions.mask.sum(axis=-1) - rolled.ended)[..., None]  # without the end token
    steps = jnp.arange(n + len(forced))
    wider = [(0, 0), (0, 0), (0, len(forced))]
    appended = rolled.forced[..., None] & (steps >= length)
    return Completions(
        tokens=jnp.where(
            appended,
            forced[jnp.clip(steps - length, 0, len(forced) - 1)],
            jnp.pad(rolled.completions.tokens, wider, constant_values=tokens.pad),
        ),
        mask=jnp.where(rolled.forced[..., None], steps < length + len(forced), jnp.pad(rolled.completions.mask, wider)),
        anchor=jnp.where(rolled.forced, length[..., 0] + len(forced) - 1, rolled.completions.anchor),
    )


class _Decoding(NamedTuple):
    """The state of sampling after t tokens."""

    t: jax.Array
    hidden: jax.Array  # [B, G, D] predicts token t
    own: Past  # of each completion's tokens; slots < t are written
    recent: jax.Array  # [B, G, 1 + anchor length] the last tokens, to spot the anchor
    anchor: jax.Array  # [B, G] position of the anchor's last token, -1 before
    done: jax.Array  # [B, G]
    tokens: jax.Array  # [B, G, N]
    logp: jax.Array  # [B, G, N]
    readout: jax.Array  # [B, G, K]


class _Writer(NamedTuple):
    """What does not change while completions are written: the policy and what it read, B prompts of G samples."""

    model: Qwen2Audio
    variables: dict
    layers: tuple[TransposedLayer, ...]
    prefix: Prefix
    head: jax.Array  # [V, D]
    tokens: Tokens
    ends_line: jax.Array  # bool [V]
    turn: tuple[jax.Array, jax.Array]  # rope's angles of every completion token, [B, 1, N, 1, D / 2] each

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, G, D] -> float32 [V, B, G]."""
        # The barrier keeps XLA from swapping the product's operands back.
        return jax.lax.optimization_barrier(product(self.head, jnp.moveaxis(hidden, -1, 0), jnp.float32))

    def decode(self, token: jax.Array, t: jax.Array, own: Past) -> tuple[jax.Array, Past]:
        """Token t [B, G] to the hidden state [B, G, D] that predicts the next, and `own` with it."""
        turn = tuple(jax.lax.dynamic_slice_in_dim(z, t, 1, axis=2) for z in self.turn)
        given = (token[..., None], turn, self.prefix.past, own, t, self.layers)
        hidden, own = self.model.apply(self.variables, *given, method="decode")
        return hidden[:, :, 0], own

    def peek(self, tokens: jax.Array, written: jax.Array, own: Past) -> jax.Array:
        """Hidden states of tokens [B, G, T] that would follow the first `written` [B, G] of `own`."""
        positions = (self.prefix.length[:, None] + written)[..., None] + jnp.arange(tokens.shape[-1])
        past = (self.prefix.past, own.replace(mask=jnp.arange(own.mask.shape[-1]) < written[..., None]))
        return self.model.apply(self.variables, tokens, positions, past, self.layers, method="peek")


@functools.partial(jax.jit, static_argnames=("model", "tokens", "samples", "max_tokens", "temperature", "keeps"))
def rollout(
    model: Qwen2Audio,
    variables: dict,
    prompt: Prompt,
    key: jax.Array,
    ends_line: jax.Array,
    *,
    tokens: Tokens,
    samples: int,
    max_tokens: int,
    temperature: float,
    keeps: bool = False,
) -> Rollout:
    """Samples G = `samples` completions of each prompt and reads the class distribution out on the way.

    When a completion passes the answer anchor, the logits of its class words are kept: the read-out costs nothing. One
    that ends or is cut before gets the anchor appended and is read out all the same (`forced`); the appended tokens
    are no part of the completion.

    Args:
      model: the model.
      variables: {'params', 'lora'}.
      prompt: B prompts.
      key: folds in seed and step; example and sample are folded in here.
      ends_line: bool [V], tokens whose text ends with a line break (a tokenizer may merge '.' and the break).
      tokens: special token ids.
      samples: G.
      max_tokens: N, length of the completion axis.
      temperature: 0 decodes greedily.
      keeps: whether what the layers made comes with it, for the update of this very policy (activations.py).
    """
    prefix = prefill(model, variables, prompt, {}, keeps=keeps)
    writer = _writer(model, variables, prefix, tokens, ends_line, max_tokens)
    keys = sampling.completion_keys(key, prompt.example, samples)

    def step(s: _Decoding) -> _Decoding:
        logits = writer.logits(s.hidden)
        token, logp = sampling.draw(logits, keys, s.t, temperature)
        return _append(writer, s, logits, token, logp)

    s = _start(model, prefix, tokens, *keys.shape, max_tokens)
    for room in loops(model, max_tokens):
        s = s._replace(own=s.own.grown(s.own.mask.shape[-1] + room))
        s = _write(step, s, room)
    rolled = _finish(writer, s)
    return rolled.replace(known=Known(*map(split, (prefix.past.made, s.own.made)))) if keeps else rolled


def loops(model: Qwen2Audio, max_tokens: int) -> list[int]:
    """The most tokens of each of a roll-out's loops: of one, where attention reads nothing but what is written."""
    kernel = decoding_kernel(model.decoding, model.cache == "int8", model.dtype, model.config.text.head_dim)
    return [max_tokens] if kernel else cache_stages(max_tokens)


def cache_stages(max_tokens: int) -> list[int]:
    """The steps, in tokens, in which the completions' cache grows: XLA's attention reads all of it, written or not.

    Each is a loop of its own to compile, so there are four at most, of 32 tokens at least.
    """
    stages = min(max(max_tokens // 32, 1), 4)
    ends = [max_tokens * i // stages for i in range(stages + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _write(step: Callable[[_Decoding], _Decoding], s: _Decoding, count: int | jax.Array) -> _Decoding:
    """At most `count` more tokens of every completion; fewer when all have ended."""

    def keep_going(state: tuple[jax.Array, _Decoding]) -> jax.Array:
        written, s = state
        has_room = written < count
        somebody_writes = ~jnp.all(s.done)
        return has_room & somebody_writes

    return jax.lax.while_loop(keep_going, lambda state: (state[0] + 1, step(state[1])), (jnp.int32(0), s))[1]


def _writer(
    model: Qwen2Audio, variables: dict, prefix: Prefix, tokens: Tokens, ends_line: jax.Array, max_tokens: int
) -> _Writer:
    positions = prefix.length[:, None, None] + jnp.arange(max_tokens)
    mesh = jax.sharding.get_abstract_mesh()
    joined = model.decoding == "triton" and (mesh.empty or mesh.size == 1)
    return _Writer(
        model=model,
        variables=variables,
        layers=transposed_layers(variables, model.config.text, model.lora, model.dtype, joined),
        prefix=prefix._replace(past=prefix.past.unstacked(model.cache, by_channel=model.decoding == "xla")),
        head=model.apply(variables, method="head").astype(model.dtype),  # once, where it is trained in float32
        tokens=tokens,
        ends_line=ends_line,
        turn=model.apply(variables, positions, method="turn"),
    )


def _append(w: _Writer, s: _Decoding, logits: jax.Array, token: jax.Array, logp: jax.Array) -> _Decoding:
    """Writes token t [B, G], drawn from `logits` [V, B, G], and computes the hidden state that predicts the next."""
    just_anchored = (s.anchor == s.t - 1) & (s.anchor >= 0)
    token = jnp.where(s.done, w.tokens.pad, token)
    recent = jnp.concatenate([s.recent[..., 1:], token[..., None]], axis=-1)
    anchored = jnp.all(recent[..., 1:] == jnp.array(w.tokens.anchor), axis=-1) & w.ends_line[recent[..., 0]]
    hidden, own = w.decode(token, s.t, s.own)
    class_logits = jnp.moveaxis(logits[jnp.array(w.tokens.classes)], 0, -1)
    return _Decoding(
        t=s.t + 1,
        hidden=hidden,
        own=own,
        recent=recent,
        anchor=jnp.where(anchored & (s.anchor < 0) & ~s.done, s.t, s.anchor),
        done=s.done | jnp.isin(token, jnp.array(w.tokens.ends)),
        tokens=jax.lax.dynamic_update_index_in_dim(s.tokens, token, s.t, axis=2),
        logp=jax.lax.dynamic_update_index_in_dim(s.logp, jnp.where(s.done, 0.0, logp), s.t, axis=2),
        readout=jnp.where(just_anchored[..., None], class_logits, s.readout),
    )


def _finish(w: _Writer, s: _Decoding) -> Rollout:
    """Reads out what the loop has not: an anchor in the very last slot, and completions without one."""
    b, g, n = s.tokens.shape
    class_ids = jnp.array(w.tokens.classes)
    own_anchor = s.anchor >= 0
    last_slot = (own_anchor & (s.anchor == s.t - 1))[..., None]  # no step followed that could keep its logits
    class_logits = jnp.where(last_slot, readout.logits(s.hidden, w.head, class_ids), s.readout)
    ends = jnp.isin(s.tokens, jnp.array(w.tokens.ends)) & (jnp.arange(n) < s.t)
    ended = jnp.any(ends, axis=-1)
    length = jnp.where(ended, jnp.argmax(ends, axis=-1), s.t)  # without the end token

    def force(_: None) -> jax.Array:
        appended = jnp.broadcast_to(jnp.array(w.tokens.forced), (b, g, len(w.tokens.forced)))
        forced = readout.logits(w.peek(appended, length, s.own)[:, :, -1], w.head, class_ids)
        return jnp.where(own_anchor[..., None], class_logits, forced)

    return Rollout(
        completions=Completions(
            tokens=s.tokens,
            mask=jnp.arange(n) < (length + ended)[..., None],
            anchor=jnp.where(own_anchor, s.anchor, -1),
        ),
        logp=s.logp,
        readout=jax.lax.cond(jnp.all(own_anchor), lambda _: class_logits, force, None),
        forced=~own_anchor,
        ended=ended,
    )


def _start(model: Qwen2Audio, prefix: Prefix, tokens: Tokens, b: int, g: int, n: int) -> _Decoding:
    # One array a layer for keys and for values: written in place, never copied out of a stack. No room as yet.
    empty = tuple(jnp.zeros((b, k.shape[1], g, 0, k.shape[3]), k.dtype) for k in prefix.past.k)
    room = lambda z: jnp.zeros((b, z.shape[1] + 1, g, n, z.shape[3]), z.dtype)  # noqa: E731
    made = None if prefix.past.made is None else split(jax.tree.map(room, prefix.past.made))
    return _Decoding(
        t=jnp.int32(0),
        hidden=jnp.broadcast_to(prefix.last[:, None], (b, g, prefix.last.shape[-1])),
        own=Past(empty, empty, jnp.zeros((b, g, 0), bool), made).unstacked(model.cache),
        # A completion starts on a fresh line: the prompt ends with a line break.
        recent=jnp.full((b, g, 1 + len(tokens.anchor)), tokens.newline, jnp.int32),
        anchor=jnp.full((b, g), -1, jnp.int32),
        done=jnp.zeros((b, g), bool),
        tokens=jnp.full((b, g, n), tokens.pad, jnp.int32),
        logp=jnp.zeros((b, g, n), jnp.float32),
        readout=jnp.zeros((b, g, len(tokens.classes)), jnp.float32),
    )


def stream(
    model: Qwen2Audio,
    variables: dict,
    prompt: Prompt,
    ends_line: jax.Array,
    *,
    tokens: Tokens,
    max_tokens: int,
    chunk: int,
) -> Iterator[Rollout]:
    """Greedy decoding, seen while it happens: `rollout` with one sample and temperature 0, stopped every few tokens.

    Args:
      model, variables, prompt, ends_line, tokens, max_tokens: see `rollout`.
      chunk: tokens between two looks.

    Yields:
      what is written so far. Its read-out is the one after that much reasoning, forced unless it came to its answer;
      the last one is `rollout`'s.
    """
    prefix, s = _begin(model, variables, prompt, tokens=tokens, max_tokens=max_tokens)
    over = False
    while not over:
        s, rolled = _advance(model, variables, prefix, s, ends_line, tokens=tokens, chunk=chunk)
        over = bool(s.done.all()) or int(s.t) == max_tokens
        yield rolled


@functools.partial(jax.jit, static_argnames=("model", "tokens", "max_tokens"))
def _begin(
    model: Qwen2Audio, variables: dict, prompt: Prompt, *, tokens: Tokens, max_tokens: int
) -> tuple[Prefix, _Decoding]:
    prefix = prefill(model, variables, prompt, {})
    s = _start(model, prefix, tokens, len(prompt.tokens), 1, max_tokens)
    return prefix, s._replace(own=s.own.grown(max_tokens))


@functools.partial(jax.jit, static_argnames=("model", "tokens", "chunk"))
def _advance(
    model: Qwen2Audio,
    variables: dict,
    prefix: Prefix,
    s: _Decoding,
    ends_line: jax.Array,
    *,
    tokens: Tokens,
    chunk: int,
) -> tuple[_Decoding, Rollout]:
    max_tokens = s.tokens.shape[-1]
    writer = _writer(model, variables, prefix, tokens, ends_line, max_tokens)

    def step(s: _Decoding) -> _Decoding:
        logits = writer.logits(s.hidden)
        return _append(writer, s, logits, *sampling.draw(logits, None, s.t, 0.0))

    s = _write(step, s, jnp.minimum(chunk, max_tokens - s.t))
    return s, _finish(writer, s)
