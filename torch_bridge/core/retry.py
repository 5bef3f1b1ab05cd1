"""RetryPolicy: the one layer of retries above the stores: what is tried again, after how long, how often."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import stamina

from node.origin.core import retry as origin_retry
from node.origin.core.errors import with_tries
from protocol.errors import InvalidParamsError, OriginError

T = TypeVar("T")

BROKEN_TRIES = 4
"""A body that broke off may be complete the next time; after so many tries it is given up."""
TOLD_S = 1.0
"""Waits of this length or more are logged as warnings."""
_log = logging.getLogger(__name__)


def _not_ours(record: logging.LogRecord) -> bool:
    """stamina warns of each retry without the error; ours are logged here, with it."""
    return not str(getattr(record, "stamina.caused_by", "")).startswith("Origin")


logging.getLogger("stamina").addFilter(_not_ours)


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter after errors that may pass: no answer, broken bodies, 408, 429 and 5xx.

    If a server asks for a wait (Retry-After), it is that long; a wait that would end after `total_s` is not begun.
    Raises InvalidParamsError for a value out of its range.
    """

    total_s: float = 60.0
    """No try begins later than this after the first; a try that has begun is not cut off."""
    attempts: int | None = None
    """None: as many as fit into `total_s`."""
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0

    def __post_init__(self) -> None:
        if not (
            self.total_s >= 0
            and 0 < self.first_wait_s <= self.longest_wait_s
            and (self.attempts is None or self.attempts >= 1)
        ):
            raise InvalidParamsError(
                f"{self}: total_s must be 0 or more, first_wait_s above 0 and at most longest_wait_s, attempts None or "
                "1 or more"
            )

    def wait_s(self, error: Exception, tries: int, elapsed_s: float) -> float | None:
        """Seconds to wait after try number `tries` failed, `elapsed_s` after the first began; None: give up.

        At random between half of the step and all of it, so that workers that failed together do not retry together.
        """
        if not may_pass(error) or tries == self.attempts:
            return None
        if tries >= BROKEN_TRIES and details(error).get("broke_off"):
            return None
        asked = details(error).get("retry_after_s")
        if isinstance(asked, int | float):
            wait = asked + random.uniform(0, self.first_wait_s)
        else:
            wait = origin_retry.backoff_s(tries, self.first_wait_s, self.longest_wait_s)
        return wait if elapsed_s + wait <= self.total_s else None

    async def run(self, call: Callable[[int], Awaitable[T]], moved: Callable[[], int] | None = None) -> T:
        """The result of `call`, which gets the number of the try, 1 for the first.

        If `moved()`, a count of bytes, grew in a try, the count of time and tries restarts. The last error says how
        often and how long it was tried, in its message and in `details["tried"]`.
        """
        started, tries, before = time.monotonic(), 0, moved() if moved else 0

        def wait(error: Exception) -> bool | float:
            nonlocal started, tries, before
            if moved and moved() > before:
                started, tries, before = time.monotonic(), 1, moved()
            seconds = time.monotonic() - started
            found = self.wait_s(error, tries, seconds)
            if found is None:
                if isinstance(error, OriginError):
                    with_tries(error, tries, seconds)
                return False
            _log.log(logging.WARNING if found >= TOLD_S else logging.INFO, "%s; again in %.1f s", error, found)
            return found

        # stamina's own bounds are off: it counts what was waited, not what would be.
        count = 0
        async for attempt in stamina.retry_context(wait, attempts=None, timeout=None):
            with attempt:
                tries, count = tries + 1, count + 1
                return await call(count)
        raise AssertionError("stamina continues until a try succeeds or its error is raised")


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed a little later."""
    return isinstance(error, OriginError) and origin_retry.may_pass(error)


def details(error: Exception) -> dict[str, object]:
    """The details of an OriginError; empty for another error."""
    return error.details if isinstance(error, OriginError) else {}
