"""What this room asks of the rooms below it, so that it can be tested without them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from node.swarm.torrent import PeerAddress, Piece, Torrent
from protocol.ids import ContentId, InfoHash, ManifestDigest, NodeId
from protocol.manifest import ShardEntry, SignedManifest


class Progress(Protocol):
    """How far a download is."""

    @property
    def bytes_done(self) -> int:
        """Checked bytes on disk."""

    @property
    def bytes_total(self) -> int: ...

    @property
    def rate_bytes_s(self) -> float: ...

    @property
    def peers(self) -> int: ...


class Download(Protocol):
    """One file on its way."""

    def progress(self) -> Progress: ...

    @property
    def piece_layer(self) -> bytes:
        """32 bytes a piece; empty while it is not known."""

    async def ready(self) -> None:
        """Wait until what is on disk was looked through."""

    def missing_pieces(self) -> Sequence[Piece]:
        """The pieces that are not here, in order."""

    async def available_pieces(self) -> frozenset[int]:
        """Those that some connected peer has."""

    async def take_layer(self, layer: bytes) -> None: ...

    async def add_piece(self, index: int, data: bytes) -> bool:
        """Whether it is kept; False also where the download was begun anew meanwhile."""

    def add_peers(self, peers: Iterable[PeerAddress]) -> None: ...

    async def verified(self) -> Path:
        """Wait until every byte is checked, flushed, and under its final name."""

    async def cancel(self, delete: bool = False) -> None:
        """Stop; what came stays as a `.part` file unless `delete`."""


class Swarm(Protocol):
    """Moves the bytes."""

    on_invalid: Callable[[Torrent, str], None] | None

    @property
    def port(self) -> int: ...

    async def seed(self, torrent: Torrent, path: Path, piece_layer: bytes) -> None: ...

    async def download(self, torrent: Torrent, path: Path, piece_layer: bytes = b"") -> Any:
        """A `Download`."""

    async def remove(self, info_hash: InfoHash) -> None: ...


class FoundProvider(Protocol):
    """A node that says that it has shards of a manifest."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def host(self) -> str: ...

    @property
    def rpc_port(self) -> int: ...

    @property
    def bt_port(self) -> int: ...

    @property
    def on_disk(self) -> frozenset[int]: ...

    @property
    def fetching(self) -> frozenset[int]: ...


class FoundName(Protocol):
    """A name in the cluster, and the manifest that it stands for."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """model, dataset or file."""

    @property
    def digest(self) -> ManifestDigest: ...


class FoundWant(Protocol):
    """A node that takes pieces of a shard from the origin at this moment."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def host(self) -> str: ...

    @property
    def bt_port(self) -> int: ...

    @property
    def block_pieces(self) -> int:
        """How many adjacent pieces it shares out together."""


class Discovery(Protocol):
    """Says who has what."""

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

    async def find_providers(self, digest: ManifestDigest) -> Sequence[FoundProvider]: ...

    async def find_name(self, name: str) -> Sequence[FoundName]: ...

    async def list_names(self) -> Sequence[FoundName]: ...

    async def announce_want(self, content_id: ContentId, bt_port: int, *, block_pieces: int, ttl_s: int) -> None:
        """Say that we take our part of this content, in such blocks, from the origin; refreshed until withdrawn."""

    async def withdraw_want(self, content_id: ContentId) -> None: ...

    async def find_wants(self, content_id: ContentId) -> Sequence[FoundWant]:
        """Who else does, ourselves not among them."""


class OriginPlace(Protocol):
    """One origin that may have the shards of a manifest. Raises OriginError and its children."""

    @property
    def url(self) -> str:
        """For messages; no credentials in it."""

    def key_of(self, entry: ShardEntry) -> str:
        """The object that is read for this shard, for messages."""

    async def range_unit_bytes(self) -> int:
        """What ranges are best multiples of: it gives nothing shorter, and nothing before all of it came."""

    async def piece_layer(self, entry: ShardEntry) -> bytes:
        """As the origin claims it, unchecked; empty where it has none."""

    def stream(self, entry: ShardEntry, start: int, end: int) -> AsyncIterator[bytes]:
        """The shard's bytes [start, end) as they come; what was given out before a failure counts."""


class Origin(Protocol):
    """Where shards come from when no peer has them."""

    def locations(self, signed: SignedManifest) -> Sequence[OriginPlace]:
        """The origins to ask for shards of this manifest, best first."""

    async def find_manifests(self, kind: str | None, name: str) -> Sequence[SignedManifest]:
        """What the name means at each of the node's own origins."""

    async def manifest_at(self, url: str) -> SignedManifest:
        """The manifest at a URL, checked."""


FetchManifest = Callable[[Any, ManifestDigest], Awaitable[SignedManifest]]
"""Asks a `FoundProvider` for a manifest and checks that it is the one with that digest."""
