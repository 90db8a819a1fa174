"""Exports in the tools they are for: transformers and PEFT in torch compute the same logits, without a warning."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file

import ambijax
from ambijax import assemble, card, checkpoint, export, peft, settings
from ambijax.errors import ConfigError, DataError
from ambijax.model.config import LoraConfig
from tests import hub_server, trained

pytestmark = pytest.mark.skipif(not (trained.TINY / "model.safetensors").exists(), reason="not in this checkout")
ROOT = Path(__file__).parents[1]
# PEFT asks transformers for something that transformers is about to rename; nothing we could write differently.
ignore_is_gradient = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained.make(tmp_path_factory.mktemp("lora") / "run", "--config.data.max_tokens=24")


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    """A run whose audio tower has adapters, too."""
    return trained.make(tmp_path_factory.mktemp("tower") / "run", "--config.lora.audio_tower=True")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A run of full fine-tuning."""
    return trained.make(tmp_path_factory.mktemp("full") / "run", "--config.optim.train=('params/.*',)", base=True)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """The PEFT export of `run`, read only."""
    out = tmp_path_factory.mktemp("exported") / "peft"
    export.export(run, "peft", out)
    return out


@functools.cache
def inputs() -> dict:
    """A prompt with audio, one row."""
    rng = np.random.default_rng(0)
    config = json.loads((trained.TINY / "config.json").read_text())
    words = rng.integers(5, config["text_config"]["vocab_size"] - 70, 21)
    tokens = np.concatenate([words[:9], [config["audio_token_index"]] * 25, words[9:]])[None]
    mel = rng.standard_normal((1, 3000, 128)).astype(np.float32)
    return {"mel": mel, "frames": np.array([101]), "tokens": tokens.astype(np.int32)}


@functools.cache
def ours(run: Path, *, base: bool = False) -> np.ndarray:
    """Logits of a run by this package."""
    setting = assemble.setting(settings.load(run))
    with jax.set_mesh(setting.mesh):
        variables = {"params": assemble.base(setting)}
        if not base:
            _, variables = assemble.trained(setting, variables, run)
    mel, frames, tokens = inputs().values()
    return np.asarray(jax.jit(setting.model.apply)(variables, mel, frames, tokens, jnp.ones(tokens.shape, bool)))


@contextlib.contextmanager
def no_complaint(caplog, capfd):
    """transformers logs and prints what does not fit; PEFT warns, which pytest makes an error."""
    import transformers

    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield
    transformers.utils.logging.disable_propagation()
    assert not caplog.records, caplog.text
    said = capfd.readouterr()
    assert not re.search(r"missing|unexpected|mismatch|newly initialized|not used", said.out + said.err, re.IGNORECASE)


def theirs(directory: Path, adapter: Path | None = None) -> np.ndarray:
    """Logits of a Hugging Face directory by transformers, and PEFT, in torch."""
    import torch
    from transformers import Qwen2AudioForConditionalGeneration

    model, info = Qwen2AudioForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    mel, frames, tokens = inputs().values()
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            input_features=torch.tensor(mel.transpose(0, 2, 1)),
            feature_attention_mask=torch.tensor(np.arange(mel.shape[1]) < frames[:, None]).long(),
        ).logits.numpy()


@ignore_is_gradient
def test_peft_gives_the_same_logits(run, exported, caplog, capfd):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    with no_complaint(caplog, capfd):
        found = theirs(trained.TINY, exported)
    expected = ours(run)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - ours(run, base=True)).max() > 0.1  # an adapter that does nothing would show


@pytest.mark.parametrize("kind", ["run", pytest.param("tower", marks=pytest.mark.slow), "full"])
def test_transformers_gives_the_same_logits(kind, tmp_path, request, caplog, capfd, monkeypatch):
    pytest.importorskip("torch")
    run = request.getfixturevalue(kind)
    small = functools.partial(export.convert.write_hugging_face, max_shard_bytes=3 * 2**20)
    monkeypatch.setattr(export.convert, "write_hugging_face", small)
    export.export(run, "merged", tmp_path / "out", dtype="float32")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    with no_complaint(caplog, capfd):
        found = theirs(tmp_path / "out")
    expected = ours(run)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - ours(run, base=True)).max() > 0.1


def test_weights_exported_in_float32_are_not_rounded_when_they_are_read(run, tmp_path):
    """Also those of a run in bfloat16, the default of real configurations."""
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    for dtype, told in (("float32", "float32"), ("", "bfloat16")):
        export.export(tmp_path / "run", "merged", tmp_path / f"merged{dtype}", dtype=dtype)
        assert json.loads((tmp_path / f"merged{dtype}/ambijax.json").read_text())["dtype"] == told


