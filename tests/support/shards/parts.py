"""Stand-ins for the swarm and for discovery that keep everything in memory, and tiny shard files."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from node.clock import Clock
from node.discovery.values import NameInfo, ProviderInfo, WantInfo
from node.shards.service import Shards
from node.shards.settings import ShardsSettings
from node.shards.store.hash_worker import Answer, Job, do
from node.shards.store.hasher import Hasher
from node.swarm.torrent import DownloadProgress, PeerAddress, Piece, Torrent
from protocol.content import hash_file
from protocol.errors import CancelledRequestError, UnreachableError
from protocol.ids import ContentId, NodeId
from protocol.manifest import Manifest, ModelInfo, ShardEntry, ShardKind, SignedManifest, sign_manifest
from protocol.signing import SigningKey

KEY = SigningKey(bytes(32))
OTHER_KEY = SigningKey(bytes(31) + b"\1")
QUICK: dict[str, Any] = {
    "settle_s": 0.06,
    "incomplete_s": 0.3,
    "rescan_s": 60.0,
    "find_timeout_s": 0.5,
    "name_timeout_s": 0.0,
    "relookup_s": 0.1,
    "restart_s": 2.0,
    "stall_timeout_s": 5.0,
}


class ThreadHasher(Hasher):
    """Does the hashing process's jobs in a thread of this one: a process takes long to start."""

    async def _ask(self, job: Job, progress: Callable[[int], None] | None) -> Answer:
        return await asyncio.to_thread(do, job, io.BytesIO())


class MemoryDownload:
    """Ends when the test says so."""

    def __init__(self, swarm: MemorySwarm, torrent: Torrent, path: Path) -> None:
        self.swarm = swarm
        self.torrent = torrent
        self.path = path
        self.peers: set[PeerAddress] = set()
        self.bytes_done = 0
        self.ended: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        self.part.write_bytes(b"")

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def progress(self) -> DownloadProgress:
        return DownloadProgress(self.bytes_done, self.torrent.size, 0.0, len(self.peers))

    def add_peers(self, peers: Any) -> None:
        self.peers |= set(peers)

    @property
    def piece_layer(self) -> bytes:
        return b""

    async def ready(self) -> None:
        pass

    def missing_pieces(self) -> list[Piece]:
        return [self.torrent.piece(index) for index in range(self.torrent.pieces)]

    async def available_pieces(self) -> frozenset[int]:
        return frozenset()

    async def take_layer(self, layer: bytes) -> None:
        raise AssertionError("no test gives it one")

    async def add_piece(self, index: int, data: bytes) -> bool:
        raise AssertionError("no test gives it one")

    async def verified(self) -> Path:
        return await asyncio.shield(self.ended)

    async def cancel(self, delete: bool = False) -> None:
        if not self.ended.done():
            self.ended.set_exception(CancelledRequestError("cancelled"))
            self.ended.exception()
        if delete and self.ended.exception():
            self.part.unlink()

    def finish(self, data: bytes) -> None:
        self.part.write_bytes(data)
        self.bytes_done = self.torrent.size
        self.part.replace(self.path)
        self.swarm.seeds[self.torrent.info_hash] = (self.torrent, self.path, b"")  # as the real one goes on
        self.ended.set_result(self.path)


class MemorySwarm:
    """Remembers what it was asked to seed and to download."""

    port = 7402

    def __init__(self) -> None:
        self.report_invalid: Callable[[Torrent, str], None] | None = None
        """Tells who listens that a seed was found changed."""
        self.seeds: dict[str, tuple[Torrent, Path, bytes]] = {}
        self.downloads: list[MemoryDownload] = []

    @contextmanager
    def on_invalid(self, listener: Callable[[Torrent, str], None]) -> Iterator[None]:
        self.report_invalid = listener
        yield
        self.report_invalid = None

    @property
    def seeded(self) -> set[str]:
        return {path.name for _, path, _ in self.seeds.values()}

    async def seed(self, torrent: Torrent, path: Path, piece_layer: bytes) -> None:
        assert hash_file(path)[:2] == (torrent.size, torrent.content_id), f"{path} is not what it is seeded as"
        self.seeds[torrent.info_hash] = (torrent, path, piece_layer)

    async def download(self, torrent: Torrent, path: Path, piece_layer: bytes = b"") -> MemoryDownload:
        assert torrent.info_hash not in self.seeds, f"{path.name} is seeded still: the real swarm says it is there"
        self.downloads.append(MemoryDownload(self, torrent, path))
        return self.downloads[-1]

    async def remove(self, info_hash: str) -> None:
        self.seeds.pop(info_hash, None)


