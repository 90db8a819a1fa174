"""Qwen2-Audio (arXiv 2407.10759): audio tower -> projector -> Qwen2 decoder.

B prompts   G completions of one prompt   P prompt tokens   T completion tokens   M mel frames   A audio tokens
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ambijax.activations import Known
from ambijax.model.cache import Past
from ambijax.model.config import LoraConfig, Qwen2AudioConfig
from ambijax.model.decoder import Block, Decoder
from ambijax.model.encoder import AudioTower
from ambijax.model.layers import Dense
from ambijax.model.transposed import TransposedLayer
from ambijax.packing import Packing


class Qwen2Audio(nn.Module):
    """The model. Every method is pure; call it through `apply(variables, ..., method=...)` or policy.py.

    variables['params'] are the base weights, variables['lora'] the adapters; without 'lora' it is the base model.
    """

    config: Qwen2AudioConfig
    lora: LoraConfig | None
    dtype: jnp.dtype  # of activations; norms, rope, softmax and logits are float32 whatever it is
    remat: str  # what a layer keeps for its backward pass, see `layers.keep`
    weights: str = "float"  # or int8: how the decoder layers' matrices are stored
    attention: str = "xla"  # or cudnn, splash: the kernel of the tower and the prompt
    cache: str = "float"  # or int8: how a roll-out stores keys and values
    decoding: str = "xla"  # or triton: the attention of a roll-out

    def setup(self):
        c = self.config
        self.audio_tower = AudioTower(
            c.audio, self.lora if self.lora and self.lora.audio_tower else None, self.attention
        )
        self.multi_modal_projector = Dense(c.text.hidden_size, True)
        self.language_model = Decoder(c.text, self.lora, self.weights, self.attention, self.decoding, self.remat)

    def encode(self, mel: jax.Array, frames: jax.Array) -> jax.Array:
        """mel [B, M, F] with `frames` [B] valid frames to audio embeddings [B, A, hidden], A = M / 4."""
        return self.multi_modal_projector(self.audio_tower(mel.astype(self.dtype), frames))

    def prefill(
        self, tokens: jax.Array, mask: jax.Array, audio: jax.Array, keeps: bool = False
    ) -> tuple[jax.Array, Past]:
        """Reads the prompts once.

        Args:
          tokens: [B, P]; the i-th <|AUDIO|> of a row takes the row's i-th audio embedding.
          mask: [B, P], False on padding (left or right).
          audio: [B, A, hidden].
          keeps: whether the past has what the layers made of the prompt.

        Returns:
          the hidden state of each prompt's last token [B, hidden]; the prompt as a past that a group can share.
        """
        return _shared(*self.language_model([self._prompt(tokens, mask, audio)], last=_last(mask), keeps=keeps)[0])

    def extend(
        self, tokens: jax.Array, positions: jax.Array, mask: jax.Array, past: tuple[Past, ...]
    ) -> tuple[jax.Array, Past]:
        """Continues each prompt with G sequences of T tokens; returns hidden [B, G, T, hidden] and their own past."""
        return self.language_model([self._block(tokens, positions, mask)], past)[0]

    def prefill_and_extend(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        audio: jax.Array,
        completions: jax.Array,
        exist: jax.Array,
        packing: Packing | None,
        known: Known | None = None,
    ) -> tuple[tuple[jax.Array, Past], tuple[jax.Array, Past]]:
        """`prefill` of prompts and `extend` by completions [B, G, T] in one pass: each matrix is read once for both.

        What is `known` of prompts and of the first completions of each is not computed again (activations.py).
        """
        start = mask.sum(axis=1)[:, None, None]
        positions = start + jnp.broadcast_to(jnp.arange(completions.shape[2]), completions.shape)
        blocks = [self._prompt(tokens, mask, audio), self._block(completions, positions, exist)]
        prompt, own = self.language_model(blocks, packing=packing, last=_last(mask), known=known)
        return _shared(*prompt), own

    def decode(
        self,
        token: jax.Array,
        turn: tuple,
        prompt: Past,
        own: Past,
        slot: jax.Array,
        layers: tuple[TransposedLayer, ...],
    ) -> tuple[jax.Array, Past]:
        """The next token [B, G, 1] in a loop over tokens, see `Decoder.decode`."""
        x = self.language_model.embed(token, self.dtype)
        return self.language_model.decode(x, turn, prompt, own, slot, layers)

    def turn(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of positions [B, G, T], for `decode`."""
        return self.language_model.turn(positions)

    def peek(
        self, tokens: jax.Array, positions: jax.Array, past: tuple[Past, ...], layers: tuple[TransposedLayer, ...]
    ) -> jax.Array:
        """Hidden states of tokens [B, G, T] that might follow; `past` and `layers` as in `decode`."""
        return self.language_model.peek(self._block(tokens, positions, jnp.ones(tokens.shape, bool)), past, layers)

    def _prompt(self, tokens: jax.Array, mask: jax.Array, audio: jax.Array) -> Block:
        x = self.language_model.embed(tokens, self.dtype)
        is_audio = tokens == self.config.audio_token
        index = jnp.clip(jnp.cumsum(is_audio, axis=1) - 1, 0, audio.shape[1] - 1)
        heard = jnp.take_along_axis(audio.astype(self.dtype), index[..., None], axis=1)
        x = jnp.where(is_audio[..., None], heard, x)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        return Block(x[:, None], positions[:, None], mask[:, None])

    def _block(self, tokens: jax.Array, positions: jax.Array, mask: jax.Array) -> Block:
        return Block(self.language_model.embed(tokens, self.dtype), positions, mask)

    def head(self) -> jax.Array:
        """The output matrix [vocabulary, hidden]."""
        return self.language_model.head()

    def __call__(self, mel: jax.Array, frames: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Plain forward pass to logits [B, P, vocabulary]: for initialisation and parity tests, not for training."""
        [(hidden, _)] = self.language_model([self._prompt(tokens, mask, self.encode(mel, frames))])
        return jnp.matmul(hidden[:, 0], self.head().T.astype(self.dtype), preferred_element_type=jnp.float32)


def _last(mask: jax.Array) -> jax.Array:
    """Which of the tokens [B, P] is each prompt's last, [B]."""
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


def _shared(hidden: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    """A prompt's one hidden state, and the prompt without its G axis."""
    return hidden[:, 0, 0], Past(past.k[:, :, :, 0], past.v[:, :, :, 0], past.mask[:, 0], past.made)


def init(model: Qwen2Audio, key: jax.Array) -> dict:
    """Fresh variables {'params', 'lora'}. Under jit, what the caller drops is never computed:
    `jax.jit(lambda key: init(model, key)['lora'])` makes adapters without a second copy of a 7B model."""
    c = model.config
    mel = jnp.zeros((1, 8, c.audio.num_mel_bins))
    tokens = jnp.zeros((1, 4), jnp.int32)
    return dict(model.init(key, mel, jnp.array([6]), tokens, jnp.ones_like(tokens, bool)))


def shapes(model: Qwen2Audio) -> dict:
    """The variables' shapes and dtypes, nothing allocated."""
    return jax.tree.map(lambda x: x, _shapes(model))  # a tree of the caller's own


@functools.lru_cache(maxsize=16)
def _shapes(model: Qwen2Audio) -> dict:
    return jax.eval_shape(lambda: init(model, jax.random.key(0)))
