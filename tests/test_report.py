"""The report: what it says of a run, what it refuses, and that what a run says stays text."""

import base64
import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.spatial
import scipy.stats

from ambijax import evaluate, settings
from ambijax.errors import ConfigError, DataError
from ambijax.report import runs as reading
from tests import made_runs as runs

pytest.importorskip("matplotlib", reason="the report draws with matplotlib: pip install -e '.[report]'")
from ambijax.report import __main__ as report
from ambijax.report import clips, figures, style

# Also a line separator, a zero byte, mathematics that is none, and the end of a comment.
HOSTILE = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 1'>\u2028\x00$\\frac$ --><!--"


def _write(directories, out, **options) -> str:
    report.write(list(directories), out, **({"split": "test", "corpus": None, "embed_audio": False} | options))
    return (out / "index.html").read_text(encoding="utf-8")


def _data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def _csv(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, str]:
    """(run directory, report directory, page) of a run on twelve clips."""
    root = tmp_path_factory.mktemp("report")
    run = runs.run(root / "run", runs.corpus(root / "corpus", 12))
    return run, root / "out", _write([run], root / "out")


def _records(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "eval" / name / "predictions.jsonl").read_text().splitlines()]


def test_every_figure_is_there_as_picture_and_as_numbers(made):
    _, out, page = made
    names = {path.stem for path in (out / "figures").iterdir()}
    assert {"learning_curves", "reliability", "js_against_entropy", "confusion", "speakers", "slices"} <= names
    for name in names:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(out / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert _csv(out / "figures" / f"{name}.csv")
        assert f'href="figures/{name}.csv"' in page


def test_a_panel_without_a_curve_is_not_shown(made):
    drawn = figures.learning_curves(reading.read([made[0]], "test", None))
    assert [axes.get_visible() for axes in drawn.figure.axes] == [True, True, True, False]  # the run has three curves


def test_js_against_entropy_is_scipys(made):
    run, out, _ = made
    rows = {(row["system"], row["id"]): row for row in _csv(out / "figures/js_against_entropy.csv")}
    for name, system in (("test-base", "base"), ("test", "GRPOz")):
        for record in _records(run, name):
            row = rows[system, record["id"]]
            js = scipy.spatial.distance.jensenshannon(record["target"], record["readout"], base=2) ** 2
            assert float(row["js"]) == pytest.approx(js, abs=1e-9)
            assert float(row["entropy"]) == pytest.approx(scipy.stats.entropy(record["target"], base=2), abs=1e-6)


def test_confusion_counts_every_clip_once(made):
    run, out, _ = made
    rows = [row for row in _csv(out / "figures/confusion.csv") if row["system"] == "GRPOz"]
    assert sum(int(row["clips"]) for row in rows) == 12
    hits = sum(int(row["clips"]) for row in rows if row["majority vote"] == row["likeliest class"])
    assert hits == sum(np.argmax(r["target"]) == np.argmax(r["readout"]) for r in _records(run, "test"))


def test_reliability_adds_up_to_the_calibration_error(made):
    """ECE from the figure's table equals the definition, clip by clip, with the same bins."""
    run, out, _ = made
    rows = [row for row in _csv(out / "figures/reliability.csv") if row["system"] == "GRPOz"]
    drawn = sum(int(r["clips"]) * abs(float(r["accuracy"]) - float(r["confidence"])) for r in rows) / 12
    bins: dict[int, list[float]] = {}
    for r in _records(run, "test"):
        confidence = max(r["readout"])
        gap = (np.argmax(r["target"]) == np.argmax(r["readout"])) - confidence
        bins.setdefault(int(np.ceil(confidence * 10)), []).append(gap)
    assert drawn == pytest.approx(sum(abs(sum(gaps)) for gaps in bins.values()) / 12)


def test_the_page_holds_the_predictions_before_and_after(made):
    run, _, page = made
    data = _data(page)
    assert [system["name"] for system in data["systems"]] == ["base", "GRPOz"]
    assert [clip["id"] for clip in data["clips"]] == [record["id"] for record in _records(run, "test")]
    for clip, before, after in zip(data["clips"], _records(run, "test-base"), _records(run, "test"), strict=True):
        np.testing.assert_allclose(clip["predictions"][0]["readout"], before["readout"], atol=1e-4)
        np.testing.assert_allclose(clip["predictions"][1]["readout"], after["readout"], atol=1e-4)
    assert data["rollouts"][0]["members"][2]["gold"]


@pytest.fixture
def no_figures(monkeypatch):
    """For what is not about figures: drawing them is what takes time."""
    monkeypatch.setattr(figures, "FIGURES", {})


def test_sound_is_linked_and_embedded_only_on_request(made, tmp_path, no_figures):
    run, out, page = made
    for clip in _data(page)["clips"]:
        assert (out / clip["audio"]).resolve().is_file()
        assert len(base64.b64decode(clip["mel"])) == clip["columns"] * clip["bands"]
    assert "data:audio" not in page
    embedded = _data(_write([run], tmp_path / "out", embed_audio=True))["clips"][0]["audio"]
    kind, _, content = embedded.partition(",")
    assert kind == "data:audio/wav;base64"
    assert base64.b64decode(content) == (out / _data(page)["clips"][0]["audio"]).read_bytes()


def test_equal_runs_give_equal_reports(made, tmp_path):
    run, out, page = made
    again = out.parent / "again"  # beside the first, so that relative links are the same
    assert _write([run], again) == page
    assert all(
        (again / "figures" / path.name).read_bytes() == path.read_bytes() for path in (out / "figures").iterdir()
    )


def test_hostile_text_cannot_leave_its_place(tmp_path):
    corpus = runs.corpus(tmp_path / "corpus", 6, hostile=HOSTILE)
    page = _write([runs.run(tmp_path / "run", corpus, hostile=HOSTILE)], tmp_path / "out")
    assert page.count("<script") == 2  # the data and the page's own
    assert page.count("</script") == 2
    assert "<img" not in page
    assert not re.search(r"<[^>]*\s(style|on\w+)=", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert _data(page)["clips"][0]["transcript"] == f"It is 0.{HOSTILE}"
    outside = re.findall(r"https?://[^\"' ]+", re.sub(r"<script.*</script>", "", page, flags=re.DOTALL))
    assert {url.split("/")[2] for url in outside} == {"www.w3.org"}  # the namespaces of SVG


def test_half_a_character_is_replaced(made, tmp_path, no_figures):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    records = _records(run, "test")
    records[0] |= {"speaker": "s\ud800", "reasoning": "\ud800"}
    runs.lines(run / "eval/test/predictions.jsonl", records)
    assert _data(_write([run], tmp_path / "out"))["clips"][0]["predictions"][1]["text"] == "?"


def test_a_bare_checkpoint_is_called_by_its_directory(made, tmp_path):
    run = tmp_path / "audio_reasoner"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    (run / "eval/test/summary.json").write_text(json.dumps({"algorithm": "base"}))
    shutil.rmtree(run / "eval/test-base")
    assert [s.name for s in reading.read([run], "test", None).systems] == ["audio_reasoner"]


def test_a_bare_checkpoint_called_base_is_not_the_base(made, tmp_path):
    bare = tmp_path / "base"
    subprocess.run(["cp", "-r", made[0], bare], check=True)
    (bare / "eval/test/summary.json").write_text(json.dumps({"algorithm": "base"}))
    shutil.rmtree(bare / "eval/test-base")
    assert [s.name for s in reading.read([bare, made[0]], "test", None).systems] == ["base", f"base ({bare})", "GRPOz"]


def test_another_corpus_has_its_own_sounds_and_name(made, tmp_path, no_figures):
    """Its clips may be called like those of the corpus that the run was trained on."""
    run, other = tmp_path / "run", runs.corpus(tmp_path / "other", 3)
    subprocess.run(["cp", "-r", made[0], run], check=True)
    shutil.copytree(run / "eval/test", run / "eval/other")
    runs.lines(run / "eval/other/predictions.jsonl", _records(run, "test")[:3])
    for told in ({"root": str(other.root)}, {"corpus": str(other.root), "root": str(tmp_path / "sounds")}):
        (run / "eval/other/summary.json").write_text(json.dumps(told))
        found = reading.read([run], "other", None)
        assert found.corpus.root == other.root
    assert "GRPOz on other" in _write([run], tmp_path / "out", split="other")
    data = clips.gallery(found, tmp_path, embed_audio=False)
    assert data["clips"][0]["transcript"]
    assert not data["rollouts"][0]["transcript"]  # it is of the run's own corpus
    assert data["rollouts"][0]["target"] is None


def test_runs_on_other_clips_are_not_ranked(made, tmp_path):
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", made[0], other], check=True)
    runs.lines(other / "eval/test/predictions.jsonl", _records(other, "test")[:-1])
    with pytest.raises(DataError, match="was tested on other clips than"):
        reading.read([made[0], other], "test", None)


def test_roll_outs_keep_the_classes_they_were_read_out_over(made, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    few = [r | {"target": [0.5, 0.5], "readout": [0.25, 0.75]} for r in _records(run, "test")]
    (run / "eval/few").mkdir()
    runs.lines(run / "eval/few/predictions.jsonl", few)
    (run / "eval/few/summary.json").write_text(json.dumps({"labels": ["fear", "anger"]}))
    data = clips.gallery(reading.read([run], "few", None), tmp_path, embed_audio=False)
    assert data["labels"] == ["fear", "anger"]
    for group in data["rollouts"]:
        assert group["labels"] == list(settings.load(run).data.labels)
        assert all(len(m["readout"]) == len(group["labels"]) for m in group["members"] if m["readout"])


def test_every_run_with_a_curve_is_in_the_legend(made, tmp_path):
    """SFT logs no roll-outs, so that the first panel is not its."""
    sft = runs.run(tmp_path / "sft", reading.read([made[0]], "test", None).corpus, "sft")
    runs.lines(sft / "metrics.jsonl", [{"step": i, "loss": 1.0} for i in range(3)])
    figure = figures.draw(reading.read([made[0], sft], "test", None))["learning_curves"].figure
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["GRPOz", "SFT"]


def test_the_table_has_the_intervals_and_bounds_of_the_evaluation(made, tmp_path, no_figures):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    (run / "eval/test/summary.json").write_text(json.dumps({"bounds": {"one annotator": {"js": 0.4321}}}))
    page = _write([run], tmp_path / "out")
    low, high = evaluate.intervals(_records(run, "test"), reading.read([run], "test", None).runs[0].config)["js"]
    assert f"<small>{low:.3f} to {high:.3f}</small>" in page
    assert re.search(r"one annotator</th><td>0\.432</td>", page)


def test_the_policy_allows_one_script_one_style_and_no_connection(made):
    _, _, page = made
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/=]+'", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]+'", rules["style-src"])
    assert "connect-src" not in rules


def test_several_runs_share_their_base(made, tmp_path):
    run, _, _ = made
    corpus = reading.read([run], "test", None).corpus
    dpo = runs.run(tmp_path / "dpo", corpus, "dpo")  # the same seed: the same base
    other = runs.run(tmp_path / "sft", corpus, "sft", seed=1)
    found = reading.read([run, dpo, other], "test", None)
    assert [s.name for s in found.systems] == ["base", "base of SFT", "GRPOz", "DPO", "SFT"]
    assert [(a.name, b.name) for _, a, b in found.before_after] == [
        ("base", "GRPOz"),
        ("base", "DPO"),
        ("base of SFT", "SFT"),
    ]


def _perceived(color: str) -> np.ndarray:
    """OKLab of #rrggbb (Ottosson 2020): a distance of .02 is about what an eye just sees."""
    c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    rgb = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    to_lab = [
        [0.21045426, 0.7936178, -0.00407205],
        [1.9779985, -2.4285922, 0.4505937],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ rgb)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_as_many_runs_as_are_allowed_can_be_told_apart(theme):
    """Each with a base of its own: as many colours in the page's style, none near another."""
    css = (Path(style.__file__).parent / "page.css").read_text()
    names = [style.variable(of(i)) for of in (style.base, style.trained) for i in range(style.MOST)] + ["human"]
    found = {name: re.search(rf"--{name}: light-dark\((#\w{{6}}), (#\w{{6}})\)", css)[1 + theme] for name in names}
    assert all(f".dot.{name} {{ background: var(--{name}); }}" in css for name in names)
    near = min(
        (np.linalg.norm(_perceived(a) - _perceived(b)), i, j)
        for (i, a), (j, b) in itertools.combinations(found.items(), 2)
    )
    assert near[0] > 0.075, near


@pytest.mark.parametrize("draw", [figures.reliability, figures.learning_curves, figures.speakers])
def test_long_names_stay_inside_their_figure(made, tmp_path, draw):
    import matplotlib

    several = [tmp_path / f"seed_{seed}_of_a_long_name" for seed in range(style.MOST)]
    for run in several:
        run.symlink_to(made[0])
    with matplotlib.rc_context(style.STYLE):
        figure = draw(reading.read(several, "test", None)).figure
        figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) >= len(several)
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_without_its_corpus_a_run_is_reported_without_sound(made, tmp_path, capsys, no_figures):
    run = tmp_path / "moved"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    config = json.loads((run / "config.json").read_text())
    config["data"]["root"] = "gone"
    (run / "config.json").write_text(json.dumps(config))
    page = _write([run], tmp_path / "out")
    assert "--corpus" in capsys.readouterr().out
    assert {clip["audio"] for clip in _data(page)["clips"]} == {None}
    page = _write([run], tmp_path / "out", corpus=made[0].parent / "corpus")
    assert all(clip["audio"] for clip in _data(page)["clips"])


UNFORCED = json.dumps({"id": "a", "speaker": "s", "reasoning": "", "js": 0, "format": 1, "tokens": 3}) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("eval/test/predictions.jsonl", None, "not evaluated yet"),
        ("config.json", None, "not a run directory"),
        ("eval/test/predictions.jsonl", "{}\n", "predictions.jsonl:1: id must be text"),
        ("eval/test/predictions.jsonl", UNFORCED, "predictions.jsonl:1: forced must be a number"),
        ("eval/test/predictions.jsonl", "[1]\n", "predictions.jsonl:1: expected a JSON object"),
        ("eval/test/predictions.jsonl", "nonsense\n", "predictions.jsonl:1: not JSON"),
        (
            "metrics.jsonl",
            "nonsense\n",
            "metrics.jsonl:1: not JSON (Expecting value: line 1 column 1 (char 0)); remove it",
        ),
        ("eval/test/predictions.jsonl", "", "holds no prediction"),
        ("eval/test/summary.json", '{"labels": 3}', "labels must be"),
    ],
)
def test_a_bad_run_is_one_line(made, tmp_path, name, text, says):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    (run / name).unlink(missing_ok=True)
    if text is not None:
        (run / name).write_text(text)
    with pytest.raises((ConfigError, DataError), match=re.escape(says)) as error:
        _write([run], tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [[0.5, 0.5], [1.0, 1.0, 0, 0, 0, 0], [float("nan")] * 6, "x", [-1, 2, 0, 0, 0, 0], [0.9995, 0, 0, 0, 0, 0]]
)
def test_a_read_out_that_is_no_distribution_is_refused(made, tmp_path, value):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    records = _records(run, "test")
    records[3]["readout"] = value
    runs.lines(run / "eval/test/predictions.jsonl", records)
    with pytest.raises(DataError, match=r"predictions.jsonl:4: readout"):
        _write([run], tmp_path / "out")


