"""What one reader measures of its downloads and its consuming; the size of its buffer follows from it."""

from __future__ import annotations

import time

from torch_bridge.shards.buffer import adapted_size, smoothed
from torch_bridge.shards.sources.interface import FetchedFile


class Measures:
    """Not for several threads at once."""

    def __init__(self, size: int, smallest: int, largest: int) -> None:
        self.size = size
        """Shards to keep ahead."""
        self.rate_bytes_s = 0.0
        self.waits_s = 0.0
        self.moved: dict[str, int] = {}
        """Payload bytes, by where they came from."""
        self._bounds = smallest, largest
        self._download_s = self._consume_s = 0.0
        self._last_consumed_at: float | None = None

    def came(self, found: FetchedFile) -> None:
        """A shard is here."""
        for source, moved in found.bytes_by_source.items():
            self.moved[source] = self.moved.get(source, 0) + moved
        if moved := sum(found.bytes_by_source.values()):
            self._download_s = smoothed(self._download_s, found.seconds)
            self.rate_bytes_s = smoothed(self.rate_bytes_s, moved / max(found.seconds, 1e-3))

    def consumed(self) -> None:
        """The reader is past a shard."""
        now = time.monotonic()
        if self._last_consumed_at is not None:
            self._consume_s = smoothed(self._consume_s, now - self._last_consumed_at)
            self.size = adapted_size(self.size, *self._bounds, self._download_s, self._consume_s)
        self._last_consumed_at = now

    def pause(self) -> None:
        """What comes now (an evaluation, a new epoch) is not the time that a shard takes."""
        self._last_consumed_at = None
