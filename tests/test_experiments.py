"""The one-line ablations of docs/experiments.md: each is a key that exists, is accepted and is not the default.

That its commands parse is tested with those of all pages (test_docs.py).
"""

import json
import os
import re
import shlex
import subprocess
import sys
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


@pytest.mark.parametrize("corpus", ["cremad", "tiny"])
@pytest.mark.parametrize(
    ("row", "gold_in_loss"), [("gold in the statistics alone", False), ("equation 7 to the letter", True)]
)
def test_what_a_row_says_gold_is_for_is_all_it_is_for(row, gold_in_loss, corpus):
    override = re.search(rf"^\| {row} \| .* \| `(.*)` \|$", TEXT, re.MULTILINE)[1]
    command = ["train", f"--config=configs/grpoz.py:{corpus}", "--workdir=runs/x", *shlex.split(override)]
    config, _ = settings.parse(command)
    assert (config.grpo.gold_in_loss, config.loss.lambda_kl, config.grpo.gold_ce) == (gold_in_loss, 0, 0)


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


@pytest.mark.slow
def test_a_checkpoint_is_asked_in_the_style_of_audio_reasoner(tmp_path):
    # The tiny model does not know the format; the path from prompt to forced read-out is what is tested.
    root = Path(__file__).parents[1]
    command = ["ambijax.evaluate", "--checkpoint=ambijax/tiny", "--config=configs/audio_reasoner.py:tiny"]
    small = {"root": tmp_path / "corpus", "speakers": 5, "clips_per_speaker": 2, "max_tokens": 24}
    overrides = [f"--config.data.{key}={value}" for key, value in small.items()]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-m", *command, *overrides, f"--workdir={tmp_path / 'run'}"], cwd=root, env=env, check=True
    )
    lines = (tmp_path / "run/eval/test/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for record in map(json.loads, lines):
        assert record["forced"] == 1
        assert record["format"] == 0
        assert sum(record["readout"]) == pytest.approx(1)
