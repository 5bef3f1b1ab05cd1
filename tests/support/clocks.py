"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from node.clock import Clock

_PAUSE_S = 0.001
"""Of real time before each step: threads and sockets get on."""
_LONGEST_STEP_S = 0.25
_THREADS_WAIT_S = 0.5
"""Of real time: so long a step waits for the threads of the loop, which do not follow this clock."""


class _CountingExecutor(ThreadPoolExecutor):
    """Counts what it was given and has not ended."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.busy = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with self._lock:
            self.busy += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: Future[Any]) -> None:
        with self._lock:
            self.busy -= 1


class MovedClock(Clock):
    """Time passes only in `move` and `move_until`, from one moment at which something is due to the next."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._wall_offset = time.time() - self._now
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []
        self._timeouts: list[tuple[float, asyncio.Timeout]] = []
        self._threads: _CountingExecutor | None = None

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        """Unix time: that of the real clock when this one was made, and from then on as this one is moved."""
        return self._wall_offset + self._now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        sleeper = (self._now + seconds, asyncio.get_running_loop().create_future())
        self._sleepers.append(sleeper)
        try:
            await sleeper[1]
        finally:
            self._sleepers.remove(sleeper)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        timeout = asyncio.timeout(None)
        self._timeouts.append((self._now + seconds, timeout))
        return timeout

    def set(self, now: float) -> None:
        """Go to a moment, for code that only asks what time it is: who sleeps is not woken."""
        self._now = now

    async def move(self, seconds: float) -> None:
        """Let so much time pass; whatever is due meanwhile happens at its moment, in order."""
        end = self._now + seconds
        while self._now < end:
            await self._step(end)
        await asyncio.sleep(_PAUSE_S)

    async def move_until(self, condition: Callable[[], Any], within_s: float, real_s: float = 20.0) -> None:
        """Let time pass until the answer is true. It must be within `within_s` of this clock's time.

        `real_s` bounds how long the test itself may take.
        """
        end, real_end = self._now + within_s, time.monotonic() + real_s
        while not condition():
            assert time.monotonic() < real_end, f"not true after {real_s:g} s of real time"
            if self._now < end:
                await self._step(end)
            else:  # threads may still be at work for what is due by now
                for _ in range(200):
                    await asyncio.sleep(_PAUSE_S)
                    if condition():
                        return
                raise AssertionError(f"not true after {within_s:g} s of the clock")

    async def _step(self, end: float) -> None:
        """Go to the next moment at which something is due, at the latest to `end`."""
        await self._let_others_work()
        due = [when for when, _ in (*self._sleepers, *self._timeouts) if when > self._now]
        self._now = min([*due, end, self._now + _LONGEST_STEP_S])
        for when, sleeping in self._sleepers:
            if when <= self._now and not sleeping.done():
                sleeping.set_result(None)
        for when, timeout in self._timeouts:
            if when <= self._now:
                with suppress(RuntimeError):  # it has ended
                    timeout.reschedule(asyncio.get_running_loop().time())
        self._timeouts = [(when, timeout) for when, timeout in self._timeouts if when > self._now]

    async def _let_others_work(self) -> None:
        """Give tasks and sockets a moment, and threads the time that they need, within a bound."""
        if self._threads is None:
            self._threads = _CountingExecutor()
            asyncio.get_running_loop().set_default_executor(self._threads)
        await asyncio.sleep(_PAUSE_S)
        give_up_at = time.monotonic() + _THREADS_WAIT_S
        while self._threads.busy and time.monotonic() < give_up_at:
            await asyncio.sleep(_PAUSE_S)
            if not self._threads.busy:
                await asyncio.sleep(_PAUSE_S)  # what waited for the thread goes on, perhaps with the next


class LeapingClock(Clock):
    """A clock on which a sleep takes no real time: it moves the clock, and lets other tasks run."""

    def __init__(self) -> None:
        self.slept_s: list[float] = []
        """Every sleep, in order."""

    def now(self) -> float:
        return super().now() + sum(self.slept_s)

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        await super().sleep(0)
