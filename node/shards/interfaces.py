"""What this package asks of those below it, so that it can be tested without them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from node.discovery import NameInfo, ProviderInfo, WantInfo
from node.swarm.torrent import DownloadProgress, PeerAddress, Piece, Torrent
from protocol.ids import ContentId, InfoHash, ManifestDigest, NodeId
from protocol.manifest import ShardEntry, SignedManifest


class DownloadHandle(Protocol):
    """One file that is downloaded."""

    def progress(self) -> DownloadProgress: ...

    @property
    def piece_layer(self) -> bytes:
        """32 bytes a piece; empty while it is not known."""

    async def ready(self) -> None:
        """Wait until the part file was checked."""

    def missing_pieces(self) -> Sequence[Piece]:
        """The pieces that are not here, in order."""

    async def available_pieces(self) -> frozenset[int]:
        """Those that some connected peer has."""

    async def take_layer(self, layer: bytes) -> None: ...

    async def add_piece(self, index: int, data: bytes) -> bool:
        """Whether it is kept; False also if the download was restarted meanwhile."""

    def add_peers(self, peers: Iterable[PeerAddress]) -> None: ...

    async def verified(self) -> Path:
        """Wait until every byte is checked, flushed, and under its final name."""

    async def cancel(self, delete: bool = False) -> None:
        """Stop; what came stays as a part file unless `delete`."""


class TorrentClient(Protocol):
    """Seeds and downloads files."""

    @property
    def port(self) -> int: ...

    def on_invalid(self, listener: Callable[[Torrent, str], None]) -> AbstractContextManager[None]:
        """Call `listener` with a torrent whose file was found changed or unreadable, and why, until the block ends."""

    async def seed(self, torrent: Torrent, path: Path, piece_layer: bytes) -> None: ...

    async def download(self, torrent: Torrent, path: Path, piece_layer: bytes = b"") -> Any:
        """A `DownloadHandle`."""

    async def remove(self, info_hash: InfoHash) -> None: ...


class ProviderDirectory(Protocol):
    """Says which node has which shard, and what names mean."""

    @property
    def node_id(self) -> NodeId:
        """Our own."""

    async def announce_shards(
        self,
        signed: SignedManifest,
        on_disk: frozenset[int],
        loaded: frozenset[int],
        rpc_port: int,
        bt_port: int,
        *,
        fetching: frozenset[int] = frozenset(),
    ) -> None: ...

    async def withdraw_shards(self, digest: ManifestDigest) -> None: ...

    async def find_providers(self, digest: ManifestDigest) -> Sequence[ProviderInfo]: ...

    async def find_name(self, name: str) -> Sequence[NameInfo]: ...

    async def list_names(self) -> Sequence[NameInfo]: ...

    async def announce_want(self, content_id: ContentId, bt_port: int, *, block_pieces: int, ttl_s: int) -> None:
        """Say that we take our part of this content, in such blocks, from the origin; refreshed until withdrawn."""

    async def withdraw_want(self, content_id: ContentId) -> None: ...

    async def find_wants(self, content_id: ContentId) -> Sequence[WantInfo]:
        """The other nodes that do."""


class OriginReader(Protocol):
    """One origin that may have the shards of a manifest. Raises OriginError and its children."""

    @property
    def url(self) -> str:
        """For messages; no credentials in it."""

    def key_of(self, entry: ShardEntry) -> str:
        """The object that is read for this shard, for messages."""

    async def range_unit_bytes(self) -> int:
        """Ranges are best multiples of it: the origin reads units whole before it gives their first byte."""

    async def piece_layer(self, entry: ShardEntry) -> bytes:
        """As the origin claims it, unchecked; empty if it has none."""

    def stream(self, entry: ShardEntry, start: int, end: int) -> AsyncIterator[bytes]:
        """The shard's bytes [start, end) as they come; what was given out before a failure counts."""


class OriginCatalog(Protocol):
    """The origins of shards, and the manifests that they have."""

    def locations(self, signed: SignedManifest) -> Sequence[OriginReader]:
        """The origins to ask for shards of this manifest, best first."""

    async def find_manifests(self, kind: str | None, name: str) -> Sequence[SignedManifest]:
        """What the name means at each of the node's own origins."""

    async def manifest_at(self, url: str) -> SignedManifest:
        """The manifest at a URL, checked."""


FetchManifest = Callable[[ProviderInfo, ManifestDigest], Awaitable[SignedManifest]]
"""Asks a provider for a manifest and checks that it is the one with that digest."""
