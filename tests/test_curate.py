"""Curation against a real HTTP server on loopback: what it sends, what it survives, what it costs, what it keeps."""

import asyncio
import base64
import collections
import dataclasses
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ambijax import curate, emotions, manifest, teacher
from ambijax.acoustics import Acoustics, Norm
from ambijax.curation import checks, client, ledger, limits, prompts
from ambijax.curation.ledger import Answer
from ambijax.emotions import CREMAD
from ambijax.errors import ConfigError, DataError
from configs.curate import get_config
from tests.chat_server import GOLD, Call, completion, error, good, serving

# ml_collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
CANARY = "sk-canary-7Qz4WvN8rT2xLp9K"
OTHERS = {  # prices that make one item cost 0.0043 USD at the server's usage
    "calls.backoff_s": 0.01,
    "calls.backoff_max_s": 0.05,
    "calls.timeout_s": 30.0,
    "calls.retries": 2,
    "calls.drain_s": 2.0,
    "writer.rpm": 100_000,
    "judge.rpm": 100_000,
    "writer.tpm": 100_000_000,
    "judge.tpm": 100_000_000,
    "judge.model": "judge-model",
}


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short clip, and the directory every corpus of this file lies beside."""
    root = tmp_path_factory.mktemp("clips")
    tone = 0.3 * np.sin(2 * np.pi * 220 * np.arange(4800) / 16_000) * np.linspace(0.2, 1, 4800)
    soundfile.write(root / "clip.wav", tone, 16_000, subtype="PCM_16")
    return root


def corpus(root: Path, clips: Path, n: int) -> Path:
    """A manifest of n utterances; 'item-3' stands in the transcript, so that the server knows whom it serves."""
    root.mkdir(exist_ok=True)
    (root / "clip.wav").write_bytes((clips / "clip.wav").read_bytes())
    votes = {"sadness": 6, "anger": 2}
    utterances = [manifest.Utterance(f"u{i}", "clip.wav", f"item-{i} is here", f"s{i % 2}", 0, votes) for i in range(n)]
    manifest.write(manifest.Corpus(root, tuple(utterances)))
    return root


def arguments(root: Path, out: Path, url: str, **config: object) -> list[str]:
    keys = {**OTHERS, "writer.base_url": url, "judge.base_url": url, **config}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return [f"--config={ROOT / 'configs/curate.py'}:cremad", f"--manifest={root}", f"--out={out}", *flags]


@pytest.fixture
def go(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command in this process: go(n, server, 'flag', ..., key=value) -> what it printed."""
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a busy disk would take most of the time; kills test the real one

    def run(n: int, server, *flags: str, **config: object) -> str:
        root = tmp_path / "corpus"
        if not root.exists():
            corpus(root, clips, n)
        config = {key.replace("__", "."): value for key, value in config.items()}
        argv = arguments(root, tmp_path / "cot.jsonl", server.url if server else "http://127.0.0.1:9/v1", **config)
        monkeypatch.setattr(sys, "argv", ["curate", *argv, *flags])
        curate.main()
        return capsys.readouterr().out

    run.out = tmp_path / "cot.jsonl"
    run.ledger = tmp_path / "cot.ledger.jsonl"
    run.root = tmp_path / "corpus"
    return run


def rows(path: Path) -> dict[str, dict]:
    """The results by id; every line must be JSON and every id stand once."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


# The ordinary run ----------------------------------------------------------------------------------------------------


def test_every_item_is_drafted_and_judged_once_and_merged(go) -> None:
    with serving() as server:
        said = go(5, server)
        assert collections.Counter(call.role for call in server.calls) == {"writer": 5, "judge": 5}
        assert {row["status"] for row in rows(go.out).values()} == {"ok"}
        assert "accepted    5" in said
        assert f"${5 * (580 * 2.5 + 20 * 32 + 200 * 10 + 580 * 0.75 + 200 * 4.5) / 1e6:.4f} in all" in said
        again = go(5, server)
        assert "0 to do of 5 (5 finished earlier)" in again
        assert len(server.calls) == 10
    about = json.dumps({"description": "mine", "audio_root": "../corpus", "licence": "ask Anna"})
    (go.root / "corpus.json").write_text(about)
    go(5, None, "--merge")
    assert [u.cot for u in manifest.read(go.root).utterances] == [GOLD] * 5
    assert (go.root / "corpus.json").read_text() == about


def test_the_teacher_hears_the_clip_and_knows_the_soft_label(go) -> None:
    with serving() as server:
        go(1, server)
    writer, judge = server.calls
    text, sound = writer.body["messages"][1]["content"]
    assert "sadness 0.75, anger 0.25" in text["text"]
    assert '"item-0 is here"' in text["text"]
    assert sound["type"] == "input_audio"
    assert sound["input_audio"]["format"] == "wav"
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["input_audio"]["data"])), dtype="int16")
    expected, _ = soundfile.read(go.root / "clip.wav", dtype="int16")
    assert rate == 16_000
    np.testing.assert_array_equal(samples, expected)
    assert writer.body["modalities"] == ["text"]
    assert writer.body["max_completion_tokens"] == 600
    assert "input_audio" not in judge.text
    assert GOLD.replace("\n", "\\n") in judge.text


def test_dry_run_estimates_and_calls_nothing(go, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        go(3, server, "--dry_run")  # the key is not needed either
        monkeypatch.delenv("OPENAI_API_KEY")
        said = go(3, server, "--dry_run")
        assert "the rate limits alone take 3 min" in go(3, server, "--dry_run", writer__rpm=1)
        assert not server.calls
    assert re.search(r"items +3 to do of 3", said)
    assert "6 requests" in said
    assert float(re.search(r"\$(\d+\.\d+) if every", said).group(1)) < float(
        re.search(r"\$(\d+\.\d+) at most", said).group(1)
    )
    assert not list(go.out.parent.glob("cot*"))


def test_one_attempt_costs_at_most_what_a_long_first_draft_does(go) -> None:
    longest = {"writer__expected_tokens": get_config().writer.max_completion_tokens}
    said = go(3, None, "--dry_run", attempts=1, validator="none", **longest)
    passes, most = (float(x) for x in re.findall(r"\$(\d+\.\d+)", said)[:2])
    assert passes == most > 0


def test_estimate_bounds_what_a_run_costs(go, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft and verdict as long as allowed, all attempts used up: the bill stays under the estimate's bound."""
    long = "x" * 1800  # 600 tokens of three bytes

    def wordy(call: Call) -> dict:
        size = sum(len(p["text"]) for m in call.body["messages"] for p in _parts(m) if "text" in p)
        body = completion(long if call.role == "writer" else "INCONSISTENT\n" + long)
        body["usage"] = {"prompt_tokens": size // 3, "completion_tokens": call.body["max_completion_tokens"]}
        return body

    with serving(wordy) as server:
        said = go(4, server)
    bound = float(re.search(r"\$(\d+\.\d+) at most", said).group(1))
    cost = float(re.search(r"\$(\d+\.\d+) in all", said).group(1))
    assert 0 < cost <= bound + 0.01  # the bound is printed in cents


def _parts(message: dict) -> list[dict]:
    return message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]


