"""The loop that repeats a store's requests: those that may succeed later, with growing waits and jitter.

Nothing above a store repeats the same request; docs/architecture.md, "Retries", names the owner of every retry.
"""

from __future__ import annotations

import email.utils
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from node.clock import Clock
from node.origin.core.errors import with_tries
from protocol.errors import OriginError

T = TypeVar("T")

MAX_RETRY_AFTER_S = 20.0
"""The longest wait, whatever an origin asks for."""
_BROKEN_TRIES = 3
"""An answer that broke off may be whole the next time; one that always breaks off is not asked for again and again."""
_log = logging.getLogger(__name__)


def may_pass(error: OriginError) -> bool:
    """Whether the same request may succeed a little later."""
    if error.details.get("retried_by"):
        return False  # a library below repeated it already, and gave up
    return error.retryable or bool(error.details.get("broke_off"))


def backoff_s(tries: int, first_wait_s: float, longest_wait_s: float) -> float:
    """Seconds to wait after the try of this number, 1 for the first: twice as long each time, up to the longest.

    Between half of it and all of it, at random: nodes that failed together do not come back together.
    """
    return float(min(longest_wait_s, first_wait_s * 2 ** min(tries - 1, 62)) * random.uniform(0.5, 1.0))


@dataclass(frozen=True)
class RetryLoop:
    """How long and how often a request is repeated. No try begins later than `total_s` seconds after the first."""

    total_s: float
    """0: the request is sent once."""
    tries: int = 8
    first_wait_s: float = 0.2
    longest_wait_s: float = 8.0
    clock: Clock = field(default_factory=Clock)

    async def run(self, call: Callable[[], Awaitable[T]], repeats: Callable[[OriginError], bool] = may_pass) -> T:
        """The result of `call`, which is called once for each try.

        Raises the last OriginError, with the number of tries in it; at once if `repeats` says no to it.
        """
        started, tries = self.clock.now(), 0
        while True:
            tries += 1
            try:
                return await call()
            except OriginError as error:
                seconds = self.clock.now() - started
                wait_s = self._wait_s(error, tries) if repeats(error) else None
                if wait_s is None or seconds + wait_s > self.total_s:
                    raise with_tries(error, tries, seconds) from None
                _log.info("%s; trying again in %.1f s", error.message, wait_s)
            await self.clock.sleep(wait_s)

    def _wait_s(self, error: OriginError, tries: int) -> float | None:
        """Seconds before the next try; None: there is none."""
        if tries >= (_BROKEN_TRIES if error.details.get("broke_off") else self.tries):
            return None
        asked = error.details.get("retry_after_s")
        if isinstance(asked, int | float):
            return min(float(asked), MAX_RETRY_AFTER_S) + random.uniform(0, self.first_wait_s)
        return backoff_s(tries, self.first_wait_s, self.longest_wait_s)


def retry_after_s(header: str | None) -> float | None:
    """The seconds that a Retry-After header asks for: a number or an HTTP date (RFC 9110, 10.2.3); else None."""
    if header is None:
        return None
    text = header.strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
