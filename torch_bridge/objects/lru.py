"""Which chunks leave a cache. Nothing here touches a disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

BLOCK_BYTES = 4096
"""File systems give whole blocks."""
SLACK = 20
"""Room for one part in so many is made beyond what is needed: the next few chunks then need no look at the folder."""


class Kept(NamedTuple):
    """A chunk's file."""

    used_ns: int
    """When it was last read, within the time between two touches."""
    cost: int
    name: str


def cost_of(file_bytes: int) -> int:
    """Bytes that a file takes on the disk."""
    return -(-file_bytes // BLOCK_BYTES) * BLOCK_BYTES


def evicted(kept: Iterable[Kept], pinned_bytes: int, need_bytes: int, limit_bytes: int) -> list[Kept] | None:
    """The chunks to delete, those longest unread first, so that `need_bytes` fit beside the others and what is pinned
    (being written); None where even all of them would not do, and none should go. None go where there is room.
    """
    files = sorted(kept)
    total = pinned_bytes + sum(one.cost for one in files)
    if total + need_bytes <= limit_bytes:
        return []
    if pinned_bytes + need_bytes > limit_bytes:
        return None
    goal = max(limit_bytes - limit_bytes // SLACK, pinned_bytes + need_bytes)
    going: list[Kept] = []
    for one in files:
        if total + need_bytes <= goal:
            break
        going.append(one)
        total -= one.cost
    return going
