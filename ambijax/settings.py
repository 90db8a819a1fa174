"""An experiment's settings: from a config file and the command line, checked at once, and to and from a run directory.

A config file is a program and is executed; what a run leaves is `config.json`, plain data. So whoever evaluates or
resumes a run somebody else made executes nothing of theirs.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from ambijax import rules
from ambijax.errors import ConfigError, DataError
from ambijax.workdir import read_object, replace

_USAGE = (
    "usage: python -m ambijax.train --config configs/grpoz.py:tiny --workdir runs/tiny [--config.KEY=VALUE ...] "
    "[--dry_run]"
)
_SHOWN = 300  # characters of somebody else's message, which may repeat a whole value


def parse(argv: list[str]) -> tuple[FrozenConfigDict, Path]:
    """`--config FILE[:VARIANT] [--config.KEY=VALUE ...] --workdir DIR` to (checked settings, run directory).

    Without --config the run in `--workdir` goes on with the settings in its config.json.

    Raises:
      ConfigError: a flag, a key or a value is wrong; all that is wrong is listed at once.
    """
    if {"-h", "--help"} & set(argv):
        print(_USAGE)
        raise SystemExit
    wrong = []
    changed = [argument for argument in argv if argument.startswith("--config.")]
    if changed and not any(re.match("--?config(=|$)", argument) for argument in argv):
        raise ConfigError(f"{changed[0]} changes a key of a file, which is missing: give --config FILE as well")
    try:
        config, workdir = _read(argv)
    except ConfigError:
        wrong, readable = _unreadable(argv)
        if not wrong:
            raise
        config, workdir = _read(readable)
    check(config, wrong)
    return FrozenConfigDict(config), workdir


def _unreadable(argv: list[str]) -> tuple[list[str], list[str]]:
    """What is wrong with each --config.KEY=VALUE that cannot be read, and the arguments without these."""
    overrides = [argument for argument in argv if argument.startswith("--config.") and "=" in argument]
    readable = others = [argument for argument in argv if argument not in overrides]
    wrong = []
    for argument in overrides:
        try:
            _read([*others, argument])
            readable = [*readable, argument]
        except ConfigError as error:
            wrong.append(str(error))
    return wrong, readable


def _read(argv: list[str]) -> tuple[ConfigDict | FrozenConfigDict, Path]:
    """Settings as the arguments say, their values not checked, and the run directory."""
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", help_string="FILE[:VARIANT]", flag_values=values, sys_argv=argv)
        flags.DEFINE_string("workdir", "", "run directory", flag_values=values)
        with at_home(argv):
            rest = values(argv)[1:]
            config = values.config
            _ = config is None or config.algorithm  # a file that failed to load fails here
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f"{one_line(error)}; {_USAGE}") from error
    except flags.Error as error:
        raise ConfigError(one_line(error)) from error
    except Exception as error:  # a config file is a program of the user's and may fail in any way
        text = one_line(error)  # of a section that is not there only its name
        if text.isidentifier():
            text = f"no section {text} in it; another algorithm's file has it"
        raise ConfigError(f"--config: {text.removeprefix('ValueError: ')}") from error
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r:.{_SHOWN}}; {_USAGE}")
    workdir = Path(values.workdir)
    if not values.workdir or not values.workdir.isprintable():
        raise ConfigError(f"--workdir is missing or no path; {_USAGE}")
    if config is None and (workdir / "config.json").exists():
        return load(workdir), workdir  # resumes somebody's run, and executes nothing of theirs
    if config is None:
        raise ConfigError(f"--config is missing; {_USAGE}")
    return config, workdir


@contextlib.contextmanager
def at_home(argv: list[str]) -> Iterator[None]:
    """Meanwhile `from configs import base` in --config=DIR/configs/sft.py finds DIR/configs, from any directory.

    Raises:
      ConfigError: there is no such file.
    """
    file = re.search("^--?config[=\n]([^:\n]+)", "\n".join(argv), re.MULTILINE)
    before = sys.path.copy()
    if file:
        if not Path(file[1]).exists():
            raise ConfigError(f"no file {file[1]} here, in {Path.cwd()}; a clone has them in configs/")
        sys.path.insert(0, str(Path(file[1]).resolve().parent.parent))
    try:
        yield
    finally:
        sys.path[:] = before


def one_line(error: Exception) -> str:
    """The gist of an error of config_flags, which may be a traceback in a string or the repr of another error."""
    text = str(error).strip() or type(error).__name__
    if "Traceback" in text:
        text = text.splitlines()[-1]
    text = " ".join(text.replace("\\n", " ").replace("\\'", "'").split())
    while len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if error.args and isinstance(error.args[0], KeyError):  # config_flags' for a key: this alone, or with a similar one
        text = f"no such setting: {text}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " ..."


def check(config: ConfigDict | FrozenConfigDict, wrong: Sequence[str] = ()) -> None:
    """Everything that can be wrong with the values alone, before any file is read; `wrong` is what was found before.

    Raises:
      ConfigError: lists all problems.
    """
    if wrong := [*wrong, *rules.problems(config.to_dict())]:
        raise ConfigError("configuration: " + "; ".join(wrong))


def save(config: FrozenConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`."""
    replace(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def load(workdir: str | Path) -> FrozenConfigDict:
    """Reads a run's `config.json`, of an earlier version too (`rules.ADDED`); nothing is executed.

    Raises:
      ConfigError: not a run directory, or a config that cannot work.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} is not a run directory: {path} does not exist")
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "model_type" in found:
            raise ConfigError(
                f"{workdir} is no run but a checkpoint; name it in model.checkpoint, or with --checkpoint"
            )
        config = FrozenConfigDict(rules.completed(found))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {one_line(error)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        check(config)
    except ConfigError as error:
        advice = f"mend it there, or use the version of ambijax that {path.with_name('env.json')} names"
        raise ConfigError(f"{path}: {error}; {advice}") from None
    moved = ConfigDict(config.to_dict())
    moved.data.root, moved.model.checkpoint = (
        _found(Path(workdir), where) for where in (config.data.root, config.model.checkpoint)
    )
    return FrozenConfigDict(moved)


def _found(workdir: Path, where: str) -> str:
    """A path of a run: relative to where it was started, or, since it may have moved, to a directory above its own.

    What lies under the same name here is the last that can be meant.
    """
    homes = [*workdir.resolve().parents, Path.cwd()]
    with contextlib.suppress(DataError, TypeError):  # a damaged one, or of an earlier version, that does not say
        homes.insert(0, Path(read_object(workdir / "env.json").get("directory")))
    there = next((home / where for home in homes if (home / where).exists()), Path(where))
    return where if there.resolve() == Path(where).resolve() else str(there)
