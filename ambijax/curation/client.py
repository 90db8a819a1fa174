"""One request to a chat endpoint: within the rate limits and the budget, retried, redacted, and in the ledger.

The openai package does the HTTP; its own retries are off, because it would retry an exhausted quota and not retry an
answer that is no JSON. What comes back is untrusted: a body is taken apart by hand, and a key that a server echoes is
blotted out before anything is printed or written.
"""

import asyncio
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import time
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections

from ambijax.curation import limits
from ambijax.curation.ledger import Answer, Ledger
from ambijax.curation.limits import Limiter, Slot
from ambijax.curation.prompts import Message
from ambijax.errors import ConfigError

_TICK = 0.02  # seconds between two looks at the limits and the budget
_TOKENS_MAX = 10_000_000  # beyond any context window: a usage above it is a server's mistake
_SECRET = 8  # characters; a shorter key is a placeholder for a local server, not a secret


class BudgetReached(Exception):
    """The next request might cost more than is left; not an error, the run ends here."""


class CallFailed(Exception):
    """This request has no answer, after all retries; `str` is the reason."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a model, and the most it can take."""

    endpoint: ml_collections.ConfigDict
    messages: list[Message]
    item: str  # the utterance's id
    attempt: int  # which attempt at the item this is; the same question asked again is another request
    seconds: float  # length of the audio in the messages

    @functools.cached_property
    def key(self) -> str:
        """Names the request by its content: what has been answered before is found in the ledger."""
        to = self.endpoint
        content = [self.item, self.attempt, to.model, to.max_completion_tokens, to.options.to_dict(), self.messages]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def audio_tokens(self) -> int:
        return math.ceil(self.seconds * self.endpoint.audio_tokens_per_s)

    @functools.cached_property
    def prompt_tokens(self) -> int:
        """Input tokens with those of the audio, estimated from above."""
        contents = [message["content"] for message in self.messages]
        parts = [
            part for content in contents for part in ([{"text": content}] if isinstance(content, str) else content)
        ]
        size = sum(len(part["text"].encode()) for part in parts if "text" in part)
        return math.ceil(size / self.endpoint.bytes_per_token) + self.audio_tokens

    @functools.cached_property
    def tokens(self) -> int:
        """Input tokens and the longest answer."""
        return self.prompt_tokens + self.endpoint.max_completion_tokens

    def usd(self, completion_tokens: int) -> float:
        """What the request costs when the answer has so many tokens."""
        return price(self.endpoint, self.prompt_tokens, self.audio_tokens, completion_tokens)

    @property
    def usd_at_most(self) -> float:
        return self.usd(self.endpoint.max_completion_tokens)


@dataclasses.dataclass(frozen=True)
class _Failure:
    reason: str
    retry: bool = False
    billed: bool = False  # the server may have done the work and charge for it
    answered: bool = False  # what came is no chat completion
    stop: bool = False  # no other request would fare better
    limited: bool = False  # all requests to this model have to wait
    wait: float | None = None  # seconds the server asks for


