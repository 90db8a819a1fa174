"""An experiment's settings: from a config file and the command line, checked at once, and to and from a run directory.

A config file is a program and is executed; what a run leaves is `config.json`, plain data. So whoever evaluates or
resumes a run somebody else made executes nothing of theirs.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ambijax import reasoning
from ambijax.errors import ConfigError


def parse(argv: list[str]) -> tuple[FrozenConfigDict, Path]:
    """`--config FILE[:VARIANT] [--config.KEY=VALUE ...] --workdir DIR` to (checked settings, run directory).

    Raises:
      ConfigError: a flag, a key or a value is wrong; all problems of the values are listed at once.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", help_string="FILE[:VARIANT]", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", "", "run directory", flag_values=values)
    flags.DEFINE_bool("help", False, "show the usage", flag_values=values)
    usage = "usage: python -m ambijax.train --config configs/grpoz.py:tiny --workdir runs/tiny [--config.KEY=VALUE ...]"
    if {"-h", "--help"} & set(argv):
        raise SystemExit(usage)
    try:
        rest = values(argv)[1:]
        config = values.config
        _ = config is None or config.algorithm  # a file that failed to load fails here
    except flags.Error as error:
        raise ConfigError(_one_line(error)) from None
    except (KeyError, AttributeError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        raise ConfigError(f"--config: {_one_line(error)}") from None
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; {usage}")
    if config is None or not values.workdir:
        raise ConfigError(f"--{'config' if config is None else 'workdir'} is missing; {usage}")
    check(config)
    return FrozenConfigDict(config), Path(values.workdir)


def _one_line(error: Exception) -> str:
    """The gist of an error of config_flags, which may be a traceback in a string or the repr of another error."""
    text = str(error).strip()
    if "Traceback" in text:
        text = text.splitlines()[-1]
    text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())
    while len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return text


def check(config: ConfigDict) -> None:
    """Everything that can be wrong with the values alone, before any file is read.

    Raises:
      ConfigError: lists all problems, one a line.
    """
    c, wrong = config, []

    def need(holds: bool, message: str) -> None:
        if not holds:
            wrong.append(message)

    known = ("sft", "dpo", "grpo", "grpoz")
    need(c.algorithm in known, f"algorithm={c.algorithm!r} must be one of {', '.join(known)}")
    need(c.steps >= 0, f"steps={c.steps} must not be negative; 0 evaluates the start")
    need(c.model.dtype in ("float32", "bfloat16"), f"model.dtype={c.model.dtype!r} must be float32 or bfloat16")
    need(hasattr(jax.checkpoint_policies, c.model.remat), f"model.remat={c.model.remat!r} is no jax.checkpoint policy")
    need(c.lora.rank >= 1, f"lora.rank={c.lora.rank} must be at least 1")
    need(0 <= c.lora.dropout < 1, f"lora.dropout={c.lora.dropout} must be in [0, 1)")
    need(c.hosts.heartbeat >= 5, f"hosts.heartbeat={c.hosts.heartbeat} must be at least 5 seconds")
    need(c.hosts.start >= 1, f"hosts.start={c.hosts.start} must be at least 1 second")
    need(c.data.batch_size >= 1, f"data.batch_size={c.data.batch_size} must be at least 1")
    need(
        len(set(c.data.labels)) == len(c.data.labels) >= 2, f"data.labels={c.data.labels} must be distinct, two or more"
    )
    need(c.data.dev in ("next_fold", "groups"), f"data.dev={c.data.dev!r} must be next_fold or groups")
    need(c.data.fold >= 0, f"data.fold={c.data.fold} must be the number of a fold")
    need(c.data.gold_label in ("argmax", "sample"), f"data.gold_label={c.data.gold_label!r} must be argmax or sample")
    styles = [style for style in reasoning.STYLES if style != "answer"]
    need(c.prompt.style in styles, f"prompt.style={c.prompt.style!r} must be one of {', '.join(styles)}")
    need(
        c.prompt.style == "steps" or c.steps == 0,
        f"prompt.style={c.prompt.style!r} is for evaluation (steps=0): curated trajectories are written in 'steps'",
    )
    need(0 <= c.optim.warmup < 1, f"optim.warmup={c.optim.warmup} must be a fraction of the steps in [0, 1)")
    need(c.optim.learning_rate > 0, f"optim.learning_rate={c.optim.learning_rate} must be positive")
    need(c.optim.clip > 0, f"optim.clip={c.optim.clip} must be positive")
    need(
        c.optim.accumulate >= 1 and c.data.batch_size % max(c.optim.accumulate, 1) == 0,
        f"optim.accumulate={c.optim.accumulate} must divide data.batch_size={c.data.batch_size}",
    )
    need(min(c.loss.lambda_ce, c.loss.lambda_kl) >= 0, "loss.lambda_ce and loss.lambda_kl must not be negative")
    need(
        c.loss.kl_direction in ("forward", "reverse"),
        f"loss.kl_direction={c.loss.kl_direction!r} must be forward or reverse",
    )
    need(0 < c.loss.reverse_floor <= 1, f"loss.reverse_floor={c.loss.reverse_floor} must be in (0, 1]")
    need(c.loss.chunk >= 1, f"loss.chunk={c.loss.chunk} must be at least 1")
    need(c.readout.temperature > 0, f"readout.temperature={c.readout.temperature} must be positive")
    need(c.checkpoint.every >= 1 and c.checkpoint.keep >= 1, "checkpoint.every and checkpoint.keep must be at least 1")
    need(c.eval.batch_size >= 1, f"eval.batch_size={c.eval.batch_size} must be at least 1")
    need(c.eval.resamples >= 1 and c.eval.draws >= 1, "eval.resamples and eval.draws must be at least 1")
    need(0 < c.eval.level < 1, f"eval.level={c.eval.level} must be in (0, 1)")
    need(c.eval.cluster in ("utterance", "speaker"), f"eval.cluster={c.eval.cluster!r} must be utterance or speaker")
    need(c.log_every >= 1, f"log_every={c.log_every} must be at least 1")
    if c.algorithm == "sft":
        need(c.loss.lambda_ce + c.loss.lambda_kl > 0, "loss.lambda_ce and loss.lambda_kl are both 0: nothing to learn")
    if c.algorithm == "dpo":
        _check_dpo(c.dpo, need)
    if c.algorithm in ("grpo", "grpoz"):
        _check_grpo(c.grpo, c.reward, need)
    if c.algorithm != "sft":
        need(c.lora.dropout == 0, f"lora.dropout={c.lora.dropout} must be 0 in RL: it would change pi between passes")
    on_reference = c.algorithm == "dpo" or (c.algorithm != "sft" and c.grpo.beta_kl > 0)
    trains_base = any(not pattern.startswith("lora") for pattern in c.optim.train)
    need(
        not (on_reference and trains_base),
        "optim.train reaches base weights, but the reference policy is the base without adapters; "
        "train lora only, or set grpo.beta_kl=0",
    )
    if wrong:
        raise ConfigError("configuration: " + "; ".join(wrong))


