"""What a StreamingDownloader says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StreamingStatus:
    """Of one reader, since its start."""

    ready: tuple[str, ...]
    """File names of shards that are here and that this reader is not past."""
    downloading: tuple[str, ...]
    failed: Mapping[str, str]
    """What the source last said of shards that did not come."""
    consumed: int
    """Shards that this reader is past, in this epoch."""
    deleted: int
    """By this reader; what was published on this machine's node counts, and stays there."""
    free_bytes: int
    buffer_size: int
    rate_bytes_s: float
    """Of the shards that moved, each measured from its asking to its being here."""
    waits_s: float
    """For how long `wait_for_shard` waited, in all."""
    bytes_by_source: Mapping[str, int] = field(default_factory=dict)
    """Payload that moved: from "peers", "origin"."""
