"""The append-only files that survive kill -9: what was sent, what came back, what became of each item.

Two files, one JSON line a record, fsynced when it holds something that was paid for:

    cot.jsonl           one line an item that ended: {"id", "votes", "status", "reason", "attempts", "teacher", "cot"}
    cot.ledger.jsonl    {"settings"} first; {"sent": n, ...} before a request leaves; {"got": n, ...} when it has ended

An answer is in the ledger before anything is done with it, and the dialogue about an item is a function of the
answers. So a restarted run replays the ledger, pays for nothing it already holds, and stands where the last one fell.
What no client can know is whether a request that was on its way at the moment of the kill has been billed: the
ledger counts it at its highest possible price, and the next run sends it again under the same idempotency key.
"""

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ambijax.errors import ConfigError, DataError
from ambijax.workdir import replace


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said: the text, why it ended ('stop', 'length', 'content_filter', ...), and its refusal if any."""

    text: str
    finish: str
    refusal: str


class Journal:
    """An append-only JSONL file; `records` is what it held when it was opened.

    Raises:
      ConfigError: another process has it open, or it cannot be written.
      DataError: a line is not a JSON object; a cut last line does not count, it is dropped.
    """

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it however the process ends
        except OSError:
            self._file.close()
            raise ConfigError(f"{path}: another run is writing to it; wait for it or choose another --out") from None
        try:
            self.records, whole = read(path)
        except DataError:
            self._file.close()
            raise
        self._file.truncate(whole)
        _sync_directory(path.parent)

    def append(self, record: Mapping[str, object], *, sync: bool = True) -> None:
        """Adds one record. On return it survives the end of this process, and with `sync` that of the machine.

        Raises:
          OSError: names the file, which then ends with the record before.
        """
        size, waiting = os.fstat(self._file.fileno()).st_size, _line(record)
        try:
            while waiting:
                waiting = waiting[self._file.write(waiting) :]
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)  # another record must not continue this line
            raise OSError(error.errno, error.strerror, self._file.name) from None

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> tuple[list[dict], int]:
    """The records of a journal and the bytes they take; a last line without its end is not a record."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: not a JSON object; repair or remove the line")
        records.append(record)
    return records, whole


_BEGIN = b'{"id": "'  # of a result's line: what stands in a file without a whole one must be the begin of one


def results(path: Path) -> list[dict]:
    """The items that ended so far; none when there is no file yet.

    Raises:
      DataError: the file holds something else.
    """
    records, whole = read(path) if path.is_file() else ([], 0)
    fit = all(isinstance(record.get(name), str) for record in records for name in ("id", "status", "reason"))
    if path.is_file() and not whole:
        with path.open("rb") as file:
            fit = _BEGIN.startswith(file.read(len(_BEGIN)))
    if not fit:
        raise DataError(f"{path} is no result of ambijax.curate; choose another --out")
    return records


def of_other_votes(record: Mapping[str, object], votes: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether a result explains other votes than its item has now (id -> votes)."""
    now = votes.get(record["id"])
    return now is not None and record.get("votes", now) != now


def finished(path: Path, votes: Mapping[str, Mapping[str, float]]) -> set[str]:
    """The ids of the items that ended so far, did not fail and have the votes they had; see `results`."""
    return {record["id"] for record in results(path) if _stands(record, votes)}


def forget_unfinished(path: Path, votes: Mapping[str, Mapping[str, float]]) -> None:
    """Rewrites the results to those that are `finished`, whole or not at all, so that this run tries the others."""
    if path.is_file():
        replace(path, "".join(_line(record).decode() for record in results(path) if _stands(record, votes)))


def _stands(record: Mapping[str, object], votes: Mapping[str, Mapping[str, float]]) -> bool:
    return record["status"] != "failed" and not of_other_votes(record, votes)


def _line(record: Mapping[str, object]) -> bytes:
    # Half a character, which UTF-8 cannot hold, stays what it is in JSON: backslash, u and four digits.
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _sync_directory(path: Path) -> None:
    """Makes the name of a new file as durable as its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Ledger:
    """Every request with its price, and every answer that was paid for.

    Attributes:
      answers: request key -> Answer.
      spent: USD of all requests in the file; one whose end is unknown counts at its highest possible price.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], *, ended: bool = False):
        """Opens or begins the ledger of a run with these settings.

        Args:
          path: the file.
          settings: what may not change once there is an answer, or an item has `ended`.
          ended: whether an item has.

        Raises:
          ConfigError: they have changed all the same; names them.
        """
        self._journal = Journal(path)
        self.answers: dict[str, Answer] = {}
        self._open: dict[int, dict] = {}  # number -> its 'sent' record
        self._ended: list[tuple[str, int, float]] = []  # model, tokens, time
        self.spent = self._lost = 0.0
        settings = json.loads(json.dumps(settings))  # as they read from the file
        for record in self._journal.records:
            self._count(record)
        begun = next((r["settings"] for r in reversed(self._journal.records) if "settings" in r), None)
        if begun and begun != settings and (ended or self.answers):
            self._journal.close()
            changed = sorted(k for k in begun.keys() | settings.keys() if begun.get(k) != settings.get(k))
            was = ", ".join(f"{k}: {begun.get(k)!r} is now {settings.get(k)!r}" for k in changed)
            raise ConfigError(f"{path} was begun with other settings ({was}); restore them or choose another --out")
        if begun != settings:
            self._journal.append({"settings": settings})
        self._next = 1 + max((r["sent"] for r in self._journal.records if "sent" in r), default=0)

    def _count(self, record: dict) -> None:
        if "sent" in record:
            self._open[record["sent"]] = record
            self.spent += record["usd"]
        elif "got" in record:
            sent = self._open.pop(record["got"], None)
            self.spent += record["usd"] - (sent["usd"] if sent else 0.0)
            if sent:
                self._ended.append((sent["model"], sent["tokens"], record["time"]))
            if sent and record["answer"] is not None:  # a damaged line about its sending has been removed: it is lost
                self.answers[sent["key"]] = Answer(**record["answer"])
            else:
                self._lost += record["usd"]

    @property
    def lost(self) -> float:
        """The part of `spent` that stands for answers which never arrived."""
        return self._lost + sum(record["usd"] for record in self._open.values())

    def sent(self, key: str, item: str, model: str, tokens: int, usd: float) -> int:
        """Notes that a request is about to leave, with the most it can cost; returns its number."""
        number, self._next = self._next, self._next + 1
        record = {"sent": number, "key": key, "item": item, "model": model, "tokens": tokens, "usd": usd}
        self._append(record, sync=False)  # the next answer takes it along to the disk
        return number

    def got(self, number: int, usd: float, *, answer: Answer | None, error: str) -> None:
        """Notes how request `number` ended: with an answer, or with an error that cost `usd` at most."""
        said = dataclasses.asdict(answer) if answer else None
        self._append({"got": number, "usd": usd, "error": error, "answer": said}, sync=True)

    def _append(self, record: dict, *, sync: bool) -> None:
        record["time"] = time.time()
        self._journal.append(record, sync=sync)
        self._count(record)

    def recent(self, seconds: float, timeout: float) -> Iterator[tuple[str, int, float]]:
        """Requests of an earlier process that may still count against a rate limit.

        Yields:
          (model, tokens, time until which it counts), `seconds` after its end. A request without an end was over
          `timeout` seconds after it left.
        """
        for model, tokens, ended in self._ended:
            yield model, tokens, ended + seconds
        for sent in self._open.values():
            yield sent["model"], sent["tokens"], sent["time"] + timeout + seconds

    def close(self) -> None:
        self._journal.close()
