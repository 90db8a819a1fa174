"""docs/api.md from the docstrings of the package: `python docs/reference.py`; a test says when it is out of date.

Reads the sources without importing them, so that it needs nothing installed.
"""

import ast
import inspect
import re
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "ambijax"

# What a program of one's own imports, in the order in which a clip travels.
CHAPTERS = {
    "Use a model": ["listener", "export", "peft", "trackers"],
    "Votes and corpora": ["emotions", "manifest", "corpora/synthetic", "data"],
    "Sound": ["audio", "acoustics", "features"],
    "Reasoning and prompts": ["reasoning", "prompt", "teacher"],
    "The model": ["policy", "sampling", "packing", "readout", "convert", "checkpoint", "sharding", "structs"],
    "A run": ["agent", "assemble"],
    "Learning": ["losses", "rewards", "algorithms", "optim", "update"],
    "Measuring": ["metrics", "significance", "calibration", "slices", "bounds", "predictions", "evaluate"],
    "Settings and errors": ["settings", "errors"],
}
_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):$")


def reference() -> str:
    """The whole page."""
    page = ["# Programming interface", "", "Made from the docstrings by `python docs/reference.py`.", ""]
    for chapter, modules in CHAPTERS.items():
        page += [f"## {chapter}", ""]
        for name in modules:
            page += _module(PACKAGE / f"{name}.py", "ambijax." + name.replace("/", "."))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(page)).rstrip() + "\n"


def _module(path: Path, name: str) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = [f"### {name}", "", *_prose(ast.get_docstring(tree) or ""), ""]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "main":
            lines += _definition(node, node.name)
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        lines += _definition(method, f"{node.name}.{method.name}")
    return lines


def _definition(node: ast.FunctionDef | ast.ClassDef, name: str) -> list[str]:
    """Heading, signature and docstring; nothing without a docstring."""
    text = ast.get_docstring(node)
    if not text:
        return []
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        signature = [f"class {name}", *(f"    {field}" for field in fields)]
    else:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = [f"{name}({ast.unparse(node.args)}){returns}"]
    return [f"#### {name}", "", "```text", *signature, "```", "", *_prose(text), ""]


def _prose(text: str) -> list[str]:
    """A docstring as Markdown: sections in bold with lists, examples and indented blocks as code."""
    lines: list[str] = []
    section = fenced = False
    for line in inspect.cleandoc(text).splitlines():
        example = line.lstrip().startswith(">>>") or (fenced and bool(line.strip()))
        block = not section and line.startswith("    ")
        if (example or block) != fenced:
            lines += ["```"] if fenced else ["", "```text"]
            fenced = not fenced
        if fenced:
            lines.append(line.removesuffix("  # doctest: +SKIP"))
        elif _SECTION.match(line):
            section = True
            lines += ["", f"**{line[:-1]}**", ""]
        elif section and line.startswith("    "):
            lines[-1] += " " + line.strip()  # an item goes on
        elif section and line.startswith("  "):
            lines.append(f"- {_escaped(line.strip())}")
        else:
            section = section and not line.strip()
            lines.append(_escaped(line))
    return lines + ["```"] * fenced


def _escaped(text: str) -> str:
    """What Markdown or a browser would take for markup."""
    return re.sub(r"(?<!`)([<>*_\[\]])", r"\\\1", text) if "`" not in text else text.replace("<", "&lt;")


if __name__ == "__main__":
    (HERE / "api.md").write_text(reference(), encoding="utf-8")