# A hostile server ----------------------------------------------------------------------------------------------------

BAD_FORMAT = GOLD.replace("Step 2 Audio Analysis:", "Step 2:")
LEAK = GOLD.replace("mostly sounds sad", "got 6 of 8 votes for sadness")
EXCUSE = "I'm sorry, but I can't infer emotions from someone's voice."


def _times(first: object, *, n: int) -> object:
    """`first` to the first n requests of an item, help to the others."""
    return lambda call: first if call.nth < n else good(call)


# What the server does to an item's writer (or 'judge:' its judge) -> how the item must end, and after how many drafts.
HOSTILE = {
    "429 with Retry-After": (_times(error(429, "slow down", "rate_limit", {"Retry-After": "0.05"}), n=1), "ok", "", 2),
    "429 without": (_times(error(429, "slow down"), n=2), "ok", "", 3),
    "429 for ever": (_times(error(429, "slow down"), n=99), "failed", "HTTP 429: slow down", 3),
    "429 with a date": (
        _times(error(429, "x", None, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), n=1),
        "ok",
        "",
        2,
    ),
    "429 with nonsense": (_times(error(429, "x", None, {"Retry-After": "soon"}), n=1), "ok", "", 2),
    "500 twice": (_times(error(500, "oops"), n=2), "ok", "", 3),
    "500 for ever": (_times(error(500, "oops"), n=99), "failed", "HTTP 500: oops", 3),
    "503 without a body": (_times((503, b"", {}), n=99), "failed", "HTTP 503", 3),
    "400": (_times(error(400, "audio too short"), n=99), "failed", "HTTP 400: audio too short", 1),
    "drops once": (_times("drop", n=1), "ok", "", 2),
    "drops for ever": (_times("drop", n=99), "failed", "connection", 3),
    "200 with garbage": (_times(b"<html>busy</html>", n=99), "failed", "garbage", 3),
    "200 with garbage once": (_times(b"\xff\xfe{", n=1), "ok", "", 2),
    "200 html": (_times((200, b"<html>", {"Content-Type": "text/html"}), n=99), "failed", "garbage", 3),
    "200 {}": (_times({}, n=99), "failed", "garbage: not a chat completion", 3),
    "200 []": (_times(b"[]", n=99), "failed", "garbage", 3),
    "200 choices null": (_times({"choices": None}, n=99), "failed", "garbage", 3),
    "200 nested": (_times(b"[" * 50_000, n=99), "failed", "garbage", 3),
    "cut body": (_times((200, b'{"cho', {"Content-Length": "50", "Connection": "close"}), n=1), "ok", "", 2),
    "refusal once": (_times(completion(EXCUSE), n=1), "ok", "", 2),
    "refusal twice": (_times(completion(None, refusal="I can't help with that."), n=99), "rejected", "refused", 2),
    "content filter": (_times(completion("", finish="content_filter"), n=99), "rejected", "refused", 2),
    "cut by length once": (_times(completion(GOLD[:200], finish="length"), n=1), "ok", "", 2),
    "cut by length": (_times(completion(GOLD, finish="length"), n=99), "rejected", "cut", 3),
    "no content": (_times(completion(None), n=99), "rejected", "format", 3),
    "bad format once": (_times(completion(BAD_FORMAT), n=1), "ok", "", 2),
    "half a character": (_times(completion(BAD_FORMAT + "\ud83d"), n=1), "ok", "", 2),
    "bad format": (_times(completion(BAD_FORMAT), n=99), "rejected", "format", 3),
    "leak": (_times(completion(LEAK), n=99), "rejected", "leak", 3),
    "too long": (_times(completion(GOLD + " very" * 600), n=99), "rejected", "length", 3),
    "control token": (_times(completion(GOLD + "<|im_end|>"), n=99), "rejected", "format", 3),
    "lone surrogate": (_times(b'{"choices":[{"message":{"content":"\\ud800"}}]}', n=1), "ok", "", 2),
    "judge: disagrees once": (_times(completion("INCONSISTENT\nIt names no sadness."), n=1), "ok", "", 2),
    "judge: disagrees": (_times(completion("INCONSISTENT\nNo sadness."), n=99), "rejected", "judge: No sadness.", 3),
    "judge: is silent": (_times(completion("Well."), n=99), "rejected", "judge: gave no verdict", 3),
    "judge: 500": (_times(error(500, "oops"), n=99), "failed", "HTTP 500", 1),
}
SLOW = {
    "hangs once": (_times("hang", n=1), "ok", "", 2),
    "hangs for ever": (_times("hang", n=99), "failed", "timeout", 3),
    "drips": (_times("drip", n=99), "failed", "timeout", 3),
}


@pytest.mark.parametrize(("hostile", "timeout"), [(HOSTILE, 30.0), (SLOW, 0.8)])
def test_every_item_ends_with_a_reason_whatever_the_server_does(go, hostile: dict, timeout: float) -> None:
    names = list(hostile)

    def reply(call: Call) -> object:
        name = names[int(call.item.removeprefix("item-"))]
        attacked = "judge" if name.startswith("judge:") else "writer"
        return hostile[name][0](call) if call.role == attacked else good(call)

    with serving(reply) as server:
        said = go(len(names), server, concurrency=16, calls__timeout_s=timeout)
    results = rows(go.out)
    assert len(results) == len(names)
    records, _ = ledger.read(go.ledger)
    drafts = collections.Counter(r["item"] for r in records if r.get("model") == "gpt-audio-1.5")
    for i, (name, (_, status, reason, expected)) in enumerate(hostile.items()):
        row = results[f"u{i}"]
        assert (row["status"], row["cot"] != "") == (status, status == "ok"), (name, row)
        assert row["reason"].startswith(reason), (name, row)
        assert bool(row["reason"]) == (status != "ok"), (name, row)
        assert drafts[f"u{i}"] == expected, (name, [r["error"] for r in records if r.get("error")])
    for status in ("rejected", "failed"):
        count = sum(row["status"] == status for row in results.values())
        assert f"{status:11} {count}" in said


