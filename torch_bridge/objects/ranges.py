"""Which chunks a range of bytes needs, which come in one request, and which are asked for ahead. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_FIRST_CHUNKS = 4
"""What the first continued read asks for; each further one asks for twice as much, up to the bound."""


class ChunkSlice(NamedTuple):
    """Bytes [start, end) of one chunk, counted from the chunk's first byte."""

    chunk: int
    start: int
    end: int


def chunk_slices(start: int, end: int, chunk_bytes: int) -> list[ChunkSlice]:
    """The parts of chunks that make up bytes [start, end) of an object, in order."""
    found = []
    while start < end:
        chunk, offset = divmod(start, chunk_bytes)
        stop = min(chunk_bytes, offset + end - start)
        found.append(ChunkSlice(chunk, offset, stop))
        start += stop - offset
    return found


def runs(chunks: Iterable[int], most: int) -> list[tuple[int, int]]:
    """Half-open runs of adjacent chunks, in order, at most `most` chunks each: one request a run."""
    found: list[tuple[int, int]] = []
    for chunk in sorted(set(chunks)):
        if found and found[-1][1] == chunk and chunk - found[-1][0] < most:
            found[-1] = (found[-1][0], chunk + 1)
        else:
            found.append((chunk, chunk + 1))
    return found


class ReadAhead:
    """How far ahead of a reader that goes from front to back chunks are asked for. Of one process.

    Threads that read different objects make it a guess: a wrong one costs a request.
    """

    def __init__(self, most_chunks: int, chunk_bytes: int) -> None:
        """`most_chunks`: 0 never asks."""
        self.most_chunks = most_chunks
        self.chunk_bytes = chunk_bytes
        self._ended_at = ("", -1)
        self._object_ended = False
        self._chunks = 0
        self._asked = ("", 0)

    def after(self, began: tuple[str, int], ended: tuple[str, int], size: int, *, busy: bool) -> range:
        """Numbers of the chunks to fetch now, of the object of `ended`, which has `size` bytes.

        A batch was read from `began` to `ended`, each a key and an offset in bytes. `busy`: what was asked for last is
        still on its way, and nothing more is asked for.
        """
        is_continued = began == self._ended_at or (self._object_ended and began[1] < self.chunk_bytes)
        self._ended_at, self._object_ended = ended, ended[1] >= size
        if not is_continued:
            self._chunks, self._asked = 0, ("", 0)
            return range(0)
        key, offset = ended
        next_chunk = -(-offset // self.chunk_bytes)
        until = max(next_chunk, self._asked[1]) if self._asked[0] == key else next_chunk
        if busy or not self.most_chunks or until - next_chunk > self._chunks // 2:
            return range(0)
        self._chunks = min(max(_FIRST_CHUNKS, 2 * self._chunks), self.most_chunks)
        end = min(next_chunk + self._chunks, -(-size // self.chunk_bytes))
        self._asked = key, max(until, end)
        return range(until, end)
