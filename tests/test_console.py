"""Output that is closed, left by its reader or on a full disk: the training goes on, and its files are safe."""

import subprocess
import sys

import pytest

from tests.command import ROOT

TALKER = """
import contextlib, os, sys
sys.path.insert(0, {root!r})
from ambijax import console
console.hold()
file = open({path!r}, "w")
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print("a line", file=stream, flush=True)
with contextlib.suppress(OSError):
    os.write(2, b"from XLA")  # whatever lies behind 2
print("done", file=file)
file.close()
"""


def talk(tmp_path, redirection: str) -> tuple[int, str]:
    """Exit code of a process that talks to `redirection`, and what stands in the file that it opened."""
    path = tmp_path / "file"
    code = TALKER.format(root=str(ROOT), path=str(path))
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}', sys.executable, code], check=False
    )
    return done.returncode, path.read_text()


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-", "2>&1 | true", "> /dev/full 2>&1"])
def test_nobody_listens(tmp_path, redirection):
    assert talk(tmp_path, redirection) == (0, "done\n")


def test_who_listens_hears_everything(tmp_path, capfd):
    assert talk(tmp_path, "") == (0, "done\n")
    assert capfd.readouterr() == ("a line\n" * 3, "a line\n" * 3 + "from XLA")
