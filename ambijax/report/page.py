"""The page: one HTML file that needs nothing else, and that hostile text in a run cannot take over.

Three fences stand around what a model, a corpus or a directory name says. Python escapes it; the script sets it as text
and never as markup; and the page's security policy allows one style sheet and one script, by their hashes, and no
connection to anywhere.
"""

import base64
import hashlib
import html
import json
from importlib import resources
from string import Template

import numpy as np

from ambijax import bounds, evaluate, reasoning
from ambijax.report import figures, style
from ambijax.report.runs import Report, Run, System

BROAD = ("examples", "learning_curves", "confusion")  # figures as wide as the page
NARROW = ("reliability", "js_against_entropy", "slices", "speakers")


def render(report: Report, clips: dict, drawn: dict[str, figures.Drawn], svgs: dict[str, str]) -> str:
    """The whole page.

    Args:
      report: the runs.
      clips: from `clips.gallery`.
      drawn: the figures by name.
      svgs: the same as SVG files.
    """
    here = resources.files(__package__)
    css = (here / "page.css").read_text(encoding="utf-8")
    script = "".join((here / name).read_text(encoding="utf-8") for name in ("page.js", "rollouts.js"))
    order = [[record["id"] for record in system.records] for system in report.systems]
    data = clips | {"order": order, "headings": reasoning.HEADINGS, "anchor": reasoning.ANCHOR}
    return Template((here / "page.html").read_text(encoding="utf-8")).substitute(
        policy=_policy(css, script),
        title=html.escape(_title(report)),
        lead=html.escape(_lead(report)),
        tiles=_tiles(report),
        tables=_table(report),
        figures="\n".join(_figure(name, figure, svgs[name]) for name, figure in drawn.items()),
        runs="\n".join(_run(run) for run in report.runs),
        css=css,
        script=script,
        data=_embedded(data),
    )


def _embedded(data: dict) -> str:
    """JSON that no text in it can end: without `<` there is neither a closing tag nor a comment."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _policy(css: str, script: str) -> str:
    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest(script)}'; style-src 'sha256-{digest(css)}'; "
        "media-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )


def _title(report: Report) -> str:
    return " · ".join(system.name for system in report.systems if not system.base) + f" on {_corpus(report)}"


def _corpus(report: Report) -> str:
    """What the first run calls its corpus: the directory's name."""
    return report.runs[0].config.data.root.rstrip("/").rsplit("/", 1)[-1]


def _lead(report: Report) -> str:
    speakers = len({record["speaker"] for record in report.clips.values()})
    text = f"{len(report.clips)} clips of {speakers} speakers ({report.split}), each judged by several listeners. "
    changes = []
    for base, trained in report.before_after:
        before, after = (float(np.mean([r["js"] for r in system.records])) for system in (base, trained))
        changes.append(f"{trained.name} from {before:.3f} to {after:.3f}")
    if changes:
        text += f"Jensen-Shannon divergence to their votes, in bits: {', '.join(changes)}."
    return text


def _tiles(report: Report) -> str:
    tiles = []
    pairs = {id(trained): base for base, trained in report.before_after}
    for system in (s for s in report.systems if not s.base):
        after = evaluate.summarise(system.records)
        base = pairs.get(id(system))
        before = evaluate.summarise(base.records) if base else None
        many = len(report.runs) > 1
        for title, key in (("JS ↓", "js"), ("BC ↑", "bc"), ("R2 ↑", "r2"), ("Accuracy ↑", "accuracy")):
            if many and key != "js":
                continue
            was = f"<small>{before[key]:.3f} → </small>" if before else ""
            name = html.escape(f"{title} of {system.name}" if many else title)
            tiles.append(f'<div class="tile"><p>{name}</p><p class="value">{was}{after[key]:.3f}</p></div>')
    return "".join(tiles)


def _table(report: Report) -> str:
    """Metrics of every system, the best of a column in bold, and of what needs no model."""
    rows: dict[str, tuple[dict, System | None]] = {}
    if report.train_target is not None:
        first = report.systems[0]
        counts = np.array([[r["votes"].get(label, 0) for label in report.labels] for r in first.records])
        draws = report.runs[0].config.eval.draws
        rows |= {name: (row, None) for name, row in bounds.bounds(report.train_target, counts, draws=draws).items()}
    rows |= {system.name: (evaluate.summarise(system.records), system) for system in report.systems}
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in ("", *evaluate.COLUMNS))
    lines = [
        f'<tr{"" if system else " class=floor"}><th scope="row">{html.escape(name)}</th>{_cells(summary, rows)}</tr>'
        for name, (summary, system) in rows.items()
    ]
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        '<p class="note">Means over the clips. What needs no model: uniform, prior (the mean of the training votes), '
        "one-hot (the majority), one annotator against the others, half of them against the other half, and as many "
        "annotators drawn anew from the votes.</p>"
    )


def _cells(summary: dict, rows: dict[str, tuple[dict, System | None]]) -> str:
    cells = []
    for column, key in evaluate.COLUMNS.items():
        if summary.get(key) is None:
            cells.append("<td></td>")
            continue
        known = [other[key] for other, system in rows.values() if system and other.get(key) is not None]
        best = (min if "↓" in column else max)(known, default=None)
        mark = ' class="best"' if summary[key] == best else ""
        cells.append(f"<td{mark}>{summary[key]:.3f}</td>")
    return "".join(cells)


def _figure(name: str, figure: figures.Drawn, svg: str) -> str:
    title, kind = html.escape(figure.title), "broad" if name in BROAD else "narrow" if name in NARROW else ""
    files = " ".join(f'<a href="figures/{name}.{kind}">{kind.upper()}</a>' for kind in ("png", "svg", "csv"))
    return (
        f'<figure class="{kind}"><h3>{title}</h3><figcaption>{html.escape(figure.caption)} {files}</figcaption>'
        f'<div class="scroll">{style.themed(svg, title)}</div></figure>'
    )


def _run(run: Run) -> str:
    config = html.escape(json.dumps(run.config.to_dict(), indent=2))
    environment = html.escape(json.dumps(run.environment, indent=2))
    return (
        f"<details><summary>{html.escape(str(run.directory))}: settings and environment</summary>"
        f"<pre>{config}</pre><pre>{environment}</pre></details>"
    )
