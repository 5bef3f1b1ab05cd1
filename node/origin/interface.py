"""What the rest of the node may know of an object store: bytes under names, in ranges, with end-exclusive bounds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object, as its store describes it."""

    key: str
    """Relative to the store's URL."""
    size: int
    """Bytes."""
    etag: str | None = None
    """Changes with the object; no hash of its bytes that one could compare."""
    modified_s: float | None = None
    """Seconds since 1970."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    root_cid: str | None = None
    """Akave's CID of what it stored, which comes some time after the upload. Reported, never trusted as a check: it
    follows from the bytes after encryption and erasure coding."""
    network_state: str | None = None
    """Akave's `Network-State`: "done" once the object is on its network."""


MAX_LISTED = 100_000
"""Objects that one listing looks at."""

OnBytes = Callable[[int], None]
"""Told how many bytes more have gone."""


class ObjectStore(Protocol):
    """Objects under one URL. Every key is relative to it, and no key leads out of it.

    Every method raises OriginNotFoundError, OriginDeniedError, OriginUnavailableError (after the store's own short
    retries), OriginCorruptError, or OriginError for what a store cannot do; each names origin, key, status and what
    was tried, and none carries a credential.
    """

    url: str
    """As it may be shown: no credentials in it."""
    min_object_bytes: int
    """Smaller objects are refused (Akave: 127); 0 for none. Whoever writes pads."""
    writes_once: bool
    """Whether a name that was written can never be written again."""
    range_unit_bytes: int
    """A range costs whole units of this, counted from the object's first byte: 1, or 32,000,000 at Akave's SDK."""

    async def head(self, key: str) -> ObjectInfo:
        """What is known of an object."""

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end), exactly as many. OriginCorruptError where fewer come, or where a range is ignored."""

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges, close ones in one request."""

    def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Bytes [start, end) as they come, in pieces of any size. What was given out before a failure is good."""

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """Write an object, whole or not at all; a large file in parts, and again from where an earlier try stopped.

        With `if_absent` an object that is there is left alone, and OriginExistsError raised.
        """

    def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the order of keys. OriginError where it would have to look at
        more than MAX_LISTED.
        """

    async def delete(self, key: str) -> None:
        """Delete an object; nothing happens where there is none."""

    async def presign_get(self, key: str, expires_s: float) -> str:
        """A URL that reads the object without credentials. It never leaves the node. OriginError where there is none
        to be had.
        """

    async def close(self) -> None:
        """Let go of connections."""
