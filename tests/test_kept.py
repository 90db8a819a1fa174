"""Tower outputs are computed once ever: what is kept is what was computed, and is taken only where nothing differs."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ambijax import audio, compilation, data, features, kept, sharding
from ambijax.errors import DataError
from tests import small, trained

KEY = "0123456789abcdef"


@dataclasses.dataclass(frozen=True)
class Clip:
    """What `features.compute` wants to know of an utterance."""

    id: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What `features.compute` wants to know of a corpus."""

    root: Path

    def path(self, clip: Clip) -> Path:
        return self.root / f"{clip.id}.wav"


@pytest.fixture
def wavs(tmp_path) -> list[Path]:
    return trained.wavs(tmp_path / "wav")


@pytest.fixture(scope="module")
def params() -> dict:
    mel, frames = jnp.zeros((1, 8, 8)), jnp.array([6])
    made = jax.jit(lambda key: small.model().init(key, mel, frames, method="encode"))(jax.random.key(0))["params"]
    return jax.tree.map(lambda x: 2.0 * x, made) | {"language_model": {"norm": {"scale": jnp.ones(32)}}}


@pytest.fixture
def hear(tmp_path, monkeypatch, wavs, params):
    """Computes the sounds of `wavs` with something else than usual; returns them and how many clips were computed."""
    computed = []
    encode = features.encode

    def counted(*args: object) -> list[tuple[int, data.Sound]]:
        found = list(encode(*args))
        computed.append(len(found))
        return found

    monkeypatch.setattr(features, "encode", counted)

    def hear(**changed: object) -> tuple[list[data.Sound], int]:
        given = {
            "model": small.model(),
            "params": params,
            "windows": (256,),
            "directory": str(tmp_path / "kept"),
        } | changed
        mesh = given.pop("mesh", None) or sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        clips = [Clip(path.stem) for path in wavs]
        with jax.set_mesh(mesh):
            sounds = features.compute(Corpus(wavs[0].parent), clips, mesh=mesh, live_tower=False, **given)
        return [sounds[clip.id] for clip in clips], computed.pop()

    return hear


def bits(sounds: list[data.Sound]) -> list[tuple]:
    return [(s.frames, np.asarray(s.values).shape, np.asarray(s.values).tobytes()) for s in sounds]


def test_a_kept_output_is_the_computed_one_bit_for_bit(hear):
    live, computed = hear(directory="")
    assert (computed, type(live[0].values)) == (3, np.ndarray)
    first, computed = hear()
    assert computed == 3
    again, computed = hear()
    assert computed == 0
    assert bits(live) == bits(first) == bits(again)
    assert len({values for *_, values in bits(live)}) == 3  # else the comparison says nothing
    assert not [s for s in first + again if isinstance(s.values, np.ndarray)]  # they lie on the disk, not in memory


