"""One look for all figures: matplotlib draws each of them once, for the PNG and SVG files and for the page.

The page has a light and a dark theme, so `themed` turns the colours of an SVG into the CSS variables that `page.css`
defines for both. The first series colours are Okabe and Ito's, the others as far from them as there is room,
also for eyes without red or green. Bases are warm, square and dashed, what was trained is not.
"""

import io
import re
import warnings

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, LINE = "#1b2430", "#5d6877", "#dfe3e8"
HUMAN = "#39424e"  # what the annotators say
_BASE = ("#e69f00", "#99400e", "#8d7b63", "#5e3200", "#cfba92", "#ddca1e")
_TRAINED = ("#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#46237a")
MOST = len(_TRAINED)  # runs that can still be told apart, each with a base of its own

_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", HUMAN: "human"}
_VARIABLES |= {color: f"base{i}" for i, color in enumerate(_BASE)}
_VARIABLES |= {color: f"trained{i}" for i, color in enumerate(_TRAINED)}

# For names in scripts that DejaVu lacks, where one of these is installed; usual ones of Linux, macOS and Windows.
_SCRIPTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans Devanagari"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Nirmala UI"),
)
_INSTALLED = {font.name for font in font_manager.fontManager.ttflist}

STYLE = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans", *(name for name in _SCRIPTS if name in _INSTALLED)],
    "text.color": INK,
    "text.parse_math": False,  # a speaker may be called $x$
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "savefig.dpi": 200,
}


def variable(color: str) -> str:
    """The CSS variable of a colour, without its dashes: what the page's script and style call it."""
    return _VARIABLES[color]


def base(index: int) -> str:
    """The colour of the i-th base, i < MOST."""
    return _BASE[index]


def trained(index: int) -> str:
    """The colour of the i-th trained model, i < MOST."""
    return _TRAINED[index]


def tidy(axes: Axes, *, grid: str) -> None:
    """Keeps the grid lines across one axis ('x', 'y', 'both' or 'none') and the spine of the other."""
    axes.grid(False)
    if grid != "none":
        axes.grid(True, axis=grid)
    for side in {"x": ("left", "bottom"), "y": ("left",), "both": (), "none": ("left", "bottom")}[grid]:
        axes.spines[side].set_visible(False)


def short(text: str, most: int = 22) -> str:
    """A name that fits beside an axis; what cannot be printed is replaced."""
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def save(figure: Figure, name: str) -> tuple[bytes, str]:
    """(PNG, SVG) of a figure; equal figures give equal files."""
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # names in scripts that no font here has are boxes in the PNG
        figure.savefig(png, format="png", facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def themed(svg: str, title: str) -> str:
    """The SVG as an element of the page: no style attributes, which its security policy refuses, and themed colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' style="([^"]*)"', _attributes, svg)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used or m[1].startswith("points-") else "", svg)
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    return svg.replace(size[0], f'role="img" aria-label="{title}"', 1)


def _attributes(match: re.Match) -> str:
    """style="fill: red; font: 9px 'DejaVu Sans'" as fill="red" font-size="9px"; the typeface is the page's."""
    found = []
    for part in match[1].split(";"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name == "font":
            size, weight = re.search(r"[0-9.]+px", value), "bold " in value
            found += [f'font-size="{size[0]}"' + ' font-weight="bold"' * weight] if size else []  # or it is in a text
        elif name:
            found.append(f'{name}="{value}"')
    return "".join(f" {attribute}" for attribute in found)
