"""Every command in docs/experiments.md is one that the program takes."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from ambijax import evaluate, settings

TEXT = (Path(__file__).parents[1] / "docs/experiments.md").read_text()
COMMANDS = re.findall(r"^    python -m (ambijax\.\w+ .*)$", TEXT, re.MULTILINE)
ROWS = re.findall(r"^\| .* \| (all|`configs/\w+\.py`) \| (.*) \|$", TEXT, re.MULTILINE)
OVERRIDES = [
    (config, override)
    for configs, cell in ROWS
    for override in re.findall(r"`(.*?)`", cell)
    for config in (re.findall(r"configs/(\w+)\.py", configs) or ["sft", "dpo", "grpo", "grpoz"])
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    module, *arguments = shlex.split(command)
    if module == "ambijax.evaluate":
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        args, arguments = evaluate._parse()
        if args.run:
            assert f"--workdir {args.run} " in TEXT  # a run that some command above makes
            return
    config, workdir = settings.parse([module, *arguments])
    assert str(workdir).startswith("runs/")
    assert config.data.corpus == "manifest"


@pytest.mark.parametrize(("config", "override"), OVERRIDES)
@pytest.mark.parametrize("corpus", ["iemocap", "tiny"])
def test_overrides_parse_and_change_something(config, override, corpus):
    command = ["train", f"--config=configs/{config}.py:{corpus}", "--workdir=runs/x"]
    plain, _ = settings.parse(command)
    changed, _ = settings.parse([*command, *shlex.split(override)])
    assert changed != plain


def test_the_document_has_them_all():
    assert len(COMMANDS) >= 12
    assert len(OVERRIDES) >= 35