def test_clips_of_one_batch_are_each_heard_to_their_own_end(params):
    rng = np.random.default_rng(0)
    sounds = [rng.normal(size=n).astype(np.float32) for n in (16_000, 30_000)]
    clips = [features.Clip(audio.mel_frames(len(sound)), lambda sound=sound: sound) for sound in sounds]
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        encoded = dict(features.encode(small.model(), {"params": params}, mesh, clips, (256,)))
    for i, sound in enumerate(sounds):
        mel = audio.log_mel(sound, 256, 8)[None]
        alone = small.model().apply({"params": params}, mel, jnp.array([clips[i].frames]), method="encode")[0]
        expected = alone[: audio.tokens(clips[i].frames)]
        assert encoded[i].values.shape == expected.shape
        np.testing.assert_allclose(encoded[i].values, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_clip_that_is_not_as_long_as_its_header_says_is_named(hear, wavs, monkeypatch):
    monkeypatch.setattr(audio, "declared_frames", lambda path: 20)
    with pytest.raises(DataError, match=rf"{wavs[0]}: \d+ mel frames of sound where its header promises 20"):
        hear(directory="")


def test_a_rare_long_clip_holds_no_other_up(params):
    """Its batch is never full; what waited for it would be lost with the process, and fill the memory until then."""
    taken = []

    def clips():
        rng = np.random.default_rng(0)
        for seconds in (10.0, *[1.0] * 40):
            taken.append(seconds)
            sound = rng.normal(size=int(seconds * 16_000)).astype(np.float32)
            yield features.Clip(audio.mel_frames(len(sound)), lambda sound=sound: sound)

    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        encoded = features.encode(small.model(), {"params": params}, mesh, clips(), (256, 1024))
        number, sound = next(encoded)
        assert (number, sound.frames, len(taken)) == (1, 100, 1 + features.CLIPS)
        rest = dict(encoded)
    assert {number, *rest} == {*range(41)}
    assert rest[0].frames == 1000


def test_a_batch_of_kept_outputs_is_that_of_computed_ones(hear):
    how = {"numbers": range(3), "windows": (256,), "slots": (80,), "pad": 0, "live_tower": False}
    batches = []
    for directory in ({"directory": ""}, {}, {}):
        sounds, _ = hear(**directory)
        tokens = [np.array([9, *[small.AUDIO] * s.tokens], np.int32) for s in sounds]
        batches.append(data.prompts(tokens, sounds, **how))
    jax.tree.map(lambda a, *others: [np.testing.assert_array_equal(a, b) for b in others], *batches)
    assert batches[0].audio.dtype == np.float32


def scaled(params: dict, module: str) -> dict:
    return params | {module: jax.tree.map(lambda x: 1.001 * x, params[module])}


@pytest.mark.parametrize("what", ["tower", "projector", "dtype", "window", "shape", "mesh", "code", "library", "flags"])
def test_what_makes_another_output_is_part_of_the_key(hear, params, monkeypatch, what):
    hear()
    changed = {}
    if what in ("tower", "projector"):
        changed["params"] = scaled(params, {"tower": "audio_tower", "projector": "multi_modal_projector"}[what])
    if what == "dtype":
        changed["model"] = small.model(dtype="bfloat16")
    if what == "window":
        changed["windows"] = (512,)
    if what == "shape":  # of weights that fit both: one head of the tower instead of two
        model = small.model()
        audio = dataclasses.replace(model.config.audio, encoder_attention_heads=1)
        changed["model"] = model.clone(config=dataclasses.replace(model.config, audio=audio))
    if what == "mesh":
        changed["mesh"] = sharding.make_mesh(1, 2, 1, jax.devices()[:2])
    if what == "code":
        read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + b"\n" * (p.name == "encoder.py"))
    if what == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    if what == "library":
        monkeypatch.setattr(compilation.importlib.metadata, "version", lambda name: "0.0")
    live = hear(directory="", **changed)[0]
    found, computed = hear(**changed)
    assert computed == 3
    assert bits(found) == bits(live)


def test_a_live_tower_hears_a_batch_in_the_window_that_holds_it(wavs):
    windows = (100, 164, 256)  # of .9, 1.6 and 2.2 s, the first two with no more silence than they need
    given = {"model": small.model(), "params": {}, "mesh": None, "windows": windows, "directory": ""}
    found = features.compute(Corpus(wavs[0].parent), [Clip(p.stem) for p in wavs], live_tower=True, **given)
    sounds = [found[path.stem] for path in wavs]
    for chosen, window in (([0], 100), ([1, 0], 164), ([2, 0, 1], 256)):
        tokens = [np.array([9, *[small.AUDIO] * sounds[i].tokens], np.int32) for i in chosen]
        how = {"numbers": chosen, "windows": windows, "slots": (80, 80, 80), "pad": 0, "live_tower": True}
        asked = data.prompts(tokens, [sounds[i] for i in chosen], **how)
        expected = [audio.log_mel(audio.load(wavs[i]), window, 8) for i in chosen]
        np.testing.assert_array_equal(asked.mel, expected)


def test_another_kernel_of_attention_is_part_of_the_key(params):
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    kernels = ("xla", "cudnn", "splash")  # the last two compute on no CPU
    assert len({features._origin(small.model().clone(attention=name), params, mesh) for name in kernels}) == 3


def test_what_changes_nothing_is_not_part_of_the_key(hear, params, wavs):
    hear()
    assert hear(params=scaled(params, "language_model"))[1] == 0
    os.utime(wavs[0], (0, 0))
    assert hear(windows=(256, 512))[1] == 0  # every clip still falls into the first


def test_another_sound_under_the_same_name_is_heard(hear, wavs):
    before = bits(hear()[0])
    wavs[1].write_bytes(wavs[0].read_bytes())
    found, computed = hear()
    assert computed == 0  # its sound was heard before, under another name
    assert bits(found) == [before[0], before[0], before[2]]
    samples = bytearray(wavs[2].read_bytes())
    samples[5000] ^= 64
    wavs[2].write_bytes(samples)
    found, computed = hear()
    assert computed == 1
    assert bits(found)[2] == bits(hear(directory="")[0])[2] != before[2]


