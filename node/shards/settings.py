"""What an operator may choose about shards on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POSITIVE_TIMES = (
    "settle_s",
    "incomplete_s",
    "rescan_s",
    "find_timeout_s",
    "restart_s",
    "stall_timeout_s",
    "relookup_s",
    "origin_after_s",
    "slow_after_s",
)


@dataclass(frozen=True, slots=True)
class ShardsSettings:
    """Where shards lie, and how long the node waits for what. Times in seconds."""

    shards_dir: Path
    """Watched with all its folders; fetched shards land here and nowhere else."""
    data_dir: Path
    """Has the hash cache."""
    min_free_disk: int = 0
    """Bytes that a download leaves free on the disk."""

    settle_s: float = 1.0
    """A file whose size and time did not change for so long counts as complete."""
    incomplete_s: float = 5.0
    """A file that is not whole is invalid after so long without a change; until then somebody may be writing it."""
    rescan_s: float = 30.0
    """The folder is scanned this often even if the system reported no change."""

    find_timeout_s: float = 30.0
    """How long a fetch looks for a first provider: an announcement may be on its way."""
    name_timeout_s: float = 3.0
    """How long an unknown name is looked up again."""
    restart_s: float = 10.0
    """A download that gets no byte for so long is restarted, with new connections."""
    stall_timeout_s: float = 60.0
    """A download that gets no byte for so long fails; what it has is kept for the next."""
    relookup_s: float = 3.0
    """Providers are looked up this often during a download: they come and go, downloaders that finished among them."""
    origin_after_s: float = 1.0
    """If an origin has the shard, peers are looked for, or missed, for so long before the origin is asked."""
    slow_bytes_s: float = 64 * 1024
    """Bytes per second: the origin helps if peers give less than this for `slow_after_s`."""
    slow_after_s: float = 5.0
    max_downloads: int = 16
    """At a time; further fetches wait."""

    def __post_init__(self) -> None:
        for name in POSITIVE_TIMES:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)} s: it must be above 0 s")
        for name, least in (("name_timeout_s", 0), ("slow_bytes_s", 0), ("min_free_disk", 0), ("max_downloads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
