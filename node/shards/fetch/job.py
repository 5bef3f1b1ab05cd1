"""A fetch as those who wait for it see it: shared, with progress, and ended when the last of them leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from protocol.commands.shards import ShardSource
from protocol.manifest import Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is."""

    phase: Literal["finding", "downloading", "verifying"]
    bytes_done: int
    bytes_total: int
    rate_bytes_s: float = 0.0
    peers: int = 0


@dataclass(frozen=True, slots=True)
class FetchedShard:
    """A shard that is here and checked."""

    path: Path
    source: ShardSource
    """Where most of the bytes came from; "local" where none moved."""
    seconds: float
    bytes_by_source: dict[str, int] = field(default_factory=dict)
    """Payload that moved; empty where none did."""


OnProgress = Callable[[FetchProgress], None]


class Fetch:
    """One shard on its way, for any number of callers."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.entry = entry = shard.entry
        self.progress = FetchProgress("finding", 0, entry.size)
        self.result: asyncio.Future[FetchedShard] = asyncio.get_running_loop().create_future()
        self.result.add_done_callback(_retrieved)
        self.abandon: Callable[[], object] = lambda: None
        """Called when nobody waits any more."""
        self._listeners: list[OnProgress | None] = []

    def tell(self, progress: FetchProgress) -> None:
        self.progress = progress
        for listener in self._listeners:
            if listener:
                _call(listener, progress)

    async def join(self, on_progress: OnProgress | None) -> FetchedShard:
        """Wait for the end. Cancelling one caller leaves the others theirs; the last one takes the fetch along."""
        self._listeners.append(on_progress)
        if on_progress:
            _call(on_progress, self.progress)
        try:
            return await asyncio.shield(self.result)
        finally:
            self._listeners.remove(on_progress)
            if not self._listeners and not self.result.done():
                self.abandon()

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


def _call(listener: OnProgress, progress: FetchProgress) -> None:
    try:
        listener(progress)
    except Exception:
        # Who listens may be gone; the bytes are wanted all the same.
        log.exception("a progress callback failed")


def _retrieved(result: asyncio.Future[FetchedShard]) -> None:
    if not result.cancelled():
        result.exception()
