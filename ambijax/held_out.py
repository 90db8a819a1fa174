"""Who a run has learned from, and that nobody of them is tested on: folds in a manifest may change after the training.

<run>/splits.json    {"train": {"<utterance id>": "<speaker>", ...}, "dev": {...}, "test": {...}}
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ambijax.errors import DataError
from ambijax.manifest import Utterance
from ambijax.workdir import read_object, replace

_SHOWN = 5  # ids of a list


def note(directory: Path, splits: Mapping[str, Sequence[Utterance]]) -> None:
    """Writes down which utterances a run trains, tunes and tests on."""
    parts = {split: {u.id: u.speaker for u in utterances} for split, utterances in splits.items()}
    replace(directory / "splits.json", json.dumps(parts, indent=1, ensure_ascii=False) + "\n")


def check(directory: Path, split: str, utterances: Sequence[Utterance]) -> None:
    """Whether what the run in `directory` has learned may be evaluated on utterances that are the `split` now.

    Of an earlier version's run, which wrote down nothing, all may be.

    Raises:
      DataError: it has trained on some of them, or on other utterances of speakers that it is tested on; or
        splits.json is damaged.
    """
    if split == "train":
        return
    path = directory / "splits.json"
    before = read_object(path)
    try:
        trained, tuned = (dict.items(before.get(name, {})) for name in ("train", "dev"))
        learned, speakers = {name for name, _ in trained}, {speaker for _, speaker in (*trained, *tuned)}
    except TypeError:
        raise DataError(f"{path} is not what a training writes; put back a copy, or move it away") from None
    if split != "test":  # dev may share speakers with train, where groups part them
        speakers = set()
    if known := [u.id for u in utterances if u.id in learned or u.speaker in speakers]:
        raise DataError(
            f"{directory} has learned from {len(known)} of the {len(utterances)} utterances that are the {split} split "
            f"now, or from their speakers, such as {', '.join(known[:_SHOWN])}: the folds are others than when it was "
            f"trained, see {path}; bring them back, or train anew"
        )
