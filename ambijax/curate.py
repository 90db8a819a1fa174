"""Curates chains of thought for a manifest: a teacher writes them, checks and a validator pass them, each is paid once.

    python -m ambijax.curate --config configs/curate.py:cremad --manifest=data/cremad --out=cot.jsonl --dry_run
    python -m ambijax.curate --config configs/curate.py:cremad --manifest=data/cremad --out=cot.jsonl
    python -m ambijax.curate --config configs/curate.py:cremad --manifest=data/cremad --out=cot.jsonl --merge

The first line estimates the cost and calls nothing. The second does the work; started again, it goes on where it
stopped or was killed. The third puts the accepted reasonings into the manifest, where training reads them; an
utterance without one is kept for the KL alone. docs/curation.md tells the rest.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from ambijax import audio, emotions, errors, manifest, settings, teacher
from ambijax.acoustics import Acoustics, Norm, measure, speaker_norms
from ambijax.curation import checks, ledger, teachers
from ambijax.curation.client import BudgetReached, Client, is_url
from ambijax.curation.estimate import estimate
from ambijax.errors import ConfigError, DataError
from ambijax.manifest import Corpus

USAGE = (
    "usage: python -m ambijax.curate --config configs/curate.py[:cremad|:iemocap] --manifest=DIR --out=cot.jsonl "
    "[--dry_run | --merge] [--max_usd=USD] [--max_items=N] [--config.KEY=VALUE ...]"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    config: ConfigDict
    root: Path  # directory of the manifest
    out: Path
    dry_run: bool
    merge: bool


def parse(argv: list[str]) -> Options:
    """Flags to options.

    Raises:
      ConfigError: a flag, a key or a value is wrong.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{USAGE}")
        raise SystemExit
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("manifest", None, "", flag_values=values)
    flags.DEFINE_string("out", None, "", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "", flag_values=values)
    flags.DEFINE_bool("merge", False, "", flag_values=values)
    flags.DEFINE_float("max_usd", None, "", flag_values=values)
    flags.DEFINE_integer("max_items", None, "", flag_values=values)
    try:
        with settings.at_home(argv):
            rest = values(argv)[1:]
            config = values.config
            _ = config is None or config.teacher  # a file that failed to load fails here
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        raise ConfigError(f"command line: {settings.one_line(error)}") from None
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; {USAGE}")
    if missing := [name for name in ("config", "manifest", "out") if values[name].value is None]:
        raise ConfigError(f"--{missing[0]} is missing; {USAGE}")
    if not values.out.endswith(".jsonl"):
        raise ConfigError(f"--out={values.out} must name a .jsonl file, such as cot.jsonl")
    if values.dry_run and values.merge:
        raise ConfigError("--dry_run estimates, --merge writes the manifest; give one of them")
    for name in ("max_usd", "max_items"):
        if values[name].value is not None:
            config[name] = values[name].value
    check(config)
    root = manifest.directory(values.manifest)
    return Options(config, root, Path(values.out), values.dry_run, values.merge)


