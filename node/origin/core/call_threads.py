"""Blocking calls in threads of their own: a bounded number at once, and none that is waited for at exit."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class StalledError(Exception):
    """Raised when a call did not return in time, or when no thread became free for it."""


class CallThreads:
    """At most `limit` calls at once, each in a daemon thread.

    A library's call may have no deadline, and a thread cannot be ended from outside: one that hangs counts until its
    call returns, so that a server that never answers costs `limit` threads and no more. The pools of asyncio and
    concurrent.futures are joined at exit, where such a thread would keep the process from ending.
    """

    def __init__(self, limit: int, name: str = "akavesdk") -> None:
        self._free = asyncio.Semaphore(limit)
        self._name = name

    @property
    def busy(self) -> bool:
        """Whether `limit` calls are going on."""
        return self._free.locked()

    async def run(
        self, call: Callable[[], T], *, timeout_s: float, moved: Callable[[], int] | None = None, queue: bool = False
    ) -> T:
        """The call's result, or what it raised. If this is cancelled, the call goes on, and its result is dropped.

        `queue`: wait for a free thread however long that takes. Raises StalledError after `timeout_s` seconds without a
        free thread, or after `timeout_s` seconds in which the call did not return and `moved()` did not change.
        """
        try:
            async with asyncio.timeout(None if queue else timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise StalledError(f"no thread became free for {timeout_s:.0f} s: all calls before this one hang") from None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        try:
            threading.Thread(target=self._work, args=(call, loop, future), name=self._name, daemon=True).start()
        except BaseException:
            self._free.release()
            raise
        before = moved() if moved else 0
        try:
            while True:
                done, _ = await asyncio.wait((future,), timeout=timeout_s)
                if done:
                    return future.result()
                now = moved() if moved else before
                if now == before:
                    raise StalledError(f"nothing came back for {timeout_s:.0f} s")
                before = now
        finally:
            future.cancel()  # a later result is dropped

    def _work(self, call: Callable[[], T], loop: asyncio.AbstractEventLoop, future: asyncio.Future[T]) -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = call()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._end, future, result, error)

    def _end(self, future: asyncio.Future[T], result: T, error: BaseException | None) -> None:
        self._free.release()
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
