"""The rival's side of benchmarks/compare.py: transformers + PEFT, sdpa attention, eager generate.

The loops are those that TRL and the public GRPO script for Qwen2-Audio run: the prompt and its sound repeated for each
of the K samples, `generate`, log-probabilities from full logits, one forward and backward for each group.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from benchmarks import shapes
from benchmarks.shapes import VOCABULARY, Shape

Step = Callable[[], object]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BETA_KL, LEARNING_RATE, CLIP = 0.04, 1e-4, 1.0  # as in configs/grpo.py and configs/base.py; they cost nothing


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def clock(parts: dict, name: str):
    began = time.perf_counter()
    yield
    wait()
    parts[name] = parts.get(name, 0.0) + time.perf_counter() - began


class Side:
    """The model with fresh adapters, and the inputs of every row."""

    def __init__(self, shape: Shape, directory: Path) -> None:
        self.shape = shape
        base = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(
            directory, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa"
        ).to(DEVICE)
        base.requires_grad_(False)
        lora = peft.LoraConfig(r=shape.rank, lora_alpha=shape.alpha, lora_dropout=0.0, target_modules=TARGETS)
        self.model = peft.get_peft_model(base, lora)
        if shape.reference_checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0)
        self.extractor = transformers.WhisperFeatureExtractor(feature_size=128)

    def features(self, count: int) -> dict[str, torch.Tensor]:
        return self.extractor(
            shapes.clips(self.shape, count),
            sampling_rate=16_000,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )

    def inputs(self, count: int, copies: int, completions: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`copies` of each of `count` prompts with its sound, row by row, before their completions [rows, T]."""
        sound = self.features(count)
        tokens = torch.from_numpy(shapes.prompts(self.shape, count))
        dtype = getattr(torch, self.shape.dtype)
        rows = {
            "input_ids": tokens,
            "input_features": sound["input_features"].to(dtype),
            "feature_attention_mask": sound["attention_mask"],
        }
        rows = {name: x.repeat_interleave(copies, 0).to(DEVICE) for name, x in rows.items()}
        if completions is not None:
            rows["input_ids"] = torch.cat([rows["input_ids"], completions.to(DEVICE)], 1)
        return rows | {"attention_mask": torch.ones_like(rows["input_ids"])}

    def completions(self, per_prompt: int, length: int) -> torch.Tensor:
        """[clips * per_prompt, T]"""
        return torch.from_numpy(shapes.completions(self.shape, self.shape.clips, per_prompt, length)).flatten(0, 1)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def log_probs(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the completion tokens [rows, T], and the class logits after the anchor, from full logits."""
        start = self.shape.prompt
        logits = self.model(**inputs, use_cache=False).logits[:, start - 1 :]
        targets = inputs["input_ids"][:, start:]
        # Row by row, as TRL's selective_log_softmax does: less memory than one log_softmax over all of it.
        rows = [
            F.log_softmax(row[:-1].float(), -1).gather(-1, t[:, None])[:, 0]
            for row, t in zip(logits, targets, strict=True)
        ]
        return torch.stack(rows), logits[:, -3, list(VOCABULARY.class_ids)].float()

    def generate(self) -> torch.Tensor:
        """[clips * K, N] sampled tokens; none may end early."""
        inputs = self.inputs(self.shape.clips, self.shape.samples)
        self.model.eval()
        n = self.shape.new_tokens
        out = self.model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=n, max_new_tokens=n
        )
        self.model.train()
        sampled = out[:, self.shape.prompt :]
        # Random weights sample <|AUDIO|> as any other word; the model would look for a sound to put there.
        return sampled.masked_fill(sampled == VOCABULARY.audio, shapes.WORDS[0])


def matrix(side: Side) -> Step:
    n = shapes.matrix_size(DEVICE.type == "cpu")
    x = torch.randn((n, n), dtype=getattr(torch, side.shape.dtype), device=DEVICE)
    return lambda: ([x @ x for _ in range(shapes.SQUARES)], wait())


def products(side: Side) -> Step:
    """Ours, by torch; into memory that is there already."""
    kinds = list(shapes.products(side.shape).items())
    draw = functools.partial(torch.randn, dtype=getattr(torch, side.shape.dtype), device=DEVICE)
    operands = [(draw(rows, inputs), draw(inputs, outputs)) for (rows, inputs, outputs), _ in kinds]
    results = [x @ w for x, w in operands]

    def step() -> dict[str, float]:
        total = 0.0
        for (_, count), (x, w), y in zip(kinds, operands, results, strict=True):
            wait()
            began = time.perf_counter()
            torch.matmul(x, w, out=y)
            wait()
            total += count * (time.perf_counter() - began)
        return {"total": total}

    return step


def attention(side: Side) -> Step:
    """Ours, by torch: to the prompt and to itself in two calls, whose results nothing puts together."""
    s = side.shape
    draw = lambda *size: torch.randn(  # noqa: E731
        (*size, s.hidden // s.heads), dtype=getattr(torch, s.dtype), device=DEVICE, requires_grad=True
    )

    def operands(prompts: int, completions: int) -> list[torch.Tensor]:
        rows = draw(prompts, s.heads, completions * s.new_tokens)
        return [rows, *(draw(prompts, s.heads, s.prompt) for _ in "kv")] + [
            draw(prompts * completions, s.heads, s.new_tokens) for _ in "qkv"
        ]

    def attend(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shared, own = given[:3], given[3:]
        return F.scaled_dot_product_attention(*shared), F.scaled_dot_product_attention(*own, is_causal=True)

    samples, groups = operands(s.clips, s.samples), operands(s.together, s.samples + 1)
    by_out = [torch.ones_like(x) for x in (groups[0], groups[3])]

    def step() -> dict[str, float]:
        parts = {}
        with clock(parts, "score"), torch.no_grad():
            attend(*samples)
        with clock(parts, "update"):
            torch.autograd.grad(attend(*groups), groups, by_out)
        taken = {"score": s.layers * parts["score"], "update": s.layers * s.clips // s.together * parts["update"]}
        return {"total": sum(taken.values()), **taken}

    return step


def token(side: Side) -> Step:
    """Ours, by torch: rows times each matrix, as its linear layers have it."""
    sizes, rows = shapes.token(side.shape)
    draw = functools.partial(torch.randn, dtype=getattr(torch, side.shape.dtype), device=DEVICE)
    weights = [draw(size) / size[1] ** 0.5 for size in sizes]
    x = draw((rows, side.shape.hidden))
    meet = lambda x, w: F.linear(x[:, : w.shape[1]], w)  # noqa: E731

    def step() -> dict[str, float]:
        began = time.perf_counter()
        with torch.no_grad():
            functools.reduce(meet, weights, x)
        wait()
        return {"total": side.shape.new_tokens * (time.perf_counter() - began)}

    return step


def read(side: Side) -> Step:
    x = torch.ones(shapes.read_size(DEVICE.type == "cpu"), device=DEVICE)
    return lambda: (x.sum(1), wait())


def logits(side: Side) -> Step:
    """All logits of a completion's tokens in float32; weights of another dtype are cast for as long as it takes."""
    torch.backends.cudnn.allow_tf32 = False  # matrix products have no TF32 unless asked for; convolutions do
    tokens = torch.from_numpy(shapes.completions(side.shape, 1, 1, shapes.LOGITS))[0]
    inputs = side.inputs(1, 1, tokens)
    inputs["input_features"] = side.features(1)["input_features"].to(DEVICE)  # not rounded to another dtype
    cast = [p for p in side.model.parameters() if p.dtype != torch.float32]

    @torch.no_grad()
    def step() -> dict[str, float]:
        side.model.eval()
        for p in cast:
            p.data = p.data.float()
        step.output = side.model(**inputs, use_cache=False).logits[:, side.shape.prompt :].cpu().numpy()
        for p in cast:
            p.data = p.data.to(getattr(torch, side.shape.dtype))
        side.model.train()

    return step


def features_row(side: Side) -> Step:
    clips = shapes.clips(side.shape, side.shape.feature_clips)
    options = {"sampling_rate": 16_000, "return_attention_mask": True, "padding": "max_length"}
    return lambda: side.extractor(clips, return_tensors="np", **options)


def tower(side: Side) -> Step:
    """Only embeddings that stand for audio tokens are used afterwards; the tower computes all of the 30 s."""
    inputs = side.inputs(side.shape.clips, 1)
    base = side.model.base_model.model.model
    valid = (side.shape.audio_tokens * 2 + 1, 1500)
    mask = (torch.arange(valid[1]) < valid[0]).to(DEVICE)[None, None, None].expand(side.shape.clips, 1, valid[1], -1)

    @torch.no_grad()
    def step() -> dict[str, float]:
        hidden = base.audio_tower(inputs["input_features"], attention_mask=mask).last_hidden_state
        base.multi_modal_projector(hidden)
        wait()

    return step


def readout(side: Side) -> Step:
    n = side.shape.readout_clips
    inputs = side.inputs(n, 1, torch.tensor([VOCABULARY.anchor]).expand(n, -1))

    @torch.no_grad()
    def step() -> dict[str, float]:
        side.model.eval()
        logits = side.model(**inputs, use_cache=False).logits[:, -1, list(VOCABULARY.class_ids)]
        step.output = logits.float().cpu().numpy()

    return step


def sft(side: Side) -> Step:
    """Cross entropy of the completion, and the KL divergence of the read-out from uniform votes."""
    inputs = side.inputs(side.shape.clips, 1, side.completions(1, side.shape.completion))

    def step() -> dict[str, float]:
        logp, classes = side.log_probs(inputs)
        (-logp.mean() - F.log_softmax(classes, -1).mean()).backward()
        side.update()
        wait()

    return step


def mixed(side: Side) -> Step:
    """The same on examples of unequal length, padded to the longest; what comes after the end is not counted."""
    examples = shapes.mixed(side.shape)
    rows = []
    for one in examples:
        asked, gold = shapes.prompts(one, 1)[0], shapes.completions(one, 1, 1, one.completion)[0, 0]
        rows.append(torch.from_numpy(np.concatenate([asked, gold])))
    lengths = torch.tensor([len(row) for row in rows])
    golds = torch.tensor([one.completion for one in examples])
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=VOCABULARY.endoftext)
    places = torch.arange(tokens.shape[1])
    counted = (places[1:] >= (lengths - golds)[:, None]) & (places[1:] < lengths[:, None])
    options = {"sampling_rate": 16_000, "return_attention_mask": True, "padding": "max_length", "return_tensors": "pt"}
    sound = side.extractor([shapes.clips(one, 1)[0] for one in examples], **options)
    inputs = {
        "input_ids": tokens,
        "attention_mask": (places < lengths[:, None]).long(),
        "input_features": sound["input_features"].to(getattr(torch, side.shape.dtype)),
        "feature_attention_mask": sound["attention_mask"],
    }
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    counted, anchors = counted.to(DEVICE), (lengths - 3).to(DEVICE)

    def step() -> dict[str, float]:
        logits = side.model(**inputs, use_cache=False).logits
        pairs = zip(logits, inputs["input_ids"][:, 1:], strict=True)
        logp = torch.stack([F.log_softmax(row[:-1].float(), -1).gather(-1, t[:, None])[:, 0] for row, t in pairs])
        classes = logits[torch.arange(len(rows)), anchors][:, list(VOCABULARY.class_ids)].float()
        ce = -(logp * counted).sum(-1) / counted.sum(-1)
        (ce.mean() - F.log_softmax(classes, -1).mean()).backward()
        side.update()
        wait()

    return step


