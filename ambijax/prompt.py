"""Transcript and audio length become the token ids of a chat; the model's completion becomes text again.

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\nAudio 1: <|audio_bos|><|AUDIO|>...<|audio_eos|>\\n{instruction}<|im_end|>\\n
    <|im_start|>assistant\\n
    {reasoning}\\nFinal emotion: anger<|im_end|>                        the completion

The ids equal those of transformers' `Qwen2AudioProcessor` for the same chat, <|AUDIO|> standing once for every audio
token. Transcripts and reasonings are untrusted: the tokenizer is told, once and for all, to split special tokens
like any other text, and special ids are only ever put in by this module.

`tokenizers` reads the checkpoint's tokenizer.json itself; transformers' AutoTokenizer wraps the same object and takes
three seconds longer to start.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import tqdm

from ambijax.errors import ConfigError, DataError
from ambijax.reasoning import ANCHOR, STYLES


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """A checkpoint's tokenizer, and the ids that mean something to us. Made by `load`."""

    tokenizer: tokenizers.Tokenizer  # splits special tokens like any other text
    im_start: int
    im_end: int  # ends a turn: the EOS of a completion
    audio: int
    audio_bos: int
    audio_eos: int
    endoftext: int  # padding
    labels: tuple[str, ...]  # the K class words
    class_words: tuple[tuple[int, ...], ...]  # [K], the tokens of " anger", ...: one each in Qwen2-Audio's tokenizer
    newline: tuple[int, ...]
    anchor: tuple[int, ...]  # "Final emotion:"
    ends_line: np.ndarray  # bool [V]: the token's text ends with "\n", as "\n" and ".\n" do; an anchor may follow

    @property
    def forced_anchor(self) -> tuple[int, ...]:
        """What is appended to a completion that never reached its anchor."""
        return self.newline + self.anchor

    @property
    def class_ids(self) -> tuple[int, ...]:
        """[K], each class word's first token: the whole word unless `split`."""
        return tuple(word[0] for word in self.class_words)

    @property
    def split(self) -> bool:
        """Some class word is several tokens, so that words are scored whole, by summed log-probability."""
        return any(len(word) > 1 for word in self.class_words)

    def encode(self, text: str) -> list[int]:
        """Plain text to ids, none of them special whatever the text says."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


TOKENS_MAX = 2**22  # ids; a larger one is a mistake of a file, which would be made room for
_SPECIAL = {  # field of Vocabulary -> name in the tokenizer; ids differ between checkpoints, names do not
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "audio": "<|AUDIO|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
    "endoftext": "<|endoftext|>",
}


def load(directory: str | Path, labels: Sequence[str]) -> Vocabulary:
    """Reads `directory/tokenizer.json` and checks that our prompt and read-out can be said in it.

    Args:
      directory: a checkpoint directory.
      labels: the K class words, in the order of every [K] axis.

    Raises:
      ConfigError: no readable tokenizer, a special token missing or not marked special, or a class word with whose
        tokens another one begins.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a checkpoint directory holds its tokenizer")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path}: not a tokenizer ({error})") from None
    tokenizer.encode_special_tokens = True  # read: encode them as the text they are
    tokenizer.no_truncation()  # both can be saved in the file
    tokenizer.no_padding()
    ids = {field: tokenizer.token_to_id(name) for field, name in _SPECIAL.items()}
    if missing := [_SPECIAL[field] for field, token in ids.items() if token is None]:
        raise ConfigError(f"{path}: no {', '.join(missing)}; this is not the tokenizer of a Qwen2-Audio")
    if unsafe := [
        name for field, name in _SPECIAL.items() if ids[field] in tokenizer.encode(name, add_special_tokens=False).ids
    ]:
        raise ConfigError(f'{path}: plain text can say {", ".join(unsafe)}; mark them "special": true')
    words = {label: tokenizer.encode(f" {label}", add_special_tokens=False).ids for label in labels}
    if len(words) < len(labels):
        raise ConfigError(f"{path}: class words must be distinct, not {', '.join(labels)}")
    if clash := [(a, b) for a in words for b in words if a != b and words[b][: len(words[a])] == words[a]]:
        a, b = clash[0]
        raise ConfigError(f"{path}: no class word's tokens may begin another's, as {a!r} begins {b!r}; rename one")
    if several := [label for label, pieces in words.items() if len(pieces) > 1]:
        tqdm.tqdm.write(
            f"{path} splits {', '.join(several)} into several tokens: class words are read out whole, by the summed "
            "log-probability of their tokens"
        )
    size = 1 + max(tokenizer.get_vocab().values())
    if size > TOKENS_MAX:
        raise ConfigError(f"{path}: a token has the id {size - 1}, and no model embeds more than {TOKENS_MAX} tokens")
    texts = tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    return Vocabulary(
        tokenizer=tokenizer,
        **ids,
        labels=tuple(labels),
        class_words=tuple(map(tuple, words.values())),
        newline=tuple(tokenizer.encode("\n", add_special_tokens=False).ids),
        anchor=tuple(tokenizer.encode(ANCHOR, add_special_tokens=False).ids),
        ends_line=np.array([text.endswith("\n") for text in texts]),
    )


