"""One place at an origin, for blocking code and for async code: `ObjectStore`'s calls, retried, from any thread."""

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

    Thread-safe. Nothing is opened before the first call, and each process opens its own: a store may be given to
    DataLoader workers, forked or spawned. `aio` has the same calls for async code, usable from any event loop.
    """

    def __init__(self, place: StoreLocation) -> None:
        self._place = place
        self.aio = AsyncStore(place)

    @property
    def place(self) -> StoreLocation:
        """Its settings and retries, for who reaches the same place by other means."""
        return self._place

    @property
    def url(self) -> str:
        """As it may be shown: no credentials in it."""
        return self._place.url

    @property
    def backing(self) -> ObjectStore:
        """The store of `node.origin` itself, for coroutines that run on `loop_thread()`; not retried."""
        return self._place.store()

    def head(self, key: str) -> ObjectInfo:
        """Size and metadata. Raises OriginNotFoundError."""
        return loop_thread().run(self._place.call(lambda store: store.head(key)))

    def get(self, key: str) -> bytes:
        """All of an object, in memory."""
        return loop_thread().run(self._place.whole(key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end), exactly as many."""
        return loop_thread().run(self._place.call(lambda store: store.get_range(key, start, end)))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges, close ones in one request."""
        return loop_thread().run(self._place.ranges(key, ranges))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes [start, end) as they come. A stream that breaks goes on where it broke, by the object that is there
        then: who reads what others write again compares its content.
        """
        return loop_thread().iterate(self._place.stream(key, start, end))

    def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """Write an object, whole or not at all. Raises OriginExistsError with `if_absent` where there is one.

        `on_bytes` is called on the loop's thread with bytes that have gone, each once.
        """
        return loop_thread().run(self._place.put(key, body, if_absent=if_absent, metadata=metadata, on_bytes=on_bytes))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the order of keys."""
        return loop_thread().run(self._place.listed(prefix))

    def delete(self, key: str) -> None:
        """Delete an object; nothing happens where there is none."""
        loop_thread().run(self._place.call(lambda store: store.delete(key)))

    def begin(self, work: Callable[[ObjectStore], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin something of several calls on the store, retried as a whole, without waiting for it: many at once."""
        return loop_thread().submit(self._place.call(work))

    def close(self) -> None:
        """Let go of this process's connections; the next call opens them again."""
        loop_thread().end(self._place.close())


class AsyncStore:
    """As `Store`, for async code: the same calls, awaited; `stream` is an async iterator."""

    def __init__(self, place: StoreLocation) -> None:
        self._place = place

    async def head(self, key: str) -> ObjectInfo:
        return await _there(self._place.call(lambda store: store.head(key)))

    async def get(self, key: str) -> bytes:
        return await _there(self._place.whole(key))

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        return await _there(self._place.call(lambda store: store.get_range(key, start, end)))

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> builtins.list[bytes]:
        return await _there(self._place.ranges(key, ranges))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        return loop_thread().iterate_async(self._place.stream(key, start, end))

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        return await _there(self._place.put(key, body, if_absent=if_absent, metadata=metadata, on_bytes=on_bytes))

    async def list(self, prefix: str = "") -> builtins.list[ObjectInfo]:
        return await _there(self._place.listed(prefix))

    async def delete(self, key: str) -> None:
        await _there(self._place.call(lambda store: store.delete(key)))


async def _there(work: Coroutine[Any, Any, T]) -> T:
    """Run it on the loop's thread; cancelling this cancels it."""
    return await asyncio.wrap_future(loop_thread().submit(work))