def test_faults_are_fed_back_and_refusals_rephrased(go) -> None:
    wrongs = [completion(BAD_FORMAT), completion(EXCUSE), completion(LEAK)]
    with serving(lambda call: _times(wrongs[int(call.item[5:])], n=1)(call)) as server:
        go(3, server, validator="none")
    second = [server.of(f"item-{i}")[1].body["messages"] for i in range(3)]
    assert second[0][2] == {"role": "assistant", "content": BAD_FORMAT}
    assert "'Step 2 Audio Analysis:' occurs 0 times" in second[0][3]["content"]
    assert prompts.PROSODY in second[1][1]["content"][0]["text"]
    assert len(second[1]) == 2  # without the refusal, which would invite another one
    assert "'6 of 8'" in second[2][3]["content"]
    assert second[2][1]["content"][1]["type"] == "input_audio"  # an endpoint remembers nothing: the clip goes along


def test_a_rephrased_request_stays_rephrased(go) -> None:
    wrongs = [completion(EXCUSE), completion(BAD_FORMAT)]
    with serving(lambda call: wrongs[call.nth] if call.nth < 2 else good(call)) as server:
        go(1, server, validator="none")
    third = server.of("item-0")[2].body["messages"]
    assert prompts.PROSODY in third[1]["content"][0]["text"]
    assert third[2] == {"role": "assistant", "content": BAD_FORMAT}


def test_failed_items_are_tried_again_by_the_next_run(go) -> None:
    with serving(lambda call: error(500, "oops") if call.item == "item-1" else good(call)) as server:
        go(3, server)
        assert {i: row["status"] for i, row in rows(go.out).items()} == {"u0": "ok", "u1": "failed", "u2": "ok"}
        server.reply = good
        assert "1 to do of 3" in go(3, server)
    assert {row["status"] for row in rows(go.out).values()} == {"ok"}


def test_bad_sound_and_bad_votes_fail_with_a_reason(go, clips: Path) -> None:
    corpus(go.root, clips, 3)
    utterances = list(manifest.read(go.root).utterances)
    (go.root / "empty.wav").write_bytes(b"")
    utterances[0] = manifest.Utterance("u0", "empty.wav", "item-0", "s0", 0, {"sadness": 1})
    utterances[1] = manifest.Utterance("u1", "clip.wav", "item-1", "s0", 0, {"surprise": 3})
    manifest.write(manifest.Corpus(go.root, tuple(utterances)))
    with serving() as server:
        said = go(3, server)
    results = rows(go.out)
    assert results["u0"]["reason"].startswith("data: ")
    assert "empty.wav" in results["u0"]["reason"]
    assert results["u1"]["reason"].startswith("votes: no vote falls on")
    assert results["u2"]["status"] == "ok"
    assert "failed      2 (" in said


def test_the_classes_of_another_corpus_are_refused_before_anything_is_written(go) -> None:
    with pytest.raises(ConfigError, match=r"labels=\('calm', 'tense'\); the votes there are on anger, sadness; set"):
        go(2, None, labels="('calm', 'tense')")
    assert not go.out.exists()
    assert not go.ledger.exists()


# Stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (error(429, "You exceeded your current quota", "insufficient_quota"), "insufficient_quota"),
        (error(401, f"Incorrect API key provided: {CANARY[:8]}*****{CANARY[-4:]}. Also {CANARY}", "invalid"), "401"),
        (error(402, "Insufficient balance"), "402"),
        (error(404, "The model does not exist", "model_not_found"), "404"),
    ],
)
def test_what_no_retry_mends_stops_the_run_at_once_and_keeps_progress(go, reply: tuple, line: str) -> None:
    with serving(lambda call: reply if call.item == "item-6" else good(call)) as server:
        with pytest.raises(ConfigError, match=line) as raised:
            go(20, server, concurrency=2)
        assert "\n" not in str(raised.value)
        kept = rows(go.out)
        assert 1 <= len(kept) < 12
        asked = len(server.calls)
        assert asked < 24
        server.reply = good
        assert f"{20 - len(kept)} to do of 20" in go(20, server)
        assert {row["status"] for row in rows(go.out).values()} == {"ok"}
        paid = collections.Counter(call.key for call in server.calls if call.answered)
        assert set(paid.values()) == {1}


def test_max_usd_stops_in_time_and_counts_over_runs(go) -> None:
    item = (580 * 2.5 + 20 * 32 + 200 * 10 + 580 * 0.75 + 200 * 4.5) / 1e6  # about half a cent
    with serving() as server:
        said = go(60, server, f"--max_usd={10 * item}")
        finished = len(rows(go.out))
        assert 5 <= finished <= 10
        assert "stopped     max_usd=" in said
        assert f"not begun   {60 - finished}" in said
        spent = sum(_bill(call) for call in server.calls)
        assert spent <= 10 * item
        assert float(re.search(r"\$(\S+) in all", said).group(1)) == pytest.approx(spent, abs=1e-4)
        go(60, server, f"--max_usd={20 * item}")
        assert finished < len(rows(go.out)) <= 20
        assert sum(_bill(call) for call in server.calls) <= 20 * item


def _bill(call: Call) -> float:
    text_in, text_out = (2.5, 10.0) if call.role == "writer" else (0.75, 4.5)
    audio = 20 * 32 if call.role == "writer" else 20 * 0
    return (580 * text_in + audio + 200 * text_out) / 1e6


def test_answers_that_never_arrive_count_against_max_usd(go) -> None:
    """They may have been billed: a server that swallows requests must not be paid without end."""
    with serving(lambda call: "drop") as server:
        said = go(60, server, "--max_usd=0.2")
    assert "stopped     max_usd=" in said
    assert len(server.calls) < 60
    lost = float(re.search(r"up to \$(\d\.\d+) for answers", said).group(1))
    assert 0.15 < lost <= 0.2


def test_max_items_takes_the_first_of_the_manifest(go) -> None:
    with serving() as server:
        go(9, server, "--max_items=4")
        assert set(rows(go.out)) == {"u0", "u1", "u2", "u3"}
        assert "0 to do of 4" in go(9, server, "--max_items=4")
        go(9, server, "--max_items=6")
    assert len(rows(go.out)) == 6
    assert len(server.calls) == 12


def test_other_settings_do_not_mix_in_one_file(go) -> None:
    with serving() as server:
        go(1, server)
        with pytest.raises(ConfigError, match="judge: 'judge-model' is now 'other'"):
            go(1, server, judge__model="other")


def test_a_model_that_does_not_exist_can_be_corrected(go) -> None:
    """As the message asks for: nothing was answered yet that another model would mix with."""
    with serving(lambda call: error(404, "no such model")) as server, pytest.raises(ConfigError, match="correct model"):
        go(1, server, writer__model="typo")
    with serving() as server:
        assert "accepted    1" in go(1, server)
        with pytest.raises(ConfigError, match=r"'gpt-.*' is now 'typo'"):
            go(1, server, writer__model="typo")


