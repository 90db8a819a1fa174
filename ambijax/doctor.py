"""Says what this machine has, and whether a training could start here.

    python -m ambijax.doctor [--config configs/grpoz.py:cremad [--config.KEY=VALUE ...]] [--workdir DIR]

Reads no weights, calls nobody and shows no key. Exits with 0 when training could start, else with the code that
training would exit with: 2 configuration, 3 data.
"""

import itertools
import os
import shutil
import sys
from importlib import resources
from pathlib import Path

from ambijax import emotions, errors, journal, manifest, preflight, prompt, settings
from ambijax.errors import AmbijaxError, ConfigError

KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")  # whether they are set, never what they are
CORPORA = ("data", "runs/corpora")  # where prepare and the tiny lab put corpora, below the current directory


def machine() -> dict[str, str]:
    """Versions, devices, disk and keys."""
    about = journal.environment()
    kinds = {kind: about["devices"].count(kind) for kind in about["devices"]}
    return {
        "python": about["python"],
        **about["packages"],
        "devices": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        "processors": str(os.cpu_count()),
        "disk": f"{shutil.disk_usage('.').free / 1e9:,.1f} GB free in {Path.cwd()}",
        **{key: "is set" if os.environ.get(key) else "is not set" for key in KEYS},
    }


def tokenizer() -> str:
    """Whether the tokenizer of the model that ships with the package can say what we need."""
    vocabulary = prompt.load(str(resources.files("ambijax") / "tiny"), emotions.CREMAD)
    return f"{len(vocabulary.ends_line)} tokens; class words are one token each"


def corpora() -> dict[str, str]:
    """Every corpus below the usual directories, counted, or what is wrong with it."""
    found = {}
    manifests = (Path(parent).glob(f"*/manifest.{kind}") for parent in CORPORA for kind in ("jsonl", "csv"))
    for path in sorted(itertools.chain(*manifests)):
        try:
            corpus = manifest.read(path)
            manifest.check_sounds(corpus)
            everyone = corpus.utterances
            speakers, folds = len({u.speaker for u in everyone}), len({u.fold for u in everyone})
            curated = sum(bool(u.cot) for u in everyone)
            found[str(path.parent)] = (
                f"{len(everyone)} clips, {speakers} speakers, {folds} folds, {curated} chains of thought"
            )
        except AmbijaxError as error:
            found[str(path.parent)] = str(error)
    return found


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        raise SystemExit
    configured = any(argument.startswith("--config") for argument in sys.argv)
    if sys.argv[1:] and not configured:
        raise ConfigError(f"{sys.argv[1]} without --config checks nothing; {__doc__.splitlines()[2].strip()}")
    for name, text in (machine() | {"tiny tokenizer": tokenizer()} | corpora()).items():
        print(f"{name:<18} {text}")
    if configured:
        argv = sys.argv if any(a.startswith("--workdir") for a in sys.argv) else [*sys.argv, "--workdir=."]
        config, directory = settings.parse(argv)
        print(preflight.plan(preflight.check(config, directory, write=False), directory))
        print("training could start")


if __name__ == "__main__":
    errors.run(main)
