"""Three teachers, three validators, and the dialogue between them that makes one chain of thought.

teacher     audio      a model that hears the recording
            acoustics  a model that reads its measured acoustics
            template   the offline teacher, no model at all
validator   judge      a model says CONSISTENT or INCONSISTENT
            reader     a model that knows only the reasoning predicts p, JS under a bound
            none
"""

import base64
import dataclasses
import io
from collections.abc import Awaitable, Callable, Mapping, Sequence

import ml_collections
import numpy as np

from ambijax import audio, metrics, reasoning
from ambijax.acoustics import Acoustics, Norm
from ambijax.curation import checks, prompts
from ambijax.curation.client import CallFailed, Client, Request
from ambijax.curation.ledger import Answer
from ambijax.errors import DataError
from ambijax.manifest import Corpus, Utterance


@dataclasses.dataclass(frozen=True)
class Item:
    """An utterance with the soft label p [K] that its reasoning has to explain, and the votes that p is made of."""

    utterance: Utterance
    votes: Mapping[str, float]
    p: np.ndarray


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a teacher is to write: a first draft, or a better one than `text`."""

    attempt: int
    prosody: bool = False  # after a refusal: describe the prosody
    text: str = ""
    faults: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of an item: 'ok' with a cot, 'rejected' by the checks, 'failed' for want of an answer."""

    id: str
    votes: Mapping[str, float]  # that it explains
    status: str
    reason: str
    attempts: int
    teacher: str
    cot: str


Voices = Mapping[str, tuple[Acoustics, Norm] | DataError]  # id -> (the clip's measures, its speaker's norm)
Teacher = Callable[[Item, Draft], Awaitable[Answer]]
Validator = Callable[[Item, str, int], Awaitable[str]]  # item, reasoning, attempt -> fault, '' when there is none


def hearing_teacher(client: Client, config: ml_collections.ConfigDict, corpus: Corpus) -> Teacher:
    """A model that is sent the recording as base64 wav."""

    async def write(item: Item, draft: Draft) -> Answer:
        samples = audio.load(corpus.path(item.utterance))
        seconds = len(samples) / audio.SAMPLE_RATE
        return await client.ask(drafting_request(config, item, draft, wav(samples), seconds))

    return write


def reading_teacher(client: Client, config: ml_collections.ConfigDict, voices: Voices) -> Teacher:
    """A model that is sent measured acoustics."""

    async def write(item: Item, draft: Draft) -> Answer:
        sound = prompts.describe(*_voice(voices, item))
        return await client.ask(drafting_request(config, item, draft, sound, 0.0))

    return write


def template_teacher(labels: Sequence[str], voices: Voices) -> Teacher:
    """The offline teacher; it has one draft and no better one."""
    from ambijax import teacher

    async def write(item: Item, draft: Draft) -> Answer:
        acoustics, norm = _voice(voices, item)
        written = teacher.reason(item.utterance.transcript, acoustics, norm, item.p, labels)
        return Answer(written.render(), "stop", "")

    return write


def _voice(voices: Voices, item: Item) -> tuple[Acoustics, Norm]:
    voice = voices[item.utterance.id]
    if isinstance(voice, DataError):
        raise voice
    return voice


def wav(samples: np.ndarray) -> bytes:
    """float32 [n] at 16 kHz as a 16-bit wav file in base64."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, audio.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(file.getvalue())


def drafting_request(
    config: ml_collections.ConfigDict, item: Item, draft: Draft, sound: str | bytes, seconds: float
) -> Request:
    """The request for a draft; `sound` as in prompts.draft."""
    messages = prompts.draft(
        sound, item.utterance.transcript, item.p, config.labels, words=config.max_words, prosody=draft.prosody
    )
    if draft.text:
        messages += prompts.again(draft.text, draft.faults)
    return Request(config.writer, messages, item.utterance.id, draft.attempt, seconds)


def validating_request(config: ml_collections.ConfigDict, item: Item, text: str, attempt: int) -> Request:
    """The request to the validator named in the config."""
    if config.validator == "judge":
        messages = prompts.judge(text, item.utterance.transcript, item.p, config.labels)
    else:
        messages = prompts.reader(text, config.labels)
    return Request(config.judge, messages, item.utterance.id, attempt, 0.0)


def judge(client: Client, config: ml_collections.ConfigDict) -> Validator:
    """A model that is shown p and the reasoning."""

    async def validate(item: Item, text: str, attempt: int) -> str:
        answer = await client.ask(validating_request(config, item, text, attempt))
        return checks.verdict(answer.text)

    return validate


def blind_reader(client: Client, config: ml_collections.ConfigDict) -> Validator:
    """A model that is shown the reasoning alone; its prediction q must have JS(p, q) <= max_js bits."""

    async def validate(item: Item, text: str, attempt: int) -> str:
        answer = await client.ask(validating_request(config, item, text, attempt))
        q = checks.prediction(answer.text, config.labels)
        if q is None:
            return "reader: gave no distribution"
        if (js := float(metrics.js(item.p, q))) <= config.max_js:
            return ""
        return f"reader: expects {prompts.target(q, config.labels)} from the analysis (JS {js:.2f} bits)"

    return validate


async def no_validator(item: Item, text: str, attempt: int) -> str:
    """Takes every well-formed reasoning."""
    del item, text, attempt
    return ""


async def curate(item: Item, teacher: Teacher, validator: Validator, config: ml_collections.ConfigDict) -> Result:
    """Drafts, checks, validates, feeds back what is wrong, and gives up after `config.attempts` drafts."""
    name = "template" if config.teacher == "template" else config.writer.model

    def ended(status: str, attempts: int, reason: str = "", cot: str = "") -> Result:
        return Result(item.utterance.id, item.votes, status, reason, attempts, name, cot)

    draft = Draft(1)
    while True:
        try:
            answer = await teacher(item, draft)
            text = checks.plain(answer.text)
            if refused := checks.refused(answer):
                faults = ["refused: " + " ".join((answer.refusal or text).split())[:200]]
            elif answer.finish == "length":
                faults = ["cut: the answer ran into the length limit, be shorter"]
            elif not (faults := checks.faults(text, item.utterance.transcript, config.labels, config.max_chars)):
                fault = await validator(item, text, draft.attempt)
                faults = [fault] if fault else []
        except CallFailed as error:
            return ended("failed", draft.attempt, str(error))
        except DataError as error:
            return ended("failed", draft.attempt, f"data: {error}")
        if not faults:
            return ended("ok", draft.attempt, cot=reasoning.parse(text).render())
        if draft.attempt == config.attempts or (refused and draft.prosody):
            return ended("rejected", draft.attempt, "; ".join(faults))
        if refused:
            draft = Draft(draft.attempt + 1, prosody=True)
        else:
            draft = Draft(draft.attempt + 1, draft.prosody, text, tuple(faults))