def test_what_another_run_finished_meanwhile_is_not_written_twice(go, monkeypatch: pytest.MonkeyPatch) -> None:
    to_do = curate.to_do
    with serving() as server:
        go(3, server)
        monkeypatch.setattr(curate, "to_do", lambda corpus, out, config: to_do(corpus, out / "before", config))
        assert "items       3 to do" in go(3, server)
    assert set(rows(go.out)) == {"u0", "u1", "u2"}  # each once


def test_two_runs_do_not_write_one_file(go) -> None:
    with serving() as server:
        book = ledger.Ledger(go.ledger, {})
        with pytest.raises(ConfigError, match="another run"):
            go(1, server)
        book.close()


def test_a_file_of_something_else_is_left_alone(go, clips: Path) -> None:
    corpus(go.root, clips, 1)
    before = (go.root / "manifest.jsonl").read_text()
    with pytest.raises(DataError, match="no result of"):
        go(1, None, f"--out={go.root / 'manifest.jsonl'}")
    assert (go.root / "manifest.jsonl").read_text() == before


def test_a_manifest_of_another_name_is_not_merged_into_the_corpus(go, clips: Path) -> None:
    corpus(go.root, clips, 5)
    pilot = go.root / "pilot.csv"
    pilot.write_text("id,audio,transcript,speaker,fold,votes.sadness,votes.anger\nu0,clip.wav,item-0 is here,s,0,6,2\n")
    with serving() as server, pytest.raises(ConfigError, match=r"pilot\.csv: a manifest is called manifest\.jsonl"):
        go(5, server, f"--manifest={pilot}")
    with pytest.raises(ConfigError, match=r"pilot\.csv: a manifest is called manifest\.jsonl"):
        go(5, None, f"--manifest={pilot}", "--merge")
    assert len(manifest.read(go.root).utterances) == 5


def test_a_full_disk_is_one_line_and_keeps_what_is_written(go, monkeypatch: pytest.MonkeyPatch) -> None:
    append, written = ledger.Journal.append, []

    def full(journal: ledger.Journal, record: dict, **how: bool) -> None:
        if Path(journal._file.name) == go.out and len(written) == 2:
            raise OSError(28, "No space left on device", journal._file.name)
        append(journal, record, **how)
        if Path(journal._file.name) == go.out:
            written.append(record)

    monkeypatch.setattr(ledger.Journal, "append", full)
    with serving() as server:
        with pytest.raises(
            ConfigError, match=r"cot\.jsonl: No space left on device; mend that, start it again \(2 finished items are"
        ):
            go(5, server, concurrency=1)
        monkeypatch.setattr(ledger.Journal, "append", append)
        go(5, server)
    assert len(rows(go.out)) == 5


def test_no_key_no_run(go, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("", "  ", "sk-käse"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with serving() as server, pytest.raises(ConfigError, match="OPENAI_API_KEY"):
            go(1, server)
        assert not server.calls


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.techer=audio", "techer"),
        (f"--config.writer.api_key_env={CANARY}", "writer.api_key_env must be the name of an environment variable"),
        ("--config.attempts=many", "attempts"),
        ("--config.attempts=0", "attempts=0"),
        ("--config.teacher=parrot", "teacher='parrot'"),
        ("--max_usd=nan", "max_usd=nan"),
        ("--config.writer.usd_per_1m.text_in=nan", "writer.usd_per_1m.text_in=nan must be a number of dollars"),
        ("--config.judge.usd_per_1m.text_out=-1", "judge.usd_per_1m.text_out=-1.0"),
        ("--config.max_chars=0", "max_words and max_chars must be at least 1"),
        ("--config.labels=(1,2)", "labels=(1, 2) must be two distinct words or more"),
        ("--config.labels=('anger',' fear')", "must be two distinct words"),
        ("--max_usd=-1", "max_usd"),
        ("--max_itms=3", "max_items"),
        *((f"--config.writer.base_url={url}", "base_url") for url in ("example.org", "http://", "http://h:x/v1")),
        *(
            (f"--config.writer.base_url={url}", "base_url")
            for url in ("http://h:80000/v1", "http://[::1/v1", "http://a b")
        ),
        ("--out=", "--out= must name a .jsonl file"),
        ("--out=cot.fold0", "--out=cot.fold0"),
        ("surplus", "surplus"),
        ("--manifest=other.jsonl", "manifest.jsonl"),
        ("--manifest=/nowhere", "no manifest"),
        ("--config=/nowhere.py", "nowhere.py"),
    ],
)
def test_a_wrong_command_line_is_one_line(go, flag: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        go(1, None, flag)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["config", "manifest", "out"])
def test_a_missing_flag_is_named(missing: str) -> None:
    argv = [a for a in arguments(Path("r"), Path("o"), "http://x") if not a.startswith(f"--{missing}=")]
    if missing == "config":
        argv = [a for a in argv if not a.startswith("--config.")]
    with pytest.raises(ConfigError, match=f"--{missing} is missing"):
        curate.parse(["curate", *argv])


# The real command, killed --------------------------------------------------------------------------------------------


def start(root: Path, out: Path, url: str, key: str = CANARY, **config: object) -> subprocess.Popen:
    """The command in a process of its own; OPENAI_LOG makes the openai package log what it can."""
    environment = {**os.environ, "OPENAI_API_KEY": key, "OPENAI_LOG": "debug", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ambijax.curate", *arguments(root, out, url, **config)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_and_resume(root: Path, out: Path, server, *, items: int, kills: int, seed: int) -> None:
    """Kills the command `kills` times, each after a random number of further requests, then lets it finish."""
    rng = random.Random(seed)
    per_run = max(1, 2 * items // (kills + 1))  # requests between two kills, so that all of them fall into the work
    for _ in range(kills):
        process = start(root, out, server.url)
        asked = len(server.calls)
        due = asked + rng.randint(1, 2 * per_run - 1)
        while process.poll() is None and len(server.calls) < due:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))  # anywhere between the request and the line in the file
        process.kill()
        process.communicate()
        if out.exists():
            assert all(json.loads(line) for line in out.read_bytes().split(b"\n")[:-1])
    process = start(root, out, server.url)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()
    results = rows(out)
    assert sorted(results) == sorted(f"u{i}" for i in range(items))
    assert {row["status"] for row in results.values()} == {"ok"}
    assert_nothing_is_paid_twice(out, server, kills=kills)


