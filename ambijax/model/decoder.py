"""The Qwen2 decoder: token embeddings to hidden states, with keys and values as plain values in and out.

    L layers   B prompts   G sequences that share one prompt   T new tokens   S past tokens
    K key-value heads   D head width

Prefill, teacher forcing, decoding and the forced read-out are one computation: new tokens [B, G, T] attend causally to
each other and to any number of past segments. A segment without a G axis is shared by the group.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ambijax import sharding
from ambijax.activations import Activations, Known
from ambijax.model import cpu_kernels
from ambijax.model.cache import Past, put, put_made
from ambijax.model.config import LoraConfig, TextConfig
from ambijax.model.layers import (
    ACTIVATIONS,
    Dense,
    RMSNorm,
    Segment,
    attention,
    keep,
    rms_norm,
    rope,
    rotation,
)
from ambijax.model.transposed import TransposedLayer
from ambijax.packing import Packing


class Block(NamedTuple):
    """New tokens: G sequences of T that continue the same prompt."""

    x: jax.Array  # embeddings [B, G, T, hidden]
    positions: jax.Array  # [B, G, T], of each token in its own sequence
    mask: jax.Array  # [B, G, T], True where the token exists; padding on either side is fine


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer."""

    config: TextConfig
    lora: LoraConfig | None
    weights: str  # of the frozen matrices: float, or int8 with a scale for each output channel
    attention: str  # of the prompt: xla, or a kernel's name

    def setup(self):
        c = self.config
        dense = functools.partial(Dense, lora=self.lora, int8=self.weights == "int8")
        self.input_layernorm = RMSNorm(c.rms_norm_eps)
        self.q_proj = dense(c.num_attention_heads * c.head_dim, True)
        self.k_proj = dense(c.num_key_value_heads * c.head_dim, True)
        self.v_proj = dense(c.num_key_value_heads * c.head_dim, True)
        self.o_proj = dense(c.hidden_size, False)
        self.post_attention_layernorm = RMSNorm(c.rms_norm_eps)
        self.gate_proj = dense(c.intermediate_size, False)
        self.up_proj = dense(c.intermediate_size, False)
        self.down_proj = dense(c.hidden_size, False)

    def __call__(
        self,
        x: jax.Array,
        past_kv: tuple,
        past: tuple[Past, ...],
        turn: tuple,
        masks: tuple,
        packing: Packing | None = None,
        last: jax.Array | None = None,
        known: tuple[Activations, ...] = (),
        after: int = 0,
        keeps: bool = False,
    ):
        """Several blocks at once: one product with each matrix, however many blocks there are.

        Args:
          x: [B, N, hidden], the blocks' tokens one after another, N = sum of G T; packed if `packing` is given.
          past_kv: this layer's keys and values of `past`.
          past: earlier tokens, seen by all.
          turn: of all positions, see `rotation`.
          masks: for each block its mask [B, G, T] and which of its tokens see which [B, G, T, T]. What is one sequence
            to a prompt (G = 1) is seen by the blocks after it.
          packing: how x is packed.
          last: int32 [B], the only token of the first block that leaves the layer, see `_leaving`; nothing packed does.
          known, after: what the matrices make of tokens before the last `after`, see `activations.product`.
          keeps: whether what they make is asked for.

        Returns:
          x; each block's keys and values [B, K, G, T, D], and what the matrices made or, unless `keeps`, None.
        """
        b, heads = len(masks[0][0]), lambda z: z.reshape(*z.shape[:-1], -1, self.config.head_dim)
        of = {name: (tuple(getattr(z, name) for z in known), after) for name in Activations._fields}
        y = self.input_layernorm(x)
        made_k, made_v = self.k_proj(y, *of["k"]), self.v_proj(y, *of["v"])
        k, v = rope(heads(made_k), turn), heads(made_v)
        if packing is not None:
            k, v = packing.unpack(k, b), packing.unpack(v, b)
        if last is not None:
            x, y, turn = jax.tree.map(lambda z: _leaving(z, packing, last, masks[0][0].shape[2]), (x, y, turn))
            packing, masks = None, (_seen_by(last, *masks[0]), *masks[1:])
        made_q = self.q_proj(y, *of["q"])
        q = rope(heads(made_q), turn)
        q = q if packing is None else packing.unpack(q, b)
        attended, new = self._attend(q, k, v, [p.segment(*kv) for p, kv in zip(past, past_kv, strict=True)], masks)
        o = self.o_proj(attended if packing is None else packing.pack(attended), *of["o"])
        x += o
        y = self.post_attention_layernorm(x)
        gate, up = self.gate_proj(y, *of["gate"]), self.up_proj(y, *of["up"])
        down = self.down_proj(ACTIVATIONS[self.config.hidden_act](gate) * up, *of["down"])
        made = Activations(made_q, made_k, made_v, o, gate, up, down)
        return x + down, (new, made if keeps else None)

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segments: list[Segment], masks: tuple
    ) -> tuple[jax.Array, tuple]:
        """[B, N, heads, D] each to [B, N, heads D], and each block's keys and values."""
        attended, new, at, start = [], [], 0, 0
        for mask, causal in masks:
            (b, g, t), queries = mask.shape, causal.shape[2]
            own_q = q[:, at : at + g * queries].reshape(b, g, queries, *q.shape[2:])
            own_k, own_v = (_heads_first(z[:, start : start + g * t].reshape(b, g, t, *z.shape[2:])) for z in (k, v))
            y = attention(own_q, [*segments, Segment(own_k, own_v, causal, causal=True)], self.attention)
            attended.append(y.reshape(b, g * queries, -1))
            if g == 1:
                segments = [*segments, Segment(own_k[:, :, 0], own_v[:, :, 0], mask[:, :, None])]
            new.append((own_k, own_v))
            at, start = at + g * queries, start + g * t
        return jnp.concatenate(attended, axis=1), tuple(new)


