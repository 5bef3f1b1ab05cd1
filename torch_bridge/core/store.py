"""The objects under one URL, for blocking and for async code: `ObjectStore`'s calls, retried, from any thread."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from node.origin.interface import ObjectInfo, ObjectStore, OnBytes
from torch_bridge.core.location import StoreLocation
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.retry import RetryPolicy

__all__ = ["AsyncStore", "RetryPolicy", "Store", "StoreLocation"]

T = TypeVar("T")


class Store:
    """Objects under one URL, in blocking calls. All raise the OriginError tree, which names origin, key and status.

    Thread-safe. Nothing is opened before the first call, and each process opens its own: DataLoader workers, forked or
    spawned, can use a store. `aio` has the same calls for async code, usable from any event loop.
    """

    def __init__(self, location: StoreLocation) -> None:
        self._location = location
        self.aio = AsyncStore(location)

    @property
    def location(self) -> StoreLocation:
        """Its URL, settings and retries, for code that reaches the same objects by other means."""
        return self._location

    @property
    def url(self) -> str:
        """Without credentials."""
        return self._location.url

    @property
    def backing(self) -> ObjectStore:
        """The store of `node.origin` itself, for coroutines that run on `loop_thread()`; not retried."""
        return self._location.store()

    def head(self, key: str) -> ObjectInfo:
        """Size and metadata. Raises OriginNotFoundError."""
        return loop_thread().run(self._location.call(lambda store: store.head(key)))

    def get(self, key: str) -> bytes:
        """All of an object, in memory."""
        return loop_thread().run(self._location.whole(key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end), exactly as many."""
        return loop_thread().run(self._location.call(lambda store: store.get_range(key, start, end)))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges, close ones in one request."""
        return loop_thread().run(self._location.ranges(key, ranges))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes [start, end) as they come. A stream that breaks continues where it broke, from the object that is there
        then: a reader of objects that others overwrite has to compare their content.
        """
        return loop_thread().iterate(self._location.stream(key, start, end))

    def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """Write an object completely or not at all. With `if_absent`, raises OriginExistsError if there is one.

        `on_bytes` is called on the loop's thread with counts of bytes that were sent, each byte once.
        """
        return loop_thread().run(
            self._location.put(key, body, if_absent=if_absent, metadata=metadata, on_bytes=on_bytes)
        )

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the order of keys. One warning names those whose key cannot
        be read.
        """
        return loop_thread().run(self._location.listed(prefix))

    def delete(self, key: str) -> None:
        """Delete an object; does nothing if there is none."""
        loop_thread().run(self._location.call(lambda store: store.delete(key)))

    def begin(self, work: Callable[[ObjectStore], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start several calls on the store as one, retried as a whole, without waiting for it: many at once."""
        return loop_thread().submit(self._location.call(work))

    def close(self) -> None:
        """Close this process's connections; the next call opens them again."""
        loop_thread().end(self._location.close())


class AsyncStore:
    """As `Store`, for async code: the same calls, awaited; `stream` is an async iterator."""

    def __init__(self, location: StoreLocation) -> None:
        self._location = location

    async def head(self, key: str) -> ObjectInfo:
        return await _on_loop(self._location.call(lambda store: store.head(key)))

    async def get(self, key: str) -> bytes:
        return await _on_loop(self._location.whole(key))

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        return await _on_loop(self._location.call(lambda store: store.get_range(key, start, end)))

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        return await _on_loop(self._location.ranges(key, ranges))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        return loop_thread().iterate_async(self._location.stream(key, start, end))

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        return await _on_loop(self._location.put(key, body, if_absent=if_absent, metadata=metadata, on_bytes=on_bytes))

    async def list(self, prefix: str = "") -> builtins.list[ObjectInfo]:
        return await _on_loop(self._location.listed(prefix))

    async def delete(self, key: str) -> None:
        await _on_loop(self._location.call(lambda store: store.delete(key)))


async def _on_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop's thread; cancelling this cancels it."""
    return await asyncio.wrap_future(loop_thread().submit(work))
