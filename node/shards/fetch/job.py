"""One run of a fetch for all who ask for the shard: progress, one result, and an end when the last of them leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.swarm.torrent import DownloadProgress
from protocol.commands.shards import ShardSource
from protocol.manifest import Shard

log = logging.getLogger(__name__)

OnProgress = Callable[[DownloadProgress], None]


@dataclass(frozen=True, slots=True)
class FetchedShard:
    """A shard that is here and checked."""

    path: Path
    source: ShardSource
    """Where most of the bytes came from; "local" if none moved."""
    seconds: float
    bytes_by_source: dict[str, int] = field(default_factory=dict)
    """Payload that moved; empty if none did."""


class FetchJob:
    """One shard's fetch, for any number of callers."""

    def __init__(self, shard: Shard, *, for_lease: bool = False) -> None:
        self.shard = shard
        self.for_lease = for_lease
        """Whether who asked first holds it by a lease."""
        self.progress = DownloadProgress(0, shard.entry.size, phase="finding")
        self._result: asyncio.Future[FetchedShard] = asyncio.get_running_loop().create_future()
        self._result.add_done_callback(_retrieve)
        self._listeners: list[OnProgress | None] = []
        """One for each caller that waits."""
        self._task: asyncio.Task[None] | None = None

    @property
    def is_abandoned(self) -> bool:
        """Whether it goes on and no caller waits for it."""
        return not self._listeners and not self._result.done()

    def start(self, tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, which calls `finish` or `fail`, in a task of the group."""
        self._task = tasks.create_task(work, name=f"fetch {self.shard.entry.filename}")

    def cancel(self) -> None:
        """End the work; who still waits gets the error that the work gives to `fail`."""
        if self._task:
            self._task.cancel()

    async def join(self, on_progress: OnProgress | None) -> FetchedShard:
        """Wait for the result, with `on_progress` called until then. A cancelled caller leaves the others theirs."""
        self._listeners.append(on_progress)
        if on_progress:
            _call(on_progress, self.progress)
        try:
            return await asyncio.shield(self._result)
        finally:
            self._listeners.remove(on_progress)

    def report(self, progress: DownloadProgress) -> None:
        """Tell all callers how far the fetch is."""
        self.progress = progress
        for listener in self._listeners:
            if listener:
                _call(listener, progress)

    def finish(self, fetched: FetchedShard) -> None:
        self._result.set_result(fetched)

    def fail(self, error: Exception) -> None:
        if not self._result.done():
            self._result.set_exception(error)


def _call(listener: OnProgress, progress: DownloadProgress) -> None:
    try:
        listener(progress)
    except Exception:
        # The connection of a caller may be gone; the others wait for the shard all the same.
        log.exception("a progress callback failed")


def _retrieve(result: asyncio.Future[FetchedShard]) -> None:
    if not result.cancelled():
        result.exception()
