"""One origin as the shard loader sees it: bytes of shards, wherever under its URL they lie."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from node.origin.interface import ObjectStore
from node.origin.layout import layer_in_torrent, max_torrent_bytes, shard_key, torrent_key
from protocol.errors import OriginCorruptError, OriginError, OriginNotFoundError, ShoalError
from protocol.manifest import ShardEntry


@dataclass
class Traffic:
    """What came from origins since the start."""

    downloaded_bytes: int = 0
    requests: int = 0
    """Of this room to a store, whose own retries are not counted."""
    errors: int = 0


class Place:
    """Shards under one URL: as `publish --origin` lays them out, or as files of their names, as others put them there.

    Which of the two is asked first is what the last shard was found as. Raises OriginError and its children.
    """

    def __init__(
        self,
        url: str,
        open_store: Callable[[], ObjectStore],
        traffic: Traffic,
        guard: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`guard` is asked before each use, and raises where the place must not be used."""
        self.url = url
        self._open_store = open_store
        self._traffic = traffic
        self._guard = guard
        self._store: ObjectStore | None = None
        self._readers = 0
        self._retired = False
        self._plain = False
        """Whether the last shard was found under its file name."""

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[ObjectStore]:
        """The store behind it, opened at the first use, for what reads from it."""
        self._readers += 1
        try:
            yield await self.store()
        finally:
            self._readers -= 1
            if self._retired and self.idle:
                await self.close()

    async def store(self) -> ObjectStore:
        """The store behind it, for a place that is kept."""
        if self._guard:
            await self._guard()
        if self._store is None:
            try:
                self._store = self._open_store()
            except OriginError:
                raise
            except ShoalError as err:
                raise OriginError(f"origin {self.url} cannot be used: {err.message}", self.details("")) from None
        return self._store

    @property
    def idle(self) -> bool:
        """Whether nothing is being read."""
        return not self._readers

    def retire(self) -> None:
        """Nobody finds it any more: whoever still has it may read, and nothing stays open behind that."""
        self._retired = True

    async def close(self) -> None:
        """Let go of connections; the next use makes new ones."""
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    async def range_unit_bytes(self) -> int:
        """What ranges are best multiples of; nothing is sent for it."""
        async with self.in_use() as store:
            return store.range_unit_bytes

    def key_of(self, entry: ShardEntry) -> str:
        """The object that is asked first for this shard's bytes."""
        return entry.filename if self._plain else shard_key(entry.content_id)

    async def piece_layer(self, entry: ShardEntry) -> bytes:
        """The shard's piece layer as the origin claims it, unchecked; empty where there is none."""
        try:
            torrent = await self.torrent(entry)
        except OriginNotFoundError:
            return b""
        return layer_in_torrent(torrent, entry.content_id)

    async def torrent(self, entry: ShardEntry) -> bytes:
        """The shard's torrent file, as it lies there."""
        return await self.read(torrent_key(entry.content_id), max_torrent_bytes(entry.size))

    async def stream(self, entry: ShardEntry, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """The shard's bytes [start, end) as they come; what was given out before a failure counts."""
        keys = [shard_key(entry.content_id), entry.filename]
        missing: OriginNotFoundError | None = None
        for key in reversed(keys) if self._plain else keys:
            begun = False
            try:
                async with aclosing(self._exactly(key, start, end)) as chunks:
                    async for chunk in chunks:
                        begun, self._plain = True, key == entry.filename
                        yield chunk
            except OriginNotFoundError as err:
                if begun:
                    raise
                missing = err
            else:
                return
        assert missing is not None
        raise OriginNotFoundError(
            f"origin {self.url} has neither {keys[0]} nor {keys[1]}; publish the shard there with --origin, or take "
            "this origin out of the settings",
            missing.details | {"key": keys[0]},
        )

    async def read(self, key: str, max_bytes: int) -> bytes:
        """A small object whole. Raises OriginCorruptError where it has more bytes than it may."""
        body = bytearray()
        async with aclosing(self._chunks(key, 0, None)) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > max_bytes:
                    raise OriginCorruptError(
                        f"{key} at origin {self.url} has more than {max_bytes} bytes: it is not what its name says",
                        self.details(key),
                    )
        return bytes(body)

    def details(self, key: str) -> dict[str, object]:
        """Of an error that is found here rather than told by the store."""
        return {"origin": self.url, "key": key, "status": "", "tried": 1}

    async def _exactly(self, key: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        left = end - start
        if left <= 0:
            return
        async with aclosing(self._chunks(key, start, end)) as chunks:
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    break
                yield chunk
        if left:
            fault = f"{left} bytes too few" if left > 0 else "more than was asked for"
            raise OriginCorruptError(
                f"{key} at origin {self.url} gave {fault} of bytes {start} to {end}", self.details(key)
            )

    async def _chunks(self, key: str, start: int, end: int | None) -> AsyncGenerator[bytes, None]:
        """Bytes as the store gives them, counted."""
        self._traffic.requests += 1
        try:
            async with self.in_use() as store:
                chunks = store.get_stream(key, start, end)
                try:
                    async for chunk in chunks:
                        self._traffic.downloaded_bytes += len(chunk)
                        yield chunk
                finally:
                    if isinstance(chunks, AsyncGenerator):
                        await chunks.aclose()
        except OriginNotFoundError:
            raise
        except OriginError:
            self._traffic.errors += 1
            raise