@dataclass
class MemoryDiscovery:
    """A cluster as the test describes it, and what the node announced."""

    announced: dict[str, tuple[frozenset[int], frozenset[int]]] = field(default_factory=dict)
    announcements: int = 0
    fetching: dict[str, frozenset[int]] = field(default_factory=dict)
    """What was announced last as on its way, by digest."""
    fetchers: dict[str, frozenset[int]] = field(default_factory=dict)
    """Digest -> shards that another node, at port 7502, is fetching."""
    manifests: dict[str, SignedManifest] = field(default_factory=dict)
    """Of other nodes, by digest."""
    providers: dict[str, frozenset[int]] = field(default_factory=dict)
    """Digest -> shards that one other node has."""
    host: str = "127.0.0.1"
    node_id: NodeId = KEY.node_id
    wanted: set[ContentId] = field(default_factory=set)
    """Contents that this node wants from an origin now."""
    wants: list[WantInfo] = field(default_factory=list)
    """Other nodes' wants, of any content."""

    def publish(self, manifest: Manifest, on_disk: frozenset[int] | None = None) -> SignedManifest:
        signed = sign_manifest(manifest, OTHER_KEY)
        self.manifests[signed.digest] = signed
        self.providers[signed.digest] = (
            frozenset(entry.shard_id for entry in manifest.shards) if on_disk is None else on_disk
        )
        return signed

    async def announce_shards(
        self,
        signed: SignedManifest,
        on_disk: frozenset[int],
        loaded: frozenset[int],
        rpc_port: int,
        bt_port: int,
        *,
        fetching: frozenset[int] = frozenset(),
    ) -> None:
        self.announced[signed.digest] = (on_disk, loaded)
        self.fetching[signed.digest] = fetching
        self.announcements += 1

    async def withdraw_shards(self, digest: str) -> None:
        del self.announced[digest]

    async def find_providers(self, digest: str) -> list[ProviderInfo]:
        found = []
        if (fetching := self.fetchers.get(digest)) is not None:
            nothing: frozenset[int] = frozenset()
            found.append(ProviderInfo(OTHER_KEY.node_id, self.host, 7500, 7502, nothing, nothing, fetching))
        if (on_disk := self.providers.get(digest)) is not None:
            found.append(ProviderInfo(OTHER_KEY.node_id, self.host, 7400, 7402, on_disk, frozenset()))
        return found

    async def announce_want(self, content_id: ContentId, bt_port: int, *, block_pieces: int, ttl_s: int) -> None:
        self.wanted.add(content_id)

    async def withdraw_want(self, content_id: ContentId) -> None:
        self.wanted.discard(content_id)

    async def find_wants(self, content_id: ContentId) -> list[WantInfo]:
        return list(self.wants)

    async def find_name(self, name: str) -> list[NameInfo]:
        return [found for found in self._names() if found.name == name]

    async def list_names(self) -> list[NameInfo]:
        return [found for found in self._names() if found.kind != "file"]

    def _names(self) -> list[NameInfo]:
        return [
            NameInfo(signed.manifest.name, signed.manifest.kind, signed.digest, (signed.publisher,))
            for signed in self.manifests.values()
        ]

    async def fetch_manifest(self, provider: ProviderInfo, digest: str) -> SignedManifest:
        if digest not in self.manifests:
            raise UnreachableError("nobody there")
        return self.manifests[digest]


@dataclass(frozen=True)
class Room:
    shards: Shards
    swarm: MemorySwarm
    discovery: MemoryDiscovery
    folder: Path

    def states(self) -> dict[str, str]:
        return {info.filename: info.state for info in self.shards.files()}


@asynccontextmanager
async def open_room(
    root: Path,
    discovery: MemoryDiscovery | None = None,
    *,
    clock: Clock | None = None,
    new_hasher: Callable[[], Hasher] = ThreadHasher,
    **options: Any,
) -> AsyncIterator[Room]:
    swarm, discovery = MemorySwarm(), discovery or MemoryDiscovery()
    settings = ShardsSettings(shards_dir=root / "shards", data_dir=root / "data", **{**QUICK, **options})
    async with Shards.open(
        settings,
        swarm=swarm,
        discovery=discovery,
        fetch_manifest=discovery.fetch_manifest,
        key=KEY,
        rpc_port=7400,
        clock=clock,
        new_hasher=new_hasher,
    ) as shards:
        yield Room(shards, swarm, discovery, settings.shards_dir)


def write_shard(path: Path, rows: int = 100) -> Path:
    """A small whole file of the kind that its name says, its content depending on `rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gguf":
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("token_embd.weight", np.arange(rows * 8, dtype=np.float32).reshape(rows, 8))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"x": list(range(rows))}), path)
    else:
        path.write_bytes(bytes(rows % 256 for _ in range(rows)))
    return path


def manifest_of(folder: Path, *names: str, name: str = "tiny", kind: Any = "dataset") -> Manifest:
    """The manifest of files in a folder; nothing is written."""
    entries = []
    for shard_id, filename in enumerate(names):
        content = hash_file(folder / filename)
        suffix = Path(filename).suffix[1:]
        file_kind: ShardKind = suffix if suffix in ("gguf", "parquet") else "file"  # type: ignore[assignment]
        layers = {"start_layer": shard_id, "end_layer": shard_id + 1} if kind == "model" else {}
        entries.append(
            ShardEntry(
                shard_id=shard_id,
                filename=filename,
                size=content.size,
                content_id=content.content_id,
                kind=file_kind,
                **layers,
            )
        )
    model = ModelInfo(architecture="llama", n_layers=len(names), n_embd=8, context_length=64)
    return Manifest(name=name, kind=kind, shards=tuple(entries), model=model if kind == "model" else None)


def write_unsigned(folder: Path, manifest: Manifest) -> None:
    (folder / "manifest.json").write_bytes(msgspec.json.encode({"manifest": manifest}))


def age(folder: Path) -> None:
    """Make files look as if they had lain there for long, so that nobody waits for them to become quiet."""
    for path in folder.rglob("*.*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
