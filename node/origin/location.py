"""One origin as readers of shards see it: bytes of shards, whatever their names under its URL are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from node.origin.interface import ObjectStore
from node.origin.layout import layer_in_torrent, max_torrent_bytes, shard_key, torrent_key
from protocol.content import ContentHasher
from protocol.errors import OriginCorruptError, OriginError, OriginNotFoundError, ShoalError
from protocol.ids import ContentId
from protocol.manifest import ShardEntry

HASHED_BYTES = 1 << 20
"""So many bytes are hashed by one call in a thread."""


@dataclass
class Traffic:
    """What this node asked of all origins, and got, since its start."""

    downloaded_bytes: int = 0
    requests: int = 0
    """Calls of a store; the store's own retries are not counted."""
    errors: int = 0


class OriginLocation:
    """The shards under one URL.

    A shard is an object named by its content id, as `publish --origin` writes it, or an object named by its file name,
    as other tools upload it. The name that the last shard had is tried first. Every method raises OriginError or one of
    its children.
    """

    def __init__(
        self,
        url: str,
        open_store: Callable[[], ObjectStore],
        traffic: Traffic,
        guard: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`guard` is awaited before each use, and raises OriginError if this origin must not be used."""
        self.url = url
        self._open_store = open_store
        self._traffic = traffic
        self._guard = guard
        self._store: ObjectStore | None = None
        self._readers = 0
        self._retired = False
        self._by_filename = False
        """Whether the last shard was found under its file name."""

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[ObjectStore]:
        """The store, opened at the first use; it stays open for the length of the block."""
        self._readers += 1
        try:
            yield await self.store()
        finally:
            self._readers -= 1
            if self._retired and self.is_idle:
                await self.close()

    async def store(self) -> ObjectStore:
        """The store, for a location that is not retired."""
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
    def is_idle(self) -> bool:
        """Whether nothing is read from it at the moment."""
        return not self._readers

    def retire(self) -> None:
        """Close the store after the last read that goes on; the registry does not give this location out any more."""
        self._retired = True

    async def close(self) -> None:
        """Close the store's connections; the next use opens them again."""
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    async def range_unit_bytes(self) -> int:
        """ObjectStore.range_unit_bytes; sends no request."""
        async with self.in_use() as store:
            return store.range_unit_bytes

    def key_of(self, entry: ShardEntry) -> str:
        """The key that is tried first for this shard."""
        return entry.filename if self._by_filename else shard_key(entry.content_id)

    async def piece_layer(self, entry: ShardEntry) -> bytes:
        """The shard's piece layer as the origin has it, unchecked; empty if it has none."""
        try:
            torrent = await self.torrent(entry)
        except OriginNotFoundError:
            return b""
        return layer_in_torrent(torrent, entry.content_id)

    async def torrent(self, entry: ShardEntry) -> bytes:
        """The shard's torrent file, unchecked."""
        return await self.read(torrent_key(entry.content_id), max_torrent_bytes(entry.size))

    async def stream(self, entry: ShardEntry, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """The shard's bytes [start, end) as they come. Bytes that were yielded before an error are good."""
        keys = [shard_key(entry.content_id), entry.filename]
        missing: OriginNotFoundError | None = None
        for key in reversed(keys) if self._by_filename else keys:
            begun = False
            try:
                async with aclosing(self._exactly(key, start, end)) as chunks:
                    async for chunk in chunks:
                        begun, self._by_filename = True, key == entry.filename
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

    async def content_id(self, entry: ShardEntry, on_bytes: Callable[[int], None] = lambda _: None) -> ContentId:
        """The content id of the bytes that the origin has for a shard; all of them are read, and none is kept.

        `on_bytes` is called with the length of each part that was read.
        """
        hasher, pending = ContentHasher(entry.size), bytearray()
        async with aclosing(self.stream(entry, 0, entry.size)) as chunks:
            async for chunk in chunks:
                pending += chunk
                on_bytes(len(chunk))
                if len(pending) >= HASHED_BYTES:
                    await asyncio.to_thread(hasher.update, bytes(pending))
                    pending.clear()
        await asyncio.to_thread(hasher.update, bytes(pending))
        return hasher.result().content_id

    async def network_state(self, entry: ShardEntry) -> str:
        """What Akave's gateway says about an object on its network, for people to read; empty if it says nothing.

        It appears some time after the upload, and proves nothing: its CID is that of the encrypted and coded bytes.
        """
        try:
            async with self.in_use() as store:
                info = await store.head(shard_key(entry.content_id))
        except OriginError:
            return ""
        return ", ".join(filter(None, (info.root_cid and f"root CID {info.root_cid}", info.network_state)))

    async def read(self, key: str, max_bytes: int) -> bytes:
        """All bytes of a small object. Raises OriginCorruptError if it has more than `max_bytes`."""
        body = bytearray()
        async with aclosing(self._chunks(key, 0, None)) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > max_bytes:
                    raise OriginCorruptError(
                        f"{key} at origin {self.url} has more than {max_bytes} bytes, the most that an object of this "
                        "name may have: publish it again",
                        self.details(key),
                    )
        return bytes(body)

    def details(self, key: str) -> dict[str, object]:
        """The details of an error that is found here, and not by the store."""
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