def _check_dpo(c: ConfigDict, need: Callable[[bool, str], None]) -> None:
    need(c.samples >= 1, f"dpo.samples={c.samples} must be at least 1")
    need(c.temperature > 0, f"dpo.temperature={c.temperature} must be positive: roll-outs must differ")
    kinds = ("worst", "random", "all")
    need(c.negatives in kinds, f"dpo.negatives={c.negatives!r} must be one of {', '.join(kinds)}")
    need(0 <= c.tau < 1, f"dpo.tau={c.tau} must be in [0, 1): JS is in bits, and nothing is above 1")
    need(c.beta > 0, f"dpo.beta={c.beta} must be positive")


def _check_grpo(c: ConfigDict, reward: ConfigDict, need: Callable[[bool, str], None]) -> None:
    need(
        min(reward.w_js, reward.w_fmt) >= 0 < max(reward.w_js, reward.w_fmt),
        "reward.w_js and reward.w_fmt must not be negative, nor both 0",
    )
    need(reward.format in ("exact", "partial"), f"reward.format={reward.format!r} must be exact or partial")
    need(c.samples >= 2, f"grpo.samples={c.samples}: a group needs at least 2")
    need(c.temperature > 0, f"grpo.temperature={c.temperature} must be positive: a group must differ")
    need(c.updates >= 1, f"grpo.updates={c.updates} must be at least 1")
    need(0 < c.eps_low < 1, f"grpo.eps_low={c.eps_low} must be in (0, 1)")
    need(c.eps_high > 0, f"grpo.eps_high={c.eps_high} must be positive")
    need(c.beta_kl >= 0, f"grpo.beta_kl={c.beta_kl} must not be negative")
    how = ("sequence_mean", "token_mean", "constant_length")
    need(c.aggregate in how, f"grpo.aggregate={c.aggregate!r} must be one of {', '.join(how)}")
    need(c.scale in ("std", "none"), f"grpo.scale={c.scale!r} must be std or none")
    need(c.ddof in (0, 1), f"grpo.ddof={c.ddof} must be 0 or 1")
    need(c.eps >= 0 and c.min_std >= 0, f"grpo.eps={c.eps} and grpo.min_std={c.min_std} must not be negative")
    need(c.gold_reward in ("maximal", "measured"), f"grpo.gold_reward={c.gold_reward!r} must be maximal or measured")
    need(c.gold_ce >= 0 and c.gold_gamma >= 0, "grpo.gold_ce and grpo.gold_gamma must not be negative")
    need(
        c.gold_adv_clip > 0, f"grpo.gold_adv_clip={c.gold_adv_clip} must be positive; inf leaves the advantage as it is"
    )


def save(config: FrozenConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`."""
    (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load(workdir: str | Path) -> FrozenConfigDict:
    """Reads a run's `config.json`; nothing is executed.

    Raises:
      ConfigError: not a run directory, or a config that cannot work.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} is not a run directory: {path} does not exist")
    try:
        config = FrozenConfigDict(json.loads(path.read_text()))
        check(config)
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is not a config of this version: {error}") from None
    return config
