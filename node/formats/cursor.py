"""A bounded forward reader for headers of untrusted files."""

from __future__ import annotations

import stat
import struct
from pathlib import Path
from typing import BinaryIO

from protocol.errors import InvalidShardError

_WINDOW_BYTES = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def regular_size(path: Path) -> int:
    """Bytes of a file. Raises InvalidShardError if it is not a regular one: opening a pipe would wait for ever."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise InvalidShardError(f"{path.name} is not a regular file")
    return found.st_size


class Cursor:
    """Reads forward through the first `limit` bytes of a file, and refuses to read beyond them.

    No memory is allocated for a length that the file announces: at most the bytes that the file has are read, in
    windows of 1 MiB. Little-endian, as GGUF is.
    """

    def __init__(self, file: BinaryIO, name: str, size: int, limit: int) -> None:
        self._file = file
        self._name = name
        self._size = size
        self._limit = min(size, limit)
        self._start = 0  # file offset of the window's first byte
        self._at = 0  # offset in the window
        self._window = b""

    @property
    def position(self) -> int:
        """File offset of the next byte."""
        return self._start + self._at

    @property
    def left(self) -> int:
        """Bytes between here and the end, or the bound on headers."""
        return self._limit - self.position

    def require(self, count: int, what: str) -> None:
        """Raise InvalidShardError unless `count` more bytes are there for `what`."""
        if count > self.left:
            end = "the file ends" if self._limit == self._size else "the largest header that is read ends"
            raise InvalidShardError(
                f"{self._name} is truncated or malformed: {what} at byte {self.position} needs {count} bytes, "
                f"{end} after {max(self.left, 0)}"
            )

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self._fill(count, what)
        piece = self._window[self._at : self._at + count]
        self._at += count
        return piece

    def skip(self, count: int, what: str) -> None:
        self.require(count, what)
        if self._at + count <= len(self._window):
            self._at += count
        else:
            self._start, self._at, self._window = self.position + count, 0, b""
            self._file.seek(self._start)

    def u32(self, what: str) -> int:
        self._fill(4, what)
        value: int = _U32.unpack_from(self._window, self._at)[0]
        self._at += 4
        return value

    def u64(self, what: str) -> int:
        self._fill(8, what)
        value: int = _U64.unpack_from(self._window, self._at)[0]
        self._at += 8
        return value

    def skip_strings(self, count: int, what: str) -> None:
        """Pass over `count` strings of a 64-bit length each: the loop that a vocabulary's size shows in."""
        unpack = _U64.unpack_from
        for _ in range(count):
            if self._at + 8 > len(self._window):
                self._fill(8, what)
            length = unpack(self._window, self._at)[0]
            after = self._at + 8 + length
            if after <= len(self._window):
                self._at = after
            else:
                self._at += 8
                self.skip(length, what)

    def _fill(self, count: int, what: str) -> None:
        if self._at + count <= len(self._window):
            return
        self.require(count, what)
        rest = self._window[self._at :]
        self._start, self._at = self.position, 0
        wanted = min(max(count, _WINDOW_BYTES), self._limit - self._start)
        self._window = rest + self._file.read(wanted - len(rest))
        if len(self._window) < count:
            raise InvalidShardError(f"{self._name} became shorter while it was read: try again when it is complete")
