"""What the parser of an official release hands over, and what two of them share."""

import dataclasses
from pathlib import Path

from ambijax.manifest import Utterance


@dataclasses.dataclass(frozen=True)
class Release:
    """An official release as its own files describe it; no audio has been opened."""

    description: str  # which corpus and which votes
    labels: tuple[str, ...]  # its classes
    utterances: tuple[Utterance, ...]  # audio paths relative to `audio_root`
    known_bad: dict[str, str]  # utterance id -> the defect of the released clip
    unlabelled: tuple[str, ...]  # audio files that nobody voted on
    notes: tuple[str, ...]  # facts to check against the literature
    audio_root: Path | None = None  # None = the release's directory


def audio_files(root: Path, pattern: str) -> list[str]:
    """Files under `root` that match, as sorted relative paths; no `._*` and other hidden files of file managers."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if not path.name.startswith("."))
