"""A run's directory: found unwritable before work starts, held by one living process, free when that one is dead."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from ambijax import journal
from ambijax.errors import ConfigError
from ambijax.watchdog import Watchdog
from ambijax.workdir import check_writable, lock, replace

HOLDER = textwrap.dedent("""
    import pathlib, sys, time
    from ambijax.workdir import lock
    with lock(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
""")


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_trainer_is_refused_by_name_and_a_dead_ones_lock_is_taken_over(tmp_path, holder):
    with pytest.raises(ConfigError, match=f"in use by pid {holder.pid} on {socket.gethostname()}"), lock(tmp_path):
        pytest.fail("two processes hold one directory")
    holder.kill()  # SIGKILL: nothing of the holder's own code runs any more
    holder.wait()
    with lock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}"


def test_lock_file_of_a_dead_process_does_not_hold(tmp_path):
    (tmp_path / "lock").write_text("pid 1 on elsewhere, and a longer text than the next holder writes")
    with lock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}"


def test_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="training"), lock(tmp_path):
        raise RuntimeError("training")
    with lock(tmp_path):
        pass


def test_writable_directory_is_created_and_left_empty(tmp_path):
    check_writable(tmp_path / "runs" / "new")
    assert list((tmp_path / "runs" / "new").iterdir()) == []


def test_read_only_directory_is_named(tmp_path):
    tmp_path.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # root may write everywhere
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=f"cannot write to {tmp_path}.*: Permission denied"):
            check_writable(tmp_path / "run")
        with pytest.raises(ConfigError, match=f"cannot write to {tmp_path}.*: Permission denied"), lock(tmp_path):
            pytest.fail("locked a read-only directory")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o755)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=f"cannot write to {tmp_path}/run"):
        check_writable(tmp_path / "run")


def test_without_git_and_outside_its_clone_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "__file__", str(tmp_path / "site-packages/ambijax/journal.py"))
    (tmp_path / "site-packages/ambijax").mkdir(parents=True)
    if shutil.which("git"):  # the repository of whoever installed it
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        once = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"]
        subprocess.run(["git", "-C", tmp_path, *once], check=True)
        assert journal.commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert journal.commit() is None


def test_links_in_somebodys_run_lead_nowhere(tmp_path):
    """Archives and repositories carry them; what they point to is the user's."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("precious")
    for name in ("lock", ".summary.json.partial"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    replace(tmp_path / "run/summary.json", "{}")
    assert not (tmp_path / "run/summary.json").is_symlink()
    with pytest.raises(ConfigError, match=r"cannot write .*lock"), lock(tmp_path / "run"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_lock_may_be_waited_for(tmp_path, holder):
    waited = []

    def wait() -> None:
        with lock(tmp_path, wait=True):
            waited.append(holder.poll())

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.5)
    assert not waited
    holder.kill()
    waiting.join(20)
    assert waited


def test_a_watchdogs_file_may_have_been_tidied_away(tmp_path):
    with Watchdog(tmp_path / "stacks-0.txt", 60.0):
        (tmp_path / "stacks-0.txt").unlink()
    assert not any(tmp_path.iterdir())