def digest(directory: str | Path) -> str:
    """The identity of a checkpoint's tokenizer: sha256 of its file."""
    return hashlib.sha256((Path(directory) / "tokenizer.json").read_bytes()).hexdigest()


def assert_fits(vocabulary: Vocabulary, rows: int, audio_token: int) -> None:
    """Holds a tokenizer against a model's config: `vocab_size` rows of embeddings and `audio_token_index`.

    Raises:
      ConfigError: the tokenizer belongs to another model.
    """
    if len(vocabulary.ends_line) > rows:
        raise ConfigError(f"the tokenizer has {len(vocabulary.ends_line)} tokens, the model embeds only {rows}")
    if vocabulary.audio != audio_token:
        raise ConfigError(
            f"<|AUDIO|> is {vocabulary.audio} in the tokenizer, audio_token_index of the model {audio_token}"
        )


def instruction(transcript: str, labels: Sequence[str], *, style: str) -> str:
    """What we ask the model about a clip.

    Args:
      transcript: what is said, put on one line; '' = none is given.
      labels: the class words it chooses from.
      style: of the answer, one of `reasoning.STYLES`.

    Raises:
      DataError: the transcript is no text that a tokenizer could read.
    """
    words = " ".join(transcript.split())
    try:
        words.encode()
    except UnicodeEncodeError:
        raise DataError(f"transcript {words!r} holds half a character; write it as UTF-8") from None
    said = f"Transcript: {words}" if words else "No transcript is given."
    return f"{said}\nHow do listeners hear this voice? {STYLES[style].task} {', '.join(labels)}."


def encode_prompt(vocabulary: Vocabulary, transcript: str, audio_tokens: int, *, style: str) -> list[int]:
    """The prompt for one clip, up to where the completion begins.

    Args:
      vocabulary: from `load`; its labels are the choice the model is given.
      transcript: see `instruction`.
      audio_tokens: the clip's length in tokens, `audio.tokens(...)`.
      style: see `instruction`.
    """
    text = instruction(transcript, vocabulary.labels, style=style)
    return encode_turns(vocabulary, [("system", (STYLES[style].system,)), ("user", (audio_tokens, text))])


def encode_turns(vocabulary: Vocabulary, turns: Sequence[tuple[str, Sequence[str | int]]]) -> list[int]:
    """Any chat, up to where the assistant's next turn begins.

    Args:
      vocabulary: from `load`.
      turns: (role, contents) each; a content is a text, or the number of tokens of an audio that stands there. The
        usual system turn is put first unless there is one.

    Example: `[("user", (25, "Who speaks?")), ("assistant", ("A child.",)), ("user", ("And how?",))]`
    """
    if not turns or turns[0][0] != "system":
        turns = [("system", (STYLES["steps"].system,)), *turns]
    pieces: list[str | int] = []  # texts and special ids
    audios = 0
    for role, contents in turns:
        pieces += [vocabulary.im_start, f"{role}\n"]
        for content in contents:
            if isinstance(content, str):
                pieces.append(content)
            else:
                audios += 1
                pieces += [f"Audio {audios}: ", vocabulary.audio_bos]
                pieces += [vocabulary.audio] * content
                pieces += [vocabulary.audio_eos, "\n"]
        pieces += [vocabulary.im_end, "\n"]
    pieces += [vocabulary.im_start, "assistant\n"]

    ids: list[int] = []
    for kind, run in itertools.groupby(pieces, type):  # texts that touch are one text: tokens may span the seam
        content = list(run)
        ids += vocabulary.encode("".join(content)) if kind is str else content
    return ids


def assert_answers_fit(vocabulary: Vocabulary, max_tokens: int) -> None:
    """Raises ConfigError: not even an answer without reasoning fits into `data.max_tokens`."""
    length, label = max((len(encode_gold(vocabulary, "", label)[0]), label) for label in vocabulary.labels)
    if length > max_tokens:
        raise ConfigError(
            f"data.max_tokens={max_tokens} is less than the {length} tokens of the answer {label!r} alone"
        )


def encode_gold(vocabulary: Vocabulary, cot: str, label: str) -> tuple[list[int], int]:
    """A completion as the model should have written it.

    Args:
      vocabulary: from `load`.
      cot: the reasoning without answer line; '' leaves the answer alone.
      label: the class word.

    Returns:
      reasoning + "\\n" + anchor + label + EOS, and the index in it of the anchor's last token: the hidden state there
      predicts the label. Reasoning and anchor are encoded apart, so the anchor is always the same ids.
    """
    reasoning = vocabulary.encode(cot.strip())
    ids = [*reasoning, *vocabulary.forced_anchor] if reasoning else [*vocabulary.anchor]
    answer = vocabulary.class_words[vocabulary.labels.index(label)]
    return [*ids, *answer, vocabulary.im_end], len(ids) - 1


def decode(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    """A completion as text, without EOS (<|im_end|> or <|endoftext|>) and what follows it.

    Other special tokens, which a model should not write, are spelled out, so that a reader sees them. The text need
    not encode to the same ids.
    """
    ends = (vocabulary.im_end, vocabulary.endoftext)
    written = itertools.takewhile(lambda token: token not in ends, map(int, ids))
    return vocabulary.tokenizer.decode(list(written), skip_special_tokens=False)