class Decoder(nn.Module):
    """Embedding table, layers, final norm and output head."""

    config: TextConfig
    lora: LoraConfig | None
    weights: str
    attention: str
    decoding: str  # xla, or triton: attention of `decode` by decode_kernel.py
    remat: str  # what a layer keeps for its backward pass, see `keep`

    def setup(self):
        c = self.config
        layer = nn.remat(DecoderLayer, prevent_cse=False, policy=keep(self.remat))
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_hidden_layers,
        )(c, self.lora, self.weights, self.attention)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = self.param("lm_head", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[...] token ids to [..., hidden] embeddings."""
        return self.embed_tokens.embedding[tokens].astype(dtype)

    def __call__(
        self,
        blocks: Sequence[Block],
        past: tuple[Past, ...] = (),
        packing: Packing | None = None,
        last: jax.Array | None = None,
        known: Known | None = None,
        keeps: bool = False,
    ) -> list[tuple[jax.Array, Past]]:
        """Runs all layers over new tokens.

        Args:
          blocks: computed together. Each attends causally to itself, to `past`, and to the blocks before it, which are
            of one sequence to a prompt: a prompt, then its completions.
          past: earlier tokens of the same sequences.
          packing: leaves the blocks' padding out wherever tokens do not meet.
          last: int32 [B], the only token of the first block whose hidden state is asked for; without `past`.
          known: with `last`, what the layers make of the first block and of the first sequences of the second.
          keeps: with `last`, whether what the layers make of the first block goes with its `Past`.

        Returns:
          for each block its normalised hidden states [B, G, T, hidden], T = 1 for the first if `last` is given, and its
          tokens as a `Past` with a G axis.
        """
        flat = lambda z: z.reshape(len(z), -1, *z.shape[3:])  # noqa: E731  [B, G, T, ...] to [B, G T, ...]
        x = jnp.concatenate([flat(block.x) for block in blocks], axis=1)
        positions = jnp.concatenate([flat(block.positions) for block in blocks], axis=1)
        masks = tuple((block.mask, _causal(block.mask)) for block in blocks)
        if packing is not None:
            x, positions = packing.pack(x), packing.pack(positions)
        x, turn, made = sharding.constrain_batch(x), self.turn(positions), None
        if last is None:
            x, (new, _) = self.layers(x, tuple((p.k, p.v) for p in past), past, turn, masks, packing)
        else:
            x, new, made = self._to_last(x, turn, masks, packing, last, known, keeps)
        x, start, results = self.norm(x), 0, []
        if packing is not None and last is None:
            x = packing.unpack(x, len(blocks[0].x))
        for i, (block, (k, v)) in enumerate(zip(blocks, new, strict=True)):
            b, g, t = block.mask.shape
            t = t if last is None or i > 0 else 1
            own = Past(k, v, block.mask, made if i == 0 else None)
            results.append((x[:, start : start + g * t].reshape(b, g, t, -1), own))
            start += g * t
        return results

    def _to_last(
        self,
        x: jax.Array,
        turn: tuple,
        masks: tuple,
        packing: Packing | None,
        last: jax.Array,
        known: Known | None,
        keeps: bool,
    ) -> tuple[jax.Array, tuple, Activations | None]:
        """`self.layers` where only `last` leaves the first block, and the last layer computes nothing else.

        The layers before it read their weights by number out of the whole stack: the stack without its last layer, as
        a scan over weights would want it, is a copy of the model. What they make comes out, too, [B, L - 1, N, F].
        """
        stacks, count = self.layers.variables, self.config.num_hidden_layers
        layer = DecoderLayer(self.config, self.lora, self.weights, self.attention, parent=None)
        keys = jax.random.split(self.make_rng("dropout"), count) if self.has_rng("dropout") else None
        adapters = {name: stack for name, stack in stacks.items() if name != "params"}
        known = () if known is None else known.by_layer()
        after = masks[1][0][0].size - known[1].q.shape[2] if known else 0
        numbered = (jnp.arange(count), adapters, keys)

        def run(x: jax.Array, turn: tuple, numbered: tuple, last: jax.Array | None) -> tuple[jax.Array, tuple]:
            i, adapters, key = numbered
            of_layer = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
            params = jax.tree.map(of_layer, stacks["params"])
            rngs = {} if key is None else {"dropout": key}
            # Of a prompt no last layer's; a single layer is the last, but the scan traces its body all the same.
            made = jax.tree.map(of_layer, known if last is None and count > 1 else known[1:])
            given = (x, (), (), turn, masks, packing, last, made, after, keeps and last is None)
            return layer.apply({"params": params} | adapters, *given, rngs=rngs)

        one = jax.checkpoint(run, prevent_cse=False, policy=keep(self.remat))

        def step(carry: tuple, numbered: tuple) -> tuple[tuple, tuple]:
            x, new = one(carry[0], turn, numbered, None)
            return (x, jax.lax.optimization_barrier(turn)), new

        # Angles that leave the loop are an array. XLA on a CPU would take cos and sin again for every head.
        (x, angles), (new, made) = jax.lax.scan(step, (x, turn), jax.tree.map(lambda z: z[:-1], numbered))
        # Packed, all tokens together may be fewer than those that leave, which are not.
        leaving = len(last) + sum(mask.size for mask, _ in masks[1:])
        fewer = packing is None or leaving < packing.slots.size
        final = jax.checkpoint(run, policy=keep(self.remat))
        x, (newest, _) = final(x, angles, jax.tree.map(lambda z: z[-1], numbered), last if fewer else None)
        x = x if fewer else _leaving(x, packing, last, masks[0][0].shape[2])
        made = jax.tree.map(lambda z: jnp.moveaxis(z, 0, 1), made)
        return x, jax.tree.map(lambda stack, z: jnp.concatenate([stack, z[None]]), new, newest), made

    # In a loop over tokens, layers follow each other without a scan: a scan over stacked arrays would copy every
    # layer's weights and caches out of the stack for each token. `layers` are transposed, pasts are unstacked.

    def decode(
        self, x: jax.Array, turn: tuple, prompt: Past, own: Past, slot: jax.Array, layers: tuple[TransposedLayer, ...]
    ) -> tuple[jax.Array, Past]:
        """The next token of every sequence.

        Args:
          x: embeddings [B, G, 1, hidden].
          turn: of this token's position, the same for a group, see `turn`; made before the loop, or cos and sin are
            taken in every layer.
          prompt: shared by the group.
          own: each sequence's tokens before this one.
          slot: where this one's keys and values are written in `own`: before attention looks, or it would take a copy.
          layers: see `transposed.transposed_layers`.

        Returns:
          hidden state [B, G, 1, hidden], and `own` with the new token.
        """
        mask = jnp.broadcast_to(jnp.arange(own.mask.shape[-1]) <= slot, own.mask.shape)
        own = Past(list(own.k), list(own.v), mask, own.made)

        def segments(i: int, k: jax.Array, v: jax.Array) -> list[Segment]:
            own.k[i], own.v[i] = put(own.k[i], k, slot), put(own.v[i], v, slot)
            return [p.segment(p.k[i], p.v[i]) for p in (prompt, own)]

        def by_kernel(kernel: Callable, i: int, qkv: jax.Array) -> jax.Array:
            angles, caches = tuple(z[:, 0, 0, 0] for z in turn), (own.k[i], own.v[i])
            read = (prompt.k[i], prompt.v[i], prompt.mask)
            attended, (own.k[i], own.v[i]) = kernel(qkv[..., 0], angles, read, caches, slot)
            return attended.reshape(-1, *qkv.shape[3:])

        kernel = decoding_kernel(self.decoding, isinstance(own.k[0], tuple), x.dtype, self.config.head_dim)
        attend = functools.partial(by_kernel, kernel) if kernel else functools.partial(self._attend, turn, segments)
        hidden, made = self._layer_by_layer(x, layers, attend)
        if own.made is not None:
            own = own.replace(made=jax.tree.map(functools.partial(put_made, slot=slot), own.made, made))
        return hidden, own.replace(k=tuple(own.k), v=tuple(own.v))

    def peek(self, block: Block, past: tuple[Past, ...], layers: tuple[TransposedLayer, ...]) -> jax.Array:
        """Hidden states [B, G, T, hidden] of a block that is not kept."""
        causal = _causal(block.mask)

        def segments(i: int, k: jax.Array, v: jax.Array) -> list[Segment]:
            return [*(p.segment(p.k[i], p.v[i]) for p in past), Segment(k, v, causal)]

        attend = functools.partial(self._attend, self.turn(block.positions), segments)
        return self._layer_by_layer(block.x, layers, attend)[0]

    def _layer_by_layer(
        self, x: jax.Array, layers: tuple[TransposedLayer, ...], attend: Callable[[int, jax.Array], jax.Array]
    ) -> tuple[jax.Array, Activations]:
        """Hidden states [B, G, T, hidden], and what the matrices made, [L, F, B, G, T]."""
        c, made = self.config, []
        x = jnp.moveaxis(sharding.constrain_batch(x), -1, 0)
        for i, layer in enumerate(layers):
            qkv = layer.qkv(rms_norm(x, layer.input_norm, c.rms_norm_eps, axis=0))
            x += (o := layer.out(attend(i, qkv)))
            gate, up = layer.gate_up(rms_norm(x, layer.middle_norm, c.rms_norm_eps, axis=0))
            x += (down := layer.down(ACTIVATIONS[c.hidden_act](gate) * up))
            made.append(Activations(qkv[:, :-2], qkv[:, -2], qkv[:, -1], o, gate, up, down))
        stack = lambda *z: jnp.stack([layer.reshape(-1, *x.shape[1:]) for layer in z])  # noqa: E731
        return self.norm(jnp.moveaxis(x, 0, -1)), jax.tree.map(stack, *made)

    def _attend(
        self, turn: tuple, segments: Callable[[int, jax.Array, jax.Array], list[Segment]], i: int, qkv: jax.Array
    ) -> jax.Array:
        """Layer i's qkv [K, R + 2, D, B, G, T] to what attention makes of them, [H D, B, G, T]."""
        q, k, v = qkv[:, :-2], qkv[:, -2:-1], qkv[:, -1]  # [K, R, D, B, G, T], [K, 1, D, ...], [K, D, ...]
        heads = lambda z: jnp.einsum("krdbgt->bgtkrd", z).reshape(*z.shape[3:], -1, z.shape[2])  # noqa: E731
        q, k = rope(heads(q), turn), rope(heads(k), turn)
        attended = attention(q, segments(i, _heads_first(k), jnp.einsum("kdbgt->bkgtd", v)))
        return jnp.moveaxis(attended.reshape(*attended.shape[:3], -1), -1, 0)

    def turn(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """By which angles queries and keys at these positions are turned, see `rotation`."""
        return rotation(positions, self.config.head_dim, self.config.rope_theta)

    def head(self) -> jax.Array:
        """The output matrix [vocabulary, hidden]: a row for each word, as in checkpoints, and as decoding reads it."""
        return self.embed_tokens.embedding if self.config.tie_word_embeddings else self.lm_head


def decoding_kernel(decoding: str, rounded: bool, dtype: jnp.dtype, width: int) -> Callable | None:
    """By which attention to a cache is computed in `decode`; None: by XLA, which reads every slot of it.

    Args:
      decoding: see `Decoder`.
      rounded: the cache is int8.
      dtype, width: of heads.
    """
    if decoding == "triton":
        from ambijax.model import decode_kernel  # needs what a later JAX may not have, and few use it

        return decode_kernel.attend
    return cpu_kernels.decode if not rounded and cpu_kernels.serves(dtype, width) else None


def _heads_first(z: jax.Array) -> jax.Array:
    return jnp.einsum("bgtkd->bkgtd", z)


def _leaving(z: jax.Array, packing: Packing | None, last: jax.Array, size: int) -> jax.Array:
    """Of blocks' tokens [B, N, ...] the one numbered `last` [B] of the first `size`, then those after them."""
    z = z if packing is None else packing.unpack(z, len(last))
    index = last.reshape(-1, *[1] * (z.ndim - 1))
    return jnp.concatenate([jnp.take_along_axis(z[:, :size], index, axis=1), z[:, size:]], axis=1)


def _seen_by(last: jax.Array, mask: jax.Array, causal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A block's mask [B, G, T], and which of its tokens the one numbered `last` [B] sees: [B, G, 1, T]."""
    return mask, jnp.take_along_axis(causal, last[:, None, None, None], axis=2)


def _causal(mask: jax.Array) -> jax.Array:
    """Which new tokens [B, G, T] see which: [B, G, T, T]."""
    steps = jnp.arange(mask.shape[2])
    return (steps[:, None] >= steps) & mask[:, :, None, :]