def test_merged_is_a_base_like_any_other(run, tmp_path):
    export.export(run, "merged", tmp_path / "merged", dtype="float32")
    again = trained.make(tmp_path / "again", f"--config.model.checkpoint={tmp_path / 'merged'}")
    np.testing.assert_allclose(ours(again, base=True), ours(run), atol=1e-4)


def test_merged_from_a_native_checkpoint(run, tmp_path):
    export.convert.convert(trained.TINY, tmp_path / "native")
    native = trained.make(tmp_path / "run", f"--config.model.checkpoint={tmp_path / 'native'}")
    for name, source in (("a", run), ("b", native)):
        export.export(source, "merged", tmp_path / name)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_whoever_may_read_the_card_may_read_the_weights(run, tmp_path):
    before = os.umask(0o027)
    try:
        for kind in ("peft", "merged"):
            export.export(run, kind, tmp_path / kind)
    finally:
        os.umask(before)
    for kind in ("peft", "merged"):
        assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / kind).iterdir()} == {
            path.name: 0o640 for path in (tmp_path / kind).iterdir()
        }


def test_what_was_written_is_what_was_published(exported):
    """Names and fields as measured to load under transformers 4.57 and 5, written out by hand."""
    tensors = load_file(exported / "adapter_model.safetensors")
    name = "base_model.model.language_model.model.layers.3.self_attn.q_proj.lora_A.weight"
    assert tensors[name].shape == (8, 192)
    assert tensors[name.replace("self_attn.q_proj.lora_A", "mlp.down_proj.lora_B")].shape == (192, 8)
    assert len(tensors) == 4 * 7 * 2
    about = json.loads((exported / "adapter_config.json").read_text())
    assert about.pop("base_model_name_or_path") == str(trained.TINY)
    assert about == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


# --- card, digests, refusals


def test_the_card_says_what_the_run_was(run, tmp_path):
    summary = {"js": 0.1234, "bc": 0.8, "r2": 0.5, "brier": 0.04, "accuracy": 0.5, "format": 1.0, "clips": 7}
    summary["intervals"] = {"js": [0.1, 0.15]}
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for name in ("test", "test-base"):
        (copy / "eval" / name).mkdir(parents=True)
        (copy / "eval" / name / "summary.json").write_text(json.dumps(summary))
    export.export(copy, "peft", tmp_path / "out", base_model="Qwen/Qwen2-Audio-7B-Instruct", licence="apache-2.0")
    text = (tmp_path / "out" / "README.md").read_text()
    header = text.split("---")[1]
    assert "base_model: Qwen/Qwen2-Audio-7B-Instruct\n" in header
    assert "library_name: peft\n" in header
    assert "license: apache-2.0\n" in header
    for words in (
        "Synthetic speech",
        "LoRA, rank 8, alpha 16",
        "3 of 3",
        "0.123 [0.100, 0.150]",
        "7 clips",
        "AI Act",
        "2603.08230",
    ):
        assert words in text, words
    assert str(tmp_path) not in text
    import huggingface_hub

    assert huggingface_hub.ModelCard(text).data.base_model == "Qwen/Qwen2-Audio-7B-Instruct"  # the header is YAML


def test_an_unevaluated_run_says_so_and_no_card_names_our_directories(exported):
    text = (exported / "README.md").read_text()
    assert "Not evaluated" in text
    assert 'base = "path/to/tiny"' in text
    assert str(trained.TINY.parent) not in text


@pytest.mark.parametrize(("own", "said"), [("best", "these weights"), ("last", "after 3 updates")])
def test_the_card_knows_whose_metrics_it_shows(own, said, run, tmp_path):
    """Weights chosen by dev: by the run, which then tested them, or at the export, when it tested others."""
    (tmp_path / "eval/test").mkdir(parents=True)
    (tmp_path / "eval/test/summary.json").write_text(json.dumps({"js": 0.1, "clips": 7, "intervals": {}}))
    config = settings.load(run).to_dict()
    config["eval"]["checkpoint"] = own
    about = {"kind": "peft", "step": 1, "best": True, "base_model": "base", "licence": "other"}
    text = card.render(card.About(run=tmp_path, config=FrozenConfigDict(config), **about))
    assert f"| {said} | 0.100 |" in text
    assert "1 of 3, the best on dev" in text


