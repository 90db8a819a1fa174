"""The documentation: every link leads somewhere, every command is one, and those that need nothing run."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from tests.commands import PAGES, ROOT, Command, Parsed, blocks, commands, parse

COMMANDS = [command for page in PAGES for command in commands(page)]
_HELD = re.compile(
    r"cremad|iemocap|CREMA|IEMOCAP|7B|/path/|\bdata/|Audio-Reasoner", re.IGNORECASE
)  # not in the tiny lab
HOW = "a code block whose commands need data, weights, a key or an accelerator says so in a line `# needs WHAT`"


def _slug(heading: str) -> str:
    """The anchor that GitHub and mkdocs give a heading."""
    text = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and aim.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", aim.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(_slug, headings), f"{page.name} links to {target}; {aim.name} has no such heading"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_understood(command, monkeypatch):
    """By the command's own parser; placeholders such as `...` stand for a value, not for an argument."""
    monkeypatch.chdir(ROOT)
    try:
        with pytest.raises(Parsed):
            parse(command, monkeypatch)
    except ModuleNotFoundError as error:  # a command of an extra
        if error.name.startswith("ambijax"):
            pytest.fail(f"{command}: there is no {error.name}")
        pytest.skip(f"needs {error.name}")
    except (Exception, SystemExit) as error:
        pytest.fail(f"{command}: {error!r}")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_what_needs_something_says_so(command):
    if _HELD.search(" ".join(command.arguments)):
        assert command.needs, f"{command}: {HOW}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tests_that_a_page_names_exist(page):
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page.name} names {file}::{name}"


@pytest.mark.slow  # docstrings change often: `python docs/reference.py` before a release
def test_the_reference_is_what_the_docstrings_say():
    made = runpy.run_path(str(ROOT / "docs/reference.py"))["reference"]()
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == made, "run python docs/reference.py"


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/quickstart/index.html").is_file()


def test_blocks_of_both_kinds_are_found():
    text = "a\n\n    python -m ambijax.x \\\n      --y\n\nb\n```sh\npython -m ambijax.z\n```\n- item\n    not code\n"
    assert blocks(text) == [(3, ["python -m ambijax.x \\", "  --y"]), (8, ["python -m ambijax.z"])]


def test_the_readme_names_every_module_and_no_other():
    """In its file tree: a subpackage by its directory, a helper behind the module it helps."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("    ambijax/\n")[2].partition("    launch/")[0]
    package = ROOT / "ambijax"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    inside = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    named = set(re.findall(r"[a-z_]+(?:\.py|/)", tree.replace("test_layering.py", "")))
    assert modules - named == set()
    assert inside - named == set()
    assert {name for name in named if name.endswith(".py")} <= modules


def test_what_a_run_logs_is_explained():
    sources = (ROOT / "ambijax" / name for name in ("algorithms.py", "agent.py", "update.py"))
    keys = re.findall(r'"((?:loss|dpo|reward|rollout|skipped)/\w+)"', "".join(path.read_text() for path in sources))
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert len(keys) > 15
    assert [key for key in keys if f"`{key}`" not in page] == []


def test_the_pages_are_linked_from_the_map():
    """docs/index.md and the site's menu lead to every page, so that none is lost."""
    map_ = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        if name.startswith("benchmarks/") and name != "benchmarks/README.md":
            continue  # results, linked from the README beside them
        assert name == "index.md" or f"({name})" in map_, f"docs/index.md does not link {name}"
        assert f": {name}\n" in menu, f"the menu of mkdocs.yml has no {name}"


# ---- long: the commands run ------------------------------------------------------------------------------------------

# A run of the tiny lab takes minutes; the same in seconds.
FEW = ["--config.steps=2", "--config.data.speakers=5", "--config.data.clips_per_speaker=4"]
RUNNABLE = [command for command in COMMANDS if not command.needs]


FIRST = {  # workdir -> the training that the other commands take for granted
    f"runs/{name}": ("--config", f"configs/{algorithm}.py:tiny", "--workdir", f"runs/{name}")
    for algorithm, name in (("grpoz", "tiny"), ("sft", "sft_tiny"))
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A directory like a clone, with the runs and the sounds that the pages speak of."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("ambijax", "configs", "launch", "docs"):
        (place / name).symlink_to(ROOT / name)
    for arguments in FIRST.values():
        _run(place, Command("README.md", 0, "ambijax.train", arguments, ""))
    sound, rate = soundfile.read(place / "runs/corpora/tiny/wav/000_000_ANG.wav")
    for name in ("clip.wav", "recordings/a.wav", "recordings/deep/b.wav", "more/c.flac", "more/deep/d.flac"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / name, sound, rate)
    (place / "clips.csv").write_text("audio,transcript\nclip.wav,It was a long day.\n")
    return place


def _run(place: Path, command: Command) -> None:
    words = [sys.executable, "-m", command.module, *command.arguments]
    if "--config" in words:
        words += FEW
    if command.module == "ambijax.tables":
        words += FEW[1:]  # it sets the steps of its runs itself
    if command.module == "ambijax.demo":
        words.append("--help")  # it serves until it is stopped; tests/test_demo.py opens it
    line = " ".join(word if "*" in word else shlex.quote(word) for word in words)  # the shell finds the files
    line = " ".join([*command.environment, line])
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # a user has no simulated devices
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "WANDB_MODE": "offline"}
    done = subprocess.run(
        ["bash", "-c", line],
        input="clip.wav\nrecordings\n",  # what `find` would pipe in
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=7200,  # of one that hangs: on a busy machine the quick lab took over half an hour
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}\n{HOW}"


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNNABLE, ids=str)
def test_commands_that_need_nothing_run(lab, command):
    if command.arguments in FIRST.values():
        pytest.skip("the fixture runs it")
    if tracker := re.search(r"tracker[= ](\w+)", " ".join(command.arguments)):
        pytest.importorskip(tracker[1])
    _run(lab, command)
