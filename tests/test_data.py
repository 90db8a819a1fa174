"""A batch is as wide as the longest prompt of the split whose clip fits into the batch's window, and no wider; and what
is not fit to be learned is kept for its votes."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from ambijax import audio, canaries, data, policy, prompt
from ambijax.emotions import CREMAD
from ambijax.errors import ConfigError
from ambijax.manifest import Utterance
from ambijax.reasoning import Reasoning
from tests import small
from tests.test_prompt import train

WINDOWS = (256, 512, 1024, 3000)


@pytest.mark.parametrize(
    ("clips", "windows", "slots"),
    [
        ([(100, 200), (130, 300)], WINDOWS, (112, 144, 144, 144)),  # nothing in the last two: as the one before
        ([(112, 200), (113, 253)], WINDOWS, (128,) * 4),  # one token more than a multiple of 16 takes sixteen more
        ([(96, 254), (120, 255)], WINDOWS, (96, 128, 128, 128)),  # two silent frames follow a clip in its window
        ([(160, 100), (130, 500)], WINDOWS, (160,) * 4),  # little sound, many words: it may lie beside the long clip
        ([(830, 3000)], WINDOWS, (0, 0, 0, 832)),  # no batch can fall into the first three
        ([(830, 3000), (80, 100)], (3000, 256, 3000), (832, 80, 832)),  # in any order, and twice
    ],
)
def test_slots_by_hand(clips, windows, slots):
    assert data.prompt_slots(*zip(*clips, strict=True), windows) == slots


# A corpus of six clips, short and long, of few words and of many ----------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> prompt.Vocabulary:
    directory = tmp_path_factory.mktemp("tokenizer")
    train([prompt.instruction("well", CREMAD, style="answer")] * 20).save(str(directory / "tokenizer.json"))
    return prompt.load(directory, CREMAD)


SPLITS = {
    "train": [(12, "well"), (600, "well"), (480, "well " * 40), (2990, "well")],
    "test": [(100, "well " * 30), (1010, "well " * 5)],
}
FRAMES = {f"{name}{i}.wav": clip[0] for name, clips in SPLITS.items() for i, clip in enumerate(clips)}


def utterances(split: str) -> list[Utterance]:
    clips = enumerate(SPLITS[split])
    return [Utterance(f"{split}{i}", f"{split}{i}.wav", words, "s", 0, {"anger": 1}) for i, (_, words) in clips]


def build(
    vocabulary: prompt.Vocabulary, edit: object = list, names: tuple[str, ...] = tuple(SPLITS)
) -> dict[str, data.Dataset]:
    splits = {split: edit(utterances(split)) for split in SPLITS}
    heard = {u.id: FRAMES[u.audio] for split in splits.values() for u in split}
    sounds = {name: data.Sound(n, np.zeros((audio.tokens(n), 4), np.float32)) for name, n in heard.items()}
    how = {"max_tokens": 8, "style": "answer", "gold_label": "argmax", "seed": 0, "label_in_ce": True}
    return data.build(splits, names, sounds, vocabulary, windows=WINDOWS, live_tower=False, root=Path(), **how)


@pytest.mark.parametrize("edit", [list, canaries.swap_audio, canaries.swap_transcript])
def test_every_batch_fits_and_its_width_is_its_windows(vocabulary, edit):
    sets = build(vocabulary, edit)
    used = set()
    for dataset in sets.values():
        slots, fullest = dataset.slots, dict.fromkeys(WINDOWS, 0)
        for several in itertools.product(range(len(dataset)), repeat=2):
            batch = dataset.prompts(several)
            window = 4 * batch.audio.shape[1]
            assert window == audio.window(max(dataset.sounds[i].frames for i in several), WINDOWS)
            assert batch.tokens.shape == batch.mask.shape == (2, dict(zip(WINDOWS, slots, strict=True))[window])
            for row, i in enumerate(several):
                asked = dataset.examples[i].prompt
                np.testing.assert_array_equal(batch.tokens[row][batch.mask[row]], asked)
                assert np.sum(asked == vocabulary.audio) == dataset.sounds[i].tokens <= batch.audio.shape[1]
            used.add(window)
            fullest[window] = max(fullest[window], batch.mask.sum(axis=1).max())
        longest = itertools.accumulate((fullest[window] for window in WINDOWS), max)
        assert slots == tuple(data.round_up(int(n)) for n in longest)  # and not one step wider
    assert used == {*WINDOWS}


def test_a_split_is_the_same_whichever_are_built_beside_it(vocabulary):
    # Or an evaluation of a run, which builds the test split alone, would compute in other shapes than the run did.
    alone, beside = (build(vocabulary, names=names)["test"] for names in (("test",), ("train", "test")))
    assert alone.slots == beside.slots != build(vocabulary)["train"].slots
    np.testing.assert_array_equal(alone.prompts([0, 1]).tokens, beside.prompts([0, 1]).tokens)


def test_examples_are_numbered_across_the_corpus(vocabulary):
    sets = build(vocabulary)
    numbers = {name: dataset.prompts(range(len(dataset))).example for name, dataset in sets.items()}
    assert [n for each in numbers.values() for n in each] == [*range(6)]  # no two draw from the same key
    for name, dataset in sets.items():
        assert [dataset.at(n).id for n in numbers[name]] == [u.id for u in dataset.utterances]


def test_every_epoch_is_another_order_of_all_utterances(vocabulary):
    train = build(vocabulary)["train"]

    def epochs(seed: int) -> list[tuple[int, ...]]:  # six of four utterances in eight steps of three
        drawn = np.concatenate([train.indices_at(seed, step, 3) for step in range(8)])
        return [tuple(row) for row in drawn.reshape(6, 4).tolist()]

    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs(0))
    assert len({*epochs(0)}) > 1
    assert epochs(0) != epochs(1)
    batch = train.batch_at(1, 5, 3)
    assert batch.prompt.example.tolist() == train.indices_at(1, 5, 3).tolist()


def test_a_prompt_that_nobody_counted_is_an_error_and_is_not_cut(vocabulary):
    plain, swapped = (build(vocabulary, edit)["test"] for edit in (list, canaries.swap_audio))
    asked = dataclasses.replace(swapped, slots=plain.slots)  # the long clip now comes with more words
    needed, room = len(swapped.examples[0].prompt), plain.slots[2]
    assert room < needed <= swapped.slots[2]
    message = f"^a prompt of {needed} tokens is longer than the {room} slots .* for windows of 1024 mel frames"
    with pytest.raises(ConfigError, match=message):
        asked.prompts([1, 0])
    assert asked.prompts([1]).tokens.shape == (1, plain.slots[0])


def test_a_chain_of_thought_that_cannot_be_learned_is_named_and_kept_for_its_votes(vocabulary, capsys):
    cot = Reasoning("slow", "a plain statement", "soft and falling", "sad").render()
    cots = {"good": cot, "broken": "It sounds sad.", "long": cot + " indeed" * 500, "none": ""}
    split = {"train": [Utterance(name, "", "well", "s", 0, {"anger": 1}, cot=cot) for name, cot in cots.items()]}
    sounds = {name: data.Sound(100, np.zeros((audio.tokens(100), 4), np.float32)) for name in cots}
    how = {"style": "steps", "gold_label": "argmax", "seed": 0, "label_in_ce": True, "live_tower": False}
    built = data.build(split, ("train",), sounds, vocabulary, windows=WINDOWS, max_tokens=1024, root=Path(), **how)
    assert "2 of 3 chains of thought break the format or exceed data.max_tokens=1024" in (
        said := capsys.readouterr().out
    )
    assert said.rstrip().endswith("broken, long")
    batch = built["train"].batch(range(4))
    assert batch.ce_mask.any(axis=(1, 2)).tolist() == [True, False, False, False]
    assert len({*batch.gold.mask[1:].sum(axis=(1, 2)).tolist()}) == 1  # of the answer alone
    np.testing.assert_array_equal(batch.target[:, 0], 1)


def test_class_words_are_drawn_for_every_utterance_of_the_corpus_apart(vocabulary):
    votes = dict.fromkeys(CREMAD, 1)
    split = {n: [Utterance(f"{n}{i}", "", "well", "s", 0, votes) for i in range(20)] for n in ("train", "test")}
    sounds = {u.id: data.Sound(100, np.zeros((audio.tokens(100), 4), np.float32)) for us in split.values() for u in us}
    how = {"style": "answer", "gold_label": "sample", "seed": 0, "label_in_ce": True, "live_tower": False}
    built = data.build(split, (*split,), sounds, vocabulary, windows=WINDOWS, max_tokens=8, root=Path(), **how)
    drawn = [[e.gold[e.anchor + 1] for e in built[name].examples] for name in split]
    assert drawn[0] != drawn[1]


def test_a_chain_of_thought_may_fill_its_room(vocabulary):
    cot = Reasoning("slow", "a plain statement", "soft and falling", "sad").render()
    split = {"train": [Utterance("u", "", "well", "s", 0, {"anger": 1}, cot=cot)]}
    sounds = {"u": data.Sound(100, np.zeros((audio.tokens(100), 4), np.float32))}
    how = {"style": "steps", "gold_label": "argmax", "seed": 0, "label_in_ce": True, "live_tower": False}
    size = len(prompt.encode_gold(vocabulary, cot, "anger")[0])
    for room, fits in ((size, True), (size - 1, False)):
        built = data.build(split, ("train",), sounds, vocabulary, windows=WINDOWS, max_tokens=room, root=Path(), **how)
        assert built["train"].examples[0].reasoned == fits


# What the model makes of it ------------------------------------------------------------------------------------------


def test_the_model_hears_the_same_in_fewer_slots(model, variables):
    rng = np.random.default_rng(0)
    sounds = [data.Sound(n, rng.normal(size=(audio.tokens(n), 32)).astype(np.float32)) for n in (110, 200, 254)]
    tokens = [
        np.array([9, *[small.AUDIO] * s.tokens, *range(8, 8 + words), small.TOKENS.newline], np.int32)
        for s, words in zip(sounds, (20, 3, 7), strict=True)
    ]
    lengths, frames = [len(t) for t in tokens], [s.frames for s in sounds]
    given = small.completions(3, 2, 6)

    def outcome(windows: tuple[int, ...], slots: tuple[int, ...]) -> tuple:
        asked = data.prompts(tokens, sounds, range(3), windows=windows, slots=slots, pad=0, live_tower=False)
        assert asked.tokens.shape[1] == slots[0]
        how = {"class_ids": small.TOKENS.classes, "temperature": 1.0, "chunk": 4, "rngs": {}}
        scores = policy.score(model, variables, asked, given, **how)
        rolled = policy.rollout(
            *(model, variables, asked, jax.random.key(0), small.ENDS_LINE),
            **{"tokens": small.TOKENS, "samples": 2, "max_tokens": 6, "temperature": 1.0},
        )
        return scores.logp, scores.readout, rolled.readout, rolled.completions.tokens

    *narrow, written = outcome((256,), data.prompt_slots(lengths, frames, (256,)))
    *wide, rewritten = outcome((256,), (64 + 32,))  # room for a clip as long as the window beside the most words
    *short, spoken = outcome((1024,), data.prompt_slots(lengths, frames, (1024,)))  # fewer slots than audio embeddings
    np.testing.assert_array_equal(written, rewritten)
    np.testing.assert_array_equal(written, spoken)
    for a, b, c in zip(narrow, wide, short, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)
