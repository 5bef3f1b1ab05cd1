"""An object of a store as a file that is read, with seeks or only forward; and its download by ranges."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from protocol.errors import CancelledRequestError
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.store import Store

BLOCK_BYTES = 1 << 20
SMALL_BLOCK_BYTES = 64 << 10
"""For headers that are far from each other."""
_BLOCKS = 8
PIECE_BYTES = 8 << 20
PIECES_AT_ONCE = 4
"""Of one file."""
_LOOK_S = 0.2
"""Seconds between two checks whether a fetch is still wanted."""
OnBytes = Callable[[int], None]
Read = Callable[[int, int], Coroutine[Any, Any, bytes]]
"""Bytes [start, end) of an object, exactly as many, on the loop's thread."""


class RangeFile(io.RawIOBase):
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
    """Reads an object once, from its beginning to its end."""

    def __init__(self, chunks: Iterator[bytes], name: str) -> None:
        self._chunks = chunks
        self._name = name
        self.stop: threading.Event | None = None
        """If it is set, the next read raises CancelledRequestError."""
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


def fetch_pieces(what: str, size: int, target: Path, read: Read, stop: threading.Event, on_bytes: OnBytes) -> Path:
    """Download an object into `target` with .part behind its name, several ranges at once, after the bytes that it has.
    Returns that file. The caller has to check that all bytes are of one version of the object.

    Raises what `read` raises, CancelledRequestError if `stop` was set, OSError of the disk.
    """
    part = target.with_name(target.name + ".part")
    at = part.stat().st_size if part.exists() else 0
    if at > size:
        part.unlink()
        at = 0
    with part.open("ab") as out:
        for data in _pieces(what, at, size, read, stop):
            out.write(data)
            on_bytes(len(data))
    return part


def _pieces(what: str, at: int, size: int, read: Read, stop: threading.Event) -> Iterator[bytes]:
    loop = loop_thread()
    ahead: deque[Future[bytes]] = deque()
    try:
        while at < size or ahead:
            while at < size and len(ahead) < PIECES_AT_ONCE:
                end = min(at + PIECE_BYTES, size)
                ahead.append(loop.submit(read(at, end)))
                at = end
            yield _result(ahead[0], stop, what)
            ahead.popleft()
    finally:
        for one in ahead:
            one.cancel()


def _result(future: Future[bytes], stop: threading.Event, what: str) -> bytes:
    while True:
        if stop.is_set():
            raise CancelledRequestError(f"{what} is not needed any more")
        try:
            return future.result(_LOOK_S)
        except TimeoutError:
            if future.done():
                raise
