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

from ambijax import reasoning
from ambijax.report import figures, style, tables
from ambijax.report.runs import Report, Run

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
        tiles=tables.tiles(report),
        tables=tables.results(report) + tables.changes(report),
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
    return report.runs[0].root.name


def _lead(report: Report) -> str:
    speakers = len({record["speaker"] for record in report.clips.values()})
    text = f"{len(report.clips)} clips of {speakers} speakers ({report.split}), each judged by several listeners. "
    changes = []
    for _, base, trained in report.before_after:
        before, after = (float(np.mean([r["js"] for r in system.records])) for system in (base, trained))
        changes.append(f"{trained.name} from {before:.3f} to {after:.3f}")
    if changes:
        text += f"Jensen-Shannon divergence to their votes, in bits: {', '.join(changes)}."
    return text


def _figure(name: str, figure: figures.Drawn, svg: str) -> str:
    title, kind = html.escape(figure.title), "broad" if name in BROAD else "narrow" if name in NARROW else ""
    links = " ".join(f'<a href="figures/{name}.{end}">{end.upper()}</a>' for end in ("png", "svg", "csv"))
    caption = f'{html.escape(figure.caption)} <span class="files">{links}</span>'
    return (
        f'<figure class="{kind}"><h3>{title}</h3><figcaption>{caption}</figcaption>'
        f'<div class="scroll">{style.themed(svg, title)}</div></figure>'
    )


def _run(run: Run) -> str:
    config = html.escape(json.dumps(run.config.to_dict(), indent=2))
    about = {key: value for key, value in run.environment.items() if key != "directory"}  # nobody else's business
    environment = html.escape(json.dumps(about, indent=2))
    return (
        f"<details><summary>{html.escape(str(run.directory))}: settings and environment</summary>"
        f"<pre>{config}</pre><pre>{environment}</pre></details>"
    )
