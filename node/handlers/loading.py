"""Have a shard here, checked, and loaded: what LOAD_SHARD does, for whoever asks.

Fetching is the shards room's, loading the pipeline's; the order of the two, the memory check between them and the
news to the cluster afterwards are here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from node.machine import available_memory_bytes
from node.pipeline.memory import estimate_memory
from node.pipeline.stage import Stages
from node.shards import FetchedShard, Shards
from protocol.commands.shards import Progress, ShardResult
from protocol.errors import InsufficientMemoryError, ShardNotLoadedError
from protocol.ids import ManifestDigest
from protocol.manifest import ShardEntry, SignedManifest

OnProgress = Callable[[Progress], None]


class ShardLoader:
    """Fetches, loads and unloads shards of this node."""

    def __init__(self, shards: Shards, stages: Stages) -> None:
        self._shards = shards
        self._stages = stages
        self._one_load = asyncio.Lock()
        """Memory is looked at and taken by one load at a time, or two would both see the same bytes free."""

    async def fetch(
        self, signed: SignedManifest, entry: ShardEntry, request_id: str, on_progress: OnProgress
    ) -> ShardResult:
        """Have the shard on disk. Raises what `Shards.fetch` raises."""
        fetched = await self._fetch(signed, entry, request_id, on_progress)
        return _result(entry, "fetched", fetched, fetched.seconds)

    async def load(
        self, signed: SignedManifest, entry: ShardEntry, request_id: str, on_progress: OnProgress
    ) -> ShardResult:
        """Have the shard on disk and loaded by this node's stage of the model.

        Raises InsufficientMemoryError before any byte moves where the shard's size alone says that it cannot fit,
        and again, with cache and buffers, before the engine is asked; EngineError where the engine refuses the file.
        """
        started = time.monotonic()
        loaded = entry.shard_id in self._stages.loaded(signed.digest)
        if not loaded:
            _refuse_above(available_memory_bytes(), entry.size, entry)
        fetched = await self._fetch(signed, entry, request_id, on_progress)
        on_progress(_progress(entry, request_id, "loading"))
        async with self._one_load:
            if entry.shard_id not in self._stages.loaded(signed.digest):
                needed = await asyncio.to_thread(estimate_memory, fetched.path, self._stages.engine_settings)
                _refuse_above(available_memory_bytes(), needed, entry)
                await self._stages.load(signed, entry.shard_id, fetched.path)
        await self.tell_loaded(signed.digest)
        return _result(entry, "loaded", fetched, time.monotonic() - started)

    async def unload(self, signed: SignedManifest, entry: ShardEntry) -> ShardResult:
        """Free the memory, keep the file. Raises ShardNotLoadedError, and ShardInUseError while a session runs on it."""
        started = time.monotonic()
        if entry.shard_id not in self._stages.loaded(signed.digest):
            raise ShardNotLoadedError(
                f"shard {entry.shard_id} of {signed.manifest.name} is not loaded here",
                {"model": signed.manifest.name, "shard_id": entry.shard_id},
            )
        await self._stages.unload(signed.digest, entry.shard_id)
        await self.tell_loaded(signed.digest)
        return _local_result(entry, "unloaded", str(self._shards.path_of(signed, entry)), time.monotonic() - started)

    async def evict(self, signed: SignedManifest, entry: ShardEntry) -> ShardResult:
        """Stop seeding and delete the file. Raises ShardInUseError while it is loaded."""
        started = time.monotonic()
        path = self._shards.path_of(signed, entry)
        await self._shards.evict(signed, entry)
        return _local_result(entry, "evicted", str(path), time.monotonic() - started)

    async def tell_loaded(self, digest: ManifestDigest) -> None:
        """Bring the catalog and the DHT up to date with what this node's stage has loaded; after a crash, nothing."""
        await self._shards.set_loaded(digest, self._stages.loaded(digest))

    async def _fetch(
        self, signed: SignedManifest, entry: ShardEntry, request_id: str, on_progress: OnProgress
    ) -> FetchedShard:
        return await self._shards.fetch(signed, entry, lambda progress: on_progress(progress_of(progress, request_id)))


def _refuse_above(available: int, needed: int, entry: ShardEntry) -> None:
    if needed > available:
        raise InsufficientMemoryError(
            f"shard {entry.shard_id} ({entry.filename}) needs about {needed / 1e6:.0f} MB of memory, "
            f"{available / 1e6:.0f} MB are available; unload something, lower --ctx-size, or use a larger machine",
            {"needed_bytes": needed, "available_bytes": available},
        )


def _progress(entry: ShardEntry, request_id: str, phase: str) -> Progress:
    raise AssertionError


def _result(entry: ShardEntry, status: str, fetched: FetchedShard, seconds: float) -> ShardResult:
    raise AssertionError


def _local_result(entry: ShardEntry, status: str, path: str, seconds: float) -> ShardResult:
    raise AssertionError


def progress_of(progress: object, request_id: str) -> Progress:
    raise AssertionError
