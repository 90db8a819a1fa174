"""Programs are counted, kept for the next process, and none is made after warm-up whatever the clips' lengths."""

import contextlib
import ctypes
import importlib
import os
import pwd
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ambijax import audio, compilation, data, hosts, kept, losses, policy
from tests import small, trained

WINDOWS = (256, 3000)
OURS = ("XLA_FLAGS", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")  # set by conftest.py, not by a user
COUNT = """
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from ambijax import compilation
compilation.keep()
with compilation.Programs() as programs:
    jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))
print(programs.compiled, programs.cached)
"""


def _count(**environment: str) -> tuple[list[int], str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COUNT],
        env={k: v for k, v in os.environ.items() if not k.startswith(OURS)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(n) for n in done.stdout.split()], done.stderr


def test_a_user_without_a_home_keeps_nothing_and_is_told(monkeypatch, capsys):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a number without a name, as in many containers
    before = jax.config.jax_compilation_cache_dir  # another test of this process may have had a home
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compilation.keep()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert not kept.Shelf("~/features").keeps
    assert kept.size("~/features") == (0, 0)
    said = capsys.readouterr().err
    assert "compiled programs are not kept" in said
    assert "~/features: nothing is kept for later runs" in said


def test_a_second_process_compiles_nothing(tmp_path):
    (compiled, cached), err = _count(XDG_CACHE_HOME=str(tmp_path))
    assert compiled > 0
    assert (cached, err) == (0, "")
    assert _count(XDG_CACHE_HOME=str(tmp_path)) == ([0, compiled], "")


def test_without_a_place_or_a_wish_nothing_is_kept(tmp_path):
    (tmp_path / "file").touch()
    (_, cached), err = _count(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert cached == 0
    assert len(err.splitlines()) == 1
    assert "JAX_COMPILATION_CACHE_DIR" in err
    assert _count(XDG_CACHE_HOME=str(tmp_path / "off"), JAX_ENABLE_COMPILATION_CACHE="false")[1] == ""
    assert not (tmp_path / "off").exists()


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "demo.__main__"])
def test_every_command_that_runs_a_model_keeps_its_programs(command, monkeypatch, tmp_path):
    settings = [f"--workdir={tmp_path / 'run'}", "--config=configs/sft.py:tiny"]
    arguments = {
        "train": settings,
        "evaluate": [*settings, f"--checkpoint={trained.TINY}"],
        "predict": [f"--model={trained.TINY}", str(trained.wavs(tmp_path, (0.5,))[0])],
        "demo.__main__": [f"--model={trained.TINY}", "--port=0"],
    }
    if command.startswith("demo"):
        pytest.importorskip("uvicorn", reason="the demo's packages are an extra")
        pytest.importorskip("starlette", reason="the demo's packages are an extra")

    class KeptError(Exception):
        pass

    def keep() -> None:
        raise KeptError

    monkeypatch.setattr(compilation, "keep", keep)
    # A process joins the others before its first computation; this one has run other tests.
    monkeypatch.setattr(hosts, "cluster", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr("sys.argv", [command, *arguments[command]])
    with pytest.raises(KeptError):
        importlib.import_module(f"ambijax.{command}").main()


def test_memory_that_compiling_took_is_given_back():
    """Blocks freed below one that is still in use are what a C library keeps."""
    libc, statm = ctypes.CDLL(None), Path("/proc/self/statm")
    if not hasattr(libc, "malloc_trim") or not statm.exists():
        pytest.skip("needs Linux and glibc")
    libc.malloc.restype = ctypes.c_void_p
    resident = lambda: int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    size, count = 2**16, 2**11  # 128 MiB in blocks too small to be mapped each for itself
    compilation.give_back()
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    full = resident()
    for block in blocks[:-1]:
        libc.free(ctypes.c_void_p(block))
    kept = resident()
    assert full - kept < size * count / 4
    jax.monitoring.record_event_duration_secs(compilation._MADE, 0.1)
    assert kept - resident() < size * count / 4
    jax.monitoring.record_event_duration_secs(compilation._MADE, 2.0)
    assert kept - resident() > size * count / 2
    libc.free(ctypes.c_void_p(blocks[-1]))


def test_the_last_step_that_compiled_is_known():
    f = jax.jit(lambda x: x * 3 + 1)
    with compilation.Programs() as programs:
        for step, n in enumerate((2, 3, 3, 2)):
            programs.at(step)
            f(np.ones(n, np.float32))
    assert (programs.compiled + programs.cached, programs.last) == (2, 1)
    before = programs.compiled + programs.cached
    f(np.ones(4, np.float32))  # outside: not counted
    assert programs.compiled + programs.cached == before


WARM = (1.0, 29.0)  # s, a clip in every window
THEN = (1.3, 2.4, 4.5, 9.9, 10.5, 30.0)


def _prompt(seconds: list[float], example: int):
    frames = [audio.mel_frames(round(s * audio.SAMPLE_RATE)) for s in seconds]
    corpus = [audio.mel_frames(round(s * audio.SAMPLE_RATE)) for s in (*WARM, *THEN, *range(1, 7))]
    slots = data.prompt_slots([audio.tokens(f) + 2 for f in corpus], corpus, WINDOWS)
    sounds = [data.Sound(f, np.ones((audio.tokens(f), 32), np.float32)) for f in frames]
    tokens = [np.array([9, *[small.AUDIO] * s.tokens, small.TOKENS.newline], np.int32) for s in sounds]
    numbers = range(example, example + len(tokens))
    return data.prompts(tokens, sounds, numbers, windows=WINDOWS, slots=slots, pad=small.TOKENS.pad, live_tower=False)


def test_nothing_compiles_after_warm_up_over_clips_of_1_to_30_seconds():
    model = small.model()
    variables = small.variables(model)
    options = {"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}}

    @jax.jit
    def update(lora, prompt, completions):
        def loss(lora):
            scores = policy.score(model, {**variables, "lora": lora}, prompt, completions, **options)
            return losses.cross_entropy(scores.logp, completions.mask).mean()

        return jax.tree.map(lambda x, g: x - 1e-3 * g, lora, jax.grad(loss)(lora))

    def step(prompt, lora, key):
        rolled = policy.rollout(
            *(model, {**variables, "lora": lora}, prompt, key, small.ENDS_LINE),
            **{"tokens": small.TOKENS, "samples": 2, "max_tokens": 4, "temperature": 1.0},
        )
        lora = update(lora, prompt, rolled.completions)  # GRPO's: G = 2
        return update(lora, prompt, jax.tree.map(np.asarray, small.completions(2, 1, 4)))  # SFT's: G = 1

    keys = [jax.random.key(i) for i in range(8)]
    lora = jax.tree.map(jnp.array, variables["lora"])
    with compilation.Programs() as programs:
        for seconds in WARM:
            lora = step(_prompt([seconds, 1.0], 0), lora, keys[0])
        warm = programs.compiled + programs.cached  # an earlier test of this process may keep programs on disk
        assert warm >= 2 * 3
        for i, seconds in enumerate(THEN):
            lora = step(_prompt([seconds, 1.0 + i], i), lora, keys[i])
    assert programs.compiled + programs.cached == warm
    assert np.isfinite(jax.tree.leaves(lora)[0]).all()