def check(config: ConfigDict) -> None:
    """Everything that can be wrong with the values alone.

    Raises:
      ConfigError: lists all problems at once.
    """
    c, wrong = config, []

    def need(holds: bool, message: str) -> None:
        if not holds:
            wrong.append(message)

    need(c.teacher in ("audio", "acoustics", "template"), f"teacher={c.teacher!r} must be audio, acoustics or template")
    need(c.validator in ("judge", "reader", "none"), f"validator={c.validator!r} must be judge, reader or none")
    words = all(isinstance(label, str) and label and label == label.strip() for label in c.labels)
    need(words and len(set(c.labels)) == len(c.labels) >= 2, f"labels={c.labels} must be two distinct words or more")
    unknown = ", ".join(set(c.labels) - set(teacher.PROFILE)) if c.teacher == "template" and words else ""
    need(not unknown, f"teacher='template' knows {', '.join(teacher.PROFILE)}, not {unknown}; use a chat model")
    need(0 < c.max_js <= 1, f"max_js={c.max_js} must be in (0, 1] bits")
    need(c.max_words >= 1 and c.max_chars >= 1, "max_words and max_chars must be at least 1")
    need(c.attempts >= 1, f"attempts={c.attempts} must be at least 1")
    need(c.concurrency >= 1, f"concurrency={c.concurrency} must be at least 1")
    need(0 <= c.max_usd < math.inf, f"max_usd={c.max_usd} must be a number of dollars, 0 or more")
    need(c.max_items >= 0, f"max_items={c.max_items} must be 0 (all) or more")
    need(c.calls.retries >= 0 and c.calls.timeout_s > 0, "calls.retries must be 0 or more, calls.timeout_s positive")
    for role in ("writer", "judge"):
        e = c[role]
        # Not shown: it may be the key itself.
        need(e.api_key_env.isidentifier(), f"{role}.api_key_env must be the name of an environment variable")
        need(is_url(e.base_url), f"{role}.base_url={e.base_url!r} must be an http(s) URL")
        need(e.rpm >= 1 and e.tpm >= 1, f"{role}.rpm and {role}.tpm must be at least 1")
        need(e.bytes_per_token > 0, f"{role}.bytes_per_token must be positive")
        need(e.audio_tokens_per_s >= 0, f"{role}.audio_tokens_per_s must be 0 or more")
        for kind, usd in e.usd_per_1m.items():
            need(0 <= usd < math.inf, f"{role}.usd_per_1m.{kind}={usd} must be a number of dollars, 0 or more")
        need(e.max_completion_tokens >= 1, f"{role}.max_completion_tokens must be at least 1")
    if wrong:
        raise ConfigError("configuration: " + "; ".join(wrong))


# What there is to do -------------------------------------------------------------------------------------------------


def to_do(corpus: Corpus, out: Path, config: ConfigDict) -> tuple[list[teachers.Item], list[teachers.Result]]:
    """Utterances without a result for the votes they have.

    Returns:
      those with a soft label, and failures of those whose votes give none.
    """
    votes = votes_on(corpus, config.labels)
    finished, items, failures = ledger.finished(out, votes), [], []
    for utterance in corpus.utterances[: config.max_items or None]:
        if utterance.id in finished:
            continue
        counted = votes[utterance.id]
        try:
            items.append(teachers.Item(utterance, counted, emotions.soft_label(utterance.votes, config.labels)))
        except DataError as error:
            failures.append(teachers.Result(utterance.id, counted, "failed", f"votes: {error}", 0, "", ""))
    return items, failures


