"""From an official release, or an own manifest, to a checked corpus: the first command of every run.

    python -m ambijax.prepare --corpus=cremad --root=CREMA-D --out=data/cremad
    python -m ambijax.prepare --corpus=iemocap --root=IEMOCAP_full_release --out=data/iemocap
    python -m ambijax.prepare --corpus=manifest --root=my_corpus --out=data/my_corpus

Every clip is decoded once. --out gets `manifest.jsonl` (audio paths relative to --root, which `corpus.json` names;
nothing is copied) and `bad_files.csv` (every clip left out, with the reason). A table of counts is printed, to be
checked against the literature (docs/corpora/).
"""

import argparse
import collections
import csv
import dataclasses
import hashlib
import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ambijax import audio, emotions, errors, lfs, manifest, metrics, workdir
from ambijax.corpora import cremad, iemocap, own
from ambijax.corpora.release import Release
from ambijax.emotions import soft_label
from ambijax.errors import AmbijaxError, ConfigError, DataError
from ambijax.manifest import Corpus, Utterance

_LINES = 20  # how much of a list is printed; bad_files.csv has every reason
_OPTIONS = {  # flag -> the corpus it belongs to
    "votes": "cremad",
    "ten_second_rule": "cremad",
    "keep": "iemocap",
    "fractional": "iemocap",
    "labels": "manifest",
    "rename": "manifest",
}


@dataclasses.dataclass
class Audio:
    """What decoding every clip has shown."""

    bad: dict[str, str]  # utterance id -> reason
    seconds: dict[str, float]  # utterance id -> duration of the file; of good clips only
    same: list[list[str]]  # ids of clips that are sample by sample the same


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
      ConfigError: a flag or a file of the release is missing, or the flags contradict each other.
      DataError: git-lfs pointers, a defect in a table, a leak between folds; with --on_bad=error also a bad clip.
    """
    args = _parse(argv)
    release = _read(args)
    if not release.utterances:
        raise DataError(f"{args.root}: no utterance in {release.description}")
    _assert_nothing_lost(args.out, release)
    root = release.audio_root or args.root
    corpus = Corpus(args.out, release.utterances, root, release.description, release.labels)
    paths = {u.id: corpus.path(u) for u in release.utterances}
    _assert_no_pointers(paths, root)
    _make(args.out)
    heard = _decode(paths)
    reasons = heard.bad | _vote_defects(release) | release.known_bad
    kept = tuple(u for u in release.utterances if u.id not in reasons)
    rows = [(u.id, u.audio, reasons[u.id]) for u in release.utterances if u.id in reasons]
    rows += [(Path(path).stem, path, "nobody voted on this file") for path in release.unlabelled]
    listed = args.out / "bad_files.csv"
    _write_bad_files(listed, rows)
    if not kept:
        raise DataError(f"none of the {len(rows)} clips can be used, see {listed}. The first: {': '.join(rows[0][1:])}")
    report = _report(release, kept, heard, rows)

    bad = [row for row in rows if row[0] not in release.known_bad]
    if bad and args.on_bad == "error":
        print(report)
        raise DataError(
            f"{len(bad)} bad files, see {listed}; mend them, or leave them out with --on_bad=skip. The first: "
            f"{': '.join(bad[0][1:])}"
        )
    corpus = dataclasses.replace(corpus, utterances=kept)
    for fold in sorted({u.fold for u in kept}):
        manifest.split(corpus, fold, "groups")  # raises on a leak
    manifest.write(corpus)
    print(report)  # to somebody who may have left: nothing depends on it any more
    print(f"wrote {args.out / 'manifest.jsonl'}: {len(kept)} utterances; audio stays in {root}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ambijax.prepare",
        description="Turn a corpus release into a checked manifest.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--corpus", required=True, choices=("cremad", "iemocap", "manifest"))
    add("--root", required=True, type=Path, help="the release, or the directory of an own manifest")
    add("--out", required=True, help="where manifest.jsonl and bad_files.csv go")
    add("--on_bad", choices=("error", "skip"), default="error", help="whether a bad clip stops the command")
    add("--votes", choices=("tabulated", "raw"), help="cremad: which vote table; tabulated by default")
    add("--ten_second_rule", action="store_true", default=None, help="cremad, raw: drop slow responses")
    add("--keep", choices=("consensus", "all_votes"), help="iemocap: which turns; consensus by default")
    add("--fractional", action="store_true", default=None, help="iemocap: one vote an annotator, shared by its tags")
    add("--labels", help="manifest: the classes, e.g. anger,neutral; by default corpus.json's, or all with a vote")
    add("--rename", help="manifest: emotion words to class words, e.g. happy:happiness,joy:happiness")
    args = parser.parse_args(argv)
    for flag, corpus in _OPTIONS.items():
        if getattr(args, flag) is not None and args.corpus != corpus:
            raise ConfigError(f"--{flag} belongs to --corpus={corpus}, not to {args.corpus}")
    if args.ten_second_rule and args.votes != "raw":
        raise ConfigError("--ten_second_rule belongs to --votes=raw; the tabulated votes have it already")
    if not str(args.out):
        raise ConfigError("--out is empty; name a directory")
    args.out = Path(args.out)
    if not args.root.is_dir():
        raise ConfigError(f"--root={args.root} is no directory")
    try:
        str(args.root.resolve()).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--root={args.root} cannot be written down: its name is not UTF-8; rename it") from None
    return args


def _read(args: argparse.Namespace) -> Release:
    if args.corpus == "cremad":
        return cremad.read(args.root, votes=args.votes or "tabulated", ten_second_rule=bool(args.ten_second_rule))
    if args.corpus == "iemocap":
        return iemocap.read(args.root, keep=args.keep or "consensus", fractional=bool(args.fractional))
    pairs = [[*map(str.strip, pair.split(":"))] for pair in args.rename.split(",")] if args.rename else []
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ConfigError(f"--rename={args.rename} must look like happy:happiness,joy:happiness")
    words = dict(pairs)
    if len(words) < len(pairs):
        raise ConfigError(f"--rename={args.rename} gives a word two names")
    if args.out.resolve() == args.root.resolve():
        raise ConfigError("--out must not be --root: the manifest that is read would be overwritten")
    return own.read(args.root, labels=emotions.classes(args.labels) if args.labels else (), words=words)


def _assert_nothing_lost(out: Path, release: Release) -> None:
    """Raises ConfigError: a manifest that is there is somebody's own, or has chains of thought that would be gone."""
    if (out / "manifest.csv").is_file():
        raise ConfigError(f"--out={out} holds a manifest.csv, and a corpus has one manifest; choose another --out")
    try:
        there = manifest.read(out) if (out / "manifest.jsonl").is_file() else None
    except AmbijaxError as error:
        if re.search(rb'"cot": *"[^"]', (out / "manifest.jsonl").read_bytes()):
            raise ConfigError(f"{error}; mend that or move the manifest away: it has chains of thought") from None
        return  # a broken one without any is worth writing anew
    kept = {u.id: u for u in release.utterances}
    if there and not (out / "corpus.json").is_file() and any(kept.get(u.id) != u for u in there.utterances):
        raise ConfigError(
            f"{out / 'manifest.jsonl'} is none of this command's, for no corpus.json lies beside it, and would be "
            "overwritten; move it away, or choose another --out"
        )
    if there and (lost := [u.id for u in there.utterances if u.cot and (u.id not in kept or kept[u.id].cot != u.cot)]):
        raise ConfigError(
            f"{out / 'manifest.jsonl'} has {len(lost)} chains of thought that this would remove, for one that of "
            f"{lost[0]}; move it away, or choose another --out"
        )


