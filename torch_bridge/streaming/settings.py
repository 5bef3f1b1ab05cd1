"""How a StreamingShardDataset orders its samples, and what it keeps on disk and in memory."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import InvalidParamsError


@dataclass(frozen=True)
class Ordering:
    """How the samples of an epoch are mixed and batched. Raises InvalidParamsError for a value out of its range."""

    shuffle: bool = True
    """Shards, and the samples of each window. False: by file name and row, lane after lane."""
    lanes: int = 8
    """Parts of the data set that take turns to give a batch. More of them hold more shards open at once."""
    block_rows: int = 1024
    """Samples, next to each other in a shard, that one lane takes."""
    window: int = 8192
    """Samples of one lane that are mixed with each other."""
    drop_last: bool = False
    """Leave out each lane's last batch if it is smaller than the others, and the epoch's last ones if they do not
    suffice for every rank."""

    def __post_init__(self) -> None:
        for name in ("lanes", "block_rows", "window"):
            if getattr(self, name) < 1:
                raise InvalidParamsError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Buffering:
    """What is fetched ahead and what stays. Raises InvalidParamsError for a value out of its range."""

    buffer_size: int = 3
    """Shards on disk beyond those that are being read; it adapts to the time that a download takes."""
    max_buffer: int | None = None
    """Shards that it may grow to; None: 16, or `buffer_size` if that is more."""
    keep_behind: int = 0
    """Shards that stay on disk after they were read."""
    decoded_bytes: int = 256_000_000
    """Row groups that stay decoded in memory, in each worker."""
    warn_free_bytes: int = 5_000_000_000
    """Free disk below which it warns, once."""
    stop_free_bytes: int = 1_000_000_000
    """Free disk below which no download begins."""
    shard_timeout_s: float | None = None
    """How long to wait for one shard; None: until its source gives up."""

    def __post_init__(self) -> None:
        if not 1 <= self.buffer_size <= self.largest_buffer:
            raise InvalidParamsError(f"buffer_size {self.buffer_size} must lie in [1, max_buffer {self.max_buffer}]")
        if min(self.keep_behind, self.decoded_bytes, self.warn_free_bytes, self.stop_free_bytes) < 0:
            raise InvalidParamsError(
                f"{self}: keep_behind, decoded_bytes, warn_free_bytes and stop_free_bytes must be 0 or more"
            )
        if self.shard_timeout_s is not None and self.shard_timeout_s <= 0:
            raise InvalidParamsError(f"shard_timeout_s must be above 0, or None, not {self.shard_timeout_s:g}")

    @property
    def largest_buffer(self) -> int:
        """Shards."""
        return max(16, self.buffer_size) if self.max_buffer is None else self.max_buffer
