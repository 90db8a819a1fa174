"""Any other corpus: a manifest.jsonl or manifest.csv beside its audio (docs/corpora/manifest.md)."""

import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from ambijax import manifest
from ambijax.corpora.release import Release
from ambijax.emotions import rename
from ambijax.errors import ConfigError
from ambijax.manifest import Utterance


def read(root: Path, *, labels: Sequence[str], words: Mapping[str, str]) -> Release:
    """Reads the corpus in `root`.

    Args:
      root: the directory of the manifest; the audio may lie elsewhere, if a corpus.json beside it says where.
      labels: the classes; none = those that corpus.json names, else every emotion that has a vote.
      words: emotion word -> class word, for a corpus that calls its classes otherwise.

    Raises:
      ConfigError: no manifest, fewer than two classes, or a class or word that neither votes nor corpus.json know.
      DataError: a line is not an utterance, or an emotion has two spellings.
    """
    corpus = manifest.read(root, renames=True)
    utterances = tuple(dataclasses.replace(u, votes=rename(u.votes, words)) for u in corpus.utterances)
    manifest.assert_one_spelling(root, utterances)
    declared = tuple(dict.fromkeys(words.get(label, label) for label in corpus.labels))
    voted, renamed = (
        sorted({e for u in us for e, n in u.votes.items() if n}) for us in (corpus.utterances, utterances)
    )
    known = (("word to rename", words, {*voted, *corpus.labels}), ("class", labels, {*renamed, *declared}))
    for what, asked, there in known:
        if unknown := [word for word in asked if word not in there]:
            advice = f'; a class that nobody chose must stand in the "labels" of {root / "corpus.json"}'
            raise ConfigError(
                f"{root}: no vote on the {what} {', '.join(unknown)}; votes are on {', '.join(sorted(there))}"
                + advice * (what == "class")
            )
    labels = tuple(labels or declared or renamed)
    if len(labels) < 2:
        raise ConfigError(f"{root}: at least two classes are needed, got {', '.join(labels) or 'none'}")
    return Release(
        description=corpus.description or f"manifest of {root.resolve().name}",
        labels=labels,
        utterances=utterances,
        known_bad={},
        unlabelled=_unlisted(corpus.audio_root or root, utterances),
        notes=(),
        audio_root=corpus.audio_root,
    )


def _unlisted(root: Path, utterances: Sequence[Utterance]) -> tuple[str, ...]:
    """Sounds without a line: of a kind, and below a directory of `root`, where sounds with a line are."""
    listed = {_name(u.audio) for u in utterances}
    kinds = {PurePosixPath(name).suffix.lower() for name in listed}
    tops = {PurePosixPath(name).parts[0] for name in listed if "/" in name}
    where = {root} if any("/" not in name for name in listed) else {root / top for top in tops}
    found = {
        path.relative_to(root).as_posix()
        for directory in where
        for path in directory.rglob("*")
        if path.suffix.lower() in kinds and not path.name.startswith(".")
    }
    return tuple(sorted(path for path in found if _name(path) not in listed))


def _name(path: str) -> str:
    """A path of one spelling; some disks keep an accent as a character of its own."""
    return unicodedata.normalize("NFC", PurePosixPath(path).as_posix())
