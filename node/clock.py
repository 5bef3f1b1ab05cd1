"""The time that a package is given: what waits asks a `Clock`, so that a test can move time instead of waiting.

Whatever a test wants to hurry takes a `Clock` as an argument. Code that only decides takes `now`, in seconds of any
clock that does not go back.
"""

from __future__ import annotations

import asyncio


class Clock:
    """The clock of the running event loop. A test passes a subclass of it: `tests/support/clocks.py`."""

    def now(self) -> float:
        """Seconds; does not go back."""
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Wait for so long; with 0, let other tasks run."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        """A context that raises TimeoutError after `seconds`."""
        return asyncio.timeout(seconds)
