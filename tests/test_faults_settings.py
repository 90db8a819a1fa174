"""Settings nobody could mean, and every config file: said at once, in one line, before anything is read. F21 to F26."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ambijax import assemble, checkpoint, curate, doctor, errors, journal, manifest, preflight, rules, settings, train
from ambijax.errors import ConfigError, DataError
from tests import made_runs
from tests.command import ROOT, SMALL, needs_tiny, run

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("base", "curate", "tables"))


def said(*arguments: str, config: str = "grpoz") -> str:
    """What `settings.parse` says about a tiny config with these values."""
    with pytest.raises(ConfigError) as error:
        settings.parse(["train", f"--config=configs/{config}.py:tiny", "--workdir=w", *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "argument",
    [
        "optim.learning_rate=nan",
        "optim.learning_rate=inf",
        "optim.learning_rate=-1e-4",
        "optim.learning_rate=1e30",
        "optim.warmup=1.5",
        "optim.b2=1.0",
        "optim.clip=nan",
        "optim.eps=-1",
        "optim.eps=0",
        "lora.rank=0",
        "lora.rank=1000000000",
        "lora.alpha=0",
        "lora.dropout=1",
        "steps=-3",
        "steps=99999999999999999999",
        "seed=-1",
        "seed=4294967296",
        "mesh.data=0",
        "mesh.tensor=-2",
        "data.batch_size=0",
        "data.batch_size=1000000000",
        "data.fold=-1",
        "data.max_tokens=0",
        "data.windows=(255,)",
        "data.windows=(256,256)",
        "data.labels=('anger','anger')",
        "data.root=",
        "data.corpus=nowhere",
        "model.dtype=float64",
        "model.remat=__class__",
        "model.remat=save_only_these_names",
        "grpo.samples=1",
        "grpo.temperature=0",
        "grpo.beta_kl=nan",
        "reward.w_js=-1",
        "checkpoint.every=0",
        "checkpoint.seconds=nan",
        "checkpoint.keep=0",
        "eval.batch_size=-4",
        "eval.every=-1",
        "eval.dev_clips=0",
        "eval.metric=bc",
        "eval.checkpoint=newest",
        "log_every=0",
        "watchdog_seconds=-1",
    ],
)
def test_a_value_nobody_could_mean_is_named(argument):
    message = said(f"--config.{argument}")
    assert f"{argument.split('=')[0]}=" in message
    assert "must be" in message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optim.lerning_rate=1", "Did you mean"),
        ("steps=many", "steps"),
        ("steps=1.5", "steps"),
        ("data.windows=abc", "data.windows"),
        ("data.labels=3", "data.labels"),
        ("data.labels[0]=anger", "data.labels"),
        (f"data.batch_size={'9' * 5000}", "data.batch_size"),
        (f"model.dtype={'9' * 5000}", "model.dtype"),
        ("data.cot=maybe", "data.cot"),
        *(
            (f"optim.train=('{train}',)", "optim.train")
            for train in ("lora/(", "lora/*", "lora/a{99999999999}", ".*", "(lora)/.*")
        ),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_one_line(argument, message):
    found = said(f"--config.{argument}")
    assert message in found
    assert len(found) < 1000


def test_a_changed_key_without_its_file_says_what_is_missing(tmp_path):
    """As somebody types who resumes a run on other devices."""
    with pytest.raises(ConfigError, match="give --config FILE as well"):
        settings.parse(["train", f"--workdir={tmp_path}", "--config.mesh.data=1"])


@pytest.mark.parametrize("program", ["1/0", "assert False", "import nowhere", "def get_config(): return 3", "x ="])
def test_a_config_file_that_fails_is_one_line(program, tmp_path):
    (tmp_path / "mine.py").write_text(program)
    with pytest.raises(ConfigError, match=r"--config: .") as error:
        settings.parse(["train", f"--config={tmp_path / 'mine.py'}", "--workdir=w"])
    assert "\n" not in str(error.value)


def test_a_config_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^--config: no file configs/sft.py here, in {tmp_path}; a clone has them"):
        settings.parse(["train", "--config=configs/sft.py:tiny", "--workdir=w"])


@pytest.mark.parametrize("directory", [ROOT, ROOT / "docs"])
def test_a_config_file_imports_what_stands_beside_it(directory, tmp_path):
    copied = shutil.copytree(ROOT / "configs", tmp_path / "mine" / "configs")
    base = copied / "base.py"
    base.write_text(base.read_text().replace("c = ConfigDict()", "c = ConfigDict()\n    c.mine = 1"))
    shutil.copy(copied / "curate.py", copied / "special.py")
    (copied / "derived.py").write_text("from configs import special\n\nget_config = special.get_config\n")
    program = (
        f"import sys; sys.path.append({str(ROOT)!r}); from ambijax import settings; before = sys.path.copy()\n"
        f"config = settings._read(['', '--config={copied}/grpoz.py:tiny', '--workdir=w'])[0]\n"
        "assert config.mine == 1 and sys.path == before\n"
        "from ambijax import curate\n"
        f"curate.parse(['', '--config={copied}/derived.py', '--manifest=m', '--out=o.jsonl'])"
    )
    subprocess.run([sys.executable, "-c", program], cwd=directory, check=True)


@pytest.mark.parametrize("main", [train.main, curate.main, doctor.main])
def test_help_is_no_mistake(main, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    shown = capsys.readouterr()
    assert "python -m ambijax." in shown.out
    assert not shown.err


def test_an_unknown_flag_comes_with_the_known_ones():
    assert "--dry_run" in said("--dry-run")


def test_what_cannot_be_read_is_listed_with_what_can_and_is_wrong():
    message = said("--config.steps=many", "--config.optim.lerning_rate=1", "--config.seed=-1", "--config.log_every=x")
    for part in ("config.steps=many", 'Did you mean "learning_rate"', "seed=-1 must be", "config.log_every=x"):
        assert part in message


@pytest.mark.parametrize("ask", [lambda: np.zeros(2**55), lambda: jnp.zeros(2**50, jnp.int8).block_until_ready()])
def test_too_little_memory_is_one_line(ask, capsys):
    with pytest.raises(SystemExit) as end:
        errors.run(ask)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ambijax: out of memory: ")
    with pytest.raises(RuntimeError, match="a bug"):
        errors.run(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize("error", [DataError("a.wav:\nno sound"), OSError("no space left"), MemoryError()])
def test_a_traceback_can_be_asked_for(error, capsys, monkeypatch):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        errors.run(main)
    assert end.value.code == {DataError: 3, OSError: 1, MemoryError: 2}[type(error)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ambijax: ")
    monkeypatch.setenv("AMBIJAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        errors.run(main)
    assert not capsys.readouterr().err


def test_a_corpus_without_enough_folds_is_named(tmp_path):
    record = {"id": "a", "audio": "a.wav", "transcript": "", "speaker": "s", "fold": 0, "votes": {"anger": 1}}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(record) + "\n")
    arguments = ["train", "--config=configs/sft.py:cremad", "--workdir=w", f"--config.data.root={tmp_path}"]
    for more, empty in (((), "train"), (("--config.eval.every=5",), "train and dev")):
        config, _ = settings.parse([*arguments, *more])
        with pytest.raises(DataError, match=f"no utterance is left for {empty} with data.fold=0"):
            preflight.check_corpus(config, write=True)


def test_some_clips_of_the_test_split_are_of_all_its_speakers(tmp_path):
    """A manifest goes by speakers: the first clips would be those of one."""
    people = [manifest.Utterance(f"{i}", "a.wav", "", f"s{i // 10}", i // 20, {"anger": 1}) for i in range(60)]
    argv = ["t", "--config=configs/sft.py:cremad", "--workdir=w", "--config.eval.max_clips=4"]
    found = assemble.splits(settings.parse(argv)[0], manifest.Corpus(tmp_path, tuple(people)))["test"]
    assert [u.id for u in found] == ["0", "5", "10", "15"]


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "grpoz"])
def test_a_corpus_that_nobody_curated_is_refused_where_its_reasoning_is_learned(algorithm, tmp_path):
    """Cross entropy would cover nothing, no roll-out would be rejected, no gold would join a group: in silence."""
    records = [
        {"id": f"{i}", "audio": "a.wav", "transcript": "", "speaker": f"s{i}", "fold": i, "votes": {"anger": 1}}
        for i in range(4)
    ]

    def check(*more: str) -> None:
        (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        given = [f"--config=configs/{algorithm}.py:cremad", "--workdir=w", f"--config.data.root={tmp_path}"]
        config, _ = settings.parse(["train", *given, "--config.data.labels=('anger','fear')", *more])
        preflight.check_corpus(config, write=False)

    (tmp_path / "a.wav").touch()  # is there; what it holds is not looked at
    if algorithm == "grpo":  # it learns from rewards alone
        check()
        return
    with pytest.raises(DataError, match=rf"no utterance to train on .* {algorithm} learns .*ambijax.curate.*data.cot"):
        check()
    check("--config.data.cot=False")
    check("--config.steps=0")
    records[0]["cot"] = "in the test fold"
    with pytest.raises(DataError, match="no utterance to train on"):
        check()
    records[2]["cot"] = "in training"
    check()


def test_reasoning_of_which_nothing_fits_is_refused():
    config, _ = settings.parse(["train", "--config=configs/sft.py:tiny", "--workdir=w", "--config.data.max_tokens=8"])
    some, none = (
        types.SimpleNamespace(root=Path("c"), examples=[types.SimpleNamespace(reasoned=r) for r in (False, last)])
        for last in (True, False)
    )
    preflight.check_reasoned(config, some)
    with pytest.raises(DataError, match=r"^c: none of the chains of thought .* data\.max_tokens=8, and sft"):
        preflight.check_reasoned(config, none)


def test_contradictions_are_listed_at_once():
    message = said(
        "--config.optim.warmup=3.0",
        "--config.grpo.samples=1",
        "--config.data.fold=6",
        "--config.lora.dropout=0.1",
        "--config.eval.checkpoint=best",
        "--config.optim.accumulate=3",
        "--config.optim.train=('params/.*',)",
    )
    for part in (
        "optim.warmup=3.0",
        "a group needs at least 2",
        "data.fold=6",
        "lora.dropout=0.1",
        "accumulate=3",
        "set eval.every",
    ):
        assert part in message
    assert "the reference policy is the base" in message


def test_a_misspelt_or_missing_key_in_a_file_is_found():
    """What the command line checks for itself, a config file or config.json does not."""
    whole = settings.parse(["train", "--config=configs/sft.py:tiny", "--workdir=w"])[0].to_dict()
    assert rules.problems(whole) == []
    whole["optim"]["lerning_rate"] = whole["optim"].pop("learning_rate")
    assert rules.problems(whole) == [
        "optim.learning_rate is missing",
        "unknown key optim.lerning_rate, did you mean optim.learning_rate?",
    ]


def test_a_run_of_the_first_version_is_read_as_it_was(tmp_path):
    """Its config.json knows no later key. A new key without a line in `rules.ADDED` fails here."""
    shutil.copy(Path(__file__).with_name("first_version.json"), tmp_path / "config.json")
    config = settings.load(tmp_path)
    assert (config.model.cache, config.eval.every, config.tracker) == ("float", 0, "")
    now = settings.parse(["train", "--config=configs/grpoz.py:tiny", "--workdir=w"])[0]
    assert {*flatten_dict(config.to_dict())} == {*flatten_dict(now.to_dict())}
    checkpoint.check_meta(json.loads((tmp_path / "config.json").read_text()), config.to_dict(), tmp_path)
    other = config.to_dict()
    other["model"]["cache"], other["data"]["pack"] = "int8", True
    with pytest.raises(ConfigError, match=r"model\.cache is 'float' in the checkpoint and 'int8' in this run") as said:
        checkpoint.check_meta(json.loads((tmp_path / "config.json").read_text()), other, tmp_path)
    assert "data.pack is False in the checkpoint and True in this run" in str(said.value)


def test_a_run_of_a_later_version_is_refused_with_what_to_do(tmp_path):
    later = json.loads(Path(__file__).with_name("first_version.json").read_text()) | {"curiosity": 1}
    (tmp_path / "config.json").write_text(json.dumps(later))
    with pytest.raises(ConfigError, match=r"unknown key curiosity; .* version of ambijax that .*env\.json names"):
        settings.load(tmp_path)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "grpoz"])
@pytest.mark.parametrize("value", [None, "0", [], {}, True, float("nan"), -1, 10**30, "\0", ["a", 1]])
def test_any_value_of_any_key_is_accepted_or_named(value, algorithm):
    """Nothing that JSON can hold makes the check itself fail."""
    whole = settings.parse(["train", f"--config=configs/{algorithm}.py:tiny", "--workdir=w"])[0].to_dict()
    for section, key in [(s, k) for s, part in whole.items() for k in (part if isinstance(part, dict) else [None])]:
        changed = json.loads(json.dumps(whole))
        if key is None:
            changed[section] = value
        else:
            changed[section][key] = value
        for problem in rules.problems(changed):
            assert "\n" not in problem


@pytest.mark.parametrize("argument", ["--workdir=", "--workdir=a\0b", "--workdir=a\nb"])
def test_a_workdir_that_is_no_path_is_named(argument):
    with pytest.raises(ConfigError, match="--workdir is missing or no path"):
        settings.parse(["train", "--config=configs/sft.py:tiny", argument])


@needs_tiny
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_plans(name, tmp_path):
    """F26; the real command's dry run is below, this is its inside, so that each costs no process."""
    own = [f"--workdir={tmp_path / 'run'}", f"--config.data.root={tmp_path / 'corpus'}", "--config.data.batch_size=8"]
    config, workdir = settings.parse(["train", f"--config=configs/{name}.py:tiny", *own])
    plan = preflight.plan(preflight.check(config, workdir, write=False), workdir)
    assert f"algorithm    {config.algorithm}" in plan
    assert "to be written first" in plan
    for variant in ("tiny_iemocap", "cremad", "iemocap"):
        settings.parse(["train", f"--config=configs/{name}.py:{variant}", "--workdir=w"])


