"""The whole SFT loss, CE + KL behind our prompt sharing, slices and read-out, against transformers + PEFT in torch."""

import copy
import functools

import jax
import numpy as np
import pytest
import torch
from ml_collections import FrozenConfigDict

from ambijax import algorithms, prompt
from ambijax.agent import Setting
from ambijax.model import config as model_config
from ambijax.model import qwen2_audio
from ambijax.structs import Batch, Completions, Prompt
from configs import sft
from tests.test_model import FRAMES, PEFT_TARGETS, TOLERANCE, _peft_layer, build, make_batch, reference_inputs

WORDS, ANCHOR, END = (11, 12, 13), (5, 6), 1
VOCABULARY = prompt.Vocabulary(
    tokenizer=None,
    im_start=2,
    im_end=END,
    audio=290,
    audio_bos=3,
    audio_eos=7,
    endoftext=0,
    labels=("a", "b", "c"),
    class_words=tuple((word,) for word in WORDS),
    newline=(4,),
    anchor=ANCHOR,
    ends_line=np.zeros(300, bool),
)
LENGTH = 12


def gold(rows: int) -> tuple[Completions, np.ndarray]:
    """Reasoning of 3, 4, ... tokens, line break, anchor, class word, end; and which tokens cross entropy covers."""
    rng = np.random.default_rng(0)
    tokens, mask, anchor = np.zeros((rows, 1, LENGTH), np.int32), np.zeros((rows, 1, LENGTH), bool), []
    for i in range(rows):
        ids = [*rng.integers(20, 280, 3 + i), 4, *ANCHOR, WORDS[i % 3], END]
        tokens[i, 0, : len(ids)], mask[i, 0, : len(ids)] = ids, True
        anchor.append([len(ids) - 3])
    ce_mask = mask.copy()
    for i in range(rows):
        ce_mask[i, 0, anchor[i][0] + 1] = False  # the class word
    return Completions(tokens, mask, np.array(anchor, np.int32)), ce_mask


@pytest.mark.slow  # compiling takes most of its time
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks transformers 5.23
def test_sft_loss_and_its_gradient_equal_peft(tmp_path):
    peft = pytest.importorskip("peft")  # here: to import it takes seconds, also where the test is left out
    pair = build("grouped_tied", tmp_path)
    asked = make_batch(pair, FRAMES[:3], "right", seed=5)
    rows = len(asked.tokens)
    completions, ce_mask = gold(rows)
    p = np.random.default_rng(1).dirichlet(np.ones(3), rows).astype(np.float32)
    lora = model_config.LoraConfig(rank=4, alpha=6.0, dropout=0.0, audio_tower=True)
    model = pair.model.clone(lora=lora)
    rng = np.random.default_rng(6)
    # At three times this size gradients reach four, where float32 itself is only good to 1e-4.
    adapters = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(np.float32), qwen2_audio.shapes(model)["lora"])

    theirs = peft.get_peft_model(
        copy.deepcopy(pair.reference),
        peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=PEFT_TARGETS),
    )
    weights = {}
    for path, value in jax.tree_util.tree_leaves_with_path(adapters):
        *module, matrix = (k.key for k in path)
        for i, own in enumerate(value):
            linear = _peft_layer(theirs, tuple(module), i)
            weight = (linear.lora_A if matrix == "a" else linear.lora_B)["default"].weight
            weight.data.copy_(torch.tensor(own.T))
            weights[(*module, matrix, i)] = weight
    total = 0.0
    for row in range(rows):  # one unpadded sequence at a time
        length, n = int(asked.mask[row].sum()), int(completions.mask[row].sum())
        ids = np.concatenate([asked.tokens[row, :length], completions.tokens[row, 0, :n]])
        one = asked._replace(
            mel=asked.mel[row : row + 1],
            frames=asked.frames[row : row + 1],
            tokens=ids[None],
            mask=np.ones((1, len(ids)), bool),
        )
        log_pi = torch.log_softmax(theirs(**reference_inputs(one)).logits[0], -1)
        logp = log_pi[length - 1 : -1].gather(-1, torch.tensor(ids[length:])[:, None])[:, 0]
        ce = -logp[torch.tensor(ce_mask[row, 0, :n])].mean()
        phat = torch.log_softmax(log_pi[length + completions.anchor[row, 0]][list(WORDS)], -1)
        kl = torch.nn.functional.kl_div(phat, torch.tensor(p[row]), reduction="sum")
        total = total + (ce + 0.5 * kl) / rows
    total.backward()

    config = sft.get_config("tiny")
    config.loss.lambda_kl = 0.5
    setting = Setting(model, VOCABULARY, None, FrozenConfigDict(config))
    batch = Batch(
        prompt=Prompt(asked.tokens, asked.mask, np.arange(rows, dtype=np.int32), mel=asked.mel, frames=asked.frames),
        gold=completions,
        ce_mask=ce_mask,
        target=p,
    )

    @jax.jit
    @jax.value_and_grad
    def loss(adapters):
        return algorithms.sft_loss(setting, {"params": pair.params, "lora": adapters}, batch, {})[0].mean()

    value, gradients = loss(adapters)
    np.testing.assert_allclose(value, total.item(), **TOLERANCE)
    for (*path, i), weight in weights.items():
        ours = functools.reduce(lambda tree, key: tree[key], path, gradients)[i]
        wanted = weight.grad.numpy().T
        assert np.abs(wanted).max() > 1e-4, f"the gradient of {path} is too small for the test to fail"
        np.testing.assert_allclose(ours, wanted, err_msg=f"{path} layer {i}", **TOLERANCE)
