"""`Shards`: what the floors above ask of this room."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from node.clock import Clock
from node.formats.hyperparameters import ModelSizes
from node.shards.eviction import Custody
from node.shards.fetch.download import FetchNetwork, FetchStore
from node.shards.fetch.fetcher import Fetcher
from node.shards.fetch.folders import ManifestFolders
from node.shards.fetch.job import FetchedShard, OnProgress
from node.shards.interfaces import Discovery, FetchManifest, Origin, Swarm
from node.shards.leases import LeasedId, Leases, Term
from node.shards.publish.publisher import Publisher
from node.shards.resolver import Kind, ManifestResolver
from node.shards.settings import ShardsSettings
from node.shards.store.announcer import Announcer
from node.shards.store.backfill import Remember
from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.disk_space import Space
from node.shards.store.file_info import file_info
from node.shards.store.hash_cache import Index
from node.shards.store.hasher import FileChangedError, Hasher
from node.shards.store.scanner import Survey
from node.shards.store.seeding import Seeds
from node.shards.store.verifier import Admission
from node.shards.store.watch import watch
from protocol.commands.common import ShardSelector
from protocol.commands.nodes import DownloadStatus
from protocol.commands.shards import FileInfo
from protocol.errors import InvalidShardError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import Shard, ShardEntry, ShardRef, SignedManifest
from protocol.signing import SigningKey

INDEX_FILENAME = "index.sqlite"
TELL_TIMEOUT_S = 3.0
"""A DHT whose nodes are gone must not hold up who has loaded a shard."""


class CanIdle(Protocol):
    """A part of this room that may have nothing left to do."""

    @property
    def is_idle(self) -> bool: ...

    async def wait_idle(self) -> None:
        """Wait for a moment at which it has nothing to do."""


class Shards:
    """The shards of this node. Opened by `async with Shards.open(...)`."""

    def __init__(
        self,
        settings: ShardsSettings,
        swarm: Swarm,
        discovery: Discovery,
        fetch_manifest: FetchManifest,
        key: SigningKey,
        rpc_port: int,
        index: Index,
        hashers: tuple[Hasher, Hasher, Hasher],
        origin: Origin | None,
        tasks: asyncio.TaskGroup,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._tasks = tasks
        self._index = index
        self._reader, self._urgent, self._headers = hashers
        self._catalog = Catalog()
        self._seeds = Seeds(swarm, index)
        self._admission = Admission(settings, self._catalog, index, self._reader, self._seeds, key)
        self._survey = Survey(settings, self._catalog, self._admission, key)
        self._remember = Remember(index, self._reader)
        self._announcer = Announcer(self._catalog, discovery, rpc_port, swarm.port)
        self.publisher = Publisher(settings, self._catalog, index, self._survey, self._announcer)
        self._resolver = ManifestResolver(settings, self._catalog, discovery, fetch_manifest, origin, clock)
        store = FetchStore(
            self._catalog,
            self._survey,
            self._seeds,
            self._remember,
            self._urgent,
            Space(settings.shards_dir, settings.min_free_disk),
            ManifestFolders(settings.shards_dir, self._catalog),
        )
        network = FetchNetwork(swarm, discovery, origin)
        self._fetcher = Fetcher(settings, store, network, tasks, clock)
        self.leases = Leases()
        """On the clock of `time.monotonic`."""
        self._custody = Custody(
            self._catalog,
            index,
            self._seeds,
            self._admission,
            self._fetcher,
            self._urgent,
            self.leases,
            tasks,
        )
        swarm.on_invalid = self._custody.on_invalid

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: ShardsSettings,
        *,
        swarm: Swarm,
        discovery: Discovery,
        fetch_manifest: FetchManifest,
        key: SigningKey,
        rpc_port: int,
        origin: Origin | None = None,
        clock: Clock | None = None,
    ) -> AsyncIterator[Shards]:
        """Begin to look at the shards folder, and go on with it until the context ends.

        Returns at once, whatever there is to hash. `fetch_manifest(provider, digest)` asks a provider that discovery
        found for a manifest, and checks it. `rpc_port` is what others are told of this node. With an `origin`, what
        peers do not give comes from there.
        """
        settings = await asyncio.to_thread(_with_folders, settings)
        index = await asyncio.to_thread(Index, settings.data_dir / INDEX_FILENAME)
        hashers = Hasher(), Hasher(), Hasher()
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                shards = cls(
                    settings,
                    swarm,
                    discovery,
                    fetch_manifest,
                    key,
                    rpc_port,
                    index,
                    hashers,
                    origin,
                    tasks,
                    clock or Clock(),
                )
                background = [
                    tasks.create_task(shards._survey.run(), name="survey"),
                    tasks.create_task(shards._admission.run(shards._survey.poke), name="admission"),
                    tasks.create_task(shards._remember.run(shards._custody.distrust), name="remember"),
                    tasks.create_task(shards._announcer.run(), name="announcer"),
                    tasks.create_task(watch(settings.shards_dir, shards._survey.poke), name="watch"),
                ]
                try:
                    yield shards
                except Exception as err:
                    failure = err  # The group would wrap it.
                finally:
                    swarm.on_invalid = None
                    shards._fetcher.cancel_all()
                    for task in background:
                        task.cancel()
            if failure:
                raise failure
        finally:
            await asyncio.gather(*(hasher.close() for hasher in hashers))
            await asyncio.to_thread(index.close)

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

    def path_of(self, signed: SignedManifest, entry: ShardEntry) -> Path | None:
        """The file of a shard, if it is here and checked."""
        files = self._catalog.of_shard(ShardRef(signed.digest, entry.shard_id))
        return next((file.path for file in files if file.state == "seeding"), None)

    def has_file(self, digest: ManifestDigest, shard_id: int) -> bool:
        """Whether anything of a shard is in its place, checked or not."""
        return bool(self._catalog.of_shard(ShardRef(digest, shard_id)))

    def is_published_here(self, digest: ManifestDigest, shard_id: int) -> bool:
        """Whether a shard lies where its publisher put it, and was not fetched."""
        folders = [
            self._catalog.manifest_in(file.path.parent) for file in self._catalog.of_shard(ShardRef(digest, shard_id))
        ]
        return any(folder is None or not folder.fetched for folder in folders)

    def downloads(self) -> list[DownloadStatus]:
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
        return self._reader.hashed_bytes + self._urgent.hashed_bytes

    @property
    def is_surveyed(self) -> bool:
        """Whether the folder was looked at since the start: before that, nothing seems to be here."""
        return self._survey.is_scanned

    async def surveyed(self) -> None:
        """Wait until it was."""
        await self._survey.wait_scanned()

    async def settled(self) -> None:
        """Wait until every file that is here is seeded or invalid, hashes are kept, and others were told."""
        parts: list[CanIdle] = [self._survey, self._catalog, self._remember, self._custody, self._announcer]
        while not all(part.is_idle for part in parts):
            for part in parts:
                await part.wait_idle()

    # What is meant

    async def resolve(self, kind: Kind | None, name_or_digest: str | None) -> SignedManifest:
        """See `ManifestResolver.resolve`."""
        return await self._resolver.resolve(kind, name_or_digest)

    async def select(self, selector: ShardSelector) -> tuple[SignedManifest, ShardEntry]:
        """See `ManifestResolver.select`."""
        shard = await self._resolver.select(selector)
        return shard.signed, shard.entry

    # What is done

    async def fetch(
        self,
        signed: SignedManifest,
        entry: ShardEntry,
        on_progress: OnProgress | None = None,
        term: Term | None = None,
    ) -> FetchedShard:
        """Have a shard here and checked, from wherever it is. With a `term` a lease holds it from now on; where it does
        not come, the lease holds it no longer than it did before.

        Raises NoSourceError, OriginError where origins were asked too, InsufficientDiskError, InvalidShardError,
        InvalidManifestError for names that cannot be written here, BusyError for too many leases. Cancelling the caller
        ends the download unless others wait for it.
        """
        shard = Shard(self._catalog.manifest(signed.digest) or signed, entry)
        if term is None:
            return await self._fetcher.fetch(shard, on_progress)
        leased, ttl_s = leased_id(signed, entry), None
        number = self.leases.begin(term.lease, leased, time.monotonic())
        try:
            fetched = await self._fetcher.fetch(shard, on_progress)
            ttl_s = term.ttl_s
        finally:
            self.leases.end(number, term.lease, leased, time.monotonic(), ttl_s)
        return fetched

    async def evict(self, signed: SignedManifest, entry: ShardEntry) -> Path:
        """Stop to seed a shard and delete its file, or what an unfinished download left of it.

        Returns where it was. Raises ShardInUseError while it is loaded, downloaded or leased, and ShardNotFoundError.
        """
        return await self._custody.evict(Shard(signed, entry))

    async def verify(self, signed: SignedManifest, entry: ShardEntry) -> ContentId | None:
        """Hash a shard's file again. Returns what it holds, None where it cannot be read; a wrong one is invalid then.

        Raises ShardNotFoundError where it is not here.
        """
        return await self._custody.verify(Shard(signed, entry))

    async def model_sizes(self, path: Path) -> ModelSizes:
        """The sizes in the header of a shard's GGUF, by which its memory is estimated. A process of its own parses it.

        Raises InvalidShardError for a header that llama.cpp could not load, or a file that is written to meanwhile.
        """
        try:
            return await self._headers.model_sizes(path)
        except FileChangedError:
            raise InvalidShardError(f"{path.name} is written to by somebody else; try again when it is whole") from None
        except OSError as err:
            raise InvalidShardError(f"{path.name} cannot be read: {err}") from None

    async def set_loaded(self, digest: ManifestDigest, shard_ids: frozenset[int]) -> None:
        """A stage has exactly these shards of a manifest loaded now; returns when others were told, or tried to be."""
        self._catalog.loaded_changed(digest, self._catalog.loaded(digest), shard_ids)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TELL_TIMEOUT_S):
                await self._announcer.wait_idle()

    # How it is done

    def _info(self, file: ShardFile) -> FileInfo:
        loaded, leases = False, 0
        if file.shard:
            leased = LeasedId(file.shard.digest, file.shard.entry.shard_id, file.shard.entry.content_id)
            loaded = leased.shard_id in self._catalog.loaded(leased.digest)
            leases = self.leases.holders(leased, time.monotonic()).leases
        return file_info(file, self._settings.shards_dir, loaded=loaded, leases=leases)


def leased_id(signed: SignedManifest, entry: ShardEntry) -> LeasedId:
    """What leases call a shard."""
    return LeasedId(signed.digest, entry.shard_id, entry.content_id)


def _with_folders(settings: ShardsSettings) -> ShardsSettings:
    """Make the two folders; their real paths, so that links out of them can be told."""
    settings.shards_dir.mkdir(parents=True, exist_ok=True)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return replace(settings, shards_dir=settings.shards_dir.resolve(), data_dir=settings.data_dir.resolve())
