"""Have a shard here, checked, and loaded: what LOAD_SHARD does, for whoever asks.

Fetching is the shards room's, loading the pipeline's; the order of the two, the memory check between them and the
news to the cluster afterwards are here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from node.machine import available_memory_bytes
from node.pipeline.engine.memory import check_memory
from node.pipeline.engine.settings import EngineSettings
from node.pipeline.stage.stages import Stages
from node.shards.fetch.job import FetchedShard, FetchProgress
from node.shards.leases import Term
from node.shards.service import Shards
from protocol.commands.shards import Progress, ShardResult
from protocol.errors import InsufficientMemoryError, ShardNotLoadedError
from protocol.ids import ManifestDigest
from protocol.manifest import ShardEntry, SignedManifest

log = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]
ShardStatus = Literal["loaded", "loading", "fetched", "fetching", "unloaded", "evicted"]


class ShardLoader:
    """Fetches, loads and unloads shards of this node."""

    def __init__(self, shards: Shards, stages: Stages, engine: EngineSettings) -> None:
        self._shards = shards
        self._stages = stages
        self._engine = engine
        self._one_load = asyncio.Lock()
        """Memory is looked at and taken by one load at a time, or two would both see the same bytes free."""

    def is_loaded(self, signed: SignedManifest, entry: ShardEntry) -> bool:
        """Whether this node's stage has the shard."""
        return entry.shard_id in self._stages.loaded(signed.digest)

    async def fetch(
        self,
        signed: SignedManifest,
        entry: ShardEntry,
        request_id: str,
        on_progress: OnProgress,
        term: Term | None = None,
    ) -> ShardResult:
        """Have the shard on disk, held by a lease where there is a `term`. Raises what `Shards.fetch` raises."""
        fetched = await self._fetch(signed, entry, request_id, on_progress, term)
        return _result(entry, "fetched", fetched, fetched.seconds)

    async def load(
        self, signed: SignedManifest, entry: ShardEntry, request_id: str, on_progress: OnProgress
    ) -> ShardResult:
        """Have the shard on disk and loaded by this node's stage of the model.

        Raises InsufficientMemoryError before any byte moves where the shard's size alone says that it cannot fit,
        and again, with cache and buffers, before the engine is asked; EngineError where the engine refuses the file.
        """
        started = time.monotonic()
        if not self.is_loaded(signed, entry):
            _refuse_above(available_memory_bytes(), entry)
        fetched = await self._fetch(signed, entry, request_id, on_progress)
        on_progress(_loading(entry, request_id))
        async with self._one_load:
            if not self.is_loaded(signed, entry):
                await asyncio.to_thread(check_memory, fetched.path, self._engine)
                await self._stages.load(signed.digest, entry.shard_id, fetched.path, name=signed.manifest.name)
                log.info("loaded shard %d of %s", entry.shard_id, signed.manifest.name)
        await self.tell_loaded(signed.digest)
        return _result(entry, "loaded", fetched, time.monotonic() - started)

    async def unload(self, signed: SignedManifest, entry: ShardEntry) -> ShardResult:
        """Free the memory, keep the file. Raises ShardNotLoadedError; ShardInUseError while a session runs on it."""
        started = time.monotonic()
        if not self.is_loaded(signed, entry):
            raise ShardNotLoadedError(
                f"shard {entry.shard_id} of {signed.manifest.name} is not loaded here",
                {"model": signed.manifest.name, "shard_id": entry.shard_id},
            )
        await self._stages.unload(signed.digest, entry.shard_id)
        await self.tell_loaded(signed.digest)
        return still_local(entry, "unloaded", self._shards.path_of(signed, entry), time.monotonic() - started)

    async def tell_loaded(self, digest: ManifestDigest) -> None:
        """Bring the catalog and the DHT up to date with what this node's stage has loaded; after a crash, nothing."""
        await self._shards.set_loaded(digest, self._stages.loaded(digest))

    async def _fetch(
        self,
        signed: SignedManifest,
        entry: ShardEntry,
        request_id: str,
        on_progress: OnProgress,
        term: Term | None = None,
    ) -> FetchedShard:
        def tell(progress: FetchProgress) -> None:
            on_progress(
                Progress(
                    request_id=request_id,
                    shard_id=entry.shard_id,
                    phase=progress.phase,
                    bytes_done=progress.bytes_done,
                    bytes_total=progress.bytes_total,
                    rate_bytes_s=progress.rate_bytes_s,
                    peers=progress.peers,
                )
            )

        fetched = await self._shards.fetch(signed, entry, tell, term)
        if fetched.bytes_by_source:
            log.info(
                "fetched shard %d of %s: %.1f MB from %s in %.1f s",
                entry.shard_id,
                signed.manifest.name,
                sum(fetched.bytes_by_source.values()) / 1e6,
                ", ".join(source for source, count in fetched.bytes_by_source.items() if count),
                fetched.seconds,
            )
        return fetched


def _refuse_above(available: int, entry: ShardEntry) -> None:
    """Before any byte moves: the weights alone. `check_memory` counts the rest, from the file."""
    if entry.size > available:
        raise InsufficientMemoryError(
            f"shard {entry.shard_id} ({entry.filename}) has {entry.size >> 20} MiB of weights, {available >> 20} MiB "
            "of memory are available; unload something, or use a larger machine",
            {"needed_bytes": entry.size, "available_bytes": available},
        )


def _loading(entry: ShardEntry, request_id: str) -> Progress:
    return Progress(
        request_id=request_id,
        shard_id=entry.shard_id,
        phase="loading",
        bytes_done=entry.size,
        bytes_total=entry.size,
        rate_bytes_s=0.0,
        peers=0,
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


def still_local(entry: ShardEntry, status: ShardStatus, path: Path | None, seconds: float) -> ShardResult:
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
