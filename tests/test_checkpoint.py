"""Checkpoints survive what happens to disks and processes: nothing is lost in silence, nothing wrong comes back."""

import json
import logging
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ambijax import digest, guard
from ambijax.checkpoint import Checkpoints, check_meta, load_trained
from ambijax.errors import ConfigError, NonFiniteError
from ambijax.structs import TrainState

META = {"algorithm": "grpoz", "rank": 4, "alpha": 8.0, "targets": ("q_proj", "v_proj"), "base": "a1b2", "seed": 0}


def on(devices: int, *axes: str | None) -> NamedSharding:
    """Axes over a mesh of the first `devices` devices."""
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec(*axes))


def make_state(step: int, devices: int = 1) -> TrainState:
    """Adapters (one split over the devices, one bfloat16), an Optax partition with masked nodes, an int32 step."""
    a = jax.random.normal(jax.random.key(step), (16, 4))
    b = jax.random.normal(jax.random.key(step + 1), (4, 3), jnp.bfloat16)
    lora = {"q_proj": {"a": jax.device_put(a, on(devices, "data")), "b": jax.device_put(b, on(devices))}}
    optimizer = optax.partition(
        {"train": optax.adamw(1e-3), "frozen": optax.set_to_zero()}, {"lora": "train", "params": "frozen"}
    )
    variables = {"lora": lora, "params": {"w": jnp.ones(2)}}
    moments = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), optimizer.init(variables))
    return TrainState(jnp.int32(step), {"lora": lora, "params": {"w": None}}, moments, guard.start(4))


def like(state: TrainState, devices: int = 1) -> TrainState:
    """The shapes of a state, 'a'-shaped leaves split over the devices."""

    def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(devices, *["data"] * (x.shape == (16, 4))))

    return jax.tree.map(abstract, state)


def assert_same(state: TrainState, other: TrainState) -> None:
    """Same tree, same dtypes, same bits."""
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def write(root, *steps: int, keep: int = 10) -> None:
    with Checkpoints(root, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), META)


def restored(root) -> tuple[int, TrainState] | None:
    with Checkpoints(root, 10) as checkpoints:
        return checkpoints.restore(like(make_state(0)), META)


