"""StoreLocation: a URL with its settings, opened in each process at its first call there, and retried."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from node.origin.core.fork_guard import no_fork
from node.origin.core.ranges import read_joined
from node.origin.factory import open_store
from node.origin.interface import ObjectInfo, ObjectStore, OnBytes
from node.origin.settings import OriginSettings
from protocol.errors import OriginDeniedError, OriginError, OriginExistsError
from torch_bridge.core.loop_thread import loop_thread, never_collect
from torch_bridge.core.retry import RetryPolicy, may_pass

T = TypeVar("T")

COMPARED_BYTES = 16 << 20
"""Up to this size, what an earlier try wrote is read back and compared; larger objects are uploaded in parts, which
check by themselves."""
_NEEDED = {
    ("o3", "gateway"): "AKAVE_O3_",
    ("o3", "native"): "AKAVE_PRIVATE_",
    ("o3", "auto"): "AKAVE_",
    "akave": "AKAVE_PRIVATE_",
    "s3": "AWS_",
    "hf": "HF_",
}
SOON_BYTES = 1 << 20
"""A stream that broke after fewer bytes waits a little before it continues."""
EXIT_S = 2.0
"""For so long the interpreter's end waits for connections to be closed."""


def with_secrets(settings: OriginSettings, scheme: str) -> OriginSettings:
    """Settings with the credentials that a pickle does not hold, from this process's environment.

    Raises OriginDeniedError, naming the variables, if they are missing and the scheme may need them.
    """
    if not settings.credentials.withheld():
        return settings
    found = replace(settings, credentials=settings.credentials.read_again(os.environ))
    needed = _NEEDED.get((scheme, settings.o3_backend)) or _NEEDED.get(scheme)
    missing = [name for name in found.credentials.withheld() if needed and name.startswith(needed)]
    if missing:
        names = " and ".join(missing)
        raise OriginDeniedError(
            f"{scheme}://: credentials are not pickled, and this process (a spawned worker?) has none of its "
            f"own; set {names}, or the same with _FILE, in the environment before the workers are started"
        )
    return found


