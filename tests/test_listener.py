"""A model that listens: the same numbers in whatever form and batch, and streamed; the predict command."""

import csv
import dataclasses
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ambijax
from ambijax import audio, errors, export, listener, listing, policy, predict, predicted
from ambijax.errors import ConfigError, DataError
from configs import base as configured
from tests import small, trained

tiny = pytest.mark.skipif(not (trained.TINY / "model.safetensors").exists(), reason="not in this checkout")
pytestmark = tiny
LABELS = ("anger", "happiness", "sadness", "neutral", "disgust", "fear")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained.make(tmp_path_factory.mktemp("lora") / "run", "--config.data.max_tokens=24")


@pytest.fixture(scope="module")
def model(run):
    return ambijax.load(run)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    """Eight clips of different lengths."""
    return trained.wavs(tmp_path_factory.mktemp("wav"), (0.9, 1.6, 2.2, 1.1, 0.4, 1.9, 1.3, 2.4))


@pytest.fixture(scope="module")
def whole(model, clips):
    """All clips in one batch."""
    return model.predict(clips, batch_size=8)


def same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.reasoning, a.forced) == (b.reasoning, b.forced)
        np.testing.assert_allclose([*a.distribution.values()], [*b.distribution.values()], atol=1e-5)
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_batch_size_changes_nothing(model, clips, whole, size):
    assert len({p.reasoning for p in whole}) > 2  # else one could be another's
    same(model.predict(clips, batch_size=size), whole)


def test_one_clip_one_prediction(model, clips, whole):
    sound = audio.load(clips[2])
    for clip in (clips[2], str(clips[2]), sound):
        same([model.predict(clip)], [whole[2]])
    same([model.predict(clips[2], "")], [whole[2]])
    p = np.array([*whole[2].distribution.values()])
    assert [*whole[2].distribution] == [*LABELS]
    np.testing.assert_allclose(p.sum(), 1, atol=1e-6)
    np.testing.assert_allclose(whole[2].entropy, -(p * np.log2(p)).sum(), atol=1e-5)


def test_clips_in_one_window_share_their_programs(model, clips):
    with jax.set_mesh(model.setting.mesh):
        shapes = {model._asked([audio.load(clip)], [""]).tokens.shape for clip in (clips[0], clips[2])}
    assert len(shapes) == 1


def test_a_transcript_is_read(model, clips, whole):
    said = model.predict(clips[0], "It was a long day.")
    assert said.distribution != whole[0].distribution


@pytest.mark.slow  # compiles programs of its own
def test_samples_depend_on_the_clip_alone(model, clips):
    options = {"samples": 3, "seed": 5}
    together = model.predict(clips[:4], batch_size=4, **options)
    same(model.predict(clips[:4][::-1], batch_size=2, **options)[::-1], together)
    assert model.predict(clips[0], samples=3, seed=6).distribution != together[0].distribution


@pytest.mark.slow  # compiles programs of its own
def test_every_form_of_a_model_says_the_same(run, clips, whole, tmp_path):
    export.export(run, "peft", tmp_path / "peft")
    export.export(run, "merged", tmp_path / "merged")
    same(ambijax.load(tmp_path / "peft").predict(clips[:2]), whole[:2])
    same(ambijax.load(tmp_path / "merged").predict(clips[:2]), whole[:2])
    base = ambijax.load(run, base=True).predict(clips[0])
    same([ambijax.load(tmp_path / "peft", base=True).predict(clips[0])], [base])
    assert np.abs(np.subtract([*base.distribution.values()], [*whole[0].distribution.values()])).max() > 0.01


def test_a_stream_ends_in_the_prediction(model, clips, whole):
    seen = list(model.stream(clips[1], chunk=5))
    same(seen[-1:], whole[1:2])
    assert len(seen) == 5  # 24 tokens
    for earlier, later in itertools.pairwise(seen):
        assert len(later.reasoning) >= len(earlier.reasoning)
        np.testing.assert_allclose(sum(later.distribution.values()), 1, atol=1e-6)