def is_url(url: str) -> bool:
    """Whether an endpoint can have this base URL: http or https, a host, and if any a port that is one."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # of a bracket or a port
        return False
    return parts.scheme in ("http", "https") and bool(host) and not any(c.isspace() for c in url)


class Client:
    """Asks the endpoints of a config. Used by many coroutines of one event loop.

    Args:
      ledger: where requests and answers are kept.
      endpoints: blocks of configs/curate.py with `model`, `base_url`, `api_key_env`, prices and limits.
      calls: the `calls` block of the config: timeouts and retries.
      max_usd: what everything in the ledger may cost.

    Raises:
      ConfigError: an API key is not in the environment.
    """

    def __init__(
        self,
        ledger: Ledger,
        endpoints: Sequence[ml_collections.ConfigDict],
        calls: ml_collections.ConfigDict,
        max_usd: float,
    ):
        import openai

        self._ledger, self._calls, self._max_usd = ledger, calls, max_usd
        self._keys = {endpoint.api_key_env: _api_key(endpoint) for endpoint in endpoints}
        self._apis = {
            (url, env): openai.AsyncOpenAI(
                api_key=self._keys[env], base_url=url, timeout=calls.timeout_s, max_retries=0
            )
            for url, env in {(endpoint.base_url, endpoint.api_key_env) for endpoint in endpoints}
        }
        self._limiters: dict[str, Limiter] = {}
        for endpoint in endpoints:  # two roles of one model share its limits
            limiter = self._limiters.setdefault(endpoint.model, Limiter(endpoint.rpm, endpoint.tpm))
            limiter.rpm, limiter.tpm = min(limiter.rpm, endpoint.rpm), min(limiter.tpm, endpoint.tpm)
        for model, tokens, until in ledger.recent(limits.WINDOW, calls.timeout_s):
            if model in self._limiters:
                self._limiters[model].occupy(tokens, until)
        self._turns = {model: asyncio.Lock() for model in self._limiters}  # first come, first served
        self._under_way: set[asyncio.Task] = set()
        self.sent = self.replayed = 0

    async def ask(self, request: Request) -> Answer:
        """The model's answer, from the ledger when it has been paid for before.

        Raises:
          CallFailed: no usable answer after all retries.
          ConfigError: the key, the quota or the model is no good: no other request would fare better.
          BudgetReached: max_usd does not allow one more request.
        """
        if request.key in self._ledger.answers:
            self.replayed += 1
            return self._ledger.answers[request.key]
        model = request.endpoint.model
        limit = self._limiters[model].tpm
        if request.tokens > limit:
            raise CallFailed(f"too large: needs {request.tokens} tokens, the limit of {model} is {limit} a minute")
        answered = 0
        for retry in range(self._calls.retries + 1):
            number, slot = await self._clearance(request)
            send = asyncio.create_task(self._send(request, number, slot, answered))
            self._under_way.add(send)
            send.add_done_callback(self._under_way.discard)
            result = await asyncio.shield(send)  # when we are stopped, a paid answer still reaches the ledger
            if isinstance(result, Answer):
                return result
            if result.stop:
                raise ConfigError(result.reason)
            if not result.retry:
                break
            answered += result.answered
            if retry < self._calls.retries:
                await self._back_off(model, result, retry)
        raise CallFailed(result.reason)

    async def _clearance(self, request: Request) -> tuple[int, Slot]:
        """Waits until limits and budget allow one more request, and notes it in the ledger."""
        model, usd = request.endpoint.model, request.usd_at_most
        async with self._turns[model]:
            while True:
                if self._ledger.spent + usd > self._max_usd:
                    if not self._under_way:  # else one of those may turn out cheaper than its worst case
                        spent = f"${self._ledger.spent:.4f} is spent and the next request may cost ${usd:.4f}"
                        raise BudgetReached(f"max_usd={self._max_usd:g} is reached: {spent}")
                elif slot := self._limiters[model].take(request.tokens):
                    self.sent += 1
                    return self._ledger.sent(request.key, request.item, model, request.tokens, usd), slot
                await asyncio.sleep(_TICK)

    async def _back_off(self, model: str, failure: _Failure, retry: int) -> None:
        """Waits as the server asks, else exponentially with jitter, so that the workers do not come back in step."""
        longest = self._calls.backoff_max_s
        wait = min(self._calls.backoff_s * 2**retry, longest) * random.uniform(0.5, 1.0)
        if failure.wait is not None:
            wait = min(failure.wait, longest)
        if failure.limited:
            self._limiters[model].hold(wait)
        else:
            await asyncio.sleep(wait)

    async def _send(self, request: Request, number: int, slot: Slot, answered: int) -> Answer | _Failure:
        """One request, from the wire into the ledger. Never raises: its caller may have been stopped.

        Its idempotency key is that of the requests before, unless so many of them were answered: those answers were no
        good, and a gateway that knows the key would give them again.
        """
        import openai

        endpoint = request.endpoint
        result: Answer | _Failure = _Failure("stopped before an answer came", billed=True)
        tokens, usd = request.tokens, request.usd_at_most
        try:
            async with asyncio.timeout(self._calls.timeout_s):  # in all; the package's own is for each read
                response = await self._apis[
                    endpoint.base_url, endpoint.api_key_env
                ].chat.completions.with_raw_response.create(
                    model=endpoint.model,
                    messages=request.messages,
                    max_completion_tokens=endpoint.max_completion_tokens,
                    extra_body=endpoint.options.to_dict(),
                    extra_headers={"Idempotency-Key": request.key + (f"-{answered}" if answered else "")},
                )
            result, completion = read_answer(response.text)
            if usage := read_usage(completion, request.audio_tokens):
                tokens, usd = usage.prompt + usage.completion, price(endpoint, *usage)
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            result = _failure(error, endpoint)
            usd = usd if result.billed else 0.0
        finally:
            self._limiters[endpoint.model].done(slot, tokens)
            result = self._redacted(result)
            if isinstance(result, Answer):
                self._ledger.got(number, usd, answer=result, error="")
            else:
                self._ledger.got(number, usd, answer=None, error=result.reason)
        return result

    def _redacted(self, result: Answer | _Failure) -> Answer | _Failure:
        keys = [key for key in self._keys.values() if len(key) >= _SECRET]
        if isinstance(result, _Failure):
            return dataclasses.replace(result, reason=redact(result.reason, keys))
        fields = dataclasses.asdict(result)
        for key in keys:
            fields = {name: value.replace(key, "[redacted]") for name, value in fields.items()}
        return Answer(**fields)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Lets the requests that are under way reach the ledger, for a while, and closes the connections."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=self._calls.drain_s)
        for send in self._under_way:
            send.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        for api in self._apis.values():
            await api.close()


def _api_key(endpoint: ml_collections.ConfigDict) -> str:
    key = os.environ.get(endpoint.api_key_env, "").strip()
    name = endpoint.api_key_env
    if not key:
        raise ConfigError(f"no API key: set {name} in the environment (any word for a local server that needs none)")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{name} holds characters that no API key has; set it again")
    return key


def price(endpoint: ml_collections.ConfigDict, prompt: int, audio: int, completion: int) -> float:
    """USD for `prompt` input tokens, `audio` of which are audio, and `completion` output tokens."""
    usd = endpoint.usd_per_1m
    return ((prompt - audio) * usd.text_in + audio * usd.audio_in + completion * usd.text_out) / 1e6


class Usage(NamedTuple):
    """Tokens as the server counted them."""

    prompt: int  # with those of the audio
    audio: int
    completion: int


def read_answer(body: str) -> tuple[Answer, dict]:
    """The answer in a response body, and the completion it stands in.

    Raises:
      ValueError: the body is not a chat completion.
    """
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        said = choice["message"]
        fields = [said.get("content"), choice.get("finish_reason"), said.get("refusal")]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError("not a chat completion: " + " ".join(body[:80].split())) from None
    texts = [field if isinstance(field, str) else "" for field in fields]
    return Answer(*(text.encode("utf-8", "replace").decode() for text in texts)), completion  # lone surrogates


def read_usage(completion: dict, audio_tokens: int) -> Usage | None:
    """The usage a completion states, or None; `audio_tokens` where it does not say how many of them were audio."""
    try:
        usage = completion["usage"]
        prompt, answer = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    try:
        audio = int(usage["prompt_tokens_details"]["audio_tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        audio = min(audio_tokens, prompt)
    if not (0 <= audio <= prompt <= _TOKENS_MAX and 0 <= answer <= _TOKENS_MAX):
        return None
    return Usage(prompt, audio, answer)


# What no retry and no other item can mend. 429 with an exhausted quota is the fourth.
_STOPS = {
    401: "401: the key in {env} is not accepted at {url}; set another one and start again",
    402: "402: the account behind {env} has no credit left at {url}; add some and start again",
    404: "404: no model {model} at {url}; correct model or base_url in the config and start again",
}
_QUOTA = {"insufficient_quota", "billing_hard_limit_reached"}
_TRANSIENT = {408, 409, 425, 429}


def _failure(error: Exception, endpoint: ml_collections.ConfigDict) -> _Failure:
    """What an exception of one request means for the next ones."""
    import openai

    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        place = {"env": endpoint.api_key_env, "url": endpoint.base_url, "model": endpoint.model}
        if status in _STOPS:
            return _Failure(_STOPS[status].format(**place), stop=True)
        if _QUOTA & {str(error.code), str(error.type)}:
            reason = "insufficient_quota: the account behind {env} is used up at {url}; add credit and start again"
            return _Failure(reason.format(**place), stop=True)
        said = error.body.get("message") if isinstance(error.body, dict) else error.body
        reason = f"HTTP {status}: {' '.join(str(said or 'no message').split())[:200]}"
        transient = status in _TRANSIENT or status >= 500
        wait = limits.retry_after(error.response.headers, time.time())
        return _Failure(reason, retry=transient, limited=status == 429, wait=wait)
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return _Failure("timeout: no answer in time", retry=True, billed=True)
    if isinstance(error, openai.APIConnectionError):
        cause = type(error.__cause__).__name__
        # 'ConnectError' of httpx: nobody was reached, so nobody charges.
        return _Failure(f"connection: lost ({cause})", retry=True, billed=not cause.startswith("Connect"))
    return _Failure(f"garbage: {error}", retry=True, billed=True, answered=True)


def redact(text: str, keys: Sequence[str]) -> str:
    """Blots out every word that shares four characters in a row with a key: providers echo masked keys."""
    pieces = {key[i : i + 4] for key in keys for i in range(len(key) - 3)}
    words = ("[redacted]" if any(piece in word for piece in pieces) else word for word in text.split())
    return " ".join(words)