@needs_tiny
def test_a_dry_run_plans_or_says_all_that_is_wrong(tmp_path):
    command = ["ambijax.train", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    code, out, err = run(
        *command, "--config=configs/grpoz.py:tiny", f"--config.data.root={tmp_path / 'corpus'}", *SMALL
    )
    assert code == 0, err
    assert "20 synthetic clips, to be written first" in out
    assert not (tmp_path / "corpus").exists()
    code, out, err = run(*command, "--config=configs/sft.py:cremad")
    assert code == 2
    assert "no model at Qwen2-Audio-7B-Instruct" in err
    assert "no manifest at" in err
    assert len(err.strip().splitlines()) == 1


def test_a_warning_for_the_user_comes_without_its_line_of_source():
    where = ("audio.py", 81, "return check(samples)")
    assert errors._plain(UserWarning("a.wav: longer than 30 s"), UserWarning, *where) == "a.wav: longer than 30 s\n"
    assert "audio.py:81" in errors._plain(DeprecationWarning("old"), DeprecationWarning, *where)


@needs_tiny
def test_the_doctor_says_what_is_here_and_no_key(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "data" / "own"
    (corpus / "wav").mkdir(parents=True)
    (corpus / "wav" / "a.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    record = {"id": "a", "audio": "wav/a.wav", "transcript": "", "speaker": "s", "fold": 0, "votes": {"anger": 1}}
    (corpus / "manifest.jsonl").write_text(json.dumps(record) + "\n")
    (corpus / "manifest.jsonl.bak").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("sys.argv", ["ambijax.doctor"])
    doctor.main()
    out = capsys.readouterr().out
    assert "8 x cpu" in out
    assert "OPENAI_API_KEY     is set" in out
    assert "HF_TOKEN           is not set" in out
    assert "class words are one token each" in out
    assert "1 of 1 sounds in data/own are git-lfs pointers" in out
    assert "canary" not in out
    config = Path(ROOT / "configs" / "sft.py")
    arguments = [f"--config={config}:tiny", "--config.data.batch_size=8", f"--config.data.root={tmp_path / 'corpus'}"]
    monkeypatch.setattr("sys.argv", ["ambijax.doctor", *arguments])
    doctor.main()
    assert "training could start" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ambijax.doctor", *arguments, "--workdir=new/run"])
    doctor.main()
    assert not (tmp_path / "new").exists()  # it only looks
    monkeypatch.setattr("sys.argv", ["ambijax.doctor", *arguments, "--config.mesh.data=3"])
    with pytest.raises(ConfigError, match="does not make 8 devices"):
        doctor.main()
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", 1) as saved:
        told = assemble.told(settings.parse(["t", *arguments, "--workdir=w"])[0])
        saved.save(3, {"x": jnp.zeros(2)}, told | {"base": "not looked at"})
    another = (f"--config={config.with_name('grpo.py')}:tiny", *arguments[1:])
    for given, said in (
        (
            (*arguments, "--config.lora.rank=4"),
            "step_00000003 does not fit: lora.rank is 8 in the checkpoint and 4 in this",
        ),
        (another, "step_00000003 does not fit: algorithm is 'sft' in the checkpoint and 'grpo' in this run; restore"),
    ):
        monkeypatch.setattr("sys.argv", ["ambijax.doctor", *given, f"--workdir={tmp_path / 'run'}"])
        with pytest.raises(ConfigError, match=said):
            doctor.main()
    monkeypatch.setattr("sys.argv", ["ambijax.doctor", *arguments, f"--workdir={tmp_path / 'run'}"])
    doctor.main()
    missing = ("--config.init_from=nowhere", "--config.tracker=trackio")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["ambijax.doctor", *arguments, *missing])
    with pytest.raises(ConfigError, match=r"init_from=nowhere: no run .*; tracker=trackio needs its package"):
        doctor.main()
    monkeypatch.setattr("sys.argv", ["ambijax.doctor", "--cofnig", "configs/sft.py:tiny"])
    with pytest.raises(ConfigError, match="--cofnig without --config checks nothing"):
        doctor.main()


def test_a_run_is_found_from_another_directory(tmp_path, monkeypatch):
    """Relative paths are those of where its training was started."""
    (tmp_path / "corpora" / "own").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    config, _ = settings.parse(["t", "--config=configs/sft.py:cremad", "--workdir=w", "--config.data.root=corpora/own"])
    (tmp_path / "runs" / "a").mkdir(parents=True)
    settings.save(config, tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert settings.load("runs/a").data.root == "corpora/own"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert settings.load("../runs/a").data.root == str(tmp_path / "corpora" / "own")
    assert settings.load("../runs/a").model.checkpoint == config.model.checkpoint  # which is nowhere
    # A namesake here is another corpus. The directory that a run was started in comes before those above it.
    (tmp_path / "elsewhere" / "corpora" / "own").mkdir(parents=True)
    assert settings.load("../runs/a").data.root == str(tmp_path / "corpora" / "own")
    (tmp_path / "home" / "corpora" / "own").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "env.json").write_text(json.dumps({"directory": str(tmp_path / "home")}))
    assert settings.load("../runs/a").data.root == str(tmp_path / "home" / "corpora" / "own")
    monkeypatch.chdir(tmp_path / "home")
    assert settings.load("../runs/a").data.root == "corpora/own"
    assert journal.environment()["directory"] == str(tmp_path / "home")
    # Its training may have been on another machine, and what it names be under the current directory alone.
    (tmp_path / "corpora" / "own").rmdir()
    for text in ('{"directory": "/nowhere"}', "{}", '{"direc'):
        (tmp_path / "runs" / "a" / "env.json").write_text(text)
        assert settings.load("../runs/a").data.root == "corpora/own"


def test_a_clip_longer_than_all_windows_is_found_before_weights_are_read(tmp_path):
    """The longest has 0.65 s: 65 frames, and two of silence."""
    corpus = made_runs.corpus(tmp_path / "corpus", 15, 5)
    argv = ["t", "--config=configs/sft.py:cremad", "--workdir=w", f"--config.data.root={corpus.root}"]
    argv += [f"--config.data.labels={corpus.classes()}", "--config.data.cot=False"]
    preflight.check_corpus(settings.parse([*argv, "--config.data.windows=(32,68)"])[0], write=False)
    said = r"1 of 15 clips are longer than .* data.windows=\(32, 66\), .*wav/7\.wav has 65, and needs two more"
    with pytest.raises(ConfigError, match=said):
        preflight.check_corpus(settings.parse([*argv, "--config.data.windows=(32,66)"])[0], write=False)


def test_a_checkpoint_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    with pytest.raises(ConfigError, match=r"is no run but a checkpoint; name it in model\.checkpoint"):
        settings.load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("('anger','neutrall')", "nobody voted on neutrall, and votes on neutral would be left out"),
        (
            "('surprise','neutral')",
            r"1 of 3 utterances have no vote on .*, for one u0; the classes there are anger, neutral",
        ),
    ],
)
def test_votes_that_would_be_lost_are_named_before_any_weight_is_read(labels, message, tmp_path, monkeypatch):
    votes = [{"anger": 2}, {"anger": 1, "neutral": 2}, {"anger": 1, "neutral": 3}]
    people = [manifest.Utterance(f"u{i}", f"{i}.wav", "", f"s{i}", i, v) for i, v in enumerate(votes)]
    manifest.write(manifest.Corpus(tmp_path, tuple(people)))
    argv = ["t", "--config=configs/sft.py:cremad", "--workdir=w", f"--config.data.root={tmp_path}"]
    with pytest.raises(DataError, match=message):
        preflight.check_corpus(settings.parse([*argv, f"--config.data.labels={labels}"])[0], write=False)
    # Where the corpus says what could be chosen, a class beyond that is another corpus' configuration.
    manifest.write(manifest.Corpus(tmp_path, tuple(people), labels=("anger", "neutral", "sadness")))
    said = "nobody could choose happiness, disgust, fear there, the classes are anger, neutral, sadness; set labels, or"
    with pytest.raises(DataError, match=said):
        preflight.check_corpus(settings.parse(argv)[0], write=False)
    arguments = [
        "--config=configs/curate.py:cremad",
        f"--manifest={tmp_path}",
        f"--out={tmp_path / 'o.jsonl'}",
        "--dry_run",
    ]
    monkeypatch.setattr("sys.argv", ["curate", *arguments])
    with pytest.raises(DataError, match=said):
        curate.main()
