"""How far ahead of a reader that goes from front to back chunks are asked for. Nothing here reads anything."""

from __future__ import annotations

_NOTHING = range(0)
_FIRST_CHUNKS = 4
"""What the first continued read asks for; each further one twice as much, up to the bound."""


class Ahead:
    """Of one process. Threads that read different places of it make it a guess: a wrong one costs a request."""

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

        A batch was read from `began` to `ended`, each a key and a place in bytes. `busy`: what was asked for last is
        still on its way, and nothing more is.
        """
        going_on = began == self._ended_at or (self._object_ended and began[1] < self.chunk_bytes)
        self._ended_at, self._object_ended = ended, ended[1] >= size
        if not going_on:
            self._chunks, self._asked = 0, ("", 0)
            return _NOTHING
        key, place = ended
        at = -(-place // self.chunk_bytes)
        until = max(at, self._asked[1]) if self._asked[0] == key else at
        if busy or not self.most_chunks or until - at > self._chunks // 2:
            return _NOTHING
        self._chunks = min(max(_FIRST_CHUNKS, 2 * self._chunks), self.most_chunks)
        end = min(at + self._chunks, -(-size // self.chunk_bytes))
        self._asked = key, max(until, end)
        return range(until, end)