@pytest.mark.slow  # compiles programs of its own; the test above is its quick sibling
@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_streaming_is_the_rollout_stopped_and_resumed(chunk):
    m = small.model()
    variables, asked = small.variables(m), small.prompts(3)
    given = {"tokens": small.TOKENS, "max_tokens": 12}
    rolls = list(policy.stream(m, variables, asked, small.ENDS_LINE, chunk=chunk, **given))
    expected = policy.rollout(
        m, variables, asked, jax.random.key(0), small.ENDS_LINE, samples=1, temperature=0.0, **given
    )
    np.testing.assert_array_equal(rolls[-1].completions.tokens, expected.completions.tokens)
    np.testing.assert_array_equal(rolls[-1].forced, expected.forced)
    np.testing.assert_allclose(rolls[-1].readout, expected.readout, atol=1e-5)
    assert len(rolls) == -(-12 // chunk)
    # In between: what a roll-out that has to stop there would be read out as.
    if chunk == 3:
        short = policy.rollout(
            m,
            variables,
            asked,
            jax.random.key(0),
            small.ENDS_LINE,
            samples=1,
            temperature=0.0,
            tokens=small.TOKENS,
            max_tokens=6,
        )
        np.testing.assert_allclose(rolls[1].readout, short.readout, atol=1e-5)


def test_what_cannot_be_opened_is_named(run, tmp_path):
    export.export(run, "peft", tmp_path / "peft", base_model="somebody/elsewhere")
    (tmp_path / "empty").mkdir()
    for opened, options, message in (
        (tmp_path / "empty", {}, "no run directory, export or checkpoint"),
        (trained.TINY, {}, "does not say which emotions to choose from"),
        (trained.TINY, {"labels": LABELS, "base": True}, "is a whole checkpoint without adapters"),
        (tmp_path / "peft", {}, "adapts 'somebody/elsewhere', which is not here"),
    ):
        with pytest.raises(ConfigError, match=message):
            ambijax.load(opened, **options)
    assert ambijax.load(tmp_path / "peft", checkpoint=trained.TINY).setting.vocabulary.labels == LABELS


def test_a_run_is_heard_on_its_own_base_alone(run, tmp_path):
    """Another one of the same shape would take its adapters without a word."""
    for name in ("weights", "tokenizer"):
        shutil.copytree(trained.TINY, tmp_path / name)
    weights = load_file(tmp_path / "weights/model.safetensors")
    first = min(weights)
    save_file(weights | {first: weights[first] + 1}, tmp_path / "weights/model.safetensors", metadata={"format": "pt"})
    with (tmp_path / "tokenizer/tokenizer.json").open("a") as file:
        file.write("\n")
    for name, message in (("weights", "trained on another base than"), ("tokenizer", "with another tokenizer than")):
        with pytest.raises(ConfigError, match=message):
            ambijax.load(run, checkpoint=tmp_path / name)
        ambijax.load(run, checkpoint=tmp_path / name, base=True)


def test_how_a_run_was_trained_does_not_decide_where_it_is_heard(tmp_path, monkeypatch):
    """Nothing of the model can be split in three, and parts of a batch are of training alone."""
    run = trained.make(tmp_path / "run", "--config.optim.micro_batch=1")
    devices = jax.devices()
    for count in (2, 3):
        monkeypatch.setattr(jax, "devices", lambda n=count: devices[:n])
        monkeypatch.setattr(jax, "device_count", lambda n=count: n)
        assert dict(ambijax.load(run).setting.mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1}


@pytest.mark.slow  # compiles programs of its own
def test_words_of_several_tokens_are_heard_by_every_form_of_a_model(run, clips, tmp_path):
    words = ("neutral", "happy")
    export.export(run, "peft", tmp_path / "peft")
    of_run, of_export = (ambijax.load(path, labels=words) for path in (run, tmp_path / "peft"))
    assert of_export.setting.vocabulary.split
    same([of_export.predict(clips[0])], [of_run.predict(clips[0])])


@pytest.mark.slow  # compiles programs of its own
def test_a_bare_checkpoint_listens(clips):
    bare = ambijax.load(trained.TINY, labels=("neutral", "anger"))
    assert [*bare.predict(clips[0]).distribution] == ["neutral", "anger"]


def test_a_checkpoint_that_says_nothing_is_asked_as_a_trained_one():
    for key, value in listener._UNTOLD.items():
        section, name = listener._SETTINGS[key].split(".")
        said = configured.get_config("cremad")[section][name]
        assert (list(said) if isinstance(said, tuple) else said) == value, key


# --- listing


def test_listing(tmp_path, monkeypatch):
    files = trained.wavs(tmp_path / "a/b", (0.1, 0.1))
    shutil.copy(files[0], tmp_path / "a/z.WAV")
    for ignored in ("a/._z.wav", "a/notes.txt"):
        (tmp_path / ignored).write_bytes(b"x")
    (tmp_path / "t.csv").write_text("transcript,path\nhello,a/z.WAV\n,missing.wav\n")
    columns = ("path", "transcript")
    found = [tmp_path / "a/b/clip0.wav", tmp_path / "a/b/clip1.wav", tmp_path / "a/z.WAV"]
    assert [c.path for c in listing.clips([str(tmp_path / "a")], columns)] == found
    assert [c.path for c in listing.clips([str(tmp_path / "a/**/*.wav")], columns)] == found[:2]
    table = list(listing.clips([str(tmp_path / "t.csv")], columns))
    assert table == [listing.Clip(tmp_path / "a/z.WAV", "hello"), listing.Clip(tmp_path / "missing.wav")]
    unsaid = listing.clips([str(tmp_path / "t.csv")], ("path",))
    assert list(unsaid) == [listing.Clip(tmp_path / "a/z.WAV"), listing.Clip(tmp_path / "missing.wav")]
    strange = b"/caf\xe9.wav"  # Latin-1: what the disk calls it, and no text
    listed = b"\xef\xbb\xbf%s\n\n%s\n%s\n" % (os.fsencode(found[1]), os.fsencode(tmp_path / "t.csv"), strange)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    expected = [found[1], *(c.path for c in table), Path(os.fsdecode(strange))]
    assert [c.path for c in listing.clips(["-"], columns)] == expected
    for name, message in ((tmp_path / "a/b/*.flac", "no sound file"), (tmp_path / "t.csv", "no column 'audio'")):
        with pytest.raises(DataError, match=message):
            list(listing.clips([str(name)]))


def test_a_folder_has_no_clips_in_hidden_folders(tmp_path):
    (tmp_path / ".trash").mkdir()
    files = trained.wavs(tmp_path / "a", (0.1,))
    shutil.copy(files[0], tmp_path / ".trash/b.wav")
    assert [clip.path for clip in listing.clips([str(tmp_path)])] == files


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ('audio,transcript\na.wav,"Hello\nb.wav,ok\n', None, "not a readable table"),
        ("audio,transcript\na.wav,Yes, I do\n", None, "t.csv:2: another number of cells"),
        ("audio,transcript\na.wav\n", None, "t.csv:2: another number of cells"),
        ("audio,words\na.wav,Yes\n", ("audio", "wrods"), "no column 'wrods'"),
        ("audio,Transcript\na.wav,Yes\n", None, "no column 'transcript'"),
        ("audio,audio\na.wav,b.wav\n", None, "more than one column 'audio'"),
        ("audio,transcript\n,Yes\n", None, "t.csv:2: no path in column 'audio'"),
        ("audio\n", None, "no rows"),
        ("audio;transcript\na.wav;Yes, I do\n", None, "its columns are separated by ';'; save it with commas"),
        ("", None, "no column 'audio'"),
    ],
)
def test_a_table_that_would_lose_clips_or_words_is_refused(tmp_path, text, columns, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        list(listing.clips([str(tmp_path / "t.csv")], columns))


# --- command


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    try:
        errors.run(predict.main)
    except SystemExit as left:
        return left.code
    return 0


def test_one_bad_file_does_not_end_the_job(run, clips, whole, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF")
    names = [clips[0], bad, tmp_path / "missing.wav", *clips[1:4]]
    for out, size in ((tmp_path / "a.csv", 2), (tmp_path / "b.jsonl", 8)):
        code = command(monkeypatch, "--model", run, *names, "--out", out, "--batch_size", size)
        said = capsys.readouterr().err
        assert code == 3
        assert "bad.wav: " in said
        assert "missing.wav: no such file" in said
        assert said.splitlines()[-1] == "ambijax: 2 of 6 clips could not be heard, see above; the others are done"
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["audio"] for r in rows] == [r["audio"] for r in lines] == [str(n) for n in names]
    assert [bool(r["error"]) for r in rows] == ["error" in r for r in lines] == [False, True, True, False, False, False]
    for row, line, expected in zip(rows[:1] + rows[3:], lines[:1] + lines[3:], whole[:4], strict=True):
        same([predict.Prediction(**{k: v for k, v in line.items() if k != "audio"})], [expected])
        np.testing.assert_allclose([float(row[f"p.{k}"]) for k in LABELS], [*expected.distribution.values()], atol=1e-5)
        assert row["reasoning"] == expected.reasoning


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_is_interrupted_goes_on_where_it_was(suffix, run, clips, tmp_path, monkeypatch, capsys):
    out, odd = tmp_path / f"a{suffix}", tmp_path / os.fsdecode(b"caf\xe9.wav")
    shutil.copy(clips[1], odd)
    names = [odd, tmp_path / "missing.wav", *clips[:1] * 2, clips[2]]
    arguments = ["--model", run, "--out", out, "--batch_size", 2, *names]
    assert command(monkeypatch, *arguments) == 3
    whole = out.read_bytes()
    ends = [i for i in range(1, len(whole)) if predicted._end(whole[:i], suffix) == i] + [len(whole)]
    assert len(ends) == 5 + (suffix == ".csv")  # its header
    heard = []
    hear = predict._hear
    monkeypatch.setattr(
        predict, "_hear", lambda model, clips, options: heard.append(clips) or hear(model, clips, options)
    )
    for kept, cut in ((2, -1), (3, 0), (4, 7)):  # whole rows, and bytes of the next
        out.write_bytes(whole[: ends[kept + (suffix == ".csv") - 1] + max(cut, 0)])
        if cut < 0:  # in the middle of a text, after the end of a line in it
            at = whole.index(b"\n", ends[kept + (suffix == ".csv") - 1] + 20) + 1
            out.write_bytes(whole[: min(at, ends[kept + (suffix == ".csv")] - 1)])
        assert command(monkeypatch, *arguments, "--resume") == 0
        assert len(heard.pop()) == 5 - kept
        found = predicted.begun(out)
        assert [Path(os.fsdecode(row["audio"].replace("\\udce9", "\udce9"))) for row in found] == names
        assert [row.get("reasoning") for row in found] == [row.get("reasoning") for row in rows(whole, suffix)]
    before = out.read_bytes()
    assert command(monkeypatch, *arguments, "--resume") == 0
    assert "has all of its 5 clips" in capsys.readouterr().out
    assert command(monkeypatch, *arguments, clips[3], "--resume", "--labels", "anger,fear") == 2
    assert "is of other classes than anger, fear" in capsys.readouterr().err
    assert out.read_bytes() == before


def rows(data: bytes, suffix: str) -> list[dict]:
    return list(predicted._rows(data.decode(), suffix))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", b"audio,p.anger,entropy,forced,reasoning,error\na.wav,1,0,False,x,\n"),  # saved by an editor
        ("a.csv", b"id,words\r\na,b\r\n"),
        ("a.csv", b"audio,p.anger,entropy,forced,reasoning,error\r\na.wav,1\r\n"),
        ("a.jsonl", b'{"audio": "a.wav"}\n'),
        ("a.jsonl", b'{"audio": "a.wav", "error": "x"}\n[]\n'),
        ("a.jsonl", b'{"audio": 1, "error": "x"}\n'),
        ("a.jsonl", b'{"audio": "a.wav", "error": "x"}'),
    ],
)
def test_another_file_is_not_gone_on_in(tmp_path, name, text):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match="is not what this command writes; choose another name"):
        predicted.begun(tmp_path / name)
    assert (tmp_path / name).read_bytes() == text


