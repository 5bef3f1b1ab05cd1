"""An origin over a local file, for the tests of the fetcher: it counts what it gives, and fails as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import OriginError, OriginNotFoundError, OriginUnavailableError
from protocol.manifest import ShardEntry, SignedManifest

CHUNK_BYTES = 32 * 1024


@dataclass
class FileOrigin:
    """One origin for any number of nodes; all of its streams share its rate."""

    path: Path
    layer: bytes = b""
    url: str = "o3://shards"
    rate_bytes_s: float = 0.0
    break_after: int | None = None
    """Every stream breaks after so many bytes."""
    wrong_at: int | None = None
    """The byte at this offset is another one."""
    error: OriginError | None = None
    """The error of every request."""
    gone: bool = False
    unit_bytes: int = 1
    """What `range_unit_bytes` says; shorter ranges are given all the same."""
    out_bytes: int = 0
    given: list[tuple[int, int]] = field(default_factory=list)
    """Ranges that were sent, end-exclusive."""
    streams: int = 0
    _free_at: float = 0.0

    def _check(self) -> None:
        if self.error:
            raise self.error
        if self.gone:
            raise OriginUnavailableError(
                f"{self.url} refuses connections", {"origin": self.url, "key": "k", "status": "", "tried": 1}
            )

    def key_of(self, entry: ShardEntry) -> str:
        return f"shards/{entry.content_id}"

    async def range_unit_bytes(self) -> int:
        return self.unit_bytes

    async def piece_layer(self, entry: ShardEntry) -> bytes:
        await asyncio.sleep(0.01)
        self._check()
        return self.layer

    async def stream(self, entry: ShardEntry, start: int, end: int) -> AsyncIterator[bytes]:
        self._check()
        self.streams += 1
        data = bytearray(self.path.read_bytes()[start:end])
        if self.wrong_at is not None and start <= self.wrong_at < end:
            data[self.wrong_at - start] ^= 1
        sent = 0
        while sent < len(data):
            self._check()
            if self.break_after is not None and sent >= self.break_after:
                raise OriginUnavailableError(
                    f"{self.url} broke off", {"origin": self.url, "key": "k", "status": "", "tried": 1}
                )
            chunk = bytes(data[sent : sent + CHUNK_BYTES])
            await self._turn(len(chunk))
            self.out_bytes += len(chunk)
            self.given.append((start + sent, start + sent + len(chunk)))
            sent += len(chunk)
            yield chunk

    async def _turn(self, size: int) -> None:
        if self.rate_bytes_s:
            loop = asyncio.get_running_loop()
            self._free_at = max(loop.time(), self._free_at) + size / self.rate_bytes_s
            await asyncio.sleep(self._free_at - loop.time())
        else:
            await asyncio.sleep(0)

    @property
    def twice_bytes(self) -> int:
        """Bytes that were sent more than once."""
        return sum(end - start for start, end in self.given) - len(
            set().union(*(range(start, end) for start, end in self.given)) if self.given else ()
        )


def not_found(url: str = "o3://shards") -> OriginError:
    return OriginNotFoundError(f"{url} has no such object", {"origin": url, "key": "k", "status": 404, "tried": 1})


class GivenOrigins:
    """`node.shards.interfaces.Origin` over given places."""

    def __init__(self, *places: FileOrigin) -> None:
        self._places = places

    def locations(self, signed: SignedManifest) -> Sequence[FileOrigin]:
        return self._places

    async def find_manifests(self, kind: str | None, name: str) -> Sequence[SignedManifest]:
        return ()

    async def manifest_at(self, url: str) -> SignedManifest:
        raise not_found(url)
