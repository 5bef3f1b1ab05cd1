"""What this room asks of the rooms below it, so that it can be tested without them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from node.swarm.torrent import PeerAddress, Torrent
from protocol.ids import InfoHash, ManifestDigest, NodeId
from protocol.manifest import SignedManifest


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

    async def download(self, torrent: Torrent, path: Path) -> Any:
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


class Discovery(Protocol):
    """Says who has what."""

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


FetchManifest = Callable[[Any, ManifestDigest], Awaitable[SignedManifest]]
"""Asks a `FoundProvider` for a manifest and checks that it is the one with that digest."""