def test_a_file_that_has_not_come_to_its_first_row_is_begun_anew(tmp_path):
    for name in ("a.csv", "a.jsonl", "empty.csv"):
        if name != "empty.csv":
            with predicted.Predicted(tmp_path / name, LABELS):
                pass
        (tmp_path / name).touch()
        assert predicted.begun(tmp_path / name) == []
        predicted.Predicted(tmp_path / name, LABELS).__exit__()


def test_a_prediction_is_printed_with_its_reasoning(whole, capsys):
    predict._print({"audio": "a.wav", **dataclasses.asdict(whole[0])}, as_json=False)
    said = capsys.readouterr().out
    assert said.startswith("a.wav\n")
    for line in (*whole[0].reasoning.splitlines(), *LABELS):
        assert line in said


def test_transcripts_from_a_table(model, run, clips, tmp_path, monkeypatch, capsys):
    (tmp_path / "t.csv").write_text(f"file,words\n{clips[0]},It was a long day.\n")
    assert command(monkeypatch, "--model", run, tmp_path / "t.csv", "--columns", "file,words", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = model.predict(clips[0], "It was a long day.")
    np.testing.assert_allclose([*found["distribution"].values()], [*expected.distribution.values()], atol=1e-5)


def test_mistakes_get_one_line(run, clips, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.csv").write_text("a\n")
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    (tmp_path / "sub").mkdir()
    for arguments, message in (
        (["--model", run, clips[0], "--out", tmp_path / "there.csv"], "there.csv exists; choose another name"),
        (["--model", run, clips[0], "--out", tmp_path / "there.csv", "--resume"], "is not what this command writes"),
        (["--model", run, clips[0], "--resume"], "--resume goes on in the file that --out names"),
        (["--model", run, clips[0], "--out", tmp_path / "x.txt"], "must be a .csv or .jsonl file"),
        (["--model", run, clips[0], "--transcript", "a", "--transcript", "b"], "2 transcripts for 1 clips"),
        (["--model", tmp_path, clips[0], "--samples", "0"], "samples=0 must be a whole number from 1"),
        (["--model", tmp_path, clips[0], "--samples", "2", "--temperature", "nan"], "temperature=nan must be a number"),
        (["--model", tmp_path, clips[0], "--samples", "2", "--temperature", "-1"], "temperature=-1.0 must be a number"),
        (["--model", tmp_path, clips[0], "--seed", str(2**40)], "must be a whole number from 0 to 2147483647"),
        (["--model", tmp_path, clips[0], "--columns", "audio,a,b"], "must name one of paths"),
        (["--model", tmp_path, clips[0], "--columns", ",words"], "must name one of paths"),
        (["--model", run, clips[0], "--out", tmp_path / "no/x.csv"], "there is no directory"),
        (["--model", run, clips[0], "--out", "/proc/x.csv"], "cannot write to /proc"),
        (["--model", tmp_path, clips[0]], "no run directory, export or checkpoint"),
        (["--model", run, "-"], "the list is empty"),
        (["--model", run, "no.wav"], "no.wav: no such file"),
        (["--model", tmp_path, broken], "broken.wav: not a readable sound file"),  # said before a model is looked for
        (["--model", tmp_path, "no.wav", broken], "no.wav: no such file; nor can any of the other 1 be heard"),
        (["--model", run, tmp_path / "sub"], "no sound file there"),
        *(
            (
                ["--model", run, clips[0], "--labels", given],
                "class words must be two or more, distinct, separated by commas",
            )
            for given in ("anger,,fear", "anger,anger", "anger", "anger;fear", "('anger','fear')")
        ),
        (["--model", run, clips[0], "--transcript", "caf\udce9"], "holds half a character"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
        assert command(monkeypatch, *arguments) in (2, 3)
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1


def test_a_clip_in_memory_is_guarded(run, model):
    with pytest.raises(DataError, match=r"clip 0: .* NaN"):
        model.predict(np.full(16000, np.nan))
    sound = 0.1 * np.random.default_rng(0).standard_normal(16000)
    with pytest.raises(ConfigError, match="2 transcripts for 1 clips"):
        model.predict([sound], ["a", "b"])
    with pytest.raises(ConfigError, match=r"transcript 1 must be text, got nan; '' or None"):  # as pandas reads a gap
        model.predict([sound, sound], ["a", np.nan])
    with pytest.raises(ConfigError, match=r"transcript 0 must be text, got 3"):
        next(model.stream(sound, 3))
    with pytest.raises(ConfigError, match="clip 0 is a float; a clip is a sound file or a numpy array of samples"):
        model.predict(sound.tolist())
    with pytest.raises(ConfigError, match="clip is a list; a clip is"):
        next(model.stream(sound.tolist()))
    assert model.predict(iter([sound]), iter([None])) == [model.predict(sound)]
    with pytest.raises(DataError, match=r"no\.wav: no such file"):
        model.predict(np.array(["no.wav"]))
    for wrong in (
        {"batch_size": -1},
        {"samples": 0},
        {"samples": 2.5},
        {"samples": 2, "temperature": np.inf},
        {"seed": -1},
    ):
        with pytest.raises(ConfigError, match=f"{[*wrong][-1]}=.* must be a .*number from"):
            model.predict([sound], **wrong)
    assert model.predict(sound, temperature=0.0) == model.predict(sound)  # nothing is drawn
    with pytest.raises(ConfigError, match="must be a list of class words"):
        ambijax.load(trained.TINY, labels="anger,fear")
    for model in (run, trained.TINY):
        with pytest.raises(ConfigError, match=r"^labels=\('anger',\) must be"):
            ambijax.load(model, labels=["anger"])


def test_names_of_files_need_not_be_text(run, clips, tmp_path, monkeypatch, capsys):
    """As they come out of old archives: bytes in Latin-1."""
    odd = tmp_path / os.fsdecode(b"caf\xe9.wav")
    shutil.copy(clips[0], odd)
    assert command(monkeypatch, "--model", run, odd, "--out", tmp_path / "a.csv") == 0
    assert command(monkeypatch, "--model", run, odd, "--out", tmp_path / "a.jsonl") == 0
    assert "caf\\udce9.wav" in (tmp_path / "a.csv").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["audio"] == str(odd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "anger"}, "labels='anger' must be"),
        ({"labels": [1, 2]}, r"labels=\(1, 2\) must be"),
        ({"temperature": 0, "dtype": "x"}, r"temperature=0 must be .*; dtype='x' must be"),
        ({"batch_size": -1}, "batch_size=-1 must be"),
        ({"windows": 3}, "windows=3 must be"),
        ({"style": []}, r"style=.. must be"),
    ],
)
def test_what_an_export_says_of_itself_is_checked(tmp_path, change, message):
    """It may be somebody else's."""
    shutil.copytree(trained.TINY, tmp_path / "model")
    told = {"format": listener.FORMAT, "labels": list(LABELS)} | change
    (tmp_path / "model" / listener.ABOUT).write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=message):
        ambijax.load(tmp_path / "model")
