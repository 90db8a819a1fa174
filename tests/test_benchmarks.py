"""What benchmarks/ writes down: a page says what its results say, and each machine's stay its own."""

import collections
import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, shapes, table

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_page_is_made_from_its_results(file):
    assert file.with_suffix(".md").read_text() == table.markdown(file.stem, json.loads(file.read_text()))


PROMPT = """
import sys
from pathlib import Path
from benchmarks import ours, shapes
shape = shapes.PRESETS["small"]
side = ours.Side(shape, shapes.make(shape, Path(sys.argv[1])))
print(side.prompt(2).audio.shape, side.prompt(2, live=True).mel.shape)
"""


def test_what_is_measured_can_be_made(tmp_path):
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    command = [sys.executable, "-c", PROMPT, str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\(2, \d+, \d+\) \(2, \d+, 128\)\n", done.stdout)


def test_machines_do_not_replace_each_other():
    before = json.loads((RESULTS / "67m.json").read_text())
    old = next(result for result in before if result["row"] == "rollout" and not result["change"])
    new = copy.deepcopy(old)
    new["ratio"]["median"] = 123.45
    again = compare._with(before, new)
    assert len(again) == len(before)
    assert old not in again
    new["hardware"]["cpu"] = "another processor"
    assert len(compare._with(before, new)) == len(before) + 1
    kept, other = table.markdown("67m", compare._with(before, new)).split(f"## {table.machine(new)}\n")
    assert f"**{old['ratio']['median']:.2f}**" in kept
    assert "123.45" not in kept
    assert "123.45" in other


def test_a_shape_is_changed_as_it_is_written():
    given = ["samples=2", "seconds=12", "dtype=bfloat16", "reference_checkpointing=False"]
    expected = {"samples": 2, "seconds": 12.0, "dtype": "bfloat16", "reference_checkpointing": False}
    assert shapes.changes(given) == expected
    for wrong, said in {
        "sampels=2": "sampels is no field of a shape; there are hidden, ",
        "samples": "samples='' must be int",
        "samples=two": "samples='two' must be int",
        "reference_checkpointing=no": "reference_checkpointing='no' must be bool",
    }.items():
        with pytest.raises(ValueError, match=rf"^{said}"):
            shapes.changes([wrong])


def test_the_limit_of_grpoz_by_hand():
    """One layer of seven numbers and a head of one; a prompt of 10 tokens, two samples and gold of 3 each."""
    shape = dataclasses.replace(
        shapes.PRESETS["small"],
        **dict.fromkeys(("hidden", "mlp", "layers", "vocabulary", "clips"), 1),
        **{"prompt": 10, "samples": 2, "new_tokens": 3},
    )
    prefill = 2 * (2 * 10 + 5 * 1)  # keys and values of all, the rest of one token
    score = 2 * (2 * 16 + 5 * 7 + 6)  # the head on completions alone
    update = 4 * (2 * 19 + 5 * 10 + 9)
    made = shapes.products(shape)
    assert sum(2 * math.prod(size) * n for size, n in made.items()) == prefill + score + update
    prefill_and_score = {(10, 1, 1): 2, (1, 1, 1): 5, (16, 1, 1): 2, (7, 1, 1): 5, (6, 1, 1): 1}
    update_alone = {(19, 1, 1): 4, (10, 1, 1): 10, (9, 1, 1): 2}
    assert made == collections.Counter(prefill_and_score) + collections.Counter(update_alone)
    deeper = shapes.products(dataclasses.replace(shape, layers=3, micro_batch=1, clips=2, chunk=1))
    assert deeper[19, 1, 1] == 2 * 2 * (2 * 7 + 2)  # of each prompt by itself, in both directions
    assert deeper[3, 1, 1] == 2 * 2 * 3  # the update's head, a time step at once
    kept = shapes.products(dataclasses.replace(shape, keep_activations=True, layers=3))
    forward = 2 * (2 * 7 * 3 + 2 * 13 + 5 * 4 + 9)  # gold in two layers, and the prompt's last layer
    back = 2 * (2 * 7 * 19 + 2 * 19 + 5 * 10 + 9)
    rest = 2 * (2 * 7 * 10 + 2 * 10 + 5 * 1) + 2 * (2 * 7 * 16 + 2 * 16 + 5 * 7 + 6)
    assert sum(2 * math.prod(size) * n for size, n in kept.items()) == forward + back + rest
    # A completion's three tokens meet the prompt's ten and 1, 2 and 3 of their own; five products are the gradient's.
    assert shapes.attention(shape) == 2 * (30 + 6) * (2 * 2 + (2 + 5) * 3)
    # Three tokens, each: eight weights, a key and a value of the prompt's ten and of half of the six to be written.
    assert table._bytes_of_decoding(shape) == (3 * 4 * 8, 3 * 4 * 2 * (10 + 3))
    # Queries, keys and values are one matrix there, gate and up another; a prompt's two samples are decoded at once.
    assert shapes.token(shape) == ([(3, 1), (1, 1), (2, 1), (1, 1), (1, 1)], 2)
    sizes, _ = shapes.token(shapes.PRESETS["67m"])
    assert sum(map(math.prod, sizes)) == shapes.PRESETS["67m"].matrix_parameters