class StoreLocation:
    """One for all threads of a process. It may be forked and pickled; pickles hold no secrets."""

    def __init__(self, url: str, settings: OriginSettings, retry: RetryPolicy) -> None:
        self.url = url
        self.settings = replace(settings, retry_total_s=0.0)  # this layer retries
        self.retry = retry
        self._opened: ObjectStore | None = None
        self._collected: weakref.finalize[..., StoreLocation] | None = None

    def store(self) -> ObjectStore:
        """This process's store, for use on its loop thread."""
        if self._opened is None:
            with no_fork():
                if self._opened is None:
                    settings = with_secrets(self.settings, self.url.partition("://")[0])
                    self._opened = store = open_store(self.url, settings)
                    _locations.add(self)
                    _open.append(store)
                    self._collected = weakref.finalize(self, _close_later, store)
                    self._collected.atexit = False
        return self._opened

    def leave(self) -> ObjectStore | None:
        """Forget the store that is open, without closing it."""
        if self._collected is not None:
            self._collected.detach()
        opened, self._opened, self._collected = self._opened, None, None
        return opened

    async def call(self, work: Callable[[ObjectStore], Awaitable[T]]) -> T:
        """Run `work` on the store, and again after an error that may pass. On the loop thread."""
        return await self.retry.run(lambda _: work(self.store()))

    async def ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges, close ones in one request; each request is retried by itself."""
        if self.url.startswith("file:") or self.settings.encryption_key_file or self.store().range_unit_bytes > 1:
            return await self.call(lambda store: store.get_ranges(key, ranges))
        return await read_joined(ranges, lambda start, end: self.call(lambda store: store.get_range(key, start, end)))

    async def stream(self, key: str, start: int, end: int | None) -> AsyncGenerator[bytes, None]:
        """Bytes as they come. A stream that breaks continues at the byte where it broke; each byte that comes restarts
        the count of time and tries.
        """
        at = start
        while True:

            async def begin(_: int, at: int = at) -> tuple[AsyncGenerator[bytes, None], bytes]:
                steps = cast(AsyncGenerator[bytes, None], self.store().get_stream(key, at, end))
                try:
                    return steps, await anext(steps, b"")
                except BaseException:
                    await steps.aclose()
                    raise

            steps, chunk = await self.retry.run(begin)
            before = at
            async with aclosing(steps):
                try:
                    while chunk:
                        yield chunk
                        at += len(chunk)
                        chunk = await anext(steps, b"")
                    return
                except OriginError as error:
                    if not may_pass(error):
                        raise
            if at - before < SOON_BYTES:
                await asyncio.sleep(self.retry.first_wait_s)

    async def whole(self, key: str) -> bytes:
        """All of an object."""
        return b"".join([chunk async for chunk in self.stream(key, 0, None)])

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool,
        metadata: Mapping[str, str] | None,
        on_bytes: OnBytes | None,
    ) -> ObjectInfo:
        """Write an object. Bytes that are sent for the first time restart the count of time and tries. If the answer to
        a try is lost and an object with exactly these bytes is found, that try succeeded.
        """
        sent = _SentBytes(on_bytes)

        async def once(tries: int) -> ObjectInfo:
            store = self.store()
            try:
                return await store.put(
                    key, body, if_absent=if_absent, metadata=metadata, on_bytes=sent.of_another_try()
                )
            except OriginExistsError:
                if tries > 1 and await _holds(store, key, body):
                    return await store.head(key)
                raise

        return await self.retry.run(once, lambda: sent.most)

    async def listed(self, prefix: str) -> list[ObjectInfo]:
        """Every object whose key begins with `prefix`."""

        async def ask(store: ObjectStore) -> list[ObjectInfo]:
            return [item async for item in store.list(prefix)]

        return await self.call(ask)

    async def close(self) -> None:
        """Close this process's connections; the next call opens them again."""
        if (store := self.leave()) is not None:
            await _close(store)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "settings": self.settings, "retry": self.retry}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state, _opened=None, _collected=None)


_locations: weakref.WeakSet[StoreLocation] = weakref.WeakSet()
_open: list[ObjectStore] = []
"""Open stores of this process."""


async def _close(store: ObjectStore) -> None:
    if store in _open:
        _open.remove(store)
        await store.close()


def _close_later(store: ObjectStore) -> None:
    """Called when a location is garbage, on any thread. A store of another process is not in the list here."""
    if store in _open and not sys.is_finalizing():
        loop_thread().submit(_close(store))


def _after_fork() -> None:
    # The parent's stores must not be collected here: that would close the parent's connections.
    never_collect(_open[:])
    _open.clear()
    for location in list(_locations):
        location.leave()


def _at_exit() -> None:
    # Or aiohttp would warn of open connections in the last lines of every run.
    async def close() -> None:
        await asyncio.gather(*map(_close, list(_open)), return_exceptions=True)

    if _open:
        with suppress(TimeoutError):
            loop_thread().submit(close()).result(EXIT_S)


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


class _SentBytes:
    """Counts the bytes of one object that were sent: each once, however often it is sent."""

    def __init__(self, on_bytes: OnBytes | None) -> None:
        self.most = 0
        self._on_bytes = on_bytes

    def of_another_try(self) -> OnBytes:
        sent = 0

        def tell(count: int) -> None:
            nonlocal sent
            sent += count
            if sent > self.most:
                more, self.most = sent - self.most, sent
                if self._on_bytes is not None:
                    self._on_bytes(more)

        return tell


async def _holds(store: ObjectStore, key: str, body: bytes | Path) -> bool:
    """Whether an object has exactly these bytes."""
    size = len(body) if isinstance(body, bytes) else body.stat().st_size
    if size > COMPARED_BYTES or (await store.head(key)).size != size:
        return False
    steps: AsyncIterator[bytes] = store.get_stream(key, 0, size)
    return b"".join([data async for data in steps]) == (body if isinstance(body, bytes) else body.read_bytes())
