"""Has a shard on this machine, whatever it takes: it is here already, a copy is, or it is brought from elsewhere."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from node.background import to_the_end_then
from node.shards.fetch.download import Intake
from node.shards.fetch.job import Fetch, FetchedShard, FetchProgress, OnProgress
from node.shards.interfaces import Discovery, Origin, Swarm
from node.shards.settings import ShardsSettings
from node.shards.store.backfill import Remember
from node.shards.store.catalog import Catalog, ShardFile, torrent_of
from node.shards.store.disk_space import Space
from node.shards.store.hasher import FileChangedError, Hasher
from node.shards.store.layout import link_or_copy, remove_if_empty
from node.shards.store.manifests import LocalManifest
from node.shards.store.scanner import Survey
from node.shards.store.seeding import Seed, Seeds
from protocol.commands.shards import ShardSource
from protocol.errors import CancelledRequestError, InsufficientDiskError, InternalError, InvalidShardError, ShoalError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import Shard, ShardRef

log = logging.getLogger(__name__)


class Loader:
    """Fetches in progress, one a shard."""

    def __init__(
        self,
        settings: ShardsSettings,
        catalog: Catalog,
        survey: Survey,
        seeds: Seeds,
        remember: Remember,
        hasher: Hasher,
        swarm: Swarm,
        discovery: Discovery,
        origin: Origin | None,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._catalog = catalog
        self._survey = survey
        self._seeds = seeds
        self._remember = remember
        self._hasher = hasher
        self._tasks = tasks
        self._space = Space(settings.shards_dir, settings.min_free_disk)
        self._intake = Intake(settings, catalog, seeds, remember, hasher, swarm, discovery, origin, self._space, tasks)
        self._slots = asyncio.Semaphore(settings.max_downloads)
        self._fetches: dict[ShardRef, Fetch] = {}
        self._turns: dict[ContentId, tuple[asyncio.Lock, int]] = {}

    def fetches(self) -> list[Fetch]:
        """In progress."""
        return list(self._fetches.values())

    def is_fetching(self, ref: ShardRef) -> bool:
        return ref in self._fetches

    async def tidy(self, digest: ManifestDigest, besides: Fetch | None = None) -> None:
        """Take the folder of a fetched manifest away, if nothing is in it and no other fetch is about to use it."""
        async with self._intake.folders:
            folder = self._catalog.folder_of(digest)
            held = self._catalog.manifest_in(folder) if folder else None
            busy = any(fetch.shard.digest == digest and fetch is not besides for fetch in self.fetches())
            if held and held.fetched and not busy:
                await to_the_end_then(partial(remove_if_empty, held.folder), partial(self._removed, held))
        self._survey.poke()

    def _removed(self, held: LocalManifest, is_gone: bool) -> None:
        if is_gone:
            self._catalog.manifest_released(held)

    async def fetch(self, shard: Shard, on_progress: OnProgress | None) -> FetchedShard:
        """Have the shard here and checked; callers for one shard share one fetch."""
        fetch = self._fetches.get(shard.ref)
        if fetch is None:
            fetch = self._fetches[shard.ref] = Fetch(shard)
            task = self._tasks.create_task(self._carry(fetch), name=f"fetch {shard.entry.filename}")

            def abandon() -> None:
                self._drop(fetch)
                task.cancel()

            fetch.abandon = abandon
        return await fetch.join(on_progress)

    def _drop(self, fetch: Fetch) -> None:
        if self._fetches.get(fetch.shard.ref) is fetch:
            del self._fetches[fetch.shard.ref]

    @asynccontextmanager
    async def alone_with(self, content_id: ContentId) -> AsyncIterator[None]:
        """Nobody else fetches or evicts this content for the length of the block."""
        lock, users = self._turns.get(content_id, (asyncio.Lock(), 0))
        self._turns[content_id] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._turns.pop(content_id)
            if users > 1:
                self._turns[content_id] = (lock, users - 1)

    async def _carry(self, fetch: Fetch) -> None:
        name = fetch.entry.filename
        try:
            fetch.result.set_result(await self._fetch(fetch))
        except asyncio.CancelledError:
            fetch.fail(CancelledRequestError(f"the fetch of {name} was ended; what came is kept for the next"))
            raise
        except ShoalError as err:
            fetch.fail(err)
        except OSError as err:
            log.warning("fetching %s failed: %s", name, err)
            kind = InsufficientDiskError if err.errno in (errno.ENOSPC, errno.EDQUOT) else InternalError
            fetch.fail(kind(f"{name} could not be written: {err.strerror}"))
        except Exception:
            log.exception("fetching %s failed", name)
            fetch.fail(InternalError(f"fetching {name} failed; the node's log says why"))
        finally:
            self._drop(fetch)

    async def _fetch(self, fetch: Fetch) -> FetchedShard:
        began = time.monotonic()
        await self._survey.wait_scanned()
        async with self.alone_with(fetch.entry.content_id):
            try:
                path = await self._local(fetch)
                if path:
                    return FetchedShard(path, "local", time.monotonic() - began)
                async with self._slots:
                    path, moved = await self._intake.bring(fetch)
            except BaseException:
                await self.tidy(fetch.shard.digest, besides=fetch)
                raise
        return FetchedShard(path, _source(moved), time.monotonic() - began, moved)

    async def _local(self, fetch: Fetch) -> Path | None:
        """The shard's file, if it is here; a copy of it is made where only another manifest's shard is the same."""
        ref, entry = fetch.shard.ref, fetch.entry
        if any(file.state == "hashing" for file in self._catalog.of_shard(ref)):
            fetch.tell(FetchProgress("verifying", 0, entry.size))
            self._survey.hurry(self._catalog.of_shard(ref))
        for file in await self._catalog.wait_for_shard(ref):
            if file.state == "seeding":
                return file.path
        for copy in self._catalog.of_content(entry.content_id):
            if copy.state == "invalid":  # found so just now, it may be in the swarm still, which would take it for good
                await self._seeds.stop(copy)
        for copy in self._catalog.of_content(entry.content_id):
            if copy.state == "seeding" and (path := await self._copy(fetch, copy)):
                return path
        return None

    async def _copy(self, fetch: Fetch, copy: ShardFile) -> Path | None:
        """None where the copy is not the shard any more: it is invalid from then on."""
        path = await self._intake.target(fetch)
        pending = await self._intake.start(path, fetch)
        try:
            return await self._copy_to(pending, fetch, copy)
        finally:
            self._catalog.fetch_failed(pending)  # unless it finished

    async def _copy_to(self, pending: ShardFile, fetch: Fetch, copy: ShardFile) -> Path | None:
        path = pending.path
        async with self._space.reserved(path, fetch.entry.size):
            fetch.tell(FetchProgress("verifying", 0, fetch.entry.size))
            await asyncio.to_thread(link_or_copy, copy.path, path)
        try:
            hashed = await self._hasher.hash(path, fetch.entry.kind)
            wrong = hashed.content.content_id != fetch.entry.content_id
        except (InvalidShardError, FileChangedError):
            wrong = True
        if wrong:
            log.warning(
                "%s is not the shard that it was: %s is fetched from elsewhere", copy.path, fetch.entry.filename
            )
            await asyncio.to_thread(path.unlink, missing_ok=True)
            self._catalog.rejected(copy, f"{copy.path.name} was changed: it is not the shard that it was")
            await self._remember.forget(copy)
            await self._seeds.stop(copy)
            return None
        await self._seeds.start(Seed(path, torrent_of(fetch.entry), hashed.fingerprint), hashed.content.piece_layer)
        await self._remember.write(self._intake.finish(pending, hashed.fingerprint), hashed.content)
        return path


def _source(moved: dict[str, int]) -> ShardSource:
    """Where most of the bytes came from."""
    if not any(moved.values()):
        return "local"
    return "origin" if moved.get("origin", 0) > moved.get("peers", 0) else "peers"
