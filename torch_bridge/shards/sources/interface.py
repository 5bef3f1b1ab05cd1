"""Where data shards come from, as the parts above see it: a node of this machine, or an origin without one."""

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
    """Payload that moved for it."""


class ShardSource(Protocol):
    """Brings shards of one data set to this machine's disk. Thread-safe; travels to other processes by pickle."""

    @property
    def folder(self) -> Path:
        """A folder of this machine that all processes on it share for this data set: locks, state of readers."""

    def manifest(self) -> Manifest:
        """The data set's shards. Raises UnknownNameError, OriginError, UnreachableError."""

    def fetch(
        self, entry: ShardEntry, *, stop: threading.Event | None = None, on_progress: OnProgress | None = None
    ) -> FetchedFile:
        """Have a shard here, whole and checked; processes that ask for one shard share one download.

        It stays until `discard`, or until this process is gone. Raises ShoalError with its code (`retryable` says
        whether it may pass), CancelledRequestError if `stop` was set.
        """

    def distrust(self, entry: ShardEntry, why: str) -> bool:
        """A reader could not read the file. It is hashed again; a wrong one is set aside, and the next `fetch` brings
        it anew. False: its bytes are those that were published, and it stays where it is.
        """

    def on_disk(self, entries: Sequence[ShardEntry]) -> list[ShardEntry]:
        """Those of them that lie on this machine's disk, whoever fetched them. Raises as `manifest` does."""

    def discard(self, entry: ShardEntry) -> bool:
        """Delete a shard from disk, unless somebody else on this machine still holds it, or it was never fetched.
        Whether nothing of that is left to do.
        """

    def release(self, entry: ShardEntry) -> None:
        """This process is past the shard; another one of this machine reads it still, and discards it. Never raises."""

    def close(self) -> None:
        """Let go of what this process holds."""
