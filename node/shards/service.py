"""`Shards`: what the packages above ask of this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from node.background import FirstErrorGroup
from node.clock import Clock
from node.formats.hyperparameters import ModelSizes
from node.shards.eviction import Eviction
from node.shards.fetch.download import FetchNetwork, FetchStore
from node.shards.fetch.fetcher import Fetcher
from node.shards.fetch.folders import ManifestFolders
from node.shards.fetch.job import FetchedShard, OnProgress
from node.shards.interfaces import FetchManifest, OriginCatalog, ProviderDirectory, TorrentClient
from node.shards.leases import Leases, Term
from node.shards.pins import Pins
from node.shards.publish.publisher import Publisher
from node.shards.resolver import Kind, ManifestResolver
from node.shards.settings import ShardsSettings
from node.shards.store.announcer import Announcer
from node.shards.store.backfill import Backfill
from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.disk_space import DiskSpace
from node.shards.store.hash_cache import HashCache
from node.shards.store.hasher import FileChangedError, Hasher, Hashers
from node.shards.store.quarantine import Quarantine
from node.shards.store.scanner import Scanner
from node.shards.store.seeding import Seeding
from node.shards.store.verifier import Verifier
from protocol.commands.common import ShardSelector
from protocol.commands.nodes import DownloadStatus
from protocol.commands.shards import FileInfo, FileState
from protocol.errors import InsufficientDiskError, InvalidShardError, ShardNotFoundError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import Shard, ShardRef, SignedManifest
from protocol.signing import SigningKey

HASH_CACHE_FILENAME = "index.sqlite"
ANNOUNCE_TIMEOUT_S = 3.0
"""A DHT whose nodes are gone must not delay the answer to a client that had a shard loaded."""


class CanIdle(Protocol):
    """A part of this package that may have nothing left to do."""

    @property
    def is_idle(self) -> bool: ...

    async def wait_idle(self) -> None:
        """Wait for a moment at which it has nothing to do."""


@dataclass(frozen=True)
class ShardsNetwork:
    """What the shards of a node need of the packages below, and the port that it announces."""

    torrents: TorrentClient
    directory: ProviderDirectory
    fetch_manifest: FetchManifest
    origins: OriginCatalog | None
    rpc_port: int


class Shards:
    """The shards of this node. Opened by `async with Shards.open(...)`."""

    def __init__(
        self,
        settings: ShardsSettings,
        network: ShardsNetwork,
        key: SigningKey,
        cache: HashCache,
        hashers: Hashers,
        tasks: asyncio.TaskGroup,
        clock: Clock,
    ) -> None:
        torrents, directory, origins = network.torrents, network.directory, network.origins
        self._settings = settings
        self._hashers = hashers
        self._catalog = catalog = Catalog()
        self._seeding = Seeding(torrents, cache)
        self._verifier = Verifier(settings, catalog, cache, hashers.background, self._seeding, key, clock)
        self._scanner = Scanner(settings, catalog, self._verifier, key, clock)
        self._backfill = Backfill(cache, hashers.background)
        self._announcer = Announcer(catalog, directory, network.rpc_port, torrents.port, clock)
        self._quarantine = Quarantine(catalog, cache, self._seeding, hashers.urgent, tasks)
        self._pins = Pins(settings.data_dir, settings.shards_dir)
        self._resolver = ManifestResolver(settings, catalog, directory, network.fetch_manifest, origins, clock)
        store = FetchStore(
            catalog,
            self._scanner,
            self._seeding,
            self._backfill,
            hashers.urgent,
            DiskSpace(settings.shards_dir, settings.min_free_disk, pinned=self._pinned_bytes),
            ManifestFolders(settings.shards_dir, catalog),
            self._pins,
        )
        self._fetcher = Fetcher(settings, store, FetchNetwork(torrents, directory, origins), tasks, clock)
        self.publisher = Publisher(settings, catalog, cache, self._scanner, self._announcer, self._pins)
        self.leases = Leases()
        """On `clock`."""
        self.clock = clock
        self._eviction = Eviction(catalog, cache, self._verifier, self._fetcher, self.leases, self._pins, clock)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: ShardsSettings,
        *,
        swarm: TorrentClient,
        discovery: ProviderDirectory,
        fetch_manifest: FetchManifest,
        key: SigningKey,
        rpc_port: int,
        origin: OriginCatalog | None = None,
        clock: Clock | None = None,
        new_hasher: Callable[[], Hasher] = Hasher,
    ) -> AsyncIterator[Shards]:
        """Begin to scan the shards folder, and go on with it until the context ends.

        Returns at once, whatever there is to hash. `fetch_manifest(provider, digest)` asks a provider that `discovery`
        found for a manifest, and checks it. `rpc_port` is announced to others. What peers do not give
        comes from `origin`, if there is one.
        """
        settings = await asyncio.to_thread(_with_folders, settings)
        cache = await asyncio.to_thread(HashCache, settings.data_dir / HASH_CACHE_FILENAME)
        hashers = Hashers(new_hasher(), new_hasher(), new_hasher())
        network = ShardsNetwork(swarm, discovery, fetch_manifest, origin, rpc_port)
        try:
            async with FirstErrorGroup() as tasks:
                shards = cls(settings, network, key, cache, hashers, tasks, clock or Clock())
                await asyncio.to_thread(shards._pins.load)
                background = [
                    tasks.create_task(shards._scanner.run(), name="scanner"),
                    tasks.create_task(shards._scanner.watch(), name="watch"),
                    tasks.create_task(shards._verifier.run(shards._scanner.poke), name="verifier"),
                    tasks.create_task(shards._backfill.run(shards._quarantine.isolate), name="backfill"),
                    tasks.create_task(shards._announcer.run(), name="announcer"),
                ]
                try:
                    with swarm.on_invalid(shards._quarantine.on_invalid):
                        yield shards
                finally:
                    shards._fetcher.cancel_all()
                    for task in background:
                        task.cancel()
        finally:
            await asyncio.gather(*(hasher.close() for hasher in hashers))
            await asyncio.to_thread(cache.close)

    # What is here

    def files(self) -> list[FileInfo]:
        """Every shard file of this node, by name."""
        return sorted(map(self._info, self._catalog.files()), key=lambda info: info.filename)

    def manifests(self) -> list[SignedManifest]:
        """The manifests that this node holds, also those of which no shard is here."""
        return self._catalog.manifests()

    def manifest(self, digest: ManifestDigest) -> SignedManifest | None:
        """A manifest that this node holds."""
        return self._catalog.manifest(digest)

    def on_disk(self, digest: ManifestDigest) -> frozenset[int]:
        """Ids of the shards of a manifest that are here, checked."""
        return self._catalog.on_disk(digest)

    def path_of(self, ref: ShardRef) -> Path | None:
        """The file of a shard, if it is here and checked."""
        return next((file.path for file in self._catalog.of_shard(ref) if file.state == "seeding"), None)

    def has_file(self, ref: ShardRef) -> bool:
        """Whether a file is in a shard's place, checked or not."""
        return bool(self._catalog.of_shard(ref))

    def is_published_here(self, ref: ShardRef) -> bool:
        """Whether a shard lies where its publisher put it, and was not fetched."""
        folders = [self._catalog.manifest_in(file.path.parent) for file in self._catalog.of_shard(ref)]
        return any(folder is None or not folder.fetched for folder in folders)

    def is_pinned(self, ref: ShardRef) -> bool:
        """Whether a shard that is here stays until a person ends that."""
        files = self._catalog.of_shard(ref)
        return bool(files) and self._pins.keeps(ref, files)

    def downloads(self) -> list[DownloadStatus]:
        """The fetches in progress."""
        return [
            DownloadStatus(
                filename=job.shard.entry.filename,
                content_id=job.shard.entry.content_id,
                bytes_done=job.progress.bytes_done,
                bytes_total=job.progress.bytes_total,
                rate_bytes_s=job.progress.rate_bytes_s,
                peers=job.progress.peers,
            )
            for job in self._fetcher.jobs()
        ]

    @property
    def hashed_bytes(self) -> int:
        """Read and hashed since the start."""
        return sum(hasher.hashed_bytes for hasher in self._hashers)

    @property
    def is_scanned(self) -> bool:
        """Whether the folder was scanned since the start: before that, no shard seems to be here."""
        return self._scanner.is_scanned

    async def wait_scanned(self) -> None:
        """Wait until the folder was scanned once."""
        await self._scanner.wait_scanned()

    async def settled(self) -> None:
        """Wait until every file that is here is seeded or invalid, hashes are kept, and changes were announced."""
        parts: list[CanIdle] = [self._scanner, self._catalog, self._backfill, self._quarantine, self._announcer]
        while not all(part.is_idle for part in parts):
            for part in parts:
                await part.wait_idle()

    # What is meant

    async def resolve(self, kind: Kind | None, name_or_digest: str | None) -> SignedManifest:
        """See `ManifestResolver.resolve`."""
        return await self._resolver.resolve(kind, name_or_digest)

    async def select(self, selector: ShardSelector) -> Shard:
        """See `ManifestResolver.select`."""
        return await self._resolver.select(selector)

    # What is done

    async def fetch(
        self, shard: Shard, on_progress: OnProgress | None = None, term: Term | None = None
    ) -> FetchedShard:
        """Have a shard here, checked and pinned, from wherever it is. With a `term`, what comes has no pin, and a lease
        holds the shard from now on; if it does not come, the lease holds it no longer than it did before.

        Raises NoSourceError, OriginError if origins were asked too, InsufficientDiskError, InvalidShardError,
        InvalidManifestError for names that cannot be written here, BusyError for too many leases. Cancelling the caller
        ends the download unless others wait for it.
        """
        shard = Shard(self._catalog.manifest(shard.digest) or shard.signed, shard.entry)
        if term is None:
            with self._pins.asked_for(shard.ref):
                fetched = await self._fetcher.fetch(shard, on_progress)
                with _writing_pins():
                    await self._pins.pin(file.path for file in self._catalog.of_shard(shard.ref))
            return fetched
        number, ttl_s = self.leases.begin(term.lease, shard, self.clock.now()), None
        try:
            fetched = await self._fetcher.fetch(shard, on_progress, for_lease=True)
            ttl_s = term.ttl_s
        finally:
            self.leases.end(number, term.lease, shard.ref, self.clock.now(), ttl_s)
        return fetched

    async def evict(self, shard: Shard, *, unless_pinned: bool = False) -> Path:
        """Stop to seed a shard and delete its file, or what an unfinished download left of it. Returns its path.

        Raises ShardInUseError while it is loaded, downloaded or leased, with `unless_pinned` while it is pinned too,
        and ShardNotFoundError.
        """
        return await self._eviction.evict(shard, unless_pinned=unless_pinned)

    async def unpin(self, shards: Sequence[Shard]) -> tuple[list[int], int]:
        """End the pins of these shards of a manifest. Returns the ids of those that had one, and the bytes of all that
        are here and neither leased nor loaded.

        Raises ShardNotFoundError if none of them is here, InsufficientDiskError.
        """
        here = [shard for shard in shards if self.has_file(shard.ref)]
        if not here:
            names = shards[0].label if len(shards) == 1 else f"all {len(shards)} shards of {shards[0].manifest.name}"
            raise ShardNotFoundError(f"{names}: not on this node; LIST_FILES shows what is")
        pinned = [shard for shard in here if self.is_pinned(shard.ref)]
        with _writing_pins():
            await self._pins.unpin(file for shard in pinned for file in self._catalog.of_shard(shard.ref))
        free = [shard for shard in here if not self._is_used(shard)]
        return [shard.entry.shard_id for shard in pinned], sum(shard.entry.size for shard in free)

    def _is_used(self, shard: Shard) -> bool:
        is_leased = self.leases.holders(shard.ref, self.clock.now()).leases > 0
        return is_leased or shard.entry.shard_id in self._catalog.loaded(shard.digest)

    async def verify(self, shard: Shard) -> ContentId | None:
        """Hash a shard's file again; a wrong one is invalid then. Returns what it holds, None if it cannot be read.

        Raises ShardNotFoundError if it is not here.
        """
        return await self._quarantine.verify(shard)

    async def model_sizes(self, path: Path) -> ModelSizes:
        """The sizes in the header of a shard's GGUF, by which its memory is estimated. A process of its own parses it.

        Raises InvalidShardError for a header that llama.cpp could not load, or a file that is written to meanwhile.
        """
        try:
            return await self._hashers.headers.model_sizes(path)
        except FileChangedError:
            raise InvalidShardError(f"{path.name} is written to by somebody else; try again when it is whole") from None
        except OSError as err:
            raise InvalidShardError(f"{path.name} cannot be read: {err}") from None

    async def set_loaded(self, digest: ManifestDigest, shard_ids: frozenset[int]) -> None:
        """A stage has exactly these shards of a manifest loaded now. Returns when that was announced, or tried."""
        self._catalog.loaded_changed(digest, self._catalog.loaded(digest), shard_ids)
        with contextlib.suppress(TimeoutError):
            async with self.clock.timeout(ANNOUNCE_TIMEOUT_S):
                await self._announcer.wait_idle()

    def _info(self, file: ShardFile) -> FileInfo:
        entry, manifest, state, leases = None, None, file.state, 0
        loaded_state: FileState = file.state
        if file.shard:
            ref, entry, manifest = file.shard.ref, file.shard.entry, file.shard.manifest
            leases = self.leases.holders(ref, self.clock.now()).leases
            if state == "seeding" and ref.shard_id in self._catalog.loaded(ref.digest):
                loaded_state = "loaded"
        size = file.fingerprint.size if file.fingerprint else 0
        return FileInfo(
            filename=os.fsencode(file.path.relative_to(self._settings.shards_dir)).decode(errors="replace"),
            size=entry.size if entry and state != "invalid" else size,
            kind=file.kind,
            state=loaded_state,
            info_hash=file.torrent.info_hash if file.torrent else None,
            content_id=entry.content_id if entry else None,
            model=manifest.name if manifest and manifest.kind == "model" else None,
            dataset=manifest.name if manifest and manifest.kind == "dataset" else None,
            shard_id=entry.shard_id if entry else None,
            error=file.error,
            leases=leases,
            pinned=file.kind != "manifest" and self._pins.is_pinned(file),
        )

    def _pinned_bytes(self) -> Mapping[str, int]:
        """On disk, by the name of a model, data set or file."""
        found: Counter[str] = Counter()
        for file in self._catalog.files():
            if file.fingerprint and file.kind != "manifest" and self._pins.is_pinned(file):
                found[file.shard.manifest.name if file.shard else file.path.name] += file.fingerprint.size
        return found


@contextlib.contextmanager
def _writing_pins() -> Iterator[None]:
    """Raise InsufficientDiskError for a list of pins that cannot be written."""
    try:
        yield
    except OSError as err:
        raise InsufficientDiskError(
            f"the shard is here, and its pin cannot be written to {err.filename or 'the data folder'} "
            f"({err.strerror}): make room there, and ask again"
        ) from None


def _with_folders(settings: ShardsSettings) -> ShardsSettings:
    """Make the two folders; with their real paths, since links that lead out of them are refused."""
    settings.shards_dir.mkdir(parents=True, exist_ok=True)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return replace(settings, shards_dir=settings.shards_dir.resolve(), data_dir=settings.data_dir.resolve())
