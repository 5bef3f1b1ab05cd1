"""ShardSource: where data shards come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from protocol.manifest import Manifest, ShardEntry

OnProgress = Callable[[int, int], None]
"""Bytes done, bytes in all."""


@dataclass(frozen=True)
class FetchedFile:
    """A shard on this machine's disk, checked against its content id."""

    path: Path
    source: str
    """Where most of it came from: "local", "peers" or "origin"."""
    seconds: float
    bytes_by_source: Mapping[str, int] = field(default_factory=dict)
    """Payload bytes that moved for it."""


@dataclass(frozen=True)
class DiskUse:
    """What a source has put into its folder, in bytes of the disk's blocks, as `du` counts them."""

    shards: Mapping[str, int] = field(default_factory=dict)
    """Complete shards, by file name, with what is noted of each."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """Downloads that are not complete, by the shard's file name, with the room reserved for them."""
    other_bytes: int = 0
    """Everything else in the folder: ledger, manifest, files that were set aside, files of others."""


class ShardSource(Protocol):
    """Brings shards of one data set to this machine's disk. Thread-safe; it can be pickled."""

    @property
    def folder(self) -> Path:
        """A folder of this machine that all processes on it share for this data set."""

    @property
    def ledger_folder(self) -> Path | None:
        """Where the readers of this machine say what they need; None if `discard` never deletes: nothing is written."""

    def manifest(self) -> Manifest:
        """The data set's shards. Raises UnknownNameError, OriginError, UnreachableError."""

    def fetch(
        self, entry: ShardEntry, *, stop: threading.Event | None = None, on_progress: OnProgress | None = None
    ) -> FetchedFile:
        """Fetch a shard, complete and checked; processes that ask for one shard share one download.

        It stays until `discard`, or until this process is gone. Raises ShoalError with its code (`retryable` says
        whether it may pass), CancelledRequestError if `stop` was set.
        """

    def distrust(self, entry: ShardEntry, why: str) -> bool:
        """Hash a file again that a reader could not read. A wrong one is set aside, and the next `fetch` brings a
        new one. Returns False for one with the published bytes, which stays.
        """

    def on_disk(self, entries: Sequence[ShardEntry]) -> list[ShardEntry]:
        """Those of them that are on this machine's disk, whoever fetched them. Raises as `manifest` does."""

    def cost_bytes(self, size_bytes: int) -> int:
        """What a shard of that size takes of a limit of the disk, from the start of its `fetch` until `discard`."""

    def disk_use(self) -> DiskUse | None:
        """What the folder holds now; None if shards are not put there, and count while a reader holds them."""

    def discard(self, entry: ShardEntry) -> bool:
        """Delete a shard from disk if it came by a source like this one, unless another process of this machine still
        holds it. What lay there before, or is to be kept, stays.

        Returns whether there is nothing left to delete.
        """

    def release(self, entry: ShardEntry) -> None:
        """This process is past the shard; another one of this machine reads it still, and discards it. Never raises."""

    def close(self) -> None:
        """Release what this process holds."""
