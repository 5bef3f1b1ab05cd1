"""Bytes promised to downloads before they begin, so that together they never fill the disk."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from node.files import part_path, whole_part_path
from protocol.errors import InsufficientDiskError

SHOWN_PINNED = 3


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write to the file system of `folder`."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def allocated_bytes(path: Path) -> int:
    """Bytes that a file takes on the disk, holes left out; 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def nothing_pinned() -> Mapping[str, int]:
    return {}


class DiskSpace:
    """Counts what downloads in progress have still to write against what the disk has free."""

    def __init__(
        self,
        folder: Path,
        min_free: int,
        free: Callable[[Path], int] = free_bytes,
        pinned: Callable[[], Mapping[str, int]] = nothing_pinned,
    ) -> None:
        """`pinned` says for how many bytes of which models, data sets and files only a person makes room."""
        self._folder = folder
        self._min_free = min_free
        self._free = free
        self._pinned = pinned
        self._open: dict[Path, int] = {}
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def reserved(self, path: Path, size: int) -> AsyncIterator[None]:
        """Reserve `size` bytes for `path` and its part files, for the length of the block.

        What an earlier try left on the disk is not counted again. Raises InsufficientDiskError if the rest does not
        fit beside what other downloads were promised and what the node keeps free.
        """
        async with self._lock:
            free, needed, promised = await asyncio.to_thread(self._count, path, size, dict(self._open))
            if needed > 0 and free - promised - needed < self._min_free:
                raise InsufficientDiskError(
                    f"{path.name} needs {needed} bytes more on the disk of {self._folder}: "
                    f"{free} are free, {promised} of them promised to other downloads and {self._min_free} kept; "
                    f"evict shards, or lower --min-free-disk{self.advice()}",
                    {
                        "needed": needed,
                        "free": free,
                        "promised": promised,
                        "kept": self._min_free,
                        "pinned": sum(self._pinned().values()),
                    },
                )
            self._open[path] = size
        try:
            yield
        finally:
            del self._open[path]

    def advice(self) -> str:
        """How many bytes are pinned, in the largest of what, and what to type to free them; empty if none are."""
        pinned = Counter(self._pinned())
        if not pinned:
            return ""
        largest = pinned.most_common(SHOWN_PINNED)
        names = ", ".join(f"{name} ({size})" for name, size in largest)
        more = f" and {len(pinned) - len(largest)} more" if len(pinned) > len(largest) else ""
        return (
            f". {pinned.total()} bytes here are pinned, they stay until somebody evicts them: {names}{more}; "
            f"`shoal evict {largest[0][0]}` frees {largest[0][1]}"
        )

    def _count(self, path: Path, size: int, others: dict[Path, int]) -> tuple[int, int, int]:
        promised = sum(max(0, total - _written_bytes(other)) for other, total in others.items())
        return self._free(self._folder), max(0, size - _written_bytes(path)), promised


def _written_bytes(path: Path) -> int:
    return sum(map(allocated_bytes, (path, part_path(path), whole_part_path(path))))
