"""The commands that the documentation shows: found in its code blocks, and parsed by the command's own parser.

# needs CREMA-D, Qwen2-Audio-7B      such a line in a block says that its commands cannot run everywhere: they are
                                     parsed and not run. All others run on the tiny lab (pytest -m slow).
"""

import argparse
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from ambijax import manifest, settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("launch/*.md"),
    ]
    if path.name not in ("log.md", "api.md")  # what was run once, with the flags of its day; what docstrings say
)
_MODULE = re.compile(r"-m (ambijax(?:\.\w+)+)(.*)")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    module: str  # ambijax.train
    arguments: tuple[str, ...]
    needs: str  # '' = nothing but the tiny lab
    environment: tuple[str, ...] = ()  # NAME=VALUE before the command

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.module} {' '.join(self.arguments)}"


def blocks(text: str) -> list[tuple[int, list[str]]]:
    """(number of its first line, lines) of every code block, fenced or indented by four spaces."""
    found, lines, fence, before = [], text.splitlines(), None, ""
    current: list[str] = []
    start = 0
    for number, line in enumerate([*lines, ""], 1):
        if fence is not None:
            if line.strip().startswith("```"):
                found.append((start, current))
                fence, current = None, []
            else:
                current.append(line[fence:])
        elif line.strip().startswith("```"):
            fence, start, current = len(line) - len(line.lstrip()), number + 1, []
        elif line.startswith("    ") and (current or not before.strip()):
            start = start if current else number
            current.append(line[4:])
        elif current:
            found.append((start, current))
            current = []
        before = line
    return found


def commands(page: Path) -> list[Command]:
    """The `python -m ambijax...` commands of a page, with their shell variables filled in."""
    found = []
    for start, lines in blocks(page.read_text(encoding="utf-8")):
        needs = next((line.partition("needs")[2].strip() for line in lines if line.lstrip().startswith("# needs ")), "")
        variables: dict[str, str] = {}
        number = 0
        while number < len(lines):
            first, line = number, lines[number]
            while line.rstrip().endswith("\\") and number + 1 < len(lines):
                number += 1
                line = line.rstrip()[:-1] + lines[number]
            number += 1
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            if assigned := re.match(r'\s*(?:export )?(\w+)=("[^"]*"|\S*)\s*(?:#.*)?$', line):
                variables[assigned[1]] = assigned[2].strip('"')
            for part in re.split(r"&&|;|(?<!\S)\|(?!\S)|(?<!\S)&(?!\S)", line):
                if match := _MODULE.search(part):
                    words = shlex.split(match[2], comments=True)
                    words = [w for i, w in enumerate(words) if w not in (">", "2>") and words[i - 1] not in (">", "2>")]
                    before = tuple(re.findall(r"(?<!\S)[A-Z_]+=\S+", part[: match.start()]))
                    page_name = str(page.relative_to(ROOT))
                    found.append(Command(page_name, start + first, match[1], tuple(words), needs, before))
    return found


class Parsed(BaseException):
    """The arguments were understood; the command goes no further. Not an Exception: no command may catch it."""


def parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts the command as far as its arguments go: up to the first thing that is read after them.

    Raises:
      Parsed: it understood them.
      SystemExit, ConfigError: it did not.
    """

    def then_stop(parse):
        def stop(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return stop

    def stop(*_, **__):
        raise Parsed

    module = importlib.import_module(command.module)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{command.module}.__main__")
    monkeypatch.setattr("sys.argv", [command.module, *command.arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(settings, "parse", then_stop(settings.parse))
    monkeypatch.setattr(settings, "load", stop)
    monkeypatch.setattr(manifest, "read", stop)
    module.main()
