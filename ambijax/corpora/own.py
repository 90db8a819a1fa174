"""Any other corpus: a manifest.jsonl or manifest.csv beside its audio (docs/corpora/manifest.md)."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from ambijax import manifest
from ambijax.corpora.release import Release
from ambijax.emotions import rename
from ambijax.errors import ConfigError


def read(root: Path, *, labels: Sequence[str], words: Mapping[str, str]) -> Release:
    """Reads the corpus in `root`.

    Args:
      root: the directory of the manifest and the audio.
      labels: the classes; none = every emotion that has a vote.
      words: emotion word -> class word, for a corpus that calls its classes otherwise.

    Raises:
      ConfigError: no manifest, fewer than two classes, a class or word without a vote, or audio that lies elsewhere.
      DataError: a line is not an utterance, or an emotion has two spellings.
    """
    corpus = manifest.read(root, renames=True)
    if corpus.audio_root is not None:
        raise ConfigError(f"the audio of {root} is in {corpus.audio_root}; prepare the corpus from there")
    utterances = tuple(dataclasses.replace(u, votes=rename(u.votes, words)) for u in corpus.utterances)
    manifest.assert_one_spelling(root, utterances)
    voted, renamed = (
        sorted({e for u in us for e, n in u.votes.items() if n}) for us in (corpus.utterances, utterances)
    )
    for what, asked, there in (("word to rename", words, voted), ("class", labels, renamed)):
        if unknown := [word for word in asked if word not in there]:
            raise ConfigError(f"{root}: no vote on the {what} {', '.join(unknown)}; votes are on {', '.join(there)}")
    labels = tuple(labels or renamed)
    if len(labels) < 2:
        raise ConfigError(f"{root}: at least two classes are needed, got {', '.join(labels) or 'none'}")
    listed = {PurePosixPath(u.audio) for u in utterances}
    beside = {
        PurePosixPath(path.relative_to(root).as_posix())
        for directory in {root / path.parent for path in listed}
        for path in directory.glob("*")
        if path.suffix in {known.suffix for known in listed} and not path.name.startswith(".")
    }
    return Release(
        description=corpus.description or f"manifest of {root.resolve().name}",
        labels=labels,
        utterances=utterances,
        known_bad={},
        unlabelled=tuple(sorted(path.as_posix() for path in beside - listed)),
        notes=(),
    )
