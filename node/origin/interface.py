"""The ObjectStore protocol: bytes under keys, read in ranges.

A new back-end is one module or package with a class that has these methods, one case in `factory.open_store` and one
form of URL in `url`. Nothing else in the node knows which back-ends there are.
"""

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
    """Changes whenever the object does; not a hash that its bytes can be compared with."""
    modified_s: float | None = None
    """Seconds since 1970."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    root_cid: str | None = None
    """Akave's CID of what it stored, which appears some time after the upload. It is shown, and never used as a check:
    it is that of the encrypted and erasure-coded bytes."""
    network_state: str | None = None
    """Akave's `Network-State`: "done" once the object is on its network."""


MAX_LISTED = 100_000
"""The most objects that one listing looks at."""

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were sent since the call before."""


class ObjectStore(Protocol):
    """Objects under one URL. Every key is relative to it, and no key leads out of it. Byte ranges are [start, end).

    Every method raises OriginNotFoundError, OriginDeniedError, OriginUnavailableError (after the store's own short
    retries), OriginCorruptError, or OriginError for what a store cannot do. Each error names the origin, the key, the
    status and the number of tries, and none contains a credential. A key that cannot be one is InvalidParamsError.
    """

    url: str
    """The URL as it may be shown: it has no credentials in it."""
    min_object_bytes: int
    """The store refuses smaller objects (Akave: 127 bytes; 0: it takes any). The writer pads."""
    writes_once: bool
    """Whether a key that was written can never be written again."""
    range_unit_bytes: int
    """A range is fetched in whole units of this many bytes, counted from the object's first byte: 1, or 32,000,000 with
    Akave's SDK."""

    async def head(self, key: str) -> ObjectInfo:
        """Size and metadata of an object. Raises OriginNotFoundError."""

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end).

        Raises OriginCorruptError if fewer come, if the object is shorter, or if the server ignores the range.
        """

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of several ranges, in their order; ranges that are close share a request. Raises as `get_range`."""

    def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes [start, end) as they come, in parts of any size; `end` None: to the object's end.

        Bytes that were yielded before an error are good. Raises as `get_range`.
        """

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """Write an object, whole or not at all; `body` is its bytes or a file with them.

        A large object goes in parts, and a later call of the same content continues an upload that broke off. Raises
        OriginExistsError if `if_absent` is set and the object is there already.
        """

    def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in the order of keys, that the other methods take.

        One warning names the objects whose key they refuse; folder markers are left out without one (`core.listing`).
        Raises OriginError if it would have to look at more than MAX_LISTED objects.
        """

    async def delete(self, key: str) -> None:
        """Delete an object. Succeeds if there is none."""

    async def close(self) -> None:
        """Close the connections; the next call opens them again."""
