"""Which chunks a range of bytes needs, and which chunks come in one request. Nothing here reads anything."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from protocol.errors import InvalidParamsError

_UNITS = {"": 1, "b": 1} | {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


class Piece(NamedTuple):
    """Bytes [start, end) of one chunk, counted from the chunk's first byte."""

    chunk: int
    start: int
    end: int


def pieces(start: int, end: int, chunk_bytes: int) -> list[Piece]:
    """The parts of chunks that make up bytes [start, end) of an object, in order."""
    found = []
    while start < end:
        chunk, offset = divmod(start, chunk_bytes)
        stop = min(chunk_bytes, offset + end - start)
        found.append(Piece(chunk, offset, stop))
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


def size_of(text: str | int) -> int:
    """Bytes that "10gb" (10^10) or "10GiB" (10 * 2^30) means. InvalidParamsError for anything else."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise InvalidParamsError(f'{text!r} is no size: give bytes, or a text such as "10gb", "500MB" or "10GiB"')
    return int(float(found[1]) * _UNITS[found[2]])
