"""Updates that must not happen: NaN in one batch or in all, spikes (F43, F46); warnings about collapsed roll-outs."""

import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from safetensors.numpy import load_file, save_file

from ambijax import assemble, digest, guard, predictions, prompt, settings
from ambijax import train as training
from ambijax.errors import NonFiniteError
from ambijax.health import Health
from ambijax.journal import Log
from tests import command
from tests.command import SHORT, lines, logged, needs_tiny, newest, only_message, train

EMBEDDING = "language_model.model.embed_tokens.weight"

# The guard.


def judged(losses: list[float], *, sigma: float, window: int = 4) -> list[bool]:
    state, applied, in_a_row = guard.start(window), [], 0
    judge = jax.jit(lambda state, loss: guard.judge(state, loss, jnp.float32(1), sigma=sigma))
    for loss in losses:
        apply, state = judge(state, jnp.float32(loss))
        applied.append(bool(apply))
        in_a_row = 0 if apply else in_a_row + 1
        assert int(state.in_a_row) == in_a_row
    assert int(state.applied) == sum(applied)
    assert int(state.skipped) == len(applied) - sum(applied)
    return applied


def test_a_spike_is_far_above_the_last_applied_updates():
    # Mean 1, deviation .1 over the window: 6 sigma is 1.6.
    calm = [0.9, 1.1, 0.9, 1.1]
    assert judged([*calm, 1.59], sigma=6) == [True] * 5
    assert judged([*calm, 1.61, 1.61, 1.0], sigma=6) == [True] * 4 + [
        False,
        False,
        True,
    ]  # spikes do not move the limit
    assert judged([*calm, 1.61, 99.0], sigma=0) == [True] * 6
    assert judged([0.9, 50.0, 1.0], sigma=6) == [True] * 3  # too few to judge by
    assert judged([0.0] * 4 + [5e-8, 1.0], sigma=6) == [True] * 5 + [False]  # losses that hardly move


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_applied(bad):
    assert judged([1.0, bad, 1.0], sigma=0) == [True, False, True]
    for sizes in ((bad, 1.0), (1.0, bad)):
        apply, after = guard.judge(guard.start(4), jnp.float32(1), *map(jnp.float32, sizes), sigma=0)
        assert not apply
        assert int(after.in_a_row) == 1


# What is said.


def test_collapses_are_said_once_with_their_metric(tmp_path, caplog):
    config = ConfigDict(
        {
            "algorithm": "sft",
            "warn": {"degenerate": 0.9, "format": 0.5, "tokens": 16.0, "logp_gap": 0.1},
            "guard": {"max_skipped": 3},
            "data": {"cot": True},
        }
    )
    with Log(tmp_path, 0) as log:
        health = Health(FrozenConfigDict(config), log, 0)
        good = {"reward/degenerate": 0.0, "rollout/format": 1.0, "rollout/tokens": 90.0, "loss": 1.0}
        for step, change in enumerate(
            [{}, {"rollout/format": 0.4}, {"rollout/format": 0.3}, {}, {"rollout/format": 0.2}]
        ):
            health.warn(step, good | change)
        health.warn(5, good | {"reward/degenerate": 1.0, "rollout/tokens": 3.0})
        health.warn(6, {"loss": 1.0})  # SFT rolls nothing out
        for step in (7, 8):
            health.warn(step, good | {"rollout/js": np.nan, "logp_gap": 0.2})
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" is ")[0] for text in said] == [
        "step 1: rollout/format = 0.4",
        "step 4: rollout/format = 0.2",
        "step 5: reward/degenerate = 1",
        "step 5: rollout/tokens = 3",
        "step 7: rollout/js",
        "step 7: logp_gap = 0.2",
    ]
    assert "below warn.format = 0.5" in said[0]
    config.data.cot = False
    caplog.clear()
    with Log(tmp_path, 0) as log:
        Health(FrozenConfigDict(config), log, 0).warn(0, {"rollout/tokens": 5.0})  # an answer alone is that short
    assert not caplog.records


def test_too_many_in_a_row_stop_with_the_batches_written_down(tmp_path):
    config = FrozenConfigDict({"algorithm": "sft", "guard": {"max_skipped": 2}, "data": {"cot": True}})
    with Log(tmp_path, 0) as log:
        health = Health(config, log, 0)
        aux = [
            {"skipped/total": t, "skipped/in_a_row": r, "loss": np.nan, "gradient_norm": np.nan}
            for t, r in ((0, 0), (1, 1), (1, 0), (2, 1), (3, 2))
        ]
        for step in range(5):
            health.note(step, [f"clip{step}"], aux[step])
        with pytest.raises(NonFiniteError, match="2 updates in a row were skipped, the last at step 4"):
            health.look()
    bad = lines(tmp_path / "bad_batches.jsonl")
    assert [(line["step"], line["ids"], line["loss"]) for line in bad] == [
        (1, ["clip1"], None),
        (3, ["clip3"], None),
        (4, ["clip4"], None),
    ]


