"""One chunk on disk: a header of 32 bytes with length and CRC-32 (RFC 1952), then the object's bytes."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

_HEADER = struct.Struct("<8sQI12x")
_MAGIC = b"o3chunk1"
HEADER_BYTES = _HEADER.size


class OpenChunk:
    """A chunk that is open for reading; one that is evicted stays readable until it is collected."""

    __slots__ = ("fd", "touched_s")

    def __init__(self, fd: int, touched_s: float) -> None:
        self.fd = fd
        self.touched_s = touched_s

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the payload."""
        return os.pread(self.fd, end - start, HEADER_BYTES + start)

    def touch(self, now_s: float) -> None:
        """Note that it was used now."""
        self.touched_s = now_s
        os.utime(self.fd)

    @property
    def evicted(self) -> bool:
        return os.fstat(self.fd).st_nlink == 0

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


def write_chunk(fd: int, data: bytes) -> None:
    """Write header and payload completely. Raises OSError if the disk does not take them."""
    rest = memoryview(_HEADER.pack(_MAGIC, len(data), zlib.crc32(data)) + data)
    at = 0
    while at < len(rest):
        at += os.pwrite(fd, rest[at:], at)


def open_chunk(path: Path, length: int, *, check: bool) -> OpenChunk | None:
    """Open a chunk; None if the file is damaged: another length or header or, with `check`, other bytes.

    Raises FileNotFoundError if there is none.
    """
    chunk = OpenChunk(os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0.0)
    header = os.pread(chunk.fd, HEADER_BYTES, 0)
    if len(header) < HEADER_BYTES or os.fstat(chunk.fd).st_size != HEADER_BYTES + length:
        return None
    magic, written, crc = _HEADER.unpack(header)
    if magic != _MAGIC or written != length or (check and zlib.crc32(chunk.read(0, length)) != crc):
        return None
    return chunk
