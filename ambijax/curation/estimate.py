"""What curating will take, before anything is sent: hours, requests, tokens, money, time."""

import dataclasses
import math
import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from ambijax import audio
from ambijax.acoustics import MEASURES, Acoustics, Norm
from ambijax.curation import prompts, teachers
from ambijax.curation.client import Request
from ambijax.errors import DataError
from ambijax.manifest import Corpus


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What curating some items will take."""

    hours: float  # of audio
    unreadable: int  # clips whose header cannot be read
    requests: int  # when every first draft passes
    tokens: int
    usd: float
    usd_at_most: float  # when every item takes all its attempts and every answer has full length
    minutes: float  # that the rate limits alone enforce


def estimate(items: Sequence[teachers.Item], corpus: Corpus, config: ConfigDict) -> Estimate:
    """Counts tokens from above with the very requests that will be sent; reads nothing of a clip but its header."""
    seconds, first, all_attempts, unreadable = 0.0, [], [], 0
    loud = Acoustics(*[100.0] * len(MEASURES))
    voice = prompts.describe(loud, Norm.of([loud]))
    longest = "x" * math.ceil(config.writer.max_completion_tokens * config.writer.bytes_per_token)
    again = teachers.Draft(2, text=longest, faults=("x" * 300,))
    for item in items:
        length = _seconds(corpus, item)
        unreadable += length is None
        seconds += length or 0.0
        if config.teacher == "template":
            continue
        sound, heard = (b"", length or 0.0) if config.teacher == "audio" else (voice, 0.0)
        first.append(teachers.drafting_request(config, item, teachers.Draft(1), sound, heard))
        all_attempts.append(first[-1])
        all_attempts += [teachers.drafting_request(config, item, again, sound, heard)] * (config.attempts - 1)
        if config.validator != "none":
            written = longest[: math.ceil(config.writer.expected_tokens * config.writer.bytes_per_token)]
            first.append(teachers.validating_request(config, item, written, 1))
            all_attempts += [teachers.validating_request(config, item, longest, 1)] * config.attempts
    if config.teacher == "template":
        return Estimate(seconds / 3600, unreadable, 0, 0, 0.0, 0.0, 0.0)
    return Estimate(
        hours=seconds / 3600,
        unreadable=unreadable,
        requests=len(first),
        tokens=sum(request.prompt_tokens + request.endpoint.expected_tokens for request in first),
        usd=sum(request.usd(request.endpoint.expected_tokens) for request in first),
        usd_at_most=sum(request.usd_at_most for request in all_attempts),
        minutes=max((_minutes(first, config[role]) for role in ("writer", "judge")), default=0.0),
    )


def _minutes(requests: Sequence[Request], endpoint: ConfigDict) -> float:
    mine = [request for request in requests if request.endpoint.model == endpoint.model]
    return max(len(mine) / endpoint.rpm, sum(request.tokens for request in mine) / endpoint.tpm)


def _seconds(corpus: Corpus, item: teachers.Item) -> float | None:
    """Length of the clip as its header tells, at most what is sent; None when it cannot be read."""
    import soundfile

    try:
        return min(soundfile.info(os.fsencode(corpus.path(item.utterance))).duration, audio.SECONDS)
    except (soundfile.SoundFileError, TypeError, DataError):
        return None
