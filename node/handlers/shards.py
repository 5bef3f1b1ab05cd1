"""LOAD_SHARD, FETCH_SHARD, UNLOAD_SHARD, EVICT_SHARD, UNPIN, LIST_FILES, GET_MANIFEST: the way of a shard into memory.

`ShardLoader` has a shard here, checked, and loaded, for whoever asks: fetching is the work of node.shards, loading that
of node.pipeline; their order, the memory check between them and the announcement afterwards are here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from node.background import Background
from node.machine import available_memory_bytes
from node.pipeline.engine.memory import check_memory
from node.pipeline.engine.settings import EngineSettings
from node.pipeline.stage.stages import Stages
from node.rpc import Call
from node.shards.fetch.job import FetchedShard
from node.shards.leases import Term
from node.shards.resolver import Kind
from node.shards.service import Shards
from node.swarm.torrent import DownloadProgress
from protocol.commands.shards import (
    EvictShardParams,
    FetchShardParams,
    GetManifestParams,
    GetManifestResult,
    ListFilesResult,
    LoadShardParams,
    Progress,
    ShardResult,
    UnloadShardParams,
    UnpinParams,
    UnpinResult,
)
from protocol.errors import (
    BusyError,
    InsufficientMemoryError,
    InvalidParamsError,
    ShardNotLoadedError,
    ShoalError,
    UnknownNameError,
)
from protocol.ids import ManifestDigest
from protocol.manifest import Shard, ShardEntry

log = logging.getLogger(__name__)

MAX_BACKGROUND = 64
"""Requests with `wait: false` in progress."""
Phase = Literal["finding", "downloading", "verifying", "loading", "uploading"]
ShardStatus = Literal["loaded", "loading", "fetched", "fetching", "unloaded", "evicted"]


@dataclass(frozen=True)
class ProgressReport:
    """Sends the PROGRESS notifications of one request about one shard."""

    call: Call | None
    """None: no client waits, and nothing is sent."""
    shard_id: int

    def send(
        self, phase: Phase, bytes_done: int, bytes_total: int, *, rate_bytes_s: float = 0.0, peers: int = 0
    ) -> None:
        """Send one notification."""
        if self.call is not None:
            progress = Progress(
                request_id=self.call.request_id,
                shard_id=self.shard_id,
                phase=phase,
                bytes_done=bytes_done,
                bytes_total=bytes_total,
                rate_bytes_s=rate_bytes_s,
                peers=peers,
            )
            self.call.notify("PROGRESS", progress)

    def send_fetch(self, progress: DownloadProgress) -> None:
        """Send how far a fetch is."""
        self.send(
            progress.phase,
            progress.bytes_done,
            progress.bytes_total,
            rate_bytes_s=progress.rate_bytes_s,
            peers=progress.peers,
        )


_Work = Callable[[Shard, ProgressReport], Awaitable[ShardResult]]


class ShardLoader:
    """Fetches, loads and unloads shards of this node."""

    def __init__(self, shards: Shards, stages: Stages, engine: EngineSettings) -> None:
        self._shards = shards
        self._stages = stages
        self._engine = engine
        self._one_load = asyncio.Lock()
        """Memory is looked at and taken by one load at a time, or two would both see the same bytes free."""

    def is_loaded(self, shard: Shard) -> bool:
        """Whether this node's stage has the shard."""
        return shard.entry.shard_id in self._stages.loaded(shard.digest)

    async def fetch(self, shard: Shard, report: ProgressReport, term: Term | None = None) -> ShardResult:
        """Have the shard on disk, held by a lease if there is a `term`. Raises what `Shards.fetch` raises."""
        fetched = await self._fetch(shard, report, term)
        return _result(shard.entry, "fetched", fetched, fetched.seconds)

    async def load(self, shard: Shard, report: ProgressReport) -> ShardResult:
        """Have the shard on disk and loaded by this node's stage of the model.

        Raises InsufficientMemoryError before any byte moves if the shard's size alone says that it cannot fit, and
        again, with cache and buffers, before the engine is asked; EngineError if the engine refuses the file.
        """
        started = time.monotonic()
        if not self.is_loaded(shard):
            _refuse_above(available_memory_bytes(), shard)
        fetched = await self._fetch(shard, report)
        report.send("loading", shard.entry.size, shard.entry.size)
        async with self._one_load:
            if not self.is_loaded(shard):
                # A process of the store's parses the header, which a stranger may have written.
                check_memory(shard.entry.filename, await self._shards.model_sizes(fetched.path), self._engine)
                await self._stages.load(shard.digest, shard.entry.shard_id, fetched.path, name=shard.manifest.name)
                log.info("loaded %s", shard.label)
        await self.tell_loaded(shard.digest)
        return _result(shard.entry, "loaded", fetched, time.monotonic() - started)

    async def unload(self, shard: Shard) -> ShardResult:
        """Free the memory, keep the file. Raises ShardNotLoadedError; ShardInUseError while a session runs on it."""
        started = time.monotonic()
        if not self.is_loaded(shard):
            raise ShardNotLoadedError(
                f"{shard.label} is not loaded here",
                {"model": shard.manifest.name, "shard_id": shard.entry.shard_id},
            )
        await self._stages.unload(shard.digest, shard.entry.shard_id)
        await self.tell_loaded(shard.digest)
        return _still_local(shard.entry, "unloaded", self._shards.path_of(shard.ref), time.monotonic() - started)

    async def tell_loaded(self, digest: ManifestDigest) -> None:
        """Bring the catalog and the DHT up to date with what this node's stage has loaded; after a crash, nothing."""
        await self._shards.set_loaded(digest, self._stages.loaded(digest))

    async def _fetch(self, shard: Shard, report: ProgressReport, term: Term | None = None) -> FetchedShard:
        fetched = await self._shards.fetch(shard, report.send_fetch, term)
        if fetched.bytes_by_source:
            log.info(
                "fetched %s: %.1f MB from %s in %.1f s",
                shard.label,
                sum(fetched.bytes_by_source.values()) / 1e6,
                ", ".join(source for source, count in fetched.bytes_by_source.items() if count),
                fetched.seconds,
            )
        return fetched