def test_a_killed_trainings_last_line_is_left_out(made, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    assert len(reading.read([run], "test", None).runs[0].curves) == 20
    # Nor does it take the place of the last group of roll-outs among those that are shown.
    group = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    runs.lines(run / "samples.jsonl", [group | {"step": step} for step in range(100)])
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 100, "id"')
    shown = [group["step"] for group in reading.read([run], "test", None).runs[0].rollouts]
    assert (len(shown), shown[0], shown[-1]) == (reading.ROLLOUTS, 0, 99)


def test_runs_of_other_classes_are_not_mixed(made, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", made[0], run], check=True)
    (run / "eval/test/summary.json").write_text(json.dumps({"labels": ["calm", "tense", "a", "b", "c", "d"]}))
    with pytest.raises(ConfigError, match="give each its own report"):
        _write([made[0], run], tmp_path / "out")


def test_the_command_needs_matplotlib_and_says_so(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["report", str(made[0]), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"pip install 'ambijax\[report\]'"):
        report.main()


def test_somebodys_page_is_not_overwritten(made, tmp_path, no_figures):
    (tmp_path / "index.html").write_text("<!doctype html>mine")
    with pytest.raises(ConfigError, match=r"index.html is somebody's page and no report; choose another --out"):
        _write([made[0]], tmp_path)
    assert (tmp_path / "index.html").read_text() == "<!doctype html>mine"
    _write([made[0]], tmp_path / "out")
    _write([made[0]], tmp_path / "out")  # a report is made anew


def test_of_one_speaker_the_table_of_changes_has_no_interval_over_speakers(tmp_path, no_figures):
    run = runs.run(tmp_path / "run", runs.corpus(tmp_path / "corpus", 8, speakers=1))
    settings_ = json.loads((run / "config.json").read_text())
    settings_["eval"]["cluster"] = "speaker"
    (run / "config.json").write_text(json.dumps(settings_))
    changed = re.search(r"GRPOz − base</th>(.*?)</tr>", _write([run], tmp_path / "out"))[1]
    assert re.fullmatch(r"(<td>[+−]\d\.\d{3}</td>)+", changed)