def names(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def assert_falls_back(root, caplog, damaged: str, reason: str) -> None:
    """Step 10 comes back, with one line that names the damaged directory and the reason."""
    caplog.clear()
    step, state = restored(root)
    assert step == 10
    assert_same(state, make_state(10))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"{root / damaged} is damaged" in line
    assert reason in line
    assert "\n" not in line


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A root with the good steps 10 and 20; tests damage copies of it."""
    root = tmp_path_factory.mktemp("pristine") / "checkpoints"
    write(root, 10, 20)
    return root


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def files_of(path) -> list:
    return sorted(file for file in path.rglob("*") if file.is_file())


# What is saved comes back.


@pytest.mark.parametrize(("before", "after"), [(8, 8), (8, 4), (4, 1), (1, 8)])
def test_restores_every_bit_on_another_mesh(tmp_path, before, after):
    state = make_state(7, before)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(7, state, META)
    with Checkpoints(tmp_path, 2) as checkpoints:
        wanted = like(state, after)
        step, back = checkpoints.restore(wanted, META)
    assert step == 7
    assert_same(back, state)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(wanted), strict=True):
        assert x.sharding == y.sharding


def test_the_next_step_may_donate_the_state_while_it_is_written(tmp_path, monkeypatch):
    updated = threading.Event()
    write_now = digest.write

    def write_after_update(directory, record, arrays):
        assert updated.wait(60)
        assert all(array.flags.owndata for array in arrays.values())  # not a view of memory that jax may reuse
        write_now(directory, record, arrays)

    monkeypatch.setattr(digest, "write", write_after_update)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    with Checkpoints(tmp_path, 2) as checkpoints:
        state = make_state(3)
        checkpoints.save(3, state, META)
        jax.block_until_ready(update(state))
        updated.set()
        checkpoints.wait()
        assert checkpoints.latest == 3
        _, back = checkpoints.restore(like(make_state(3)), META)
    assert_same(back, make_state(3))


def test_keeps_the_newest_and_the_best(tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step, metric in ((10, 0.3), (20, 0.1), (30, None), (40, float("nan")), (50, 0.2)):
            checkpoints.save(step, make_state(step), META)
            checkpoints.wait()
            if metric is not None:
                checkpoints.score(step, metric)
    assert names(tmp_path) == ["step_00000020", "step_00000040", "step_00000050"]
    assert load_trained(tmp_path, best=True)[0] == 20
    assert load_trained(tmp_path, best=False)[0] == 50


def test_a_score_is_noted_whole_or_not_at_all(root, monkeypatch, caplog):
    """Full disk, damaged record, a step that a full disk never took: training goes on, the checkpoint stays whole."""
    with Checkpoints(root, 5) as checkpoints:
        checkpoints.score(99, 0.1)
        checkpoints.score(20, float("nan"))
        with monkeypatch.context() as patch:
            patch.setattr(digest, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            checkpoints.score(20, 0.1)
        assert caplog.records[-1].getMessage().endswith("No space left on device; training goes on")
        assert digest.read_record(root / "step_00000020")["metric"] is None
        checkpoints.score(20, 0.1)
        assert digest.read_record(root / "step_00000020")["metric"] == 0.1
        digest.read_arrays(root / "step_00000020", digest.read_record(root / "step_00000020"))
        (root / "step_00000010" / "digest.json").write_text("{}")
        checkpoints.score(10, 0.1)
    assert len(caplog.records) == 2
    assert restored(root)[0] == 20


def test_a_step_on_disk_is_not_written_again(root):
    with Checkpoints(root, 10) as checkpoints:
        checkpoints.restore(like(make_state(0)), META)
        before = (root / "step_00000020").stat().st_ino
        checkpoints.save(20, make_state(20), META)
        checkpoints.wait()
        assert (root / "step_00000020").stat().st_ino == before


def test_adapters_load_without_knowing_the_tree(root, caplog):
    step, trained, meta = load_trained(root, best=False)
    assert step == 20
    assert meta == json.loads(json.dumps(META))
    np.testing.assert_array_equal(trained["lora"]["q_proj"]["a"], make_state(20).trained["lora"]["q_proj"]["a"])
    assert jax.tree.structure(trained) == jax.tree.structure({"lora": {"q_proj": {"a": 0, "b": 0}}})
    (root / "step_00000020" / "state" / "manifest.ocdbt").write_bytes(b"")
    assert load_trained(root, best=False)[0] == 10
    assert len(caplog.records) == 1
    with pytest.raises(ConfigError, match=r"no checkpoint in .*elsewhere"):
        load_trained(root / "elsewhere", best=False)


# What lies about beside the checkpoints (F13).


def test_strangers_are_ignored_and_stale_directories_removed(root, caplog):
    for name in ("step_00000030", "99", "notes", "step_12"):
        (root / name).mkdir()
    (root / "99" / "file").write_text("a number, and not ours")
    (root / "step_00000040").write_text("a file")
    (root / "README").write_text("foreign")
    for name in ("step_00000050.tmp", "step_00000060.old.tmp", "7.orbax-checkpoint-tmp", "x.orbax-checkpoint-tmp-123"):
        shutil.copytree(root / "step_00000020", root / name)
    step, state = restored(root)
    assert step == 20
    assert_same(state, make_state(20))
    assert caplog.records == []
    expected = ["99", "README", "notes", "step_00000010", "step_00000020", "step_00000030", "step_00000040", "step_12"]
    assert names(root) == expected


def test_nothing_completed_is_no_checkpoint(tmp_path, caplog):
    (tmp_path / "step_00000010").mkdir()
    (tmp_path / "step_00000020.tmp" / "state").mkdir(parents=True)
    assert restored(tmp_path) is None
    assert caplog.records == []


def test_killed_at_any_moment_of_a_save_leaves_a_run_that_restores(root, tmp_path, monkeypatch, caplog):
    moments = []
    rmtree = shutil.rmtree

    def look() -> None:
        moments.append(shutil.copytree(root, tmp_path / f"moment{len(moments)}"))

    def around(call):
        def wrapped(*args):
            look()
            call(*args)
            look()

        return wrapped

    def remove_in_two_steps(path, *, ignore_errors):
        for file in files_of(path)[:1]:
            file.unlink()
        look()
        rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch, Checkpoints(root, 1) as checkpoints:
        checkpoints.restore(like(make_state(0)), META)
        patch.setattr(digest, "write", around(digest.write))
        patch.setattr(digest, "fsync", around(digest.fsync))
        patch.setattr(shutil, "rmtree", remove_in_two_steps)
        checkpoints.save(30, make_state(30), META)
        checkpoints.wait()
    assert names(root) == ["step_00000030"]
    for moment in moments:
        for path in moment.glob("step_????????"):  # whatever has a final name is whole
            digest.read_arrays(path, digest.read_record(path))
    steps = [restored(moment)[0] for moment in moments]
    assert steps == sorted(steps)
    assert set(steps) == {20, 30}
    assert caplog.records == []
    assert not [name for moment in moments for name in names(moment) if name.endswith("tmp")]


def test_a_root_removed_under_a_running_training_is_created_again(root):
    with Checkpoints(root, 2) as checkpoints:
        checkpoints.restore(like(make_state(0)), META)
        shutil.rmtree(root)
        checkpoints.save(30, make_state(30), META)
    assert restored(root)[0] == 30


# Damage (F11, F12, F14).

DAMAGE = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "removed": lambda file: file.unlink(),
    "overwritten": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    "nested": lambda file: file.write_bytes(b"[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damaged_file_falls_back_with_one_line(root, caplog, damage):
    newest = root / "step_00000020"
    assert len(files_of(newest)) > 5
    for file in files_of(newest):
        sound = file.read_bytes()
        DAMAGE[damage](file)
        assert_falls_back(root, caplog, newest.name, file.name)
        file.write_bytes(sound)
    assert restored(root)[0] == 20


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_a_flipped_bit_in_any_file_falls_back_with_one_line(root, caplog, position):
    newest = root / "step_00000020"
    for file in files_of(newest):
        sound = file.read_bytes()
        flipped = bytearray(sound)
        flipped[round(position * (len(sound) - 1))] ^= 0x10
        file.write_bytes(flipped)
        assert_falls_back(root, caplog, newest.name, file.name)
        file.write_bytes(sound)
    assert restored(root)[0] == 20


@pytest.mark.slow
def test_every_single_bit_is_guarded(root):
    newest = root / "step_00000020"
    for file in files_of(newest):
        sound = file.read_bytes()
        for bit in range(8 * len(sound)):
            flipped = bytearray(sound)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(digest.DamagedError):
                digest.read_arrays(newest, digest.read_record(newest))
        file.write_bytes(sound)


@pytest.mark.parametrize("file", ["digest.json", "state/manifest.ocdbt"])
def test_a_best_one_that_is_damaged_is_said_and_not_kept(root, caplog, file):
    """It is not what the run goes on from, but what it would have chosen in the end."""
    with Checkpoints(root, 1) as checkpoints:
        checkpoints.restore(like(make_state(0)), META)
        checkpoints.score(10, 0.1)
        checkpoints.score(20, 0.2)
    (root / "step_00000010" / file).write_bytes(b"{}")
    for read in (lambda: restored(root)[0], lambda: load_trained(root, best=True)[0]):
        caplog.clear()
        assert read() == 20
        (line,) = [record.getMessage() for record in caplog.records]
        assert f"{root / 'step_00000010'} is damaged ({file} is" in line
    with Checkpoints(root, 1) as checkpoints:
        checkpoints.restore(like(make_state(0)), META)
        checkpoints.save(30, make_state(30), META)
    assert names(root) == ["step_00000020", "step_00000030"]


def test_what_once_had_to_be_equal_does_not_keep_a_run_from_resuming():
    check_meta({"seed": 0, "tracker": "wandb", "tracker_audio": True}, {"seed": 0}, Path("here"))
    with pytest.raises(ConfigError, match="seed is 0"):
        check_meta({"seed": 0, "tracker": "wandb"}, {"seed": 1}, Path("here"))


def test_missing_commit_files_fall_back(root, caplog):
    (root / "step_00000020" / "state" / "commit_success.txt").unlink()
    assert_falls_back(root, caplog, "step_00000020", "commit_success.txt: No such file")
    shutil.rmtree(root / "step_00000020" / "state")
    assert_falls_back(root, caplog, "step_00000020", "No such file")
    (root / "step_00000020" / "digest.json").write_text("[]")
    assert_falls_back(root, caplog, "step_00000020", "digest.json is unreadable")


def reseal(path, **changes) -> None:
    """Gives a digest other values and its own right sha256."""
    (path / "digest.json").write_text(digest._encode(digest.read_record(path) | changes))


def test_arrays_that_are_not_those_saved_fall_back(root, caplog):
    newest = root / "step_00000020"
    arrays = digest.read_record(newest)["arrays"]
    arrays["step"]["sha256"] = arrays["trained/lora/q_proj/a"]["sha256"]  # all files right, one array another
    reseal(newest, arrays=arrays)
    assert_falls_back(root, caplog, newest.name, "its arrays are not those that were saved")


def test_a_copy_under_another_step_falls_back(root, caplog):
    shutil.rmtree(root / "step_00000020")
    shutil.copytree(root / "step_00000010", root / "step_00000099")
    assert_falls_back(root, caplog, "step_00000099", "it is a copy of step 10")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_state_that_is_not_finite_is_neither_saved_nor_restored(root, caplog, bad):
    state = make_state(30)
    state.trained["lora"]["q_proj"]["b"] = state.trained["lora"]["q_proj"]["b"].at[1, 1].set(bad)
    with Checkpoints(root, 10) as checkpoints:
        with pytest.raises(NonFiniteError, match="step 30 is not finite in trained/lora/q_proj/b"):
            checkpoints.save(30, state, META)
        assert names(root) == ["step_00000010", "step_00000020"]
    newest = root / "step_00000020"
    arrays = digest.read_arrays(newest, digest.read_record(newest))
    arrays["trained/lora/q_proj/b"] = np.asarray(state.trained["lora"]["q_proj"]["b"])
    shutil.rmtree(newest)
    digest.write(newest, {"step": 20, "metric": None, "meta": META}, arrays)
    assert_falls_back(root, caplog, newest.name, "trained/lora/q_proj/b is not finite")


def test_when_all_are_damaged_the_run_does_not_start_over(root):
    (root / "step_00000010" / "digest.json").unlink()
    (root / "step_00000020" / "state" / "_METADATA").write_text("{}")
    with pytest.raises(ConfigError) as error:
        restored(root)
    assert f"{root}/step_00000010 (digest.json is missing)" in str(error.value)
    assert f"{root}/step_00000020 (state/_METADATA is altered)" in str(error.value)
    with pytest.raises(ConfigError, match="no checkpoint is intact"):
        load_trained(root, best=True)


def test_a_damaged_newer_checkpoint_never_displaces_a_good_one(root):
    (root / "step_00000020" / "state" / "_METADATA").unlink()
    with Checkpoints(root, 1) as checkpoints:
        assert checkpoints.restore(like(make_state(0)), META)[0] == 10
        checkpoints.save(15, make_state(15), META)
        checkpoints.wait()
        assert names(root) == ["step_00000015"]


def test_a_damaged_checkpoint_is_replaced_when_the_run_passes_it_again(root):
    (root / "step_00000020" / "state" / "_METADATA").unlink()
    with Checkpoints(root, 5) as checkpoints:
        assert checkpoints.restore(like(make_state(0)), META)[0] == 10
        checkpoints.save(20, make_state(20), META)
    assert names(root) == ["step_00000010", "step_00000020"]
    assert restored(root)[0] == 20


# A sound checkpoint of another run (F16 to F20).


def test_check_meta_names_every_difference_with_both_values(tmp_path):
    saved = json.loads(json.dumps(META))  # tuples are lists there
    check_meta(saved, META, tmp_path)
    with pytest.raises(ConfigError) as error:
        check_meta(saved | {"dtype": "float32"}, META | {"rank": 16, "base": "ffff"}, tmp_path)
    for text in (
        str(tmp_path),
        "rank is 4 in the checkpoint and 16 in this run",
        "the base weights changed since the checkpoint (base was a1b2 and is ffff)",
        "dtype is 'float32' in the checkpoint and None in this run",
    ):
        assert text in str(error.value)
    for key in ("algorithm", "alpha", "targets", "seed"):
        assert f"{key} is" not in str(error.value)


def test_of_another_algorithm_its_settings_are_not_listed(tmp_path):
    with pytest.raises(ConfigError, match=r"fit: algorithm is 'sft' in the checkpoint and 'dpo' in this run; restore"):
        check_meta(META | {"algorithm": "sft"}, META | {"algorithm": "dpo", "dpo": {"tau": 0.1}, "rank": 16}, tmp_path)


def test_meta_is_compared_before_shapes(root):
    other = like(make_state(0)).replace(step=jax.ShapeDtypeStruct((2,), jnp.int32))
    with Checkpoints(root, 10) as checkpoints, pytest.raises(ConfigError, match=r"rank is 4 .* 8 in this run"):
        checkpoints.restore(other, META | {"rank": 8})


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (jax.ShapeDtypeStruct((), jnp.float32), r"step is int32\[\] in the checkpoint and float32\[\] in this run"),
        (jax.ShapeDtypeStruct((2,), jnp.int32), r"step is int32\[\] in the checkpoint and int32\[2\] in this run"),
        (None, r"step is int32\[\] in the checkpoint and absent in this run"),
    ],
)
def test_another_dtype_shape_or_tree_is_named(root, leaf, text):
    with Checkpoints(root, 10) as checkpoints, pytest.raises(ConfigError, match=text):
        checkpoints.restore(like(make_state(0)).replace(step=leaf), META)


def test_an_unknown_format_is_named_and_not_passed_over(root):
    reseal(root / "step_00000020", format=99)
    with pytest.raises(ConfigError, match="step_00000020 has checkpoint format 99, this ambijax reads 1"):
        restored(root)


# A disk that does not take it (F09).


def test_a_write_the_kernel_refuses_is_reported_and_training_goes_on(root, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(root, 10) as checkpoints:
        checkpoints.restore(like(make_state(0)), META)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # no file may grow past 300 bytes
        try:
            checkpoints.save(30, make_state(30), META)
            checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert_reported(checkpoints, caplog, root, "File too large")


def test_a_write_that_fails_half_way_is_reported_and_training_goes_on(root, caplog, monkeypatch):
    def fail(directory, record, arrays):
        (directory / "state").mkdir(parents=True)
        (directory / "state" / "half").write_bytes(b"half")
        raise ValueError("RESOURCE_EXHAUSTED: Error writing\nin OCDBT database")

    with Checkpoints(root, 10) as checkpoints:
        checkpoints.restore(like(make_state(0)), META)
        with monkeypatch.context() as patch:
            patch.setattr(digest, "write", fail)
            checkpoints.save(30, make_state(30), META)
            checkpoints.wait()
        assert_reported(checkpoints, caplog, root, "RESOURCE_EXHAUSTED: Error writing in OCDBT database")


def assert_reported(checkpoints, caplog, root, cause) -> None:
    """One line with path, need and free bytes; step 20 still restores; the next save succeeds."""
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{root}/step_00000030 is not written" in line
    assert cause in line
    assert re.search(r"needs \d+ bytes, \d+ are free", line)
    assert "last good step: 20" in line
    assert "\n" not in line
    assert names(root) == ["step_00000010", "step_00000020"]
    assert checkpoints.restore(like(make_state(0)), META)[0] == 20
    checkpoints.save(40, make_state(40), META)
    checkpoints.wait()
    assert checkpoints.latest == 40


FULL_DISK = textwrap.dedent("""
    import pathlib, jax, jax.numpy as jnp
    from ambijax.checkpoint import Checkpoints
    root = pathlib.Path("{disk}/checkpoints")
    state = {{"trained": jax.random.bits(jax.random.key(0), 2**20, jnp.uint8)}}
    with Checkpoints(root, 10) as checkpoints:
        for step in (1, 2, 3, 4):  # 1 MiB each, on a disk of 4 MiB
            checkpoints.save(step, state, {{}})
        checkpoints.wait()
        print(checkpoints.latest, checkpoints.restore(state, {{}})[0], len(list(root.iterdir())))
""")


def test_a_disk_that_is_really_full_costs_one_line_a_save(tmp_path):
    private = ["unshare", "--map-root-user", "--mount"]  # a mount needs no privilege in its own namespace
    if not shutil.which("unshare") or subprocess.run([*private, "mount", "-t", "tmpfs", "none", tmp_path]).returncode:
        pytest.skip("needs a mount namespace")
    run = shlex.join([sys.executable, "-c", FULL_DISK.format(disk=tmp_path)])
    mount = shlex.join(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)])
    done = subprocess.run([*private, "sh", "-c", f"{mount} && {run}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2"]
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    for step, line in zip((3, 4), lines, strict=True):
        assert f"{tmp_path}/checkpoints/step_0000000{step} is not written" in line
        assert "No space left on device" in line
        need, free = map(int, re.search(r"needs (\d+) bytes, (\d+) are free", line).groups())
        assert free < need
