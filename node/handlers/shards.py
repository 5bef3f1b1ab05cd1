"""LOAD_SHARD, FETCH_SHARD, UNLOAD_SHARD, EVICT_SHARD, LIST_FILES and GET_MANIFEST."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from node.background import Background
from node.handlers.loading import OnProgress, ShardLoader, still_local
from node.rpc import Call
from node.shards.leases import Term
from node.shards.resolver import Kind
from node.shards.service import Shards
from protocol.commands.shards import (
    EvictShardParams,
    FetchShardParams,
    GetManifestParams,
    GetManifestResult,
    ListFilesParams,
    ListFilesResult,
    LoadShardParams,
    Progress,
    ShardResult,
    UnloadShardParams,
)
from protocol.errors import BusyError, InvalidParamsError, ShoalError, UnknownNameError
from protocol.manifest import ShardEntry, SignedManifest

log = logging.getLogger(__name__)

MAX_BACKGROUND = 64
"""Requests with `wait: false` in progress."""
_Work = Callable[[SignedManifest, ShardEntry, str, OnProgress], Awaitable[ShardResult]]


@dataclass(frozen=True)
class ShardHandlers:
    """Shard commands of one node; `background` owns what nobody waits for."""

    shards: Shards
    loader: ShardLoader
    background: Background

    async def load(self, params: LoadShardParams, call: Call) -> ShardResult:
        """LOAD_SHARD."""
        signed = await self.shards.resolve("model", params.model)
        entry = signed.manifest.shard(params.shard_id)
        if params.wait or self.loader.is_loaded(signed, entry):
            return await self.loader.load(signed, entry, call.request_id, _notifier(call))
        self._go_on(self.loader.load, signed, entry, call)
        return still_local(entry, "loading", self.shards.path_of(signed, entry), 0.0)

    async def fetch(self, params: FetchShardParams, call: Call) -> ShardResult:
        """FETCH_SHARD."""
        signed, entry = await self.shards.select(params)
        term = Term(params.lease, params.ttl_s) if params.lease is not None else None
        if params.wait or self.shards.path_of(signed, entry):
            return await self.loader.fetch(signed, entry, call.request_id, _notifier(call), term)
        self._go_on(partial(self.loader.fetch, term=term), signed, entry, call)
        return still_local(entry, "fetching", self.shards.path_of(signed, entry), 0.0)

    async def unload(self, params: UnloadShardParams, call: Call) -> ShardResult:
        """UNLOAD_SHARD."""
        del call
        return await self.loader.unload(*await self.shards.select(params))

    async def evict(self, params: EvictShardParams, call: Call) -> ShardResult:
        """EVICT_SHARD."""
        del call
        started = time.monotonic()
        await self.shards.surveyed()
        signed, entry = await self.shards.select(params)
        path = await self.shards.evict(signed, entry)
        return still_local(entry, "evicted", path, time.monotonic() - started)

    async def list_files(self, params: ListFilesParams, call: Call) -> ListFilesResult:
        """LIST_FILES."""
        del params, call
        return ListFilesResult(files=self.shards.files())

    async def get_manifest(self, params: GetManifestParams, call: Call) -> GetManifestResult:
        """GET_MANIFEST: by name or URL from wherever it is, by digest from what is held here."""
        del call
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

    def _go_on(self, work: _Work, signed: SignedManifest, entry: ShardEntry, call: Call) -> None:
        if self.background.requests >= MAX_BACKGROUND:
            raise BusyError(f"{MAX_BACKGROUND} requests go on in the background already; wait for one")

        what = f"{call.method} of shard {entry.shard_id} of {signed.manifest.name}, request {call.request_id}"

        async def run() -> None:
            try:
                await work(signed, entry, call.request_id, _notifier(call))
            except ShoalError as error:
                log.warning("%s: %s", what, error)
            except asyncio.CancelledError:
                log.info("%s: cancelled", what)
                raise

        self.background.start(run(), name=what, request_id=call.request_id)


def _notifier(call: Call) -> OnProgress:
    def notify(progress: Progress) -> None:
        call.notify("PROGRESS", progress)

    return notify
