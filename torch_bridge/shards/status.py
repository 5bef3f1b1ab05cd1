"""What a StreamingDownloader measures and reports, and the size of its buffer, which follows from that."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch_bridge.shards.sources.interface import FetchedFile


@dataclass(frozen=True)
class StreamingStatus:
    """What one reader did since its start."""

    ready: tuple[str, ...]
    """File names of shards that are here and that this reader is not past."""
    downloading: tuple[str, ...]
    failed: Mapping[str, str]
    """The last error of each shard that did not come."""
    consumed: int
    """Shards that this reader is past, in this epoch."""
    deleted: int
    """By this reader; what somebody keeps (pinned at the node, in the folder before) counts, and stays there."""
    free_bytes: int
    buffer_size: int
    rate_bytes_s: float
    """Of the shards that moved, each measured from the request to its arrival."""
    waits_s: float
    """Seconds that `wait_for_shard` waited, in all."""
    bytes_by_source: Mapping[str, int] = field(default_factory=dict)
    """Payload that moved: from "peers", "origin"."""
    disk_limit: int | None = None
    """Bytes."""
    disk_bytes: int = 0
    """Under a limit: what all readers of the folder have on the disk, with the room of downloads on their way."""


class DownloadMeter:
    """Measures one reader's downloads and consuming. Not thread-safe."""

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
        """Count a shard that arrived."""
        for source, moved in found.bytes_by_source.items():
            self.moved[source] = self.moved.get(source, 0) + moved
        if moved := sum(found.bytes_by_source.values()):
            self._download_s = smoothed(self._download_s, found.seconds)
            self.rate_bytes_s = smoothed(self.rate_bytes_s, moved / max(found.seconds, 1e-3))

    def consumed(self) -> None:
        """Count a shard that the reader is past."""
        now = time.monotonic()
        if self._last_consumed_at is not None:
            self._consume_s = smoothed(self._consume_s, now - self._last_consumed_at)
            self.size = adapted_size(self.size, *self._bounds, self._download_s, self._consume_s)
        self._last_consumed_at = now

    def pause(self) -> None:
        """Leave the time until the next shard out (an evaluation, a new epoch)."""
        self._last_consumed_at = None


def adapted_size(now: int, smallest: int, largest: int, download_s: float, consume_s: float) -> int:
    """The next buffer size, in shards, one step from `now`.

    While one shard is consumed in `consume_s`, one is downloaded in `download_s`: to hide a download takes
    download_s / consume_s shards, and one more for variation. 0 s means not measured yet.
    """
    if download_s <= 0 or consume_s <= 0:
        return min(max(now, smallest), largest)
    wanted = math.ceil(min(download_s / consume_s, float(largest))) + 1
    step = (wanted > now) - (wanted < now)
    return min(max(now + step, smallest), largest)


def smoothed(before: float, measured: float, weight: float = 0.3) -> float:
    """A running mean that follows; the first measurement as it is."""
    return measured if before <= 0 else before + weight * (measured - before)
