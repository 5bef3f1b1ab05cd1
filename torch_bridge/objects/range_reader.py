"""Ranges of objects through the cache: what is missing is fetched, by one process of the machine, many at once."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from node.origin.interface import ObjectStore
from protocol.errors import OriginCorruptError, OriginNotFoundError, ShoalError
from torch_bridge.core.store import Store
from torch_bridge.objects.chunk_cache import TOUCH_S, ChunkCache, ChunkClaim
from torch_bridge.objects.chunk_file import HEADER_BYTES
from torch_bridge.objects.listing import ListedObject
from torch_bridge.objects.ranges import ReadAhead, chunk_slices, runs

log = logging.getLogger(__name__)
WAITS = 20
"""After so many failures of other fetchers, or losses by the cache, a chunk is read without the cache."""


@dataclass
class Stats:
    """What one process read."""

    hits: int = 0
    """Pieces of chunks that the cache had."""
    misses: int = 0
    """Pieces that had to be fetched, or waited for."""
    origin_bytes: int = 0
    origin_requests: int = 0


class ObjectRange(NamedTuple):
    """Bytes [start, end) of an object."""

    item: ListedObject
    start: int
    end: int


class _Chunk(NamedTuple):
    item: ListedObject
    number: int
    length: int


class RangeReader:
    """Thread-safe; it may be forked and pickled."""

    def __init__(
        self,
        store: Store,
        cache: ChunkCache,
        *,
        chunk_bytes: int,
        request_bytes: int,
        concurrency: int,
        trusted_until_s: float,
        read_ahead_bytes: int = 0,
    ) -> None:
        """After `trusted_until_s`, seconds since 1970, the etag of each object is compared when bytes of it come.

        `read_ahead_bytes`: so much of an object that is read from front to back is fetched in the background; nothing
        if the cache holds less than four times that.
        """
        self.store = store
        self.cache = cache
        self.chunk_bytes = chunk_bytes
        self.chunks_at_once = max(1, request_bytes // chunk_bytes)
        self.concurrency = concurrency
        self.trusted_until_s = trusted_until_s
        self.counted = Stats()
        room = read_ahead_bytes * 4 <= cache.limit_bytes
        self._ahead = ReadAhead(read_ahead_bytes // chunk_bytes if room else 0, chunk_bytes)
        self._ahead_counted = Stats()
        self._ahead_thread: threading.Thread | None = None
        self._names: dict[str, str] = {}
        self._seen: set[str] = set()

    def read(self, wanted: Sequence[ObjectRange], decode: Callable[[bytes], Any] | None = None) -> list[Any]:
        """The bytes of each range, through `decode` if there is one.

        Raises OriginNotFoundError for an object that vanished since it was listed, OriginCorruptError for one that
        changed, else what the origin raises.
        """
        found: list[Any] = []
        gathered: list[tuple[int, list[bytes]]] = []
        missing: dict[str, _Chunk] = {}
        gaps: dict[str, list[tuple[list[bytes], int, int, int]]] = defaultdict(list)
        now, held, names, size = time.monotonic(), self.cache.held(), self._names, self.chunk_bytes
        for item, start, end in wanted:
            # Most ranges are in one chunk that is open already: a warm epoch takes this path.
            at, offset = divmod(start, size)
            ready = held.get((names.get(item.key), at))
            if ready is not None and start < end <= start - offset + size and now - ready.touched_s < TOUCH_S:
                data = os.pread(ready.fd, end - start, HEADER_BYTES + offset)
                if len(data) == end - start:
                    self.counted.hits += 1
                    # Decoded before the next is read: its bytes are still in the processor's cache.
                    found.append(data if decode is None else decode(data))
                    continue
            parts: list[bytes] = []
            gathered.append((len(found), parts))
            found.append(None)
            for index, first, stop in chunk_slices(start, end, self.chunk_bytes):
                name = self._name(item, index)
                length = min(self.chunk_bytes, item.size - index * self.chunk_bytes)
                chunk = None if name in missing else self.cache.opened(name, length)
                if chunk is not None and len(data := chunk.read(first, stop)) == stop - first:
                    self.counted.hits += 1
                    parts.append(data)
                    continue
                self.counted.misses += 1
                missing[name] = _Chunk(item, index, length)
                gaps[name].append((parts, len(parts), first, stop))
                parts.append(b"")

        def fill(name: str, data: bytes) -> None:
            for parts, at, first, stop in gaps.pop(name):
                parts[at] = data[first:stop]

        self._fetch_ahead(wanted)
        if missing:
            self._fill(missing, fill)
        for at, parts in gathered:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            found[at] = data if decode is None else decode(data)
        return found

    def stats(self) -> Stats:
        ahead = self._ahead_counted
        return replace(
            self.counted,
            origin_bytes=self.counted.origin_bytes + ahead.origin_bytes,
            origin_requests=self.counted.origin_requests + ahead.origin_requests,
        )

    def _fetch_ahead(self, wanted: Sequence[ObjectRange]) -> None:
        if not wanted or not self._ahead.most_chunks:
            return
        first, last = wanted[0], wanted[-1]
        busy = self._ahead_thread is not None and self._ahead_thread.is_alive()
        numbers = self._ahead.after((first.item.key, first.start), (last.item.key, last.end), last.item.size, busy=busy)
        item, chunks = last.item, {}
        for number in numbers:
            if not (self.cache.folder / (name := self._name(item, number))).exists():
                chunks[name] = _Chunk(item, number, min(self.chunk_bytes, item.size - number * self.chunk_bytes))
        if chunks:
            self._ahead_thread = threading.Thread(target=self._keep, args=(chunks,), name="read-ahead", daemon=True)
            self._ahead_thread.start()

    def _keep(self, chunks: Mapping[str, _Chunk]) -> None:
        """Fetch into the cache what no other process fetches. An error is raised later, to the reader of the chunk."""
        try:
            claims = self.cache.claim({name: chunk.length for name, chunk in chunks.items()})
            kept = [claim for claim in claims if claim.part is not None]
            self._fetch(kept, chunks, lambda _name, _data: None, self._ahead_counted)
        except (ShoalError, OSError) as error:
            log.debug("reading ahead ended: %s", error)

    def _name(self, item: ListedObject, index: int) -> str:
        """The name of a chunk's file, of the origin, the object, its version and the size of chunks."""
        if (known := self._names.get(item.key)) is None:
            identity = repr((self.store.url, item.key, item.etag, item.size, self.chunk_bytes)).encode()
            known = self._names[item.key] = hashlib.blake2b(identity, digest_size=16).hexdigest()
        return f"{known}-{index}"

    def _fill(self, missing: dict[str, _Chunk], fill: Callable[[str, bytes], None]) -> None:
        # Claimed chunks are fetched first; only then it waits for others: no process waits while it holds a claim.
        for turn in range(WAITS + 1):
            claims = self.cache.claim({name: chunk.length for name, chunk in missing.items()})
            if turn == WAITS:
                here = {claim.name for claim in claims}
                claims += [ChunkClaim(name, chunk.length, None) for name, chunk in missing.items() if name not in here]
            self._fetch(claims, missing, fill, self.counted)
            for claim in claims:
                del missing[claim.name]
            for name, chunk in list(missing.items()):
                self.cache.wait(name)
                kept = self.cache.opened(name, chunk.length)
                if kept is not None and len(data := kept.read(0, chunk.length)) == chunk.length:
                    fill(name, data)
                    del missing[name]
            if not missing:
                return

    def _fetch(
        self, claims: list[ChunkClaim], chunks: Mapping[str, _Chunk], fill: Callable[[str, bytes], None], counted: Stats
    ) -> None:
        by_object: dict[ListedObject, dict[int, ChunkClaim]] = defaultdict(dict)
        for claim in claims:
            by_object[chunks[claim.name].item][chunks[claim.name].number] = claim
        jobs = [
            (item, [here[index] for index in range(*run)], run[0] * self.chunk_bytes)
            for item, here in by_object.items()
            for run in runs(here, self.chunks_at_once)
        ]
        jobs.reverse()
        under_way: dict[Future[bytes], tuple[ListedObject, list[ChunkClaim]]] = {}
        try:
            while jobs or under_way:
                while jobs and len(under_way) < self.concurrency:
                    item, run_claims, start = jobs.pop()
                    end = start + sum(claim.length for claim in run_claims)
                    under_way[self.store.begin(self._asking(item, start, end))] = item, run_claims
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    item, run_claims = under_way.pop(future)
                    data = memoryview(self._result(future, item, counted))
                    at = 0
                    for claim in run_claims:
                        body = bytes(data[at : at + claim.length])
                        at += claim.length
                        self.cache.publish(claim, body)
                        fill(claim.name, body)
        finally:
            for future in under_way:
                future.cancel()
            for claim in claims:
                self.cache.abandon(claim)

    def _asking(self, item: ListedObject, start: int, end: int) -> Callable[[ObjectStore], Any]:
        look = time.time() >= self.trusted_until_s and item.key not in self._seen

        async def ask(store: ObjectStore) -> bytes:
            data = await store.get_range(item.key, start, end)
            if look:  # after the bytes: they are of the object that is there now, or of an earlier one
                info = await store.head(item.key)
                if (info.size, info.etag) != (item.size, item.etag):
                    raise OriginCorruptError(
                        f"{item.key} at {self.store.url} has changed since it was listed ({item.size} bytes, "
                        f"etag {item.etag}; now {info.size} bytes, etag {info.etag}): make the data set again"
                    )
                self._seen.add(item.key)
            return data

        return ask

    def _result(self, future: Future[bytes], item: ListedObject, counted: Stats) -> bytes:
        try:
            data = future.result()
        except OriginNotFoundError as error:
            raise OriginNotFoundError(
                f"{error.message}; it was there when {self.store.url} was listed: make the data set again, with "
                "listing_ttl_s=0 so that the origin is listed again",
                error.details,
            ) from None
        counted.origin_bytes += len(data)
        counted.origin_requests += 1
        return data

    def __getstate__(self) -> dict[str, Any]:
        fresh = ReadAhead(self._ahead.most_chunks, self.chunk_bytes)
        return self.__dict__ | {
            "counted": Stats(),
            "_ahead_counted": Stats(),
            "_ahead": fresh,
            "_ahead_thread": None,
            "_names": {},
        }
