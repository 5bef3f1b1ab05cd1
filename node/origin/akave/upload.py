"""The file object that the akavesdk reads an upload from: it counts and hashes what it gives, and an error stays."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

from node.origin.akave.cid import CHUNK_BYTES, RootCid

_READ_BYTES = 1 << 20


class UploadReader(io.RawIOBase):
    """Gives exactly `size` bytes; after an error, every read fails.

    The SDK takes a reader that fails in the middle of a chunk for one at its end: it sends the begun chunk, reads on,
    and gives up only if that fails too. If the error did not stay, a file that was cut short would be committed under a
    name that is written once.
    """

    def __init__(self, source: BinaryIO, size: int, on_bytes: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self._source, self._size, self._on_bytes = source, size, on_bytes
        self._root = RootCid()
        self._reported = 0
        self._beats = 0
        self._asked = False
        self.failure: Exception | None = None

    @property
    def begun(self) -> bool:
        """Whether the SDK has read from it: then it has taken the name for this upload."""
        return self._asked

    def moved(self) -> int:
        """A number that changes as long as the upload makes progress."""
        return self._root.size + self._beats

    def beat(self) -> None:
        """Note that the upload still waits for its turn. Raises the reason of `stop`, if it was called."""
        self._beats += 1
        if self.failure is not None:
            raise self.failure

    def stop(self, reason: Exception) -> None:
        """Make the upload fail with `reason` at its next read."""
        self.failure = self.failure or reason

    def root_cid(self) -> str:
        """The root CID of the bytes that were read."""
        return self._root.text()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        self._asked = True
        if self.failure is not None:
            raise self.failure
        if self._root.size % CHUNK_BYTES == 0:  # the SDK reads a chunk, sends it, and reads on
            self.report_sent()
        view = memoryview(buffer)[: min(_READ_BYTES, self._size - self._root.size)]
        if not view:
            return 0
        try:
            data = self._source.read(len(view))
            if not data:
                raise OSError(
                    f"the file ends after {self._root.size} of {self._size} bytes: it was changed in the meantime"
                )
        except Exception as error:
            self.failure = error
            raise
        view[: len(data)] = data
        self._root.update(data)
        return len(data)

    def report_sent(self) -> None:
        """Report the bytes that were read and not yet reported."""
        more, self._reported = self._root.size - self._reported, self._root.size
        if more and self._on_bytes is not None:
            self._on_bytes(more)
