"""An event loop in a thread of its own, one a process: how blocking code, as training scripts are, uses async stores."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")
_QUEUED_CHUNKS = 4
_END = object()


class LoopThread:
    """Made by `loop_thread`; ends with its process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="torch_bridge", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin a coroutine there. Cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine there; what interrupts the wait (Ctrl-C) cancels it. Not to be called on the loop."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """Go through an async iterator from this thread, a few items ahead; leaving early closes it."""
        queue: asyncio.Queue[Any] = asyncio.Queue(_QUEUED_CHUNKS)

        async def fill() -> None:
            try:
                async for item in items:
                    await queue.put((item, None))
                await queue.put((_END, None))
            except Exception as error:
                await queue.put((_END, error))
            finally:
                if close := getattr(items, "aclose", None):
                    await close()

        filling = self.submit(fill())
        try:
            while True:
                item, error = self.run(queue.get())
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield item
        finally:
            filling.cancel()
            with contextlib.suppress(CancelledError):
                filling.exception()  # wait until it has closed what it read from


_current: LoopThread | None = None
_making = threading.Lock()


def loop_thread() -> LoopThread:
    """This process's. A forked child has no threads of its parent, so it gets one of its own."""
    global _current
    if _current is None or _current.process != os.getpid():
        with _making:
            if _current is None or _current.process != os.getpid():
                _current = LoopThread()
    return _current


def _after_fork() -> None:
    # The lock may have been held by a thread that is not here.
    global _current, _making
    _current, _making = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