def test_the_card_of_a_run_without_reasoning_speaks_of_none(run, tmp_path):
    (tmp_path / "eval/test").mkdir(parents=True)
    (tmp_path / "eval/test/summary.json").write_text(json.dumps({"js": 0.1, "clips": 7, "intervals": {}}))
    config = settings.load(run).to_dict()
    about = {"kind": "peft", "step": 3, "best": False, "base_model": "base", "licence": "other"}
    for cot, said in ((True, 3), (False, 0)):  # what it is, its loss, how it was evaluated
        config["data"]["cot"] = cot
        text = card.render(card.About(run=tmp_path, config=FrozenConfigDict(config), **about))
        told = text.split("## Limits")[0]  # which speaks of reasoning in general
        assert len(re.findall(r"reasons about|curated reasoning|writes its reasoning", told)) == said
    assert "CE of the answer line" in told


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "not that of an evaluation"),
        ('{"clips": 7, "js": {}, "intervals": {}}', "not that of an evaluation"),
        ('{"clips": 7, "js": 0.1, "intervals": []}', "not that of an evaluation"),
    ],
)
def test_a_damaged_evaluation_is_named(text, what, run, tmp_path):
    (tmp_path / "eval/test").mkdir(parents=True)
    (tmp_path / "eval/test/summary.json").write_text(text)
    about = {"kind": "peft", "step": 1, "best": False, "base_model": "base", "licence": "other"}
    with pytest.raises(DataError, match=f"{tmp_path}.*{what}"):
        card.render(card.About(run=tmp_path, config=settings.load(run), **about))


def test_digests_are_of_every_file(exported):
    sums = dict(line.split("  ")[::-1] for line in (exported / "SHA256SUMS").read_text().splitlines())
    names = {path.name for path in exported.iterdir()} - {"SHA256SUMS"}
    assert sums == {name: hashlib.sha256((exported / name).read_bytes()).hexdigest() for name in names}


def test_best_is_the_best(tmp_path, run):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    _, weights, meta = checkpoint.load_trained(run / "checkpoints", best=False)
    shutil.rmtree(copy / "checkpoints")
    with checkpoint.Checkpoints(copy / "checkpoints", keep=2) as saved:
        for step, metric in ((1, 0.2), (2, 0.3)):
            scaled = jax.tree.map(lambda x, step=step: jnp.asarray(x * step), weights)
            saved.save(step, {checkpoint.TRAINED: scaled}, meta)
            saved.wait()
            saved.score(step, metric)
    export.export(copy, "peft", tmp_path / "out", best=True)
    key = "base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight"
    a = weights["lora"]["language_model"]["layers"]["up_proj"]["a"]
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "adapter_model.safetensors")[key], a[0].T)
    assert "1 of 3, the best on dev" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"no checkpoint of .* has a score on dev: leave --best out"):
        export.export(run, "peft", tmp_path / "none", best=True)


