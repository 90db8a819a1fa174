"""How fast requests may leave: the provider's limits, and what a server asks for when it has had enough."""

import dataclasses
import email.utils
import math
import time
from collections.abc import Callable, Mapping

WINDOW = 60.0  # seconds over which providers count requests and tokens


@dataclasses.dataclass
class Slot:
    """One request that counts against the limits."""

    tokens: int
    until: float  # when it stops counting; infinity while the request is under way


class Limiter:
    """Never more than `rpm` requests and `tpm` tokens in any window of 60 s, wherever the server starts to count.

    A request reaches the server some time between leaving and being answered. So it counts from the moment it leaves
    until 60 s after its end, and its tokens are the most it can use. `take` and `done` are called in one thread.
    """

    def __init__(self, rpm: int, tpm: int, clock: Callable[[], float] = time.time):
        self.rpm, self.tpm = rpm, tpm
        self._clock = clock
        self._slots: list[Slot] = []
        self._held_until = 0.0

    def take(self, tokens: int) -> Slot | None:
        """A slot for one more request, or None when it has to wait."""
        now = self._clock()
        self._slots = [slot for slot in self._slots if slot.until >= now]
        used = sum(slot.tokens for slot in self._slots)
        if now < self._held_until or len(self._slots) >= self.rpm or used + tokens > self.tpm:
            return None
        self._slots.append(Slot(tokens, math.inf))
        return self._slots[-1]

    def done(self, slot: Slot, tokens: int) -> None:
        """The request of `slot` has ended and used `tokens`, as far as is known."""
        slot.tokens = max(slot.tokens, tokens)
        slot.until = self._clock() + WINDOW

    def hold(self, seconds: float) -> None:
        """Nothing leaves for so long: the server has said that it is too much."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    def occupy(self, tokens: int, until: float) -> None:
        """Counts a request of an earlier process."""
        self._slots.append(Slot(tokens, until))


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds a server asks to wait, from Retry-After as a number or a date; None when it does not say."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_tz(value)
            seconds = email.utils.mktime_tz(date) - now if date else math.nan
        except (ValueError, OverflowError):  # a date beyond all calendars
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
