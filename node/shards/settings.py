"""What a person may choose about shards on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ShardsSettings:
    """Where shards lie, and how patient the room is. Times in seconds."""

    shards_dir: Path
    """Watched with all its folders; fetched shards land here and nowhere else."""
    data_dir: Path
    """Holds the index of what was hashed before."""
    min_free_disk: int = 0
    """Bytes that a download leaves free on the disk."""

    settle_s: float = 1.0
    """A file whose size and time did not change for so long counts as written."""
    incomplete_s: float = 5.0
    """A file that is not whole is called invalid after so long without a change; until then someone may be writing."""
    rescan_s: float = 30.0
    """The folder is looked at this often even where the system reported no change."""

    find_timeout_s: float = 30.0
    """How long a fetch looks for a first provider: an announcement may be on its way."""
    name_timeout_s: float = 3.0
    """How long a name that nobody knows is asked for again."""
    restart_s: float = 10.0
    """A download that gets no byte for so long is begun anew, with new connections."""
    stall_timeout_s: float = 60.0
    """A download that gets no byte for so long fails; what it has is kept for the next."""
    relookup_s: float = 3.0
    """Providers are looked up this often during a download: they come and go, downloaders that finished among them."""
    origin_after_s: float = 1.0
    """Where an origin has the shard, peers are looked for, or missed, for so long before it is asked."""
    slow_bytes_s: float = 64 * 1024
    """Bytes per second: the origin helps where peers give less than this for `slow_after_s`."""
    slow_after_s: float = 5.0
    max_downloads: int = 16
    """At a time; further fetches wait."""

    def __post_init__(self) -> None:
        times = (
            self.settle_s,
            self.incomplete_s,
            self.rescan_s,
            self.find_timeout_s,
            self.restart_s,
            self.stall_timeout_s,
            self.origin_after_s,
            self.slow_after_s,
        )
        if min(times) <= 0 or self.relookup_s <= 0 or self.name_timeout_s < 0:
            raise ValueError("the times of ShardsSettings must be above 0 s")
        if self.slow_bytes_s < 0:
            raise ValueError("slow_bytes_s is at least 0 bytes per second")
        if self.min_free_disk < 0 or self.max_downloads < 1:
            raise ValueError("min_free_disk is at least 0 bytes and max_downloads at least 1")
