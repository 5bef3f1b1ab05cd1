"""An event loop in a thread of its own, one for each process: blocking code uses async stores through it.

A forked child gets one of its own, and never touches the one that it inherited: an asyncio transport that is collected
in the child would close the connection of its parent, over TLS with a message.

`may_wait` says whether a thread may wait for another one. What the garbage collector ends is ended on whatever thread
it runs, in the middle of whatever that thread does: it may hold locks that others need, and it may be the very thread
that is waited for.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import os
import selectors
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from node.origin.core.fork_guard import no_fork

T = TypeVar("T")
_QUEUED_ITEMS = 16
_END = object()


class LoopThread:
    """Made by `loop_thread`; ends with its process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self.selector)
        self._thread = ServingThread(self._loop.run_forever, "torch_bridge")
        self._ahead: set[_Prefetch] = set()
        """Iterators that were not ended. There may be no other reference to one that is abandoned."""
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine there. Cancelling the future cancels it. Raises RuntimeError in another process."""
        if self.process != os.getpid():
            work.close()
            raise RuntimeError("this belongs to the process that this one was forked from: open it again here")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; an interrupt of the wait (Ctrl-C) cancels it.

        Raises RuntimeError on the loop's own thread.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a blocking call on the loop's own thread would wait for itself: use the async calls")
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def end(self, work: Coroutine[Any, Any, object]) -> None:
        """As `run`; on the loop itself, and while the garbage collector runs, the coroutine is only started."""
        if is_collecting() or threading.current_thread() is self._thread:
            self.submit(work)
        else:
            self.run(work)

    def call_apart(self, call: Callable[[], object]) -> None:
        """Start a call on a thread of its own. Waits for nothing: safe while the garbage collector runs."""
        thread = functools.partial(threading.Thread, target=call, name="torch_bridge-apart", daemon=True)
        self._loop.call_soon_threadsafe(lambda: thread().start())

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """Iterate an async iterator from this thread, a few items ahead. Leaving early closes it (`end`)."""
        ahead = _Prefetch(items)
        self._ahead.add(ahead)
        try:
            self.run(ahead.begin())
            while items_here := self.run(ahead.next()):
                yield from items_here
        finally:
            if self._is_here():
                self.end(self._ended(ahead))

    async def _ended(self, ahead: _Prefetch) -> None:
        await ahead.end()
        self._ahead.discard(ahead)

    async def iterate_async(self, items: AsyncIterator[T]) -> AsyncIterator[T]:
        """The same for async code, on any event loop."""
        ahead = _Prefetch(items)
        await asyncio.wrap_future(self.submit(ahead.begin()))
        try:
            while items_here := await asyncio.wrap_future(self.submit(ahead.next())):
                for item in items_here:
                    yield item
        finally:
            if self._is_here():
                await asyncio.wrap_future(self.submit(ahead.end()))

    def _is_here(self) -> bool:
        """Whether the thread can run anything: not in a forked child, nor at the interpreter's end."""
        return self.process == os.getpid() and not sys.is_finalizing()


class _Prefetch:
    """An async iterator that runs a few items ahead of its consumer. All on one loop."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items
        self._queue: asyncio.Queue[Any] = asyncio.Queue(_QUEUED_ITEMS)
        self._over = False
        self._error: Exception | None = None
        self._filling: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        self._filling = asyncio.create_task(self._fill())  # noqa: TID251 - `end` cancels it and waits

    async def next(self) -> list[Any]:
        """All items that are there, at least one; none at the end. After them it raises what the iterator raised."""
        found: list[Any] = []
        while not found or not self._queue.empty():
            if self._over:
                if not found and self._error is not None:
                    raise self._error
                break
            item = await self._queue.get()
            if item is _END:
                self._over = True
            else:
                found.append(item)
        return found

    async def end(self) -> None:
        """Returns when the iterator is closed."""
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.wait([self._filling])

    async def _fill(self) -> None:
        try:
            try:
                async for item in self._items:
                    await self._queue.put(item)
            finally:
                close: Callable[[], Coroutine[Any, Any, None]] | None = getattr(self._items, "aclose", None)
                if close is not None:
                    await close()
        except Exception as error:
            self._error = error
        await self._queue.put(_END)


_current: LoopThread | None = None


def never_collect(thing: object) -> None:
    """Keep an object for good, past the interpreter's end too, when modules drop their globals."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def loop_thread() -> LoopThread:
    """The one of this process, started at the first call."""
    global _current
    if _current is None:
        with no_fork():  # two threads do not make two, and no child inherits a half-made one
            if _current is None:
                _current = LoopThread()
    return _current


def _after_fork() -> None:
    global _current
    if _current is None:
        return
    never_collect(_current)
    # The child shares its parent's epoll: an unregister here would act there. The descriptor now means another file,
    # so that every such call fails.
    nowhere = os.open(os.devnull, os.O_RDONLY)
    if isinstance(_current.selector, selectors.EpollSelector):
        os.dup2(nowhere, _current.selector.fileno(), inheritable=False)
    os.close(nowhere)
    _current = None


os.register_at_fork(after_in_child=_after_fork)


class ServingThread(threading.Thread):
    """A daemon thread that others wait for: what ends on it must not wait."""

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)


_collecting: set[int] = set()
"""Threads on which the garbage collector runs now."""


def is_collecting() -> bool:
    """Whether the garbage collector runs on this thread now."""
    return threading.get_ident() in _collecting


def may_wait() -> bool:
    """Whether this thread may wait for any other one."""
    return not is_collecting() and not isinstance(threading.current_thread(), ServingThread)


def _note(
    phase: str, _: object, here: Callable[[], int] = threading.get_ident, threads: set[int] = _collecting
) -> None:  # arguments, not globals: the interpreter's end removes a module's names, and still collects
    if phase == "start":
        threads.add(here())
    else:
        threads.discard(here())


gc.callbacks.append(_note)
os.register_at_fork(after_in_child=_collecting.clear)