def test_refusals(run, tower, full, tmp_path):
    (tmp_path / "there").mkdir()
    other = trained.make(tmp_path / "other", f"--config.model.checkpoint={tmp_path / 'base'}")
    shutil.copytree(trained.TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = load_file(tmp_path / "base/model.safetensors")
    weights["language_model.model.norm.weight"] += 1
    export.convert.save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    for source, kind, out, message in (
        (tower, "peft", "out", "adapters on the audio tower .* use --format merged"),
        (full, "peft", "out", "trained base weights, which no adapter holds; use --format merged"),
        (run, "peft", "there", "there already exists; remove it or choose another name"),
        (other, "merged", "out", "was trained on other weights than .*base holds now"),
        (tmp_path, "peft", "out", "is not a run directory"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            export.export(source, kind, tmp_path / out)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*.partial"))


def push(run: Path, out: Path, address: str, **environment: str) -> subprocess.CompletedProcess:
    """The command with --push against a hub at `address`."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "HF_HUB_OFFLINE", "HF_TOKEN")} | environment
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(out.parent / "hf"), "JAX_PLATFORMS": "cpu"}
    env["HF_HUB_DISABLE_XET"] = "1"  # the hub's own storage protocol, which no small server speaks
    command = [sys.executable, "-m", "ambijax.export", "--run", run, "--format", "peft", "--out", out]
    return subprocess.run([*command, "--push", "me/x"], env=env, capture_output=True, text=True, cwd=ROOT, check=False)


def test_push_to_a_hub(run, tmp_path):
    pytest.importorskip("huggingface_hub")
    with hub_server.serve() as (hub, address):
        done = push(run, tmp_path / "out", address, HF_TOKEN=hub_server.TOKEN)
        assert done.returncode == 0, done.stderr
        assert f"pushed to {address}/me/x" in done.stdout
        assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert [repository["name"] for repository in hub.created] == ["x"]
        assert "private" in (hub.created[0].get("visibility"), *(k for k, v in hub.created[0].items() if v is True))
        said = done.stdout + done.stderr

        hub.refuse = 403
        done = push(run, tmp_path / "again", address, HF_TOKEN=hub_server.TOKEN)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "again is written, but not pushed to me/x: " in done.stderr
        assert (tmp_path / "again/SHA256SUMS").is_file()
        assert hub_server.TOKEN not in said + done.stdout + done.stderr


def test_without_a_token_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    arguments = ["--run", run, "--format", "peft", "--out", tmp_path / "out", "--push", "me/x"]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    with pytest.raises(ConfigError, match=r"--push needs a token .* environment variable HF_TOKEN"):
        export.main()
    assert not (tmp_path / "out").exists()


KILLED = """
import functools, os, sys
from pathlib import Path
from ambijax import convert, export
save, left = convert.save_file, int(sys.argv[3])
def count(*args, **kwargs):
    global left
    save(*args, **kwargs)
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
convert.save_file = count
convert.write_hugging_face = functools.partial(convert.write_hugging_face, max_shard_bytes=2**20)
export.export(Path(sys.argv[1]), "merged", Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_export_is_not_accepted(tmp_path, run, after):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, run, out, str(after)], capture_output=True, check=False)
    assert done.returncode == -9
    assert not out.exists()
    with pytest.raises(ConfigError):
        ambijax.load(tmp_path / ".out.partial", labels=("anger", "neutral"))
    export.export(run, "merged", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# --- import


def adapters_of(run: Path) -> dict:
    return checkpoint.load_trained(run / "checkpoints", best=False)[1]["lora"]


CONFIG = LoraConfig(rank=8, alpha=16.0, dropout=0.0, audio_tower=False)


def same(a: dict, b: dict) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_import_is_bit_equal(run, exported, tmp_path):
    same(peft.load(exported, CONFIG), adapters_of(run))
    again = settings.parse(
        ["t", "--config=configs/sft.py:tiny", f"--workdir={tmp_path}", f"--config.init_from={exported}"]
    )[0]
    setting = assemble.setting(again)
    with jax.set_mesh(setting.mesh):
        same(assemble.initial(setting, {})["lora"], adapters_of(run))


@ignore_is_gradient
def test_what_peft_saves_is_read(run, exported, tmp_path):
    """PEFT under transformers 5 names the tensors as transformers does in memory."""
    pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import Qwen2AudioForConditionalGeneration

    base = Qwen2AudioForConditionalGeneration.from_pretrained(trained.TINY)
    PeftModel.from_pretrained(base, exported).save_pretrained(tmp_path)
    same(peft.load(tmp_path, CONFIG), adapters_of(run))


def edit(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    export.convert.save_file(tensors, path)


def flip(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the last bit of the last number
    path.write_bytes(data)


UP = "base_model.model.language_model.model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "no PEFT adapter in"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda d: edit(d, peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda d: edit(d, use_dora=True, rank_pattern={"q": 4}), "no use_dora=True, rank_pattern="),
        (lambda d: edit(d, init_lora_weights="pissa"), "no init_lora_weights='pissa'"),
        (
            lambda d: rewrite(d, lambda t: t.update({UP.replace(".1.", f".{10**9}."): t[UP]})),
            "a tensor of layer 1000000000",
        ),
        (lambda d: edit(d, layer_replication=[[0, 2]]), "no layer_replication="),
        (lambda d: rewrite(d, lambda t: t[UP].fill(np.nan)), "up_proj holds NaN or infinity"),
        (lambda d: edit(d, r=None), "r=None and lora_alpha=16 must be numbers"),
        (lambda d: edit(d, r=4), r"r=4, lora_alpha=16 there, lora\.rank=8, lora\.alpha=16 here"),
        (flip, r"adapter_model\.safetensors is not what was exported; copy it again"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors is missing"),
        (lambda d: os.truncate(d / "adapter_model.safetensors", 999), "is cut short or not safetensors"),
        (lambda d: rewrite(d, lambda t: t.pop(UP)), r"1 missing tensors \(language_model.*up_proj"),
        (lambda d: rewrite(d, lambda t: t.update({"x": t[UP]})), r"1 tensors that this model has no place for \(x\)"),
        (lambda d: rewrite(d, lambda t: t.update({UP: t[UP][:, 1:]})), "up_proj has layers of different shapes"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(exported, tmp_path, harm, message):
    shutil.copytree(exported, tmp_path / "peft")
    harm(tmp_path / "peft")
    with pytest.raises(ConfigError, match=message) as caught:
        peft.load(tmp_path / "peft", CONFIG)
    assert "\n" not in str(caught.value)


# --- the program in docs/export.md


def program(directory: Path, clip: Path) -> str:
    """The page's example, with paths put in."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)[1]
    return code.replace('"tiny-peft"', repr(str(directory))).replace('"clip.wav"', repr(str(clip)))


def assert_same_prediction(printed: str, exported: Path, clip: Path) -> None:
    found = json.loads(printed.splitlines()[-1])
    expected = ambijax.load(exported).predict(clip)
    assert found["reasoning"].startswith(expected.reasoning)
    np.testing.assert_allclose(
        [found["distribution"][k] for k in expected.distribution], [*expected.distribution.values()], atol=1e-4
    )


@ignore_is_gradient
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of other people's packages
def test_the_documented_program_prints_our_numbers(exported, tmp_path):
    pytest.importorskip("torch")
    clip = trained.wavs(tmp_path, (1.3,))[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program(exported, clip), "docs/export.md", "exec"), {})
    assert_same_prediction(printed.getvalue(), exported, clip)


@ignore_is_gradient
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_documented_program_reads_out_after_the_models_own_anchor(exported, tmp_path, monkeypatch):
    """A model without chain of thought begins with it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    about = json.loads((exported / "ambijax.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.TINY)
    clip = trained.wavs(tmp_path, (1.3,))[0]
    for before in ("", "well.\n"):
        written = tokenizer(f"{before}{about['anchor']} anger<|im_end|>", add_special_tokens=False).input_ids

        def generate(model, *, input_ids, written=written, **_):
            return torch.cat([input_ids, torch.tensor([written])], dim=1)

        monkeypatch.setattr(transformers.Qwen2AudioForConditionalGeneration, "generate", generate)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program(exported, clip), "docs/export.md", "exec"), {})
        assert json.loads(printed.getvalue().splitlines()[-1])["reasoning"] == before + about["anchor"]


LOGITS = """
import sys, json, warnings
import numpy as np, torch, peft, transformers
warnings.simplefilter("error", UserWarning)  # PEFT's way to say that keys are missing
inputs = np.load(sys.argv[3])
def logits(directory, adapter=None):
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter) if adapter else model
    valid = np.arange(inputs["mel"].shape[1]) < inputs["frames"][:, None]
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.tensor(inputs["tokens"]).long(),
            attention_mask=torch.ones(inputs["tokens"].shape, dtype=torch.long),
            input_features=torch.tensor(inputs["mel"].transpose(0, 2, 1)),
            feature_attention_mask=torch.tensor(valid).long()).logits.numpy()
base = json.load(open(sys.argv[1] + "/adapter_config.json"))["base_model_name_or_path"]
np.savez(sys.argv[4], peft=logits(base, sys.argv[1]), merged=logits(sys.argv[2]))
print(transformers.__version__, peft.__version__)
"""


@pytest.fixture(scope="module")
def other_python(tmp_path_factory) -> str:
    """An interpreter with transformers 4.57 and PEFT: OTHER_PYTHON, or a fresh environment (needs the network)."""
    if "OTHER_PYTHON" in os.environ:
        return os.environ["OTHER_PYTHON"]
    directory = tmp_path_factory.mktemp("other")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    packages = ["transformers==4.57.*", "peft", "torch==2.13.0", "librosa"]
    pip = [directory / "bin/python", "-m", "pip", "install", "--quiet", *packages]
    if subprocess.run(pip, check=False).returncode:
        pytest.skip("pip cannot install transformers 4.57 here")
    return str(directory / "bin/python")


@pytest.mark.slow
def test_other_transformers_agree(run, exported, other_python, tmp_path):
    export.export(run, "merged", tmp_path / "merged", dtype="float32")
    np.savez(tmp_path / "in.npz", **inputs())
    files = [exported, tmp_path / "merged", tmp_path / "in.npz", tmp_path / "out.npz"]
    done = subprocess.run([other_python, "-c", LOGITS, *map(str, files)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4.57")
    assert not re.search(r"missing|unexpected|mismatch|newly initialized|not used", done.stderr, re.IGNORECASE)
    expected = ours(run)
    for name, found in np.load(tmp_path / "out.npz").items():
        np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)
    clip = trained.wavs(tmp_path, (1.3,))[0]
    done = subprocess.run([other_python, "-c", program(exported, clip)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_prediction(done.stdout, exported, clip)
