"""Tasks that have an owner: a group that raises its first error, work beside requests, threads seen to their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

log = logging.getLogger(__name__)


class FirstErrorGroup(asyncio.TaskGroup):
    """A TaskGroup that raises the error that came first, as it is, and logs those that followed.

    asyncio's own wraps even a single error in an ExceptionGroup, and if a task fails while the block is on its way out
    with an error, which of the two came first is lost. Here the caller's `except NoSourceError` works.
    """

    def __init__(self) -> None:
        super().__init__()
        self._first_error: BaseException | None = None

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        task = super().create_task(coro, name=name, context=context)
        task.add_done_callback(self._note)
        return task

    def _note(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and self._first_error is None:
            self._first_error = task.exception()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, asyncio.CancelledError) and self._first_error is None:
            self._first_error = error
        try:
            await super().__aexit__(kind, error, trace)
        except BaseExceptionGroup as failed:
            first = self._first_error
            if first is None:
                raise
            for other in failed.exceptions:
                if other is not first:
                    log.warning("after %r, also failed: %r", first, other, exc_info=other)
        else:
            return
        try:
            raise first
        finally:
            del first, error  # or the error and this frame would keep each other alive


class Background:
    """Tasks that are cancelled when the context ends. One that fails is logged, and takes nothing else along."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._running: dict[asyncio.Task[None], str | None] = {}
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[Background]:
        """Cancels what still runs at the exit, and waits for its end."""
        async with FirstErrorGroup() as group:
            background = cls(group)
            try:
                yield background
            finally:
                background._closed = True
                for task in background._running:
                    task.cancel()

    @property
    def requests(self) -> int:
        """How many tasks go on for a request that was answered already."""
        return sum(request_id is not None for request_id in self._running.values())

    def start(self, work: Coroutine[Any, Any, None], *, name: str, request_id: str | None = None) -> None:
        """Run it in the background; nothing happens once the context has ended.

        `request_id` names the request that it goes on with, for `cancel`.
        """
        if self._closed:
            work.close()
            return
        task = self._group.create_task(_logged(work, name), name=name)
        self._running[task] = request_id
        task.add_done_callback(self._running.pop)
        task.add_done_callback(lambda _: work.close())  # if it was cancelled before it began

    def cancel(self, request_id: str) -> bool:
        """End what goes on for a request. False if there is nothing."""
        tasks = [task for task, owner in self._running.items() if owner == request_id]
        for task in tasks:
            task.cancel()
        return bool(tasks)


class BoundedGroup:
    """Tasks that are cancelled when the context ends, and whose end is then awaited for a bounded time only.

    For tasks that run others' code, which may not end when it is cancelled. One that fails is logged, and the others
    go on.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls, patience_s: float) -> AsyncIterator[BoundedGroup]:
        """At the exit, a task that still runs `patience_s` seconds after it was cancelled is left behind and logged."""
        group = cls()
        try:
            yield group
        finally:
            tasks = tuple(group._tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                _, stuck = await asyncio.wait(tasks, timeout=patience_s)
                for task in stuck:
                    log.warning("%s does not end when cancelled", task.get_name())

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run it beside everything else."""
        task = asyncio.create_task(_logged(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _logged(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except Exception:
        log.exception("%s failed", name)


async def to_the_end(call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Run a call in a thread, and wait for its end even if the caller is cancelled."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():  # nor does a second cancellation end the wait
            with suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        raise


async def to_the_end_then(call: Callable[[], R], then: Callable[[R], object]) -> R:
    """The same; what the call returned is handed to `then`, even if the caller is cancelled."""
    results: list[R] = []
    try:
        await to_the_end(lambda: results.append(call()))
    finally:
        for result in results:
            then(result)
    return results[0]