def assert_nothing_is_paid_twice(out: Path, server, *, kills: int, workers: int = 8) -> None:
    records, _ = ledger.read(out.with_suffix(".ledger.jsonl"))
    answered, key_of = set(), {}
    for record in records:
        if "sent" in record:
            assert record["key"] not in answered, "asked again although the ledger held the answer"
            key_of[record["sent"]] = record["key"]
        elif "got" in record and record["answer"]:
            answered.add(key_of[record["got"]])
    asked = collections.Counter(call.key for call in server.calls)
    assert set(asked) == answered
    twice = sum(count - 1 for count in asked.values())
    assert twice <= kills * workers  # no more than was on its way at a kill, under the same idempotency key


def test_kill_9_loses_nothing_and_pays_nothing_twice(tmp_path: Path, clips: Path) -> None:
    root = corpus(tmp_path / "corpus", clips, 24)
    with serving() as server:
        kill_and_resume(root, tmp_path / "cot.jsonl", server, items=24, kills=2, seed=1)


@pytest.mark.slow
def test_kill_9_at_50_random_points(tmp_path: Path, clips: Path) -> None:
    root = corpus(tmp_path / "corpus", clips, 200)
    with serving() as server:
        kill_and_resume(root, tmp_path / "cot.jsonl", server, items=200, kills=50, seed=2)


def test_a_bad_answer_is_not_asked_for_again(go) -> None:
    """A gateway gives what it has once answered under an idempotency key; what it has not, it may still be at."""
    replies = iter(["drop", b"nonsense", error(500, "oops")])

    def reply(call: Call) -> object:
        return next(replies, good(call)) if call.role == "writer" else good(call)

    with serving(reply) as server:
        go(1, server, calls__retries=3)
    first, again, another, last = (call.key for call in server.calls if call.role == "writer")
    assert first == again
    assert another == last == f"{first}-1"


def test_the_key_appears_nowhere(tmp_path: Path, clips: Path) -> None:
    """Echoed in an answer, in errors, and in the 401 that ends the run, with the openai package logging."""
    root = corpus(tmp_path / "corpus", clips, 4)
    masked = f"{CANARY[:7]}********{CANARY[-4:]}"

    def reply(call: Call) -> object:
        if call.item == "item-0":
            return completion(f"{GOLD} {CANARY}") if call.role == "writer" else completion("CONSISTENT")
        if call.item == "item-1":
            return error(400, f"bad key {CANARY} or {masked}")
        if call.item == "item-2":
            return f"no JSON {CANARY}".encode()
        return error(401, f"Incorrect API key provided: {masked}.", "invalid_api_key")

    with serving(reply) as server:
        process = start(root, tmp_path / "cot.jsonl", server.url, concurrency=1)
        said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 2
    lines = [line for line in said.splitlines() if line.startswith("ambijax: ")]
    assert len(lines) == 1
    assert lines[0].startswith("ambijax: 401: the key in OPENAI_API_KEY is not accepted")
    assert "Traceback" not in said
    results = rows(tmp_path / "cot.jsonl")
    assert results["u0"]["cot"].endswith("[redacted]")
    assert results["u1"]["reason"] == "HTTP 400: bad key [redacted] or [redacted]"
    written = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".wav"}
    assert {"cot.jsonl", "cot.ledger.jsonl"} <= {path.name for path in written}
    for place, text in {**written, "log": said}.items():
        for part in (CANARY, CANARY[3:10], CANARY[-4:]):
            assert part not in text, (place, part)


def test_ctrl_c_is_one_line_and_keeps_what_is_paid(tmp_path: Path, clips: Path) -> None:
    root = corpus(tmp_path / "corpus", clips, 30)

    def slow(call: Call) -> dict:
        time.sleep(0.2)
        return good(call)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits it if ours is ignored
    with serving(slow) as server:
        process = start(root, tmp_path / "cot.jsonl", server.url)
        signal.signal(signal.SIGINT, before)
        while len(server.calls) < 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[0].decode()
        assert process.returncode == 130, said
        assert "ambijax: interrupted" in said
        records, _ = ledger.read(tmp_path / "cot.ledger.jsonl")
        assert sum(1 for r in records if r.get("answer")) == len(server.calls)  # all that were under way came home


def test_an_answer_is_on_the_disk_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    path = tmp_path / "l.jsonl"
    book = ledger.Ledger(path, {})
    book.got(book.sent("a", "u0", "m", 100, 0.5), 0.1, answer=Answer("x", "stop", ""), error="")
    assert sizes[-1] == path.stat().st_size
    book.close()


def test_a_cut_last_line_is_dropped_and_a_broken_one_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    journal = ledger.Journal(path)
    assert journal.records == [{"a": 1}]
    journal.append({"a": 3})
    journal.close()
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'
    for broken in (b"x", b"[" * 100_000):
        path.write_bytes(b'{"a": 1}\n' + broken + b'\n{"a": 2}\n')
        with pytest.raises(DataError, match=r"x\.jsonl:2"):
            ledger.Journal(path)


