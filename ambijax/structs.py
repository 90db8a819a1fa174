"""The values that flow through a step: frozen pytrees, every field with its shape.

B prompts   G completions of one prompt, S of them sampled   P prompt tokens   T completion tokens   K classes
M mel frames   F mel bins   A audio tokens   D hidden width
"""

import flax.struct
import jax

from ambijax.activations import Known
from ambijax.packing import Packing

Array = jax.Array


@flax.struct.dataclass
class Prompt:
    """What the model hears and is asked. Its sound is either mel frames or, while the tower is frozen, tower output."""

    tokens: Array  # int32 [B, P]
    mask: Array  # bool [B, P], False on padding
    example: Array  # int32 [B], index of the utterance: seeds its sampling
    audio: Array | None = None  # [B, A, D] projected tower output
    mel: Array | None = None  # float32 [B, M, F]
    frames: Array | None = None  # int32 [B], valid frames of `mel`


@flax.struct.dataclass
class Completions:
    """Token sequences that continue a prompt, G to each."""

    tokens: Array  # int32 [B, G, T]
    mask: Array  # bool [B, G, T], True up to and including the end token
    anchor: Array  # int32 [B, G], index of the answer anchor's last token, -1 where there is none
    packing: Packing | None = None  # how to leave the padding of prompts and completions out


@flax.struct.dataclass
class Batch:
    """One step's examples: the prompt, the curated trajectory (G = 1) and the votes."""

    prompt: Prompt
    gold: Completions
    ce_mask: Array  # bool [B, 1, T], the gold tokens that cross entropy covers
    target: Array  # float32 [B, K], the soft label p


@flax.struct.dataclass
class Scores:
    """A policy's view of given completions."""

    logp: Array  # float32 [B, G, T], log pi(token | before); 0 on padding
    entropy: Array  # float32 [B, G, T], nats; 0 on padding
    readout: Array  # float32 [B, G, K], logits of the class words after the anchor; undefined without one


@flax.struct.dataclass
class Rollout:
    """Sampled completions with what was seen on the way."""

    completions: Completions
    logp: Array  # float32 [B, G, T], log-probability of each sampled token at the sampling temperature
    readout: Array  # float32 [B, G, K], logits of the class words after the anchor, own or forced
    forced: Array  # bool [B, G], the anchor had to be appended
    ended: Array  # bool [B, G], the model itself ended the completion
    known: Known | None = None  # what the layers made of prompts and completions, where that is asked for


@flax.struct.dataclass
class Group:
    """What a GRPO update needs: the roll-outs of each prompt, rewarded; in GRPOz gold is the last of G."""

    prompt: Prompt
    completions: Completions  # [B, G, T]
    loss_mask: Array  # bool [B, G, T], tokens the surrogate covers
    tokens: Array  # float32 [B], all the same: tokens the surrogate covers a prompt, mean over the whole batch
    ce_mask: Array  # bool [B, 1, T], the gold tokens that plain cross entropy covers
    advantages: Array  # float32 [B, G]
    logp_drawn: Array  # float32 [B, S, T], of those sampled, as the roll-out saw it, which decodes by other programs
    target: Array  # float32 [B, K]
    logp_old: Array | None = None  # float32 [B, G, T], under the policy that sampled, where several updates follow
    logp_ref: Array | None = None  # float32 [B, S, T], of those sampled under the reference, where that counts
    known: Known | None = None  # what the layers made of prompts and of those sampled, with grpo.keep_activations


@flax.struct.dataclass
class Preferences:
    """What a DPO update needs: gold as the preferred completion, first of G, before R = G - 1 rejected roll-outs."""

    prompt: Prompt
    completions: Completions  # [B, 1 + R, T]
    ce_mask: Array  # bool [B, 1, T]
    pairs: Array  # bool [B, R], which roll-outs are far enough from the votes to be rejected
    logp_ref: Array  # float32 [B, 1 + R, T]
    target: Array  # float32 [B, K]


@flax.struct.dataclass
class Guard:
    """What decides whether an update is applied, see guard.py."""

    applied: Array  # int32 [], updates applied
    skipped: Array  # int32 [], updates skipped
    in_a_row: Array  # int32 [], updates skipped since the last applied one
    losses: Array  # float32 [W], a ring of the losses of the last applied updates


@flax.struct.dataclass
class TrainState:
    """Everything that changes during training."""

    step: Array  # int32 [], steps done
    trained: dict  # variables with None where a leaf is frozen
    optimizer: tuple  # optax state
    guard: Guard
