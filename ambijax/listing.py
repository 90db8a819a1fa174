"""What a command line names -> clips with their transcripts: files, folders, globs, tables, and a list on stdin."""

import codecs
import csv
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ambijax.errors import DataError

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au")  # what a folder is searched for


class Clip(NamedTuple):
    """A sound file, which need not exist, and what is said in it, '' where nobody says."""

    path: Path
    transcript: str = ""


def clips(names: Sequence[str], columns: tuple[str, ...] | None = None) -> Iterator[Clip]:
    """Clips in the order of `names`, the content of a folder or a glob sorted.

    Args:
      names: a sound file; a folder, searched with all below it; a glob, which the shell may have left to us; a `.csv`
        table; `-` for a list of any of these on stdin, one a line.
      columns: the table's columns of paths (relative to the table) and, unless none are to be told, of transcripts;
        None: 'audio' and, if there, 'transcript'.

    Raises:
      DataError: a folder or glob without sound files, a table that cannot be read.
    """
    for name in names:
        path = Path(name)
        if name == "-":
            listed = os.fsdecode(sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8))  # names are bytes, as on a disk
            yield from clips([line.strip() for line in listed.splitlines() if line.strip()], columns)
        elif path.is_dir():
            seen = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
            yield from map(Clip, _found(name, seen))
        elif path.suffix.lower() == ".csv":
            yield from _table(path, columns)
        elif not path.exists() and glob.has_magic(name):
            yield from map(Clip, _found(name, map(Path, glob.glob(name, recursive=True))))
        else:
            yield Clip(path)


def _found(name: str, paths: Iterable[Path]) -> list[Path]:
    """The sound files among `paths`; hidden ones (.DS_Store, ._clip.wav) are none."""
    found = sorted(p for p in paths if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
    if not found:
        raise DataError(f"{name}: no sound file there ({', '.join(SUFFIXES)})")
    return found


def _table(path: Path, columns: tuple[str, ...] | None) -> Iterator[Clip]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header, rows = reader.fieldnames or [], [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({error})") from None
    if len(header) == 1 and (other := next((c for c in ";\t" if c in header[0]), "")):
        raise DataError(f"{path}: its columns are separated by {other!r}; save it with commas")
    audio, transcript = (*(columns or ("audio", "transcript")), "")[:2]
    said = len(columns) > 1 if columns else any(name.strip().lower() == transcript for name in header)
    if absent := [name for name in ((audio, transcript) if said else (audio,)) if header.count(name) != 1]:
        many = "more than one" if absent[0] in header else "no"
        raise DataError(f"{path}: {many} column {absent[0]!r} (it has {', '.join(header)}); name it with --columns")
    if not rows:
        raise DataError(f"{path}: no rows under its header")
    for line, row in rows:
        if None in row or None in row.values():
            raise DataError(
                f"{path}:{line}: another number of cells than the header has; put text with commas in quotes"
            )
        if not row[audio]:
            raise DataError(f"{path}:{line}: no path in column {audio!r}")
        yield Clip(path.parent / row[audio], row[transcript] if said else "")