def test_a_record_that_the_disk_does_not_take_leaves_nothing_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    journal = ledger.Journal(path)
    journal.append({"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            journal.append({"a": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append({"a": 3})
    journal.close()
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'


def test_a_line_that_was_removed_from_the_ledger_costs_its_answer_alone(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    book = ledger.Ledger(path, {})
    for key in ("a", "b"):
        book.got(book.sent(key, "u0", "m", 100, 0.5), 0.25, answer=Answer(key, "stop", ""), error="")
    book.close()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"sent": 1' not in line))
    again = ledger.Ledger(path, {})
    assert set(again.answers) == {"b"}
    assert (again.spent, again.lost) == (0.5, 0.25)
    again.close()


def test_a_table_has_no_place_for_reasonings(go) -> None:
    with serving() as server:
        go(1, server)
    (go.root / "manifest.jsonl").unlink()
    table = "id,audio,transcript,speaker,fold,votes.sadness\nu0,clip.wav,item-0,s0,0,6\n"
    (go.root / "manifest.csv").write_text(table)
    with pytest.raises(ConfigError, match="python -m ambijax"):
        go(1, None, "--merge")
    assert [path.name for path in go.root.glob("manifest.*")] == ["manifest.csv"]
    with pytest.raises(ConfigError, match="give one of them"):
        go(1, None, "--merge", "--dry_run")


# Rate limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rpm", "tpm"), [(7, 10**9), (10**6, 900), (9, 1100)])
@pytest.mark.parametrize("seed", range(5))
def test_no_window_of_60_s_holds_more_than_the_limits(rpm: int, tpm: int, seed: int) -> None:
    """A simulated hour against a fake clock; the server counts a request anywhere between leaving and its answer."""
    rng = random.Random(seed)
    now = [0.0]
    limiter = limits.Limiter(rpm, tpm, clock=lambda: now[0])
    under_way, arrivals = [], []
    while now[0] < 3600:
        for end, slot, used in [entry for entry in under_way if entry[0] <= now[0]]:
            limiter.done(slot, used)
            under_way.remove((end, slot, used))
        tokens = rng.randint(50, 200)
        if len(under_way) < 8 and (slot := limiter.take(tokens)):
            latency = rng.uniform(0.1, 20) if rng.random() < 0.95 else rng.uniform(60, 120)
            under_way.append((now[0] + latency, slot, tokens))
            arrivals.append((now[0] + rng.uniform(0, latency), tokens))
        else:
            now[0] += 0.1
    arrivals.sort()
    first, tokens, fullest = 0, 0, 0
    for last, (time_, used) in enumerate(arrivals):
        tokens += used
        while arrivals[first][0] < time_ - 60:
            tokens -= arrivals[first][1]
            first += 1
        assert last - first + 1 <= rpm
        assert tokens <= tpm
        fullest = max(fullest, (last - first + 1) / rpm, tokens / tpm)
    assert fullest > 0.7  # and yet the limits are used


def test_a_request_counts_as_the_most_that_it_could_use() -> None:
    """Providers count the tokens that were asked for; more, when the answer shows that the estimate was too low."""
    limiter = limits.Limiter(10, 100, clock=lambda: 0.0)
    limiter.done(limiter.take(60), 10)
    assert not limiter.take(41)
    limiter.done(limiter.take(20), 30)
    assert not limiter.take(11)
    assert limiter.take(10)


def test_of_two_waits_the_longer_one_holds() -> None:
    now = [0.0]
    limiter = limits.Limiter(10, 100, clock=lambda: now[0])
    limiter.hold(30)
    limiter.hold(5)
    now[0] = 29.0
    assert not limiter.take(1)
    now[0] = 30.0
    assert limiter.take(1)


def test_results_of_clips_that_are_not_asked_about_stay(tmp_path: Path) -> None:
    """A manifest without them may be a mistake, and what was paid for is not to be lost by it."""
    out = tmp_path / "cot.jsonl"
    ends = {"gone": "accepted", "other": "accepted", "here": "accepted", "bad": "failed"}
    votes = {"gone": {"sad": 1}, "other": {"sad": 2}, "here": {"sad": 1}, "bad": {"sad": 1}}
    lines = [{"id": i, "status": status, "reason": "", "votes": votes[i]} for i, status in ends.items()]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    now = {i: {"sad": 1} for i in ("other", "here", "bad")}
    assert ledger.finished(out, now) == {"gone", "here"}
    ledger.forget_unfinished(out, now)
    assert [record["id"] for record in ledger.results(out)] == ["gone", "here"]


def test_a_file_that_is_not_ours_stays_what_it_is(tmp_path: Path) -> None:
    out = tmp_path / "notes.jsonl"
    for text in ('[{"id": "a"}]', '{"notes": "mine"}', "notes"):  # one line each, without an end
        out.write_text(text)
        with pytest.raises(DataError, match=r"notes\.jsonl is no result of ambijax\.curate; choose another --out"):
            ledger.results(out)
    for text in ("", '{"id', '{"id": "u0", "vot'):  # of a killed process
        out.write_text(text)
        assert ledger.results(out) == []


def test_two_roles_of_one_model_share_the_tighter_of_their_limits(go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WINDOW", 0.5)
    with serving(lambda call: completion("CONSISTENT" if "CONSISTENT" in call.text else GOLD)) as server:
        go(3, server, judge__model="gpt-audio-1.5", judge__rpm=3)
    times = sorted(call.arrived for call in server.calls)
    assert len(times) == 6
    assert all(later - earlier > 0.5 for earlier, later in zip(times, times[3:], strict=False))


def test_the_command_keeps_its_limits(go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WINDOW", 0.5)
    with serving() as server:
        go(8, server, "--max_items=2", writer__rpm=3, writer__tpm=10**6)
        go(8, server, writer__rpm=3, writer__tpm=10**6)  # a new run remembers what the last one has just sent
    times = sorted(call.arrived for call in server.calls if call.role == "writer")
    assert len(times) == 8
    assert all(later - earlier > 0.5 for earlier, later in zip(times, times[3:], strict=False))


def test_a_new_process_counts_what_the_last_one_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = ledger.Ledger(tmp_path / "l.jsonl", {})
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    ended = book.sent("a", "u0", "m", 100, 0.5)
    book.sent("b", "u1", "m", 200, 0.25)  # killed before an answer came
    book.got(ended, 0.1, answer=Answer("x", "stop", ""), error="")
    book.close()
    book = ledger.Ledger(tmp_path / "l.jsonl", {})
    assert sorted(book.recent(60, timeout=30)) == [("m", 100, 1060.0), ("m", 200, 1090.0)]
    assert (book.spent, book.lost) == pytest.approx((0.35, 0.25))
    assert book.answers == {"a": Answer("x", "stop", "")}
    book.close()


@pytest.mark.parametrize("limit", [{"writer__tpm": 500}, {"judge__model": "gpt-audio-1.5", "judge__tpm": 500}])
def test_a_request_that_can_never_fit_fails_instead_of_waiting(go, limit: dict) -> None:
    with serving() as server, pytest.raises(ConfigError, match="all 1 items failed; start the same command again"):
        go(1, server, **limit)
    assert rows(go.out)["u0"]["reason"].startswith("too large: needs ")
    assert not server.calls


def test_a_429_holds_every_worker(go) -> None:
    """Three workers, one of whom is told to wait: the others send what they have in hand, and nobody anything more."""

    def reply(call: Call) -> object:
        if call.item == "item-9" and call.nth == 0:
            return error(429, "wait", None, {"Retry-After": "1"})
        return good(call)

    with serving(reply) as server:
        go(60, server, calls__backoff_max_s=1, validator="none", concurrency=3)
    records, _ = ledger.read(go.ledger)
    told = next(i for i, record in enumerate(records) if "HTTP 429" in record.get("error", ""))
    until = records[told]["time"] + 1
    meanwhile = [record for record in records[told:] if "sent" in record and record["time"] < until]
    assert len(meanwhile) <= 2
    assert sum("sent" in record for record in records[told:]) > 30


def test_retries_come_ever_later_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setattr(client.random, "uniform", lambda low, high: high)
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    config = get_config()
    config.calls.backoff_s, config.calls.backoff_max_s = 1.0, 5.0
    book = ledger.Ledger(tmp_path / "l.jsonl", {})
    asking = client.Client(book, [config.writer], config.calls, 1.0)
    for retry in range(4):
        asyncio.run(asking._back_off(config.writer.model, client._Failure("HTTP 500", retry=True), retry))
    asyncio.run(asking._back_off(config.writer.model, client._Failure("HTTP 503", retry=True, wait=3.0), 0))
    assert waits == [1, 2, 4, 5, 3]
    book.close()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("inf", None),
        ("Mon, 01 Jan 99999 00:00:00 GMT", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert limits.retry_after({"retry-after": value}, now=1000.0) == seconds


# Other teachers and validators ---------------------------------------------------------------------------------------


def test_a_model_that_hears_nothing_reads_the_acoustics(go) -> None:
    with serving() as server:
        go(4, server, teacher="acoustics")
    text = server.calls[0].body["messages"][1]["content"][0]["text"]
    assert re.search(r"- median pitch 2[12]\d Hz: (very low|low|moderate|high|very high)\n", text)
    assert "input_audio" not in server.calls[0].text
    assert all(row["status"] == "ok" for row in rows(go.out).values())


def test_the_offline_teacher_needs_neither_key_nor_server(go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    said = go(4, None, teacher="template")
    assert "0 requests" in said
    results = rows(go.out)
    assert {row["status"] for row in results.values()} == {"ok"}, results
    assert all("sadness" in row["cot"] for row in results.values())
    go(4, None, "--merge", teacher="template")
    assert all(u.cot for u in manifest.read(go.root).utterances)


@pytest.mark.parametrize("seed", range(3))
def test_what_the_offline_teacher_writes_passes_the_checks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(200):
        norm = Norm.of([Acoustics(*np.abs(rng.normal(3, 2, 9))) for _ in range(3)])
        p = emotions.soft_label(dict(zip(CREMAD, rng.integers(0, 9, 6).tolist(), strict=True)), CREMAD)
        written = teacher.reason("I'm so sorry.", Acoustics(*np.abs(rng.normal(3, 4, 9))), norm, p, CREMAD)
        assert checks.faults(written.render(), "I'm so sorry.", CREMAD, max_chars=2400) == []


def test_the_offline_teacher_names_a_class_it_does_not_know(go) -> None:
    with pytest.raises(ConfigError, match="surprise"):
        go(1, None, teacher="template", labels="('sadness', 'surprise')")


def test_a_blind_reader_must_come_near_to_the_votes(go) -> None:
    guesses = ['{"sadness": 0.7, "anger": 0.3}', '{"happiness": 1}', "no idea", 'Sure: {"sadness": 75, "anger": 25}']

    def reply(call: Call) -> object:
        return good(call) if call.role == "writer" else completion(guesses[int(call.item[5:])])

    with serving(reply) as server:
        # The reader does not see the transcript, so the reasoning has to carry the item's name.
        server.reply = lambda call: (
            completion(GOLD.replace("soft voice", f"soft voice of {call.item}"))
            if call.role == "writer"
            else reply(call)
        )
        go(4, server, validator="reader", attempts=1)
    results = rows(go.out)
    assert [results[f"u{i}"]["status"] for i in range(4)] == ["ok", "rejected", "rejected", "ok"]
    assert results["u1"]["reason"] == "reader: expects happiness 1.00 from the analysis (JS 1.00 bits)"
    assert results["u2"]["reason"] == "reader: gave no distribution"
    assert "sadness 0.75" not in server.of("item-0", "judge")[0].text  # blind


# Merging -------------------------------------------------------------------------------------------------------------


def test_malformed_rows_are_dropped_and_counted(go, clips: Path) -> None:
    corpus(go.root, clips, 9)

    def row(i: int, cot: object, **more: object) -> str:
        return json.dumps({"id": f"u{i}", "status": "ok", "cot": cot, **more})

    lines = [
        row(0, GOLD),
        row(0, GOLD),  # once more
        row(1, GOLD.replace("Step 1 Text Analysis:", "Step 4:")),
        row(2, GOLD + "\nFinal emotion: sadness\nFinal emotion: anger"),
        row(3, "\n".join(reversed(GOLD.split("\n")))),  # out of order
        row(4, GOLD + "x" * 20_000),
        row(5, GOLD + "<|im_end|>"),
        row(5, GOLD + "\ud83d"),  # half a character
        row(6, None),
        row(99, GOLD),
        "[1]",
        row(7, "", status="rejected"),
        json.dumps({"id": "u8", "cot": GOLD}),  # from elsewhere, without a status
        row(1, GOLD)[:50],  # last line cut
    ]
    go.out.write_text("\n".join(lines))
    said = go(9, None, "--merge")
    assert [bool(u.cot) for u in manifest.read(go.root).utterances] == [True, *[False] * 7, True]
    assert "merged      2 reasonings" in said
    assert "dropped     11" in said
    assert "for KL only 7" in said


def test_results_of_another_corpus_are_not_merged(go, clips: Path) -> None:
    corpus(go.root, clips, 2)
    before = (go.root / "manifest.jsonl").read_bytes()
    go.out.write_text(json.dumps({"id": "elsewhere", "status": "ok", "cot": GOLD}) + "\n")
    with pytest.raises(ConfigError, match=r"no reasoning for .*\(not in the manifest 1\); nothing was written"):
        go(2, None, "--merge")
    assert (go.root / "manifest.jsonl").read_bytes() == before


def test_a_reasoning_explains_the_votes_it_was_written_for(go, clips: Path) -> None:
    """Votes prepared anew: such an item is neither merged nor finished, and only it is asked about again."""
    with serving() as server:
        go(3, server)
        assert [row["votes"] for row in rows(go.out).values()] == [{"sadness": 6, "anger": 2}] * 3
        first, *others = manifest.read(go.root).utterances
        changed = dataclasses.replace(first, votes={"sadness": 2, "anger": 6})
        outside = dataclasses.replace(others[0], votes=others[0].votes | {"contempt": 3})  # no label: p is what it was
        manifest.write(manifest.Corpus(go.root, (changed, outside, *others[1:])))
        said = go(3, None, "--merge")
        assert "merged      2" in said
        assert "dropped     1 (for other votes than the manifest has 1)" in said
        server.calls.clear()
        assert "1 to do of 3 (2 finished earlier)" in go(3, server)
        assert {call.item for call in server.calls} == {"item-0"}
    assert "anger 0.75, sadness 0.25" in server.calls[0].body["messages"][1]["content"][0]["text"]
    assert rows(go.out)["u0"]["votes"] == changed.votes
    assert "merged      3" in go(3, None, "--merge")


def test_merging_keeps_what_the_manifest_has(go, clips: Path) -> None:
    corpus(go.root, clips, 2)
    old, other = manifest.read(go.root).utterances
    both = (manifest.Utterance(**{**vars(old), "cot": "earlier"}), other)
    manifest.write(manifest.Corpus(go.root, both, audio_root=clips, description="six votes"))
    go.out.write_text(json.dumps({"id": "u1", "status": "ok", "cot": GOLD}) + "\n")
    go(2, None, "--merge")
    merged = manifest.read(go.root)
    assert [u.cot for u in merged.utterances] == ["earlier", GOLD]
    assert (merged.audio_root.resolve(), merged.description) == (clips.resolve(), "six votes")


# Checks --------------------------------------------------------------------------------------------------------------


def faults_of(words: str, transcript: str = "It's eleven o'clock.") -> list[str]:
    text = GOLD.replace("a plain fact", words)
    return checks.faults(text, transcript, CREMAD, max_chars=5000)


@pytest.mark.parametrize(
    "words",
    [
        *("6 of 8 heard it", "six out of eight", "75% sad", "75 percent", "0.75 sadness", "a share of .25", "3/4"),
        *(
            "sadness: 6",
            "sadness (6)",
            "sadness 0.6 at 220 Hz",
            "sadness: 6.",
            "sadness (0.75)",
            "6 sadness",
            "two thirds sad",
            "nine listeners agree",
            "six of nine heard sadness",
            "six in nine",
            "seventy percent",
            "sixty per cent",
            "a third of the listeners",
            "a quarter heard it",
            "half of them",
            "a 7-2 split",
            "split seven to two",
            "seven observers",
            "sadness at 1.0",
        ),
        *(
            "the annotators",
            "raters",
            "seven respondents",
            "the consensus",
            "participants judged it sad",
            "the label",
            "labelled as sad",
            "most voted",
            "a majority opinion",
        ),
        *(
            "the given emotion",
            "the target distribution",
            "ground truth",
            "the probability",
            "I was told",
            "the prompt",
        ),
    ],
)
def test_leaks_are_found(words: str) -> None:
    assert [fault.split(":")[0] for fault in faults_of(words)] == ["leak"]


@pytest.mark.parametrize(
    "words",
    [
        *("pitch near 220 Hz", "a 0.3 s pause", "0.3 to 0.5 s", "a 0.5-second pause", "3.5 semitones", "0.25 kHz"),
        *(
            "10 dB louder",
            "over 2 syllables",
            "eleven o'clock",
            "one of the two readings",
            "the majority of the phrase",
        ),
        *(
            "a third of a second",
            "half of the phrase",
            "a quarter tone lower",
            "one of two readings",
            "from 180 to 220 Hz",
            "the other participant",
            "1.0 kHz",
            "it is neutral, 180 Hz on average",
            "neutral (220 Hz)",
            "neutral: 4.2 syllables a second",
            "0.3 milliseconds",
        ),
        *("listeners may hear it", "the distribution of energy", "the target of the anger", "in the first half"),
    ],
)
def test_measurements_and_plain_words_are_no_leak(words: str) -> None:
    assert faults_of(words) == []


def test_the_speakers_own_words_are_no_leak() -> None:
    assert faults_of("'we voted 7 of 9'", transcript="So we voted 7 of 9 times.") == []
    assert faults_of("'we voted 7 of 9'", transcript="So we went.") != []
    assert faults_of("a rating suggests it", transcript="We are celebrating.") != []


def test_a_row_of_digits_takes_no_time() -> None:
    assert [fault.split(":")[0] for fault in faults_of("1" * 200_000)] == ["length"]
    assert faults_of("1" * 4_000) == []


def test_markdown_is_taken_off() -> None:
    marked = "```text\n" + GOLD.replace("Keywords:", "**Keywords:**").replace("Step 1", "## Step 1") + "\n```"
    assert checks.plain(marked) == GOLD
    assert checks.plain(GOLD.replace("\n", "\u2028")) == GOLD  # else it would end a line of the manifest


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (EXCUSE, True),
        ("I’m unable to determine how a person feels.", True),
        ("I cannot assist with identifying emotions.", True),
        (GOLD, False),
        (GOLD.replace("a plain fact", "that I can't go"), False),
        ("The recording is loud and fast.", False),
    ],
)
def test_refusals(text: str, refused: bool) -> None:
    assert checks.refused(Answer(text, "stop", "")) == refused


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("CONSISTENT", ""),
        ("**CONSISTENT**\nFine.", ""),
        ("INCONSISTENT\nToo little\nanger.", "judge: Too little anger."),
        ("INCONSISTENT", "judge: inconsistent with the perception"),
        ("Consistent.", ""),
        ("I have read it.\n**Verdict: consistent**", ""),
        ("**Verdict: Inconsistent** - too little anger", "judge: too little anger"),
        ("It is CONSISTENT", "judge: gave no verdict"),
        ("Not consistent", "judge: gave no verdict"),
        ("Consistently loud", "judge: gave no verdict"),
        ("", "judge: gave no verdict"),
    ],
)
def test_verdicts(text: str, fault: str) -> None:
    assert checks.verdict(text) == fault


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"sadness": -1}', '{"sadness": "much"}', '{"sadness": 1e999}', "{}", '{"sadness": null}']
)
def test_predictions_that_are_none(text: str) -> None:
    assert checks.prediction(text, CREMAD) is None


def test_a_prediction_is_normalised() -> None:
    q = checks.prediction('Here: {"sadness": 3, "fear": 1, "joy": 9}', CREMAD)
    np.testing.assert_allclose(q, [0, 0, 0.75, 0, 0, 0.25])


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        {},
        {"prompt_tokens": "many", "completion_tokens": 1},
        {"prompt_tokens": -5, "completion_tokens": 1},
        {"prompt_tokens": 1e300, "completion_tokens": 1},
        {"prompt_tokens": 5, "completion_tokens": float("inf")},
        {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"audio_tokens": 6}},
    ],
)
def test_a_usage_that_cannot_be_is_not_believed(usage: object) -> None:
    assert client.read_usage({"usage": usage}, audio_tokens=3) is None


def test_usage_without_details_has_the_estimated_audio() -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 7}
    assert client.read_usage({"usage": usage}, audio_tokens=3) == client.Usage(50, 3, 7)
    assert client.read_usage({"usage": usage}, audio_tokens=99) == client.Usage(50, 50, 7)


# The page ------------------------------------------------------------------------------------------------------------


def test_the_documentation_shows_the_prompts_as_they_are_sent() -> None:
    page = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^### `([A-Z]+)`.*?\n```text\n(.*?)\n```$", page, flags=re.MULTILINE | re.DOTALL))
    names = [name for name, value in vars(prompts).items() if name.isupper() and isinstance(value, str)]
    assert shown == {name: getattr(prompts, name) for name in names}
