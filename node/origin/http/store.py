"""https://: objects on any web server, read only; and http:// on this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from node.clock import Clock
from node.origin.core.errors import origin_error
from node.origin.http.ranges import HttpRangeReader
from node.origin.interface import ObjectInfo, OnBytes
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import OriginError


class ReadOnlyStore:
    """The methods of ObjectStore that a back-end without writes refuses."""

    url: str
    min_object_bytes = 0
    writes_once = False
    range_unit_bytes = 1

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """Raises OriginError."""
        raise self._cannot("write", key)

    async def delete(self, key: str) -> None:
        """Raises OriginError."""
        raise self._cannot("delete", key)

    def _cannot(self, did: str, key: str) -> OriginError:
        advice = "use an o3://, s3:// or file:// origin for that"
        return origin_error(OriginError, did, "this origin is read-only", advice, origin=self.url, key=key)


class HttpStore(ReadOnlyStore):
    """Objects under one URL, by HEAD and Range requests. It cannot list: HTTP has no such request."""

    def __init__(self, url: OriginUrl, settings: OriginSettings, clock: Clock | None = None) -> None:
        self.url = str(url)
        self._origin_url = url
        self._ranges = HttpRangeReader(self.url, settings, clock=clock)

    async def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        return await self._ranges.head(self._address(key), key)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """See ObjectStore."""
        return await self._ranges.read(self._address(key), key, start, end)

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ObjectStore."""
        return await self._ranges.read_many(self._address(key), key, ranges)

    def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See ObjectStore."""
        return self._ranges.stream(self._address(key), key, start, end)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """Raises OriginError."""
        raise self._cannot("list", prefix)
        yield

    async def close(self) -> None:
        """See ObjectStore."""
        await self._ranges.close()

    def _address(self, key: str) -> str:
        return f"{self._origin_url.scheme}://{self._origin_url.container}/{quote(self._origin_url.full_key(key))}"