@dataclass(frozen=True)
class ShardHandlers:
    """Shard commands of one node; `background` owns what nobody waits for."""

    shards: Shards
    loader: ShardLoader
    background: Background

    async def load(self, params: LoadShardParams, call: Call) -> ShardResult:
        """LOAD_SHARD."""
        shard = (await self.shards.resolve("model", params.model)).shard(params.shard_id)
        if params.wait or self.loader.is_loaded(shard):
            return await self.loader.load(shard, ProgressReport(call, shard.entry.shard_id))
        self._go_on(self.loader.load, shard, call)
        return _still_local(shard.entry, "loading", self.shards.path_of(shard.ref), 0.0)

    async def fetch(self, params: FetchShardParams, call: Call) -> ShardResult:
        """FETCH_SHARD."""
        shard = await self.shards.select(params)
        term = Term(params.lease, params.ttl_s) if params.lease is not None else None
        if params.wait or self.shards.path_of(shard.ref):
            return await self.loader.fetch(shard, ProgressReport(call, shard.entry.shard_id), term)
        self._go_on(partial(self.loader.fetch, term=term), shard, call)
        return _still_local(shard.entry, "fetching", self.shards.path_of(shard.ref), 0.0)

    async def unload(self, params: UnloadShardParams) -> ShardResult:
        """UNLOAD_SHARD."""
        return await self.loader.unload(await self.shards.select(params))

    async def evict(self, params: EvictShardParams) -> ShardResult:
        """EVICT_SHARD."""
        started = time.monotonic()
        await self.shards.wait_scanned()
        shard = await self.shards.select(params)
        path = await self.shards.evict(shard)
        return _still_local(shard.entry, "evicted", path, time.monotonic() - started)

    async def unpin(self, params: UnpinParams) -> UnpinResult:
        """UNPIN: one shard, or all of a model or data set that are here."""
        await self.shards.wait_scanned()
        name = params.model or params.dataset
        is_whole = name is not None and (params.shard_id, params.content_id, params.filename) == (None, None, None)
        if is_whole and not (params.model and params.dataset):
            signed = await self.shards.resolve("dataset" if params.dataset else "model", name)
            chosen = [Shard(signed, entry) for entry in signed.manifest.shards]
        else:
            chosen = [await self.shards.select(params)]
        ended, evictable_bytes = await self.shards.unpin(chosen)
        sizes = {shard.entry.shard_id: shard.entry.size for shard in chosen}
        return UnpinResult(
            digest=chosen[0].digest,
            shard_ids=ended,
            bytes=sum(sizes[shard_id] for shard_id in ended),
            evictable_bytes=evictable_bytes,
        )

    async def list_files(self) -> ListFilesResult:
        """LIST_FILES."""
        return ListFilesResult(files=self.shards.files())

    async def get_manifest(self, params: GetManifestParams) -> GetManifestResult:
        """GET_MANIFEST: by name or URL from wherever it is, by digest from what is held here."""
        given = [one for one in (params.name, params.model, params.dataset, params.digest) if one is not None]
        if len(given) > 1:
            raise InvalidParamsError("give one of name, model, dataset and digest")
        if params.digest is not None:
            signed = self.shards.manifest(params.digest)
            if signed is None:
                raise UnknownNameError(f"this node holds no manifest {params.digest}", {"digest": params.digest})
        else:
            kind: Kind | None = None if params.name else "dataset" if params.dataset else "model"
            signed = await self.shards.resolve(kind, params.name or params.dataset or params.model)
        return GetManifestResult(signed=signed, digest=signed.digest)

    def _go_on(
        self,
        work: Callable[[Shard, ProgressReport], Awaitable[ShardResult]],
        shard: Shard,
        call: Call,
    ) -> None:
        if self.background.requests >= MAX_BACKGROUND:
            raise BusyError(f"{MAX_BACKGROUND} requests go on in the background already; wait for one")

        what = f"{call.method} of {shard.label}, request {call.request_id}"

        async def run() -> None:
            try:
                await work(shard, ProgressReport(call, shard.entry.shard_id))
            except ShoalError as error:
                log.warning("%s: %s", what, error)
            except asyncio.CancelledError:
                log.info("%s: cancelled", what)
                raise

        self.background.start(run(), name=what, request_id=call.request_id)


def _refuse_above(available: int, shard: Shard) -> None:
    """Before any byte moves: the weights alone. `check_memory` counts the rest, from the file's header."""
    if shard.entry.size > available:
        raise InsufficientMemoryError(
            f"{shard.label} has {shard.entry.size >> 20} MiB of weights, {available >> 20} MiB "
            "of memory are available; unload something, or use a larger machine",
            {"needed_bytes": shard.entry.size, "available_bytes": available},
        )


def _result(entry: ShardEntry, status: ShardStatus, fetched: FetchedShard, seconds: float) -> ShardResult:
    return ShardResult(
        shard_id=entry.shard_id,
        status=status,
        path=str(fetched.path),
        source=fetched.source,
        bytes=entry.size,
        seconds=seconds,
        content_id=entry.content_id,
        bytes_by_source=dict(fetched.bytes_by_source),
    )


def _still_local(entry: ShardEntry, status: ShardStatus, path: Path | None, seconds: float) -> ShardResult:
    """A result for which no byte moved."""
    return ShardResult(
        shard_id=entry.shard_id,
        status=status,
        path=str(path or ""),
        source="local",
        bytes=entry.size,
        seconds=seconds,
        content_id=entry.content_id,
    )
