"""A module imports only from rows above its own: the package reads in the order in which a clip travels."""

import ast
from pathlib import Path

import ambijax

PACKAGE = Path(ambijax.__file__).parent

# One row a layer; within a row modules may not import each other.
LAYERS = [
    ["errors"],
    ["signals", "console"],
    ["hosts", "chips", "cost", "compilation", "ahead"],
    ["emotions", "workdir", "digest", "kept", "lfs", "watchdog", "planned"],
    ["journal", "goodput"],
    ["audio", "reasoning", "packing", "sharding"],
    ["activations"],
    ["acoustics", "structs", "losses", "metrics", "manifest", "significance", "calibration"],
    ["optim", "prompt", "teacher", "rewards", "readout", "sampling", "guard", "bounds", "slices", "held_out"],
    ["curation.ledger", "curation.limits", "curation.prompts"],
    ["curation.checks", "curation.client"],
    ["curation.teachers"],
    ["curation.estimate"],
    ["corpora.talker", "corpora.release"],
    ["corpora.cremad", "corpora.iemocap", "corpora.own", "corpora.synthetic"],
    ["rules", "model.config"],
    ["model.compiled.calls", "model.compiled.tiles"],
    ["model.compiled.products"],
    ["model.compiled.attention"],
    ["model.kernels", "model.compiled.kernels"],
    ["model.cpu_kernels"],
    ["model.lora"],
    ["model.layers"],
    ["model.cache", "model.encoder", "model.transposed", "model.decode_kernel"],
    ["model.decoder"],
    ["model.qwen2_audio"],
    ["hugging_face"],
    ["convert", "checkpoint", "policy", "data", "peft", "listing", "predicted"],
    ["features", "agent", "settings"],
    ["algorithms"],
    ["assemble", "update"],
    ["preflight", "health"],
    ["predictions", "canaries"],
    ["evaluate", "compare"],
    ["listener", "card", "trackers", "programs"],
    ["demo.server", "plan"],
    ["train", "doctor", "predict", "export", "demo.__main__", "prepare", "curate", "tiny.make"],
    ["report.runs"],
    ["report.style"],
    ["report.figures"],
    ["report.clips", "report.tables"],
    ["report.page"],
    ["report.__main__"],
    ["published"],
    ["typeset", "runs"],
    ["results"],
    ["lab"],
    ["tables"],
]
ROW = {name: i for i, row in enumerate(LAYERS) for name in row}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions, as 'corpora.cremad'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    names = {name.removeprefix("ambijax.") for name in found if name.startswith("ambijax.")}
    return {n for n in names if (PACKAGE / (n.replace(".", "/") + ".py")).exists()}


def _modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def test_every_module_has_a_layer():
    assert {_name(path) for path in _modules()} == ROW.keys()


def test_imports_go_up():
    wrong = [
        f"{_name(path)} imports {other}"
        for path in _modules()
        for other in _imported(path)
        if _name(path) in ROW and other in ROW and ROW[other] >= ROW[_name(path)]
    ]
    assert not wrong


def test_the_walk_sees_imports():
    # Without this, a parser that finds nothing would make the test above pass.
    assert {"assemble", "settings", "algorithms"} <= _imported(PACKAGE / "train.py")


def _top_level(path: Path) -> set[str]:
    """Every name that a module binds for itself, in whatever branch."""
    found, left = set(), list(ast.parse(path.read_text()).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            left += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
    return found


def test_what_a_module_takes_from_another_is_there():
    """Also in commands that run for half an hour before they come to it, and in benchmarks and docs."""
    root = PACKAGE.parent
    scripts = [path for folder in ("benchmarks", "configs", "docs", "tests") for path in (root / folder).glob("*.py")]
    modules = {f"ambijax.{_name(path)}": path for path in _modules()}
    modules |= {f"{path.parent.name}.{path.stem}": path for path in scripts}
    names = {name: _top_level(path) for name, path in modules.items()}
    wrong, seen = [], 0
    for path in modules.values():
        tree = ast.parse(path.read_text())
        known = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if f"{node.module}.{alias.name}" in names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
                module, seen = known[node.value.id], seen + 1
                if node.attr not in names[module] and not node.attr.startswith("__"):
                    wrong.append(f"{path}:{node.lineno}: {module} has no {node.attr}")
    assert not wrong
    assert seen > 1000


def test_no_pickle_and_no_remote_code():
    pickles = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "torch"}
    for path in _modules():
        text = path.read_text()
        assert "trust_remote_code" not in text, path
        assert "allow_pickle=True" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not pickles & {name.split(".")[0] for name in names}, (path, node.lineno)
