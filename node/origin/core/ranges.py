"""Several ranges of an object in few requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from node.background import FirstErrorGroup

JOIN_BYTES = 1 << 20
"""Ranges at most this far apart share a request."""
MAX_JOINED_BYTES = 32 << 20
REQUESTS_AT_ONCE = 8


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans to request, in order: together they cover all ranges, and none is empty.

    Ranges less than JOIN_BYTES apart share a span, as long as it has at most MAX_JOINED_BYTES.
    """
    spans: list[tuple[int, int]] = []
    for start, end in sorted(one for one in ranges if one[0] < one[1]):
        if spans and start <= spans[-1][1] + JOIN_BYTES and max(end, spans[-1][1]) - spans[-1][0] <= MAX_JOINED_BYTES:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


async def read_joined(ranges: Sequence[tuple[int, int]], read: Callable[[int, int], Awaitable[bytes]]) -> list[bytes]:
    """The bytes of each range, in the order of `ranges`; `read(start, end)` is called for each span.

    At most REQUESTS_AT_ONCE calls go on at a time. Raises the first error of `read`; the other calls are cancelled.
    """
    spans, slots = joined(ranges), asyncio.Semaphore(REQUESTS_AT_ONCE)

    async def one(start: int, end: int) -> bytes:
        async with slots:
            return await read(start, end)

    async with FirstErrorGroup() as group:
        tasks = [group.create_task(one(*span)) for span in spans]
    found = [(span, task.result()) for span, task in zip(spans, tasks, strict=True)]

    def cut(start: int, end: int) -> bytes:
        for (first, stop), data in found:
            if first <= start < end <= stop:
                return data[start - first : end - first]
        return b""

    return [cut(start, end) for start, end in ranges]
