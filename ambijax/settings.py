"""An experiment's settings: from a config file and the command line, checked at once, and to and from a run directory.

A config file is a program and is executed; what a run leaves is `config.json`, plain data. So whoever evaluates or
resumes a run somebody else made executes nothing of theirs.
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ambijax import rules
from ambijax.errors import ConfigError
from ambijax.workdir import replace


def parse(argv: list[str]) -> tuple[FrozenConfigDict, Path]:
    """`--config FILE[:VARIANT] [--config.KEY=VALUE ...] --workdir DIR` to (checked settings, run directory).

    Without --config the run in `--workdir` goes on with the settings in its config.json.

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
    workdir = Path(values.workdir)
    if not values.workdir or not values.workdir.isprintable():
        raise ConfigError(f"--workdir is missing or no path; {usage}")
    if config is None and (workdir / "config.json").exists():
        return load(workdir), workdir  # resumes somebody's run, and executes nothing of theirs
    if config is None:
        raise ConfigError(f"--config is missing; {usage}")
    check(config)
    return FrozenConfigDict(config), workdir


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
      ConfigError: lists all problems.
    """
    if wrong := rules.problems(config.to_dict()):
        raise ConfigError("configuration: " + "; ".join(wrong))


def save(config: FrozenConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`."""
    replace(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


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
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {_one_line(error)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config
