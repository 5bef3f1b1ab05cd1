"""Chunks of Akave files on their way: each in an unlinked temporary file, a few kept for the ranges that come next.

The SDK gives whole chunks of 32,000,000 bytes only. Ranges of a few MiB are asked for one after the other, so the
last chunks stay: else each range would fetch its chunk anew.
"""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable


class SpooledChunk(io.RawIOBase):
    """What the SDK writes a chunk to. Takes `limit` bytes and no more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._fd, name = tempfile.mkstemp(prefix="shoal-akave-")
        os.unlink(name)
        self._end = weakref.finalize(self, os.close, self._fd)  # when no reader has it any more
        self.limit = limit
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.size + len(data) > self.limit:
            raise ValueError(f"more than the {self.limit} bytes of the chunk came")
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self.size)
            self.size += written
            view = view[written:]
        return len(data)

    def bytes_at(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the chunk; shorter only where its end is."""
        return os.pread(self._fd, end - start, start)


class SpooledChunks:
    """The last chunks by file and index. One that is asked for twice at once is fetched once."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._chunks: OrderedDict[tuple[str, int], SpooledChunk] = OrderedDict()
        self._locks: weakref.WeakValueDictionary[tuple[str, int], asyncio.Lock] = weakref.WeakValueDictionary()

    async def get(self, name: str, index: int, fetch: Callable[[], Awaitable[SpooledChunk]]) -> SpooledChunk:
        place = (name, index)
        lock = self._locks.get(place)
        if lock is None:
            lock = self._locks[place] = asyncio.Lock()
        async with lock:
            spool = self._chunks.get(place)
            if spool is None:
                spool = self._chunks[place] = await fetch()
                while len(self._chunks) > self._kept:
                    self._chunks.popitem(last=False)
            else:
                self._chunks.move_to_end(place)
            return spool

    def forget(self, name: str | None = None) -> None:
        """The chunks of one file, or all."""
        for place in [place for place in self._chunks if name in (None, place[0])]:
            del self._chunks[place]
