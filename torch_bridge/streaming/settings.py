"""How a StreamingShardDataset orders its samples, and what it keeps on disk."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import InvalidParamsError
from torch_bridge.core.sizes import byte_count

WINDOWS_BYTES = 128_000_000
"""Of the samples that are mixed with each other, as shards hold them, where `Ordering.window` is not given."""
_MOST_WINDOW, _MOST_BLOCK = 8192, 1024


@dataclass(frozen=True)
class Ordering:
    """How the samples of an epoch are mixed and batched. Raises InvalidParamsError for a value out of its range."""

    shuffle: bool = True
    """Shards, and the samples of each window. False: by file name and row, lane after lane."""
    lanes: int = 8
    """Parts of the data set that take turns to give a batch. More of them hold more shards open at once."""
    block_rows: int | None = None
    """Samples, next to each other in a shard, that one lane takes; None: an eighth of the window, at most 1024."""
    window: int | None = None
    """Samples of one lane that are mixed with each other; None: 8192, or fewer if those of all lanes would take more
    than 128 MB of the shards. A window of each lane, and about one more, is decoded in the memory of each worker."""
    drop_last: bool = False
    """Leave out each lane's last batch if it is smaller than the others, and the epoch's last ones if they do not
    suffice for every rank."""

    def __post_init__(self) -> None:
        for name in ("lanes", "block_rows", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidParamsError(f"{name} must be at least 1, not {value}")

    def fitted(self, row_bytes: float) -> tuple[int, int]:
        """`block_rows` and `window` for samples of that mean size in the shards."""
        window = self.window or min(_MOST_WINDOW, max(1, int(WINDOWS_BYTES / self.lanes / max(row_bytes, 1))))
        return self.block_rows or min(_MOST_BLOCK, max(1, window // 8)), window


@dataclass(frozen=True)
class Buffering:
    """What is fetched ahead and what stays. Raises InvalidParamsError for a value out of its range."""

    buffer_size: int = 3
    """Shards on disk beyond those that are being read; it adapts to the time that a download takes."""
    max_buffer: int | None = None
    """Shards that it may grow to; None: 16, or `buffer_size` if that is more."""
    keep_behind: int = 0
    """Shards that stay on disk after they were read."""
    warn_free_bytes: int = 5_000_000_000
    """Free disk below which it warns, once."""
    stop_free_bytes: int = 1_000_000_000
    """Free disk below which no download begins."""
    disk_limit: int | str | None = None
    """Bytes, or "10gb", that all readers of the run on this machine may have in the shards' folder together; None: no
    limit. With one, a shard is deleted as soon as its last rows are decoded, and what is fetched ahead or kept behind
    gives way. The samples and their order do not depend on it."""
    shard_timeout_s: float | None = None
    """How long to wait for one shard; None: until its source gives up."""

    def __post_init__(self) -> None:
        if not 1 <= self.buffer_size <= self.largest_buffer:
            raise InvalidParamsError(f"buffer_size {self.buffer_size} must lie in [1, max_buffer {self.max_buffer}]")
        if min(self.keep_behind, self.warn_free_bytes, self.stop_free_bytes) < 0:
            raise InvalidParamsError(f"{self}: keep_behind, warn_free_bytes and stop_free_bytes must be 0 or more")
        if self.disk_limit is not None and byte_count(self.disk_limit) < 1:
            raise InvalidParamsError(f'disk_limit must be above 0, such as "10gb", not {self.disk_limit!r}')
        if self.shard_timeout_s is not None and self.shard_timeout_s <= 0:
            raise InvalidParamsError(f"shard_timeout_s must be above 0, or None, not {self.shard_timeout_s:g}")

    @property
    def largest_buffer(self) -> int:
        """Shards."""
        return max(16, self.buffer_size) if self.max_buffer is None else self.max_buffer
