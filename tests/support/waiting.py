"""How a test waits for a condition: by asking again, never by a pause that should be long enough."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

_LOOK_S = 0.02


async def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Ask until the answer is true; the condition may be a coroutine function. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            answer = condition()
            if await answer if asyncio.iscoroutine(answer) else answer:
                return
            await asyncio.sleep(_LOOK_S)


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """The same for code without an event loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(_LOOK_S)


class OwnPauses:
    """How long this process did not run: an event that it saw late by that much may have been in time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @classmethod
    @asynccontextmanager
    async def watched(cls) -> AsyncIterator[OwnPauses]:
        """Counts until the context ends."""
        pauses = cls()
        watching = asyncio.create_task(pauses._watch())
        try:
            yield pauses
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _watch(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.05)
            self.seconds += max(0.0, time.monotonic() - began - 0.07)