def votes_on(corpus: Corpus, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each utterance, id -> its votes on the labels, without labels that have none."""
    return {u.id: {label: u.votes[label] for label in labels if u.votes.get(label)} for u in corpus.utterances}


def voices(corpus: Corpus, least: int) -> teachers.Voices:
    """Measures every clip of the corpus and its speakers' norms; a clip that cannot be read keeps its error."""
    from tqdm import tqdm

    clips: dict[str, Acoustics] = {}
    measured: dict[str, tuple[Acoustics, Norm] | DataError] = {}
    for utterance in tqdm(corpus.utterances, desc="acoustics", disable=None):
        try:
            clips[utterance.id] = measure(audio.load(corpus.path(utterance)))
        except DataError as error:
            measured[utterance.id] = error
    heard = [utterance for utterance in corpus.utterances if utterance.id in clips]
    norms = speaker_norms(list(clips.values()), [u.speaker for u in heard], least) if heard else {}
    return measured | {u.id: (clips[u.id], norms[u.speaker]) for u in heard}


# Doing it ------------------------------------------------------------------------------------------------------------


def _settings(config: ConfigDict) -> dict[str, object]:
    """What may not change half-way through an output file."""
    settings = {"labels": config.labels, "teacher": config.teacher}
    if config.teacher != "template":
        settings |= {"writer": config.writer.model, "validator": config.validator}
        settings |= {"judge": config.judge.model} if config.validator != "none" else {}
        settings |= {"max_js": config.max_js} if config.validator == "reader" else {}
    return settings


def _endpoints(config: ConfigDict) -> list[ConfigDict]:
    """The models that the config needs; none for the offline teacher."""
    if config.teacher == "template":
        return []
    return [config.writer] if config.validator == "none" else [config.writer, config.judge]


def _cast(client: Client, corpus: Corpus, config: ConfigDict) -> tuple[teachers.Teacher, teachers.Validator]:
    """Who writes and who checks."""
    if config.teacher == "template":  # whatever a validator found, the template would write the same again
        return teachers.template_teacher(config.labels, voices(corpus, config.norm_clips)), teachers.no_validator
    if config.teacher == "audio":
        teacher = teachers.hearing_teacher(client, config, corpus)
    else:
        teacher = teachers.reading_teacher(client, config, voices(corpus, config.norm_clips))
    validators = {"judge": teachers.judge, "reader": teachers.blind_reader}
    return teacher, teachers.no_validator if config.validator == "none" else validators[config.validator](
        client, config
    )


async def _work(
    items: Sequence[teachers.Item],
    client: Client,
    cast: tuple[teachers.Teacher, teachers.Validator],
    results: ledger.Journal,
    config: ConfigDict,
) -> Exception | None:
    """Curates the items, a few at a time; returns why it ended early."""
    from tqdm import tqdm

    queue, end = iter(items), None
    async with client:
        with tqdm(total=len(items), desc="curate", disable=None) as bar:

            async def worker() -> None:
                for item in queue:
                    results.append(dataclasses.asdict(await teachers.curate(item, *cast, config)))
                    bar.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(config.concurrency):
                        group.create_task(worker())
            except* (BudgetReached, ConfigError) as ends:
                end = ends.exceptions[0]
            except* OSError as ends:  # a full disk
                error = ends.exceptions[0]
                end = ConfigError(f"{error.filename or 'a file'}: {error.strerror or error}; mend that, start it again")
    return end


def run(items: Sequence[teachers.Item], failures: Sequence[teachers.Result], corpus: Corpus, options: Options) -> None:
    """Curates the items into `options.out` and prints what became of them.

    Raises:
      ConfigError: the key, quota or model is no good, or nothing was answered; what was finished is kept.
    """
    config, out = options.config, options.out
    with contextlib.ExitStack() as stack:
        votes = votes_on(corpus, config.labels)
        path, ended = out.with_suffix(".ledger.jsonl"), bool(ledger.finished(out, votes))
        book = stack.enter_context(contextlib.closing(ledger.Ledger(path, _settings(config), ended=ended)))
        finished = ledger.finished(out, votes)  # by another run that held the ledger until now
        items = [item for item in items if item.utterance.id not in finished]
        client = Client(book, _endpoints(config), config.calls, config.max_usd)
        ledger.forget_unfinished(out, votes)
        results = stack.enter_context(contextlib.closing(ledger.Journal(out)))
        for failure in failures:
            results.append(dataclasses.asdict(failure))
        end = asyncio.run(_work(items, client, _cast(client, corpus, config), results, config))
        rows = ledger.results(out)
        if isinstance(end, ConfigError):
            raise ConfigError(f"{end} ({len(rows)} finished items are kept in {out})")
        if end:
            print(f"stopped     {end}")
        summarise(rows, corpus, config)
        print(f"requests    {client.sent} sent, {client.replayed} answered from the ledger")
        print(f"cost        ${book.spent:.4f} in all, of which up to ${book.lost:.4f} for answers that never arrived")
    if items and not end and all(row["status"] == "failed" for row in rows):
        raise ConfigError(f"all {len(rows)} items failed; start the same command again when that is mended")


def summarise(rows: Sequence[dict], corpus: Corpus, config: ConfigDict) -> None:
    """Prints how many items ended how, and why."""
    asked = {utterance.id for utterance in corpus.utterances[: config.max_items or None]}
    rows = [row for row in rows if row["id"] in asked]
    counts = collections.Counter(row["status"] for row in rows)
    reasons = collections.defaultdict(collections.Counter)
    for row in rows:
        reasons[row["status"]][row["reason"].split(":")[0]] += 1
    print(f"accepted    {counts['ok']}")
    for status in ("rejected", "failed"):
        why = ", ".join(f"{reason} {count}" for reason, count in reasons[status].most_common())
        print(f"{status:11} {counts[status]}{f' ({why})' if why else ''}")
    print(f"not begun   {len(asked) - len(rows)}")


# Using it ------------------------------------------------------------------------------------------------------------


def merge(corpus: Corpus, out: Path, config: ConfigDict) -> None:
    """Writes the accepted reasonings of `out` into the manifest; a malformed row is dropped and counted, not fatal.

    Raises:
      ConfigError: there is no such file, nothing in it is of this manifest, or the manifest is a table.
    """
    if not out.is_file():
        raise ConfigError(f"no results at {out}; curate first")
    if (table := corpus.root / "manifest.csv").is_file():
        raise ConfigError(
            f"{table} has no place for reasonings; make a manifest.jsonl of it with python -m ambijax.prepare"
        )
    by_id, votes = {u.id: u for u in corpus.utterances}, votes_on(corpus, config.labels)
    dropped: collections.Counter[str] = collections.Counter()
    cots: dict[str, str] = {}
    for line in out.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, cot, accepted = row["id"], row["cot"], row.get("status", "ok") == "ok"
        except (ValueError, TypeError, KeyError, RecursionError):
            dropped["not a result"] += 1
            continue
        if not accepted:
            continue
        if not isinstance(name, str) or name not in by_id:
            dropped["not in the manifest"] += 1
        elif ledger.of_other_votes(row, votes):
            dropped["for other votes than the manifest has"] += 1
        elif name in cots:
            dropped["id occurs twice"] += 1
        elif not isinstance(cot, str):
            dropped["not a result"] += 1
        elif found := checks.faults(cot, by_id[name].transcript, config.labels, config.max_chars):
            dropped[found[0].split(":")[0]] += 1
        else:
            cots[name] = cot
    why = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
    if not cots:
        raise ConfigError(f"{out} has no reasoning for {corpus.root}{f' ({why})' if why else ''}; nothing was written")
    utterances = tuple(dataclasses.replace(u, cot=cots.get(u.id, u.cot)) for u in corpus.utterances)
    manifest.write_utterances(dataclasses.replace(corpus, utterances=utterances))
    print(f"merged      {len(cots)} reasonings into {corpus.root / 'manifest.jsonl'}")
    print(f"dropped     {dropped.total()}{f' ({why})' if why else ''}")
    print(f"for KL only {sum(not u.cot for u in utterances)}")


def main() -> None:
    """The command."""
    options = parse(sys.argv)
    config, out = options.config, options.out
    corpus = manifest.read(options.root)
    if not manifest.voted(corpus.utterances, config.labels):
        raise ConfigError(
            f"no utterance of {options.root} has a vote on labels={tuple(config.labels)}; the votes there are on "
            f"{', '.join(corpus.classes())}; set --config.labels"
        )
    manifest.assert_classes(corpus, config.labels)
    if options.merge:
        merge(corpus, out, config)
        return
    items, failures = to_do(corpus, out, config)
    e = estimate(items, corpus, config)
    asked = len(corpus.utterances[: config.max_items or None])
    print(f"items       {len(items)} to do of {asked} ({asked - len(items) - len(failures)} finished earlier)")
    print(f"audio       {e.hours:.2f} h" + (f", {e.unreadable} clips cannot be read" if e.unreadable else ""))
    print(f"estimate    {e.requests} requests, {e.tokens:,} tokens, ${e.usd:.2f} if every first draft passes,")
    print(f"            ${e.usd_at_most:.2f} at most; the rate limits alone take {e.minutes:.0f} min")
    if not options.dry_run:
        run(items, failures, corpus, options)


if __name__ == "__main__":
    errors.run(main)
