"""What each setting may be, and which settings contradict each other. A setting that is not listed here does not exist.

The bounds say where no computation could be meant, not what is wise; values and reasons are in configs/.
"""

import difflib
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import flax.traverse_util

from ambijax import reasoning
from ambijax.corpora import synthetic


class Rule(NamedTuple):
    """A value is right when `holds`; else it 'must be ' `what`."""

    holds: Callable[[object], bool]
    what: str


def _whole(least: int, most: int = 10**8) -> Rule:
    return Rule(lambda v: type(v) is int and least <= v <= most, f"a whole number from {least} to {most}")


def _real(least: float, most: float = 1e6) -> Rule:
    what = f"a number from {least:.15g} to {most:.15g}"
    return Rule(lambda v: type(v) in (int, float) and least <= v <= most, what)


def _one_of(*names: str) -> Rule:
    return Rule(lambda v: isinstance(v, str) and v in names, f"one of {', '.join(names)}")


def _list_of(holds: Callable[[object], bool], what: str, least: int = 1) -> Rule:
    def all_hold(values: object) -> bool:
        return isinstance(values, list | tuple) and len(values) >= least and all(map(holds, values))

    return Rule(lambda v: all_hold(v) and len({*v}) == len(v), f"a list of {least} or more distinct {what}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _is_pattern(value: object) -> bool:
    if not isinstance(value, str):
        return False
    collection, _, rest = value.partition("/")
    try:
        return collection in ("lora", "params") and bool(re.compile(f"/(?:{rest})"))  # as `optim.labels` compiles it
    except (re.error, OverflowError, RecursionError):
        return False


_POSITIVE = 1e-12
TRACKERS = ("tensorboard", "wandb", "trackio")
_FLAG = Rule(lambda v: isinstance(v, bool), "True or False")
_PATH = Rule(_is_name, "a path")
_CLIPS = Rule(lambda v: type(v) is int and (v == -1 or 1 <= v <= 10**8), "a number of clips, or -1 for all")
_AXIS = Rule(lambda v: type(v) is int and (v == -1 or 1 <= v <= 10**6), "a number of devices, or -1")

RULES = {
    "algorithm": _one_of("sft", "dpo", "grpo", "grpoz"),
    "seed": _whole(0, 2**31 - 1),
    "steps": _whole(0),  # 0 evaluates the start
    "log_every": _whole(1),
    "tracker": Rule(lambda v: v in ("", *TRACKERS), f"one of {', '.join(TRACKERS)}, or empty"),
    "tracker_audio": _FLAG,
    "watchdog_seconds": _real(0),
    "init_from": Rule(lambda v: v == "" or _is_name(v), "a run directory, or empty"),
    "model.checkpoint": _PATH,
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.weights": _one_of("float", "int8"),
    "model.cache": _one_of("float", "int8"),
    "model.attention": _one_of("xla", "cudnn", "splash"),
    "model.decoding": _one_of("xla", "triton"),
    "model.remat": _one_of(  # ours (layers.keep), or of jax.checkpoint_policies those without names
        "products_saveable",
        *("everything_saveable", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"),
    ),
    "prompt.style": _one_of(*(style for style in reasoning.STYLES if style != "answer")),
    "lora.rank": _whole(1, 4096),
    "lora.alpha": _real(_POSITIVE),
    "lora.dropout": _real(0, 0.99),
    "lora.audio_tower": _FLAG,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "hosts.heartbeat": _whole(5),  # seconds
    "hosts.start": _whole(1),  # seconds
    "data.corpus": _one_of("manifest", "synthetic"),
    "data.like": _one_of(*synthetic.LIKE),
    "data.root": _PATH,
    "data.labels": _list_of(_is_name, "class words, as \"('anger','sadness')\"", least=2),
    "data.fold": _whole(0, 1000),
    "data.dev": _one_of("next_fold", "groups"),
    "data.batch_size": _whole(1, 2**16),
    "data.windows": _list_of(lambda v: type(v) is int and 2 < v <= 3000 and v % 2 == 0, "even mel lengths up to 3000"),
    "data.features": Rule(lambda v: v == "" or _is_name(v), "a directory, or empty"),
    "data.max_tokens": _whole(8, 2**14),
    "data.pack": _FLAG,
    "data.cot": _FLAG,
    "data.gold_label": _one_of("argmax", "sample"),
    "data.speakers": _whole(2, 10**5),
    "data.clips_per_speaker": _whole(1, 10**5),
    "data.seed": _whole(0, 2**31 - 1),
    "optim.train": _list_of(_is_pattern, "regular expressions after lora/ or params/"),
    "optim.learning_rate": _real(_POSITIVE, 100),
    "optim.warmup": _real(0, 0.99),  # a fraction of the steps
    "optim.b1": _real(0, 1 - _POSITIVE),
    "optim.b2": _real(0, 1 - _POSITIVE),
    "optim.eps": _real(_POSITIVE, 1),  # with 0, A's first update is 0 / 0: B starts as 0 and gives it no gradient
    "optim.weight_decay": _real(0),
    "optim.clip": _real(_POSITIVE),
    "optim.accumulate": _whole(1, 2**16),
    "optim.micro_batch": _whole(0, 2**16),  # 0 is a whole part
    "loss.lambda_ce": _real(0),
    "loss.lambda_kl": _real(0),
    "loss.kl_direction": _one_of("forward", "reverse"),
    "loss.reverse_floor": _real(_POSITIVE, 1),
    "loss.chunk": _whole(1, 2**14),
    "readout.temperature": _real(1e-3),
    "guard.max_skipped": _whole(1),
    "guard.spike_sigma": _real(0),
    "guard.spike_window": _whole(2, 10**6),
    "warn.degenerate": _real(0, 1),
    "warn.format": _real(0, 1),
    "warn.tokens": _real(0),
    "warn.logp_gap": _real(0, math.inf),
    "checkpoint.every": _whole(1),
    "checkpoint.seconds": _real(0),
    "checkpoint.keep": _whole(1, 10**6),
    "checkpoint.grace": _real(0),
    "eval.batch_size": _whole(1, 2**16),
    "eval.max_clips": _CLIPS,
    "eval.every": _whole(0),  # 0 never does
    "eval.dev_clips": _CLIPS,
    "eval.metric": _one_of("js", "brier", "kl"),
    "eval.checkpoint": _one_of("last", "best"),
    "eval.base": _FLAG,
    "eval.resamples": _whole(1, 10**6),
    "eval.level": _real(0.01, 0.9999),
    "eval.cluster": _one_of("utterance", "speaker"),
    "eval.draws": _whole(1, 10**6),
    "dpo.samples": _whole(1, 4096),
    "dpo.temperature": _real(1e-3),
    "dpo.tau": _real(0, 1 - _POSITIVE),  # bits, of which JS has one at most
    "dpo.negatives": _one_of("worst", "random", "all"),
    "dpo.beta": _real(_POSITIVE),
    "reward.w_js": _real(0),
    "reward.w_fmt": _real(0),
    "reward.format": _one_of("exact", "partial"),
    "grpo.samples": Rule(lambda v: type(v) is int and 2 <= v <= 4096, "a whole number: a group needs at least 2"),
    "grpo.temperature": _real(1e-3),
    "grpo.updates": _whole(1, 1000),
    "grpo.keep_activations": _FLAG,
    "grpo.eps_low": _real(_POSITIVE, 1 - _POSITIVE),
    "grpo.eps_high": _real(_POSITIVE),
    "grpo.beta_kl": _real(0),
    "grpo.aggregate": _one_of("sequence_mean", "token_mean", "constant_length"),
    "grpo.scale": _one_of("std", "none"),
    "grpo.ddof": _whole(0, 1),
    "grpo.eps": _real(0, 1),
    "grpo.min_std": _real(0),
    "grpo.gold_reward": _one_of("maximal", "measured"),
    "grpo.gold_in_loss": _FLAG,
    "grpo.gold_ce": _real(0),
    "grpo.gold_gamma": _real(0),
    "grpo.gold_adv_clip": _real(_POSITIVE, math.inf),
}

# How a step's work is cut: it is the same step but for rounding, as on another mesh. What runs out of memory is resumed
# with others.
CUT = ("optim.micro_batch", "loss.chunk", "model.remat", "model.attention", "model.decoding")
FREED = ("tracker", "tracker_audio", *CUT)  # what once had to be equal to resume
# Keys that came later, with what a run did before it could say so: history, which no new run is given. A new key goes
# here too, or the runs of earlier versions can no longer be read.
ADDED = {
    "tracker": "",
    "tracker_audio": False,
    "model.weights": "float",
    "model.cache": "float",
    "model.attention": "xla",
    "model.decoding": "xla",
    "data.features": "",
    "data.pack": False,
    "optim.micro_batch": 0,
    "warn.logp_gap": math.inf,
    "eval.every": 0,
    "eval.dev_clips": 256,  # of no evaluation
    "eval.metric": "js",
    "eval.checkpoint": "last",
    "grpo.keep_activations": False,
}

# What only some runs read, and so may be absent from the others: prefix -> (key, values of it that read this).
_READ_BY = {
    "dpo.": ("algorithm", ("dpo",)),
    "grpo.": ("algorithm", ("grpo", "grpoz")),
    "reward.": ("algorithm", ("grpo", "grpoz")),
    "data.like": ("data.corpus", ("synthetic",)),
    "data.speakers": ("data.corpus", ("synthetic",)),
    "data.clips_per_speaker": ("data.corpus", ("synthetic",)),
    "data.seed": ("data.corpus", ("synthetic",)),
}

_ON_BASE = "optim.train reaches base weights, but the reference policy is the base without adapters; train lora only"
# What single values do not show: keys, what must hold of their values, and what is said where it does not.
_TOGETHER = (
    (
        ("algorithm", "lora.dropout"),
        lambda algorithm, dropout: algorithm == "sft" or dropout == 0,
        "lora.dropout={lora_dropout} must be 0 in RL: it would change pi between passes",
    ),
    (
        ("optim.accumulate", "data.batch_size"),
        lambda parts, size: size % parts == 0,
        "optim.accumulate={optim_accumulate} must divide data.batch_size={data_batch_size}",
    ),
    (
        ("data.pack", "optim.accumulate"),
        lambda pack, parts: not pack or parts == 1,
        "data.pack is without optim.accumulate={optim_accumulate}: parts of a batch would be of unequal size",
    ),
    (
        ("optim.micro_batch", "optim.accumulate", "data.batch_size"),
        lambda prompts, parts, size: prompts == 0 or size % (parts * prompts) == 0,
        "optim.micro_batch={optim_micro_batch} must divide data.batch_size={data_batch_size} / "
        "optim.accumulate={optim_accumulate}",
    ),
    (
        ("data.pack", "optim.micro_batch"),
        lambda pack, prompts: not pack or prompts == 0,
        "data.pack is without optim.micro_batch={optim_micro_batch}: parts of a batch would be of unequal size",
    ),
    (
        ("grpo.keep_activations", "grpo.updates", "data.pack", "model.cache"),
        lambda keeps, updates, pack, cache: not keeps or (updates == 1 and not pack and cache == "float"),
        "grpo.keep_activations is for what the update would compute again exactly so: with grpo.updates=1, "
        "data.pack=False and model.cache='float', and here they are {grpo_updates}, {data_pack} and {model_cache!r}",
    ),
    (
        ("eval.checkpoint", "eval.every"),
        lambda checkpoint, every: checkpoint == "last" or every > 0,
        "eval.checkpoint={eval_checkpoint!r} needs evaluations on dev to choose by: set eval.every",
    ),
    (
        ("prompt.style", "steps"),
        lambda style, steps: style == "steps" or steps == 0,
        "prompt.style={prompt_style!r} is for evaluation (steps=0): curated trajectories are written in 'steps'",
    ),
    (
        ("algorithm", "loss.lambda_ce", "loss.lambda_kl"),
        lambda algorithm, ce, kl: algorithm != "sft" or ce + kl > 0,
        "loss.lambda_ce and loss.lambda_kl are both 0: nothing to learn",
    ),
    (
        ("reward.w_js", "reward.w_fmt"),
        lambda js, fmt: js + fmt > 0,
        "reward.w_js and reward.w_fmt are both 0: no reward",
    ),
    (
        ("data.corpus", "data.like", "data.fold"),
        lambda corpus, like, fold: corpus != "synthetic" or fold < synthetic.LIKE[like].folds,
        "data.fold={data_fold} is not one of the folds of the synthetic corpus, which count from 0 to 4",
    ),
    (
        ("algorithm", "optim.train"),
        lambda algorithm, train: algorithm != "dpo" or not trains_base(train),
        _ON_BASE,
    ),
    (
        ("algorithm", "optim.train", "grpo.beta_kl"),
        lambda algorithm, train, beta: algorithm not in ("grpo", "grpoz") or beta == 0 or not trains_base(train),
        _ON_BASE + ", or set grpo.beta_kl=0",
    ),
    (
        ("model.weights", "optim.train"),
        lambda weights, train: weights == "float" or not trains_base(train),
        "optim.train reaches base weights, which model.weights={model_weights!r} rounds: train lora only, or set "
        "model.weights='float'",
    ),
    (
        ("model.attention", "model.dtype"),
        lambda attention, dtype: attention != "cudnn" or dtype == "bfloat16",
        "model.attention='cudnn' computes in bfloat16, and model.dtype={model_dtype!r}",
    ),
    (
        ("model.decoding", "model.cache"),
        lambda decoding, cache: decoding == "xla" or cache == "float",
        "model.decoding='triton' reads a float cache, and model.cache={model_cache!r}",
    ),
)


def completed(config: dict) -> dict:
    """`config` (nested) of a run, in which an earlier version could not say what `ADDED` says."""
    whole = dict(config)
    for key, value in ADDED.items():
        section, _, name = key.rpartition(".")
        if not section:
            whole.setdefault(name, value)
        elif isinstance(whole.get(section), dict):
            whole[section] = {name: value, **whole[section]}
    return whole


def problems(config: dict) -> list[str]:
    """Everything that is wrong with the values alone, one text each; `config` is nested."""
    flat = flax.traverse_util.flatten_dict(config, sep=".")
    wrong = []
    for key in flat.keys() - RULES.keys():
        near = difflib.get_close_matches(key, RULES, 1)
        wrong.append(f"unknown key {key}" + (f", did you mean {near[0]}?" if near else ""))
    missing = [key for key in RULES if key not in flat and _is_read(key, flat)]
    wrong += [f"{key} is missing" for key in missing]
    sane = {key: value for key, value in flat.items() if key in RULES and RULES[key].holds(value)}
    wrong += [f"{k}={v!r:.80} must be {RULES[k].what}" for k, v in flat.items() if k in RULES and k not in sane]
    return sorted(wrong) + _contradictions(sane)


def _is_read(key: str, flat: dict) -> bool:
    readers = [reader for prefix, reader in _READ_BY.items() if key.startswith(prefix)]
    return all(flat.get(other) in values for other, values in readers)


def _contradictions(c: dict) -> list[str]:
    """Which of `_TOGETHER` do not hold; asked only where all the values that they are about are right."""
    return [
        message.format(**{key.replace(".", "_"): c[key] for key in keys})
        for keys, holds, message in _TOGETHER
        if all(key in c for key in keys) and not holds(*(c[key] for key in keys))
    ]


def trains_base(patterns: tuple[str, ...]) -> bool:
    """Whether `optim.train` reaches base weights, and not adapters alone."""
    return any(pattern.startswith("params/") for pattern in patterns)
