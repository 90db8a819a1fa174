"""The one-line ablations of docs/experiments.md: each is a key that exists, is accepted and is not the default.

That its commands parse is tested with those of all pages (test_docs.py).
"""

import re
import shlex
from pathlib import Path

import pytest

from ambijax import settings

TEXT = (Path(__file__).parents[1] / "docs/experiments.md").read_text()
ROWS = re.findall(r"^\| .* \| (all|`configs/\w+\.py`) \| (.*) \|$", TEXT, re.MULTILINE)
OVERRIDES = [
    (config, override)
    for configs, cell in ROWS
    for override in re.findall(r"`(.*?)`", cell)
    for config in (re.findall(r"configs/(\w+)\.py", configs) or ["sft", "dpo", "grpo", "grpoz"])
]


@pytest.mark.parametrize(("config", "override"), OVERRIDES)
@pytest.mark.parametrize("corpus", ["iemocap", "tiny"])
def test_overrides_are_accepted_and_change_something(config, override, corpus):
    command = ["train", f"--config=configs/{config}.py:{corpus}", "--workdir=runs/x"]
    plain, _ = settings.parse(command)
    changed, _ = settings.parse([*command, *shlex.split(override)])
    assert changed != plain


def test_a_run_that_is_evaluated_is_made_above():
    for run in re.findall(r"--run (\S+)", TEXT):
        assert f"--workdir {run} " in TEXT[: TEXT.index(f"--run {run}")]


def test_every_choice_of_method_md_has_an_override():
    method = (Path(__file__).parents[1] / "docs/method.md").read_text()
    keys = {match.split(".")[-1] for match in re.findall(r"--config\.([\w.]+)=", TEXT)}
    for key in ("kl_direction", "gold_label", "negatives", "aggregate", "format", "gold_reward", "gold_in_loss"):
        assert key in method
        assert key in keys
    assert len(OVERRIDES) >= 35
