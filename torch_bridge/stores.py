"""One place at an origin, for blocking code and for async code: the calls of `ObjectStore`, retried, from any thread.

Nothing is opened before the first call, and each process opens its own: a store travels to DataLoader workers by fork
and by pickle.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import stamina

from node.origin.interface import ObjectInfo, ObjectStore, OnBytes
from node.origin.opening import open_store
from node.origin.settings import OriginSettings
from protocol.errors import OriginError
from torch_bridge.loop import loop_thread

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter, of what may pass: time-outs, broken bodies, 429 and 503. `total_s` caps all."""

    total_s: float = 60.0
    attempts: int | None = None
    """None: as many as fit into the time."""
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0

    def calling(self) -> stamina.AsyncRetryingCaller:
        """What runs a call under this policy."""
        return stamina.AsyncRetryingCaller(
            attempts=self.attempts,
            timeout=self.total_s,
            wait_initial=self.first_wait_s,
            wait_jitter=self.first_wait_s,
            wait_max=self.longest_wait_s,
        )


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed a little later."""
    return isinstance(error, OriginError) and (error.retryable or bool(error.details.get("broke_off")))


class Place:
    """A URL with how it is reached; opened in each process at the first call."""

    def __init__(self, url: str, settings: OriginSettings, retry: RetryPolicy) -> None:
        self.url = url.rstrip("/")
        self.settings = replace(settings, retry_total_s=0.0)  # one layer of retries: ours
        self.retry = retry
        self._opened: ObjectStore | None = None
        self._process = 0

    def store(self) -> ObjectStore:
        """This process's store, for use on its loop thread."""
        if self._opened is None or self._process != os.getpid():
            self._opened, self._process = open_store(self.url, self.settings), os.getpid()
        return self._opened

    async def call(self, work: Callable[[ObjectStore], Awaitable[T]]) -> T:
        """Run `work` on the store, again where it fails with what may pass. On the loop thread."""
        return await self.retry.calling()(may_pass, work, self.store())

    async def stream(self, key: str, start: int, end: int | None) -> AsyncIterator[bytes]:
        """Bytes as they come; one that breaks goes on at the byte where it broke, as long as bytes come between."""
        at = start
        while True:
            before = at
            try:
                async for chunk in self.store().get_stream(key, at, end):
                    at += len(chunk)
                    yield chunk
                return
            except OriginError as error:
                if not may_pass(error) or (at == before and not await self._comes(key, at, end)):
                    raise

    async def _comes(self, key: str, at: int, end: int | None) -> bool:
        """Wait, within the policy, until the object can be read at this byte again. Raises what prevents it."""
        if end is not None and at >= end:
            return False
        await self.call(lambda store: store.get_range(key, at, at + 1))
        return True

    async def close(self) -> None:
        if self._opened is not None and self._process == os.getpid():
            await self._opened.close()
        self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "settings": self.settings, "retry": self.retry}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _opened=None, _process=0)


class Store:
    """Objects under one URL, in blocking calls. All raise the OriginError tree, which names origin, key and status.

    Thread-safe. `aio` has the same calls for async code, usable from any event loop.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.aio = AsyncStore(place)

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
        return b"".join(self.stream(key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end), exactly as many."""
        return loop_thread().run(self._place.call(lambda store: store.get_range(key, start, end)))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges, close ones in one request."""
        return loop_thread().run(self._place.call(lambda store: store.get_ranges(key, ranges)))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes [start, end) as they come. A stream that breaks goes on where it broke."""
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
        """Write an object, whole or not at all. Raises OriginExistsError with `if_absent` where there is one."""
        return loop_thread().run(
            self._place.call(
                lambda store: store.put(key, body, if_absent=if_absent, metadata=metadata, on_bytes=on_bytes)
            )
        )

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the order of keys."""
        return loop_thread().run(self._place.call(lambda store: _listed(store, prefix)))

    def delete(self, key: str) -> None:
        """Delete an object; nothing happens where there is none."""
        loop_thread().run(self._place.call(lambda store: store.delete(key)))

    def close(self) -> None:
        """Let go of this process's connections; the next call opens them again."""
        loop_thread().run(self._place.close())


class AsyncStore:
    """As `Store`, for async code."""

    def __init__(self, place: Place) -> None:
        self._place = place

    async def head(self, key: str) -> ObjectInfo:
        return await self._there(lambda store: store.head(key))

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        return await self._there(lambda store: store.get_range(key, start, end))

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return await self._there(lambda store: store.get_ranges(key, ranges))

    async def put(
        self, key: str, body: bytes | Path, *, if_absent: bool = False, metadata: Mapping[str, str] | None = None
    ) -> ObjectInfo:
        return await self._there(lambda store: store.put(key, body, if_absent=if_absent, metadata=metadata))

    async def list(self, prefix: str = "") -> list[ObjectInfo]:
        return await self._there(lambda store: _listed(store, prefix))

    async def delete(self, key: str) -> None:
        await self._there(lambda store: store.delete(key))

    async def _there(self, work: Callable[[ObjectStore], Awaitable[T]]) -> T:
        return await asyncio.wrap_future(loop_thread().submit(self._place.call(work)))


async def _listed(store: ObjectStore, prefix: str) -> list[ObjectInfo]:
    return [item async for item in store.list(prefix)]
