"""Downloaded chunks of Akave's files: each in an unlinked temporary file, the last few kept for the next ranges.

The SDK gives whole chunks of 32,000,000 bytes only. Readers ask for ranges of a few MiB, one after the other: without
the kept chunks each range would download its chunk again.
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
    """A file that the SDK writes a chunk to. Raises ValueError for more than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._fd, name = tempfile.mkstemp(prefix="shoal-akave-")
        os.unlink(name)
        self._end = weakref.finalize(self, os.close, self._fd)  # closed when no reader has this object any more
        self.limit = limit
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.size + len(data) > self.limit:
            raise ValueError(f"the chunk has {self.limit} bytes, and more came")
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self.size)
            self.size += written
            view = view[written:]
        return len(data)

    def bytes_at(self, start: int, end: int) -> bytes:
        """The bytes [start, end) of the chunk; fewer if it ends before."""
        return os.pread(self._fd, end - start, start)


class SpooledChunks:
    """The last `kept` chunks, by file and index. Readers that ask for one at the same time share one download."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._chunks: OrderedDict[tuple[str, int], SpooledChunk] = OrderedDict()
        self._locks: weakref.WeakValueDictionary[tuple[str, int], asyncio.Lock] = weakref.WeakValueDictionary()

    async def get(self, name: str, index: int, fetch: Callable[[], Awaitable[SpooledChunk]]) -> SpooledChunk:
        """The chunk of a file; `fetch` downloads it if it is not kept. Raises what `fetch` does."""
        which = (name, index)
        lock = self._locks.get(which)
        if lock is None:
            lock = self._locks[which] = asyncio.Lock()
        async with lock:
            spool = self._chunks.get(which)
            if spool is None:
                spool = self._chunks[which] = await fetch()
                while len(self._chunks) > self._kept:
                    self._chunks.popitem(last=False)
            else:
                self._chunks.move_to_end(which)
            return spool

    def forget(self, name: str | None = None) -> None:
        """Drop the chunks of one file, or all."""
        for which in [which for which in self._chunks if name in (None, which[0])]:
            del self._chunks[which]
