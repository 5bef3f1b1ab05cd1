"""An object of a store as a file that is read: with seeks, over ranges, or forward alone."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from protocol.errors import CancelledRequestError
from torch_bridge.stores import Store

BLOCK_BYTES = 1 << 20
SMALL_BLOCK_BYTES = 64 << 10
"""For headers that lie far from each other."""
_BLOCKS = 8


class RangedFile(io.RawIOBase):
    """Reads blocks of an object and keeps the last few."""

    def __init__(self, store: Store, key: str, size: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._store, self._key, self._size, self._block = store, key, size, block_bytes
        self._at = 0
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        number, skip = divmod(self._at, self._block)
        if self._at >= self._size:
            return 0
        data = self._read_block(number)[skip : skip + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read_block(self, number: int) -> bytes:
        if number not in self._kept:
            start = number * self._block
            self._kept[number] = self._store.get_range(self._key, start, min(start + self._block, self._size))
            if len(self._kept) > _BLOCKS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]


class StreamedFile(io.RawIOBase):
    """Reads an object from its begin to its end, once."""

    def __init__(self, chunks: Iterator[bytes], name: str) -> None:
        self._chunks = chunks
        self._name = name
        self.stop: threading.Event | None = None
        """Set by others when nobody needs it any more: the next read raises CancelledRequestError."""
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.stop is not None and self.stop.is_set():
            raise CancelledRequestError(f"{self._name} is not needed any more")
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = bytes(chunk)
        data, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            close = getattr(self._chunks, "close", None)
            if close is not None:
                close()
        super().close()