def dpo(side: Side) -> Step:
    """As TRL: chosen and rejected in one batch, first under the reference policy, then with gradient."""
    inputs = side.inputs(side.shape.clips, 2, side.completions(2, side.shape.completion))

    def step() -> dict[str, float]:
        with torch.no_grad(), side.model.disable_adapter():
            reference = side.log_probs(inputs)[0].sum(-1).view(-1, 2)
        logp, classes = side.log_probs(inputs)
        margin = (logp.sum(-1).view(-1, 2) - reference) @ torch.tensor([1.0, -1.0], device=DEVICE)
        (-F.logsigmoid(0.1 * margin).mean() - logp[::2].mean() - F.log_softmax(classes[::2], -1).mean()).backward()
        side.update()
        wait()

    return step


def rollout(side: Side) -> Step:
    @torch.no_grad()
    def step() -> dict[str, float]:
        assert side.generate().shape[1] == side.shape.new_tokens
        wait()

    return step


def grpoz(side: Side) -> Step:
    """Groups of K samples and the gold completion; rewards are given, so that the rival's host costs nothing."""
    shape = side.shape
    k = shape.samples
    gold = side.completions(1, shape.new_tokens)
    advantages = torch.linspace(-1, 1, k + 1, device=DEVICE)

    def step() -> dict[str, float]:
        parts = {}
        with clock(parts, "total"):
            with clock(parts, "decode"), torch.no_grad():  # its prefill included
                sampled = side.generate().view(shape.clips, k, -1)
            groups = torch.cat([sampled, gold[:, None].to(DEVICE)], 1)
            whole = side.inputs(shape.clips, k + 1, groups.flatten(0, 1))
            for i in range(shape.clips):  # one prompt's group at a time, gradients accumulated
                group = {name: x[i * (k + 1) : (i + 1) * (k + 1)] for name, x in whole.items()}
                with clock(parts, "score"), torch.no_grad(), side.model.disable_adapter():
                    reference = side.log_probs(group)[0]
                with clock(parts, "update"):
                    logp, classes = side.log_probs(group)
                    surrogate = -torch.exp(logp - logp.detach()) * advantages[:, None]
                    d = reference - logp
                    loss = (surrogate + BETA_KL * (torch.exp(d) - d - 1)).mean() - F.log_softmax(classes[-1], -1).mean()
                    (loss / shape.clips).backward()
            with clock(parts, "update"):
                side.update()
        return parts

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
    "sft": sft,
    "sft_live": sft,
    "sft_mixed": mixed,
    "sft_mixed_padded": mixed,
    "dpo": dpo,
    "rollout": rollout,
    "grpoz": grpoz,
}


def forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_device_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None


def compiles() -> dict[str, float]:
    return {"compiles": 0, "compile_seconds": 0.0}