def test_a_batch_counts_once_however_often_it_is_learned_from(tmp_path):
    """With mu updates a batch one that is not finite is skipped mu times, and a restart would meet it again."""
    changes = {"algorithm": "grpo", "grpo": {"updates": 12}, "guard": {"max_skipped": 2}, "data": {"cot": True}}
    with Log(tmp_path, 0) as log:
        health = Health(FrozenConfigDict(changes), log, 0)
        bad = {"loss": np.nan, "gradient_norm": np.nan}
        health.note(0, ["one"], {"skipped/total": 12, "skipped/in_a_row": 12} | bad)
        health.note(1, ["two"], {"skipped/total": 24, "skipped/in_a_row": 24} | bad)
        with pytest.raises(NonFiniteError, match="24 updates in a row were skipped, the last at step 1"):
            health.look()


def test_a_dev_read_out_that_is_not_a_number_is_no_score_and_ends_nothing(tmp_path, monkeypatch, caplog):
    good = {"id": "u6", "target": [0.5, 0.5], "readout": [0.5, 0.5], "js_gold": 0.1}
    good |= {"format": 1.0, "forced": False, "tokens": 3}
    scored = []
    run = types.SimpleNamespace(
        setting=types.SimpleNamespace(
            config=FrozenConfigDict({"steps": 4, "eval": {"every": 2, "dev_clips": 0, "metric": "js"}})
        ),
        saved=types.SimpleNamespace(wait=lambda: None, score=lambda *given: scored.append(given)),
        clock=types.SimpleNamespace(lap=lambda _: None),
        sets={"dev": types.SimpleNamespace(spread=lambda _: [0, 1])},
        directory=tmp_path,
        variables=lambda _: {},
    )
    for changes in ({"readout": [np.nan, np.nan]}, {"js_gold": np.nan}):
        monkeypatch.setattr(predictions, "collect", lambda *_, c=changes, **__: [good, good | {"id": "u7"} | c])
        assert training.assess(run, None, 2) == {}
        assert not scored
        assert "step 2 has no score: the read-out of 1 of 2 utterances is not a number, u7 say" in caplog.text
        caplog.clear()
    monkeypatch.setattr(predictions, "collect", lambda *_, **__: [good, good])
    assert training.assess(run, None, 2)["dev/js"] == 0
    assert scored == [(2, 0.0)]


# The real command on a model with damaged weights.


def damaged_model(directory, tokens: list[int]) -> str:
    """A copy of the tiny model that turns into NaN whatever one of `tokens` stands in."""
    shutil.copytree(command.ROOT / "ambijax" / "tiny", directory)
    weights = load_file(directory / "model.safetensors")
    table = weights[EMBEDDING].copy()
    table[tokens] = np.nan
    save_file(weights | {EMBEDDING: table}, directory / "model.safetensors", metadata={"format": "pt"})
    return f"--config.model.checkpoint={directory}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus") / "tiny"


@needs_tiny
def test_a_nan_in_one_batch_is_skipped_and_counted(tmp_path, corpus):
    arguments = train(tmp_path / "run", corpus, "sft", *SHORT)
    config, _ = settings.parse([str(a) for a in arguments])
    vocabulary = prompt.load(config.model.checkpoint, config.data.labels)
    utterances = assemble.splits(config, assemble.corpus(config))["train"]
    used = {u.id: {*vocabulary.encode(u.cot), *vocabulary.encode(u.transcript)} for u in utterances}
    everyone = [token for tokens in used.values() for token in tokens]
    clip, token = next((name, t) for name, tokens in used.items() for t in tokens if everyone.count(t) == 1)
    process = command.start(*arguments, damaged_model(tmp_path / "model", [token]), stdout=-3, JAX_LOG_COMPILES="1")
    _, err = process.communicate(timeout=2 * command.LIMIT)
    assert process.returncode == 0, err
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    bad = lines(tmp_path / "run" / "bad_batches.jsonl")
    assert 1 <= len(bad) <= 2  # twelve clips in batches of four: each is seen once or twice in five steps
    assert all(clip in line["ids"] for line in bad)
    skipped = [line["step"] for line in metrics if line["skipped"]]
    assert skipped == [line["step"] for line in bad]
    assert all((line["loss"] is None) == (line["step"] in skipped) for line in metrics)
    assert metrics[-1]["skipped/total"] == len(bad)
    digest.read_arrays(newest(tmp_path / "run"), digest.read_record(newest(tmp_path / "run")))  # finite
    assert err.count("Compiling jit(update)") == 1  # F46


@needs_tiny
def test_nan_in_every_batch_stops_with_a_finite_checkpoint(tmp_path, corpus):
    arguments = train(tmp_path / "run", corpus, "sft", *SHORT, "--config.checkpoint.every=1")
    every = damaged_model(tmp_path / "model", list(range(600)))
    code, _, err = command.run(*arguments, every, "--config.guard.max_skipped=3")
    assert code == 4, err
    assert "3 updates in a row were skipped, the last at step 2" in only_message(err)
    assert logged(tmp_path / "run", 3)()
    assert [line["step"] for line in lines(tmp_path / "run" / "bad_batches.jsonl")] == [0, 1, 2]
    record = digest.read_record(newest(tmp_path / "run"))
    arrays = digest.read_arrays(newest(tmp_path / "run"), record)  # which refuses what is not finite
    assert not any(np.any(array) for name, array in arrays.items() if name.endswith("/b") and "trained" in name)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["guard"]["max_skipped"] == 3