@pytest.mark.parametrize("damage", ["flip", "flip the digest", "truncate", "empty", "swap"])
def test_a_damaged_entry_is_made_anew_with_one_line(hear, tmp_path, capsys, damage):
    good = bits(hear()[0])
    entries = sorted((tmp_path / "kept").glob("??/*"))
    capsys.readouterr()
    whole = entries[0].read_bytes()
    entries[0].write_bytes(
        {
            "flip": whole[:7] + bytes([whole[7] ^ 1]) + whole[8:],
            "flip the digest": whole[:-1] + bytes([whole[-1] ^ 1]),
            "truncate": whole[:-40],
            "empty": b"",
            "swap": entries[1].read_bytes(),  # whole, and another clip's
        }[damage]
    )
    found, computed = hear()
    assert (computed, bits(found)) == (1, good)
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(said) == 1
    assert str(entries[0]) in said[0]
    assert hear()[1] == 0
    assert entries[0].read_bytes() == whole


def test_a_missing_file_is_named_though_its_output_is_kept(hear, wavs):
    hear()
    wavs[1].unlink()
    with pytest.raises(DataError, match=r"clip1\.wav: no such file"):
        hear()


def test_an_entry_that_goes_while_it_is_used_is_named(tmp_path):
    found = kept.Shelf(str(tmp_path)).put(KEY, np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(np.asarray(found), [[0, 1, 2], [3, 4, 5]])
    found.path.unlink()
    with pytest.raises(DataError, match=rf"{KEY} .*start again"):
        np.asarray(found)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4), (3, 4)])
def test_arrays_come_back(tmp_path, dtype, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    kept.Shelf(str(tmp_path)).put(KEY, array)
    back = np.asarray(kept.Shelf(str(tmp_path)).find(KEY, shape, np.dtype(dtype)))
    assert (back.dtype, back.tobytes()) == (array.dtype, array.tobytes())
    assert kept.Shelf(str(tmp_path)).find(KEY, (5, 4), np.dtype(dtype)) is None
    assert kept.size(str(tmp_path)) == (1, array.nbytes + 32)


def test_who_shares_a_directory_may_read_what_others_keep(tmp_path):
    before = os.umask(0o027)
    try:
        found = kept.Shelf(str(tmp_path)).put(KEY, np.ones(3, np.float32))
    finally:
        os.umask(before)
    assert found.path.stat().st_mode & 0o777 == 0o640


def test_without_room_it_goes_on_and_says_so_once(tmp_path, capsys):
    (tmp_path / "file").touch()
    shelf = kept.Shelf(str(tmp_path / "file"))
    array = np.ones(3, np.float32)
    assert shelf.put(KEY, array) is array
    assert shelf.put(KEY, array) is array
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/file: nothing more is kept")


def test_a_full_disk_leaves_no_half_of_an_entry(tmp_path):
    code = (
        "import resource, sys, numpy as np\n"
        "from ambijax import kept\n"
        "shelf = kept.Shelf(sys.argv[1])\n"
        "shelf.put('aa', np.ones(10))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "array = np.ones(1000)\n"
        "assert shelf.put('bb', array) is array\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["aa"]


def test_killed_while_writing_it_keeps_whole_entries_only(tmp_path):
    # Two processes write the same hundred entries again and again, and are killed in the middle of it.
    code = (
        "import sys, numpy as np\n"
        "from ambijax import kept\n"
        "shelf = kept.Shelf(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for i in range(100):\n"
        "        shelf.put(f'{i:02}', np.full(200_000, i))\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for writer in writers:
        writer.stdout.readline()
    time.sleep(0.3)
    for writer in writers:
        writer.kill()
        writer.communicate()
    shelf = kept.Shelf(str(tmp_path))
    found = [shelf.find(f"{i:02}", (200_000,), np.dtype(int)) for i in range(100)]
    assert any(found)
    assert not shelf.damaged
    for i, entry in enumerate(found):
        assert entry is None or (np.asarray(entry) == i).all()
    old, others = tmp_path / "partial" / f"{KEY}-{'0' * 32}", tmp_path / "partial" / "draft.txt"
    for path in (old, others):
        path.touch()
        os.utime(path, (0, 0))
    kept.Shelf(str(tmp_path))
    assert not old.exists()
    assert others.exists()  # nobody knows what else lies in a directory that somebody named
