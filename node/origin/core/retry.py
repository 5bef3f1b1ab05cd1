"""A store's own short retries: of what may pass, with growing waits and jitter, or as long as an origin asks for."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from node.origin.core.errors import with_tries
from protocol.errors import OriginError

T = TypeVar("T")

MAX_RETRY_AFTER_S = 20.0
"""An origin that asks for a longer wait is waited for this long."""
_BROKEN_TRIES = 3
"""A body that broke off may be whole the next time; one that always does is not asked for again and again."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryLoop:
    """How long and how often. No try begins later than `total_s` after the first."""

    total_s: float
    tries: int = 8
    first_wait_s: float = 0.2
    longest_wait_s: float = 8.0

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` gives; tried again where its OriginError is one that may pass, else raised with the tries in it.

        `call` is called anew each time.
        """
        started, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return await call()
            except OriginError as error:
                seconds = time.monotonic() - started
                wait = self._wait_s(error, tries)
                if wait is None or seconds + wait > self.total_s:
                    raise with_tries(error, tries, seconds) from None
                _log.info("%s; again in %.1f s", error.message, wait)
            await asyncio.sleep(wait)

    def _wait_s(self, error: OriginError, tries: int) -> float | None:
        """Before the next try; None where there is to be none."""
        most = _BROKEN_TRIES if error.details.get("broke_off") else self.tries if error.retryable else 0
        if tries >= most:
            return None
        asked = error.details.get("retry_after_s")
        if asked is not None:
            return min(float(asked), MAX_RETRY_AFTER_S) + random.uniform(0, self.first_wait_s)
        # Half of it at random: nodes that failed together do not come back together.
        return float(min(self.longest_wait_s, self.first_wait_s * 2 ** (tries - 1)) * random.uniform(0.5, 1.0))


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or an HTTP date (RFC 9110, 10.2.3); None for any other."""
    if header is None:
        return None
    text = header.strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        when = email.utils.parsedate_to_datetime(text)
        return max(0.0, when.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