def _assert_no_pointers(paths: dict[str, Path], root: Path) -> None:
    """Names what a checkout without git-lfs leaves instead of sound, before any clip is decoded."""
    if pointers := [path for path in paths.values() if lfs.is_pointer(path)]:
        raise DataError(
            f"{len(pointers)} of {len(paths)} audio files are git-lfs pointers, not sound, for one {pointers[0]}; "
            f"run `git lfs pull` in {root}"
        )


def _make(out: Path) -> None:
    """Makes the output directory, before rather than after the long work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={out} cannot be made: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise ConfigError(f"--out={out} cannot be written to")


def _decode(paths: dict[str, Path]) -> Audio:
    """Decodes every clip once; `paths` by utterance id."""
    import soundfile
    from tqdm import tqdm

    found = Audio(bad={}, seconds={}, same=[])
    clips = collections.defaultdict(list)
    for clip, path in tqdm(paths.items(), desc="decoding", unit="clip", mininterval=1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # clips over 30 s are counted in the table
                samples = audio.load(path)
        except (DataError, OSError) as error:
            found.bad[clip] = str(error).removeprefix(f"{path}: ")
            continue
        found.seconds[clip] = soundfile.info(os.fsencode(path)).duration
        clips[hashlib.sha256(samples.tobytes()).digest()].append(clip)
    found.same = [ids for ids in clips.values() if len(ids) > 1]
    return found


def _vote_defects(release: Release) -> dict[str, str]:
    """Utterance id -> why its votes make no soft label."""
    defects = {}
    for utterance in release.utterances:
        try:
            soft_label(utterance.votes, release.labels)
        except DataError as error:
            defects[utterance.id] = str(error)
    return defects


def _write_bad_files(path: Path, rows: list[tuple[str, str, str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("id", "audio", "reason"), *rows])
    workdir.replace(path, text.getvalue().encode(errors="backslashreplace").decode())


# The report ----------------------------------------------------------------------------------------------------------


def _report(release: Release, kept: tuple[Utterance, ...], heard: Audio, rows: list[tuple[str, str, str]]) -> str:
    """Counts of the vote tables and of what is kept, folds, floors, and what was left out."""
    voted = manifest.voted(release.utterances, release.labels)
    columns = [_counts(utterances, release.labels) for utterances in (voted, kept)]
    lines = ["", release.description, *(f"  {note}" for note in release.notes), ""]
    lines.append(f"{'':28}{'in the tables':>14}{'kept':>14}")
    lines += [f"{name:28}{columns[0][name]:>14}{columns[1][name]:>14}" for name in columns[0]]
    lines += ["", f"{'fold':6}{'utterances':>12}{'votes':>12}{'groups':>8}{'speakers':>10}"]
    lines += [_fold_line(fold, kept, release.labels) for fold in sorted({u.fold for u in kept})]
    lines += ["", f"{'floors of those kept':28}{'JS':>8}{'BC':>8}{'R2':>8}{'Brier':>8}"]
    p = manifest.soft_labels(kept, release.labels)
    for name, q in _floors(p, np.array([u.fold for u in kept])).items():
        measured = metrics.summary(p, q)
        lines.append(f"{name:28}" + "".join(f"{measured[key]:8.3f}" for key in ("js", "bc", "r2", "brier")))
    return "\n".join([*lines, "", *_remarks(kept, heard), *_left_out(rows)])


def _counts(utterances: Sequence[Utterance], labels: Sequence[str]) -> dict[str, str]:
    """The rows of the count table."""
    votes = np.array([[u.votes.get(label, 0) for label in labels] for u in utterances], np.float64)
    outside = sum(n for u in utterances for emotion, n in u.votes.items() if emotion not in labels)
    totals = votes.sum(axis=1)
    top = votes == votes.max(axis=1, keepdims=True)
    sole = top.sum(axis=1) == 1
    rows = {
        "utterances": f"{len(utterances)}",
        "speakers": f"{len({u.speaker for u in utterances})}",
        "votes": f"{totals.sum():.9g}",
        "votes outside the classes": f"{outside:.9g}",
        "votes an utterance": f"{totals.min():g} to {totals.max():g}",
        "  mean": f"{totals.mean():.2f}",
        "ties": f"{(~sole).sum()}",
        "unanimous": f"{(votes.max(axis=1) == totals).sum()}",
        "mean entropy in bits": f"{metrics.entropy(votes / totals[:, None]).mean():.3f}",
    }
    for k, label in enumerate(labels):
        rows[f"{label}, votes"] = f"{votes[:, k].sum():.9g}"
        rows[f"{label}, sole majority"] = f"{(top[:, k] & sole).sum()}"
    return rows


def _fold_line(fold: int, utterances: Sequence[Utterance], labels: Sequence[str]) -> str:
    test = [u for u in utterances if u.fold == fold]
    speakers = sorted({u.speaker for u in test})
    votes = sum(u.votes.get(label, 0) for u in test for label in labels)
    groups = len({u.group or u.speaker for u in test})
    return f"{fold:<6}{len(test):>12}{votes:>12.9g}{groups:>8}{len(speakers):>10}  {speakers[0]} to {speakers[-1]}"


def _floors(p: np.ndarray, folds: np.ndarray) -> dict[str, np.ndarray]:
    """What one gets without listening, which every trained model must beat; and from a perfect hard label.

    Args:
      p: soft labels [N, K].
      folds: test fold of each utterance [N].

    Returns:
      name -> predictions [N, K].
    """
    floors = {"uniform": metrics.uniform(*p.shape), "mean prior": metrics.prior(p, len(p))}
    if len(set(folds)) > 1:
        floors["prior of the other folds"] = np.zeros(p.shape)
        for fold in set(folds):
            floors["prior of the other folds"][folds == fold] = p[folds != fold].mean(axis=0)
    return floors | {"majority vote, one-hot": np.eye(p.shape[1])[p.argmax(axis=1)]}


def _remarks(kept: Sequence[Utterance], heard: Audio) -> list[str]:
    """What to know about the sound and the transcripts."""
    seconds = [heard.seconds[u.id] for u in kept]
    lines = [
        f"audio: {sum(seconds) / 3600:.2f} h, {min(seconds):.2f} to {max(seconds):.2f} s a clip, "
        f"mean {np.mean(seconds):.2f} s"
    ]
    if long := sum(duration > audio.SECONDS for duration in seconds):
        lines.append(f"warning: {long} longer than {audio.SECONDS} s; only the first {audio.SECONDS} s are used")
    if silent := sum(not u.transcript for u in kept):
        lines.append(f"warning: {silent} without a transcript")
    group = {u.id: u.group or u.speaker for u in kept}
    for ids in heard.same[:_LINES]:
        parted = len({group[i] for i in ids if i in group}) > 1
        names = " = ".join(ids[:_LINES]) + " = ..." * (len(ids) > _LINES)
        lines.append(f"the same sound: {names}{'; warning: in different groups' if parted else ''}")
    return lines + _rest(heard.same, "sounds that occur more than once")


def _left_out(rows: list[tuple[str, str, str]]) -> list[str]:
    reasons = collections.Counter(reason for _, _, reason in rows).most_common()
    lines = [f"left out: {len(rows)}", *(f"{n:>6}  {reason}" for reason, n in reasons[:_LINES])]
    return lines + _rest(reasons, "reasons")


def _rest(items: list, what: str) -> list[str]:
    return [f"        and {len(items) - _LINES} other {what}"] if len(items) > _LINES else []


if __name__ == "__main__":
    errors.run(main)
