"""The file of predictions that ambijax.predict writes row by row, and in which it goes on after an interruption.

.jsonl    {"audio": ..., "distribution": {class: p}, "reasoning": ..., "entropy": ..., "forced": ...} a line
.csv      audio, p.<class> for each class, entropy, forced, reasoning, error
A clip that could not be heard has an `error` alone.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ambijax.errors import ConfigError

SUFFIXES = (".csv", ".jsonl")
_AFTER = ["entropy", "forced", "reasoning", "error"]  # columns after the classes


class Predicted:
    """The rows of one file."""

    def __init__(self, path: Path, labels: Sequence[str], begun: Sequence[dict] = ()) -> None:
        """Opens `path` for the rows after `begun`, which are in it; with none it must not exist.

        Raises:
          ConfigError: the rows that are there are of other classes.
        """
        self._columns = ["audio", *(f"p.{label}" for label in labels), *_AFTER]
        if path.suffix == ".jsonl":
            same = all(list(row["distribution"]) == list(labels) for row in begun if "error" not in row)
        else:
            same = all(list(row) == self._columns for row in begun)
        if not same:
            raise ConfigError(f"--out {path} is of other classes than {', '.join(labels)}; choose another name")
        # What a model writes may be half a character; a line is written at once, so that a kill leaves whole ones.
        how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "", "buffering": 1}
        self._file = path.open("a" if begun else "x", **how)
        self._table = csv.DictWriter(self._file, self._columns) if path.suffix == ".csv" else None
        if self._table and not begun:
            self._table.writeheader()

    def __enter__(self) -> "Predicted":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, record: dict) -> None:
        """Writes the record of a clip."""
        if self._table:
            probabilities = {f"p.{label}": p for label, p in record.get("distribution", {}).items()}
            self._table.writerow({key: record[key] for key in record if key != "distribution"} | probabilities)
        else:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")


def begun(path: Path) -> list[dict]:
    """The rows of a file that was begun, of a table with cells as text.

    A row that a kill has cut is taken away, and so is a file that has not come to its first row.

    Raises:
      ConfigError: the file is none that this module writes; it stays as it is.
    """
    data = path.read_bytes()
    whole = data[: _end(data, path.suffix)]
    try:
        rows = list(_rows(whole.decode(), path.suffix)) if data else []
    except (ValueError, TypeError, AttributeError, RecursionError, csv.Error):
        raise ConfigError(f"--out {path} is not what this command writes; choose another name") from None
    if rows:
        os.truncate(path, len(whole))
    else:
        path.unlink()
    return rows


def _end(data: bytes, suffix: str) -> int:
    """Where the last whole row ends. In a table "\\r\\n" ends one, unless it stands in a text: in quotes."""
    if suffix == ".jsonl":
        return data.rfind(b"\n") + 1
    end = data.rfind(b"\r\n")
    while end >= 0 and data.count(b'"', 0, end) % 2:
        end = data.rfind(b"\r\n", 0, end)
    return end + 2 if end >= 0 else 0


def _rows(text: str, suffix: str) -> Iterator[dict]:
    """Raises ValueError or the like: something in it is no row of a prediction."""
    if suffix == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if (table.fieldnames or [])[:1] != ["audio"] or table.fieldnames[-len(_AFTER) :] != _AFTER:
            raise ValueError(table.fieldnames)
        for row in table:
            if None in row or None in row.values():
                raise ValueError(row)
            yield row
        return
    if not text:
        raise ValueError("no line has an end")
    for line in text.split("\n")[:-1]:
        row = json.loads(line)
        if not isinstance(row.get("audio"), str) or not isinstance(row.get("distribution", {}), dict):
            raise TypeError(line)
        if ("error" in row) == ("distribution" in row):
            raise ValueError(line)
        yield row
