"""Brings a shard onto this machine, whatever it takes: it is here already, a copy is, or the swarm has it."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from node.shards.catalog import Catalog, ShardFile, torrent_of
from node.shards.fetching import Fetch, FetchedShard, FetchProgress, OnProgress
from node.shards.folders import link_or_copy, prepare_folder, remove_if_empty, set_aside
from node.shards.hasher import FileChangedError, Hasher
from node.shards.holding import Holding, folder_names, shard_path
from node.shards.ports import Discovery, Download, Swarm
from node.shards.remember import Remember
from node.shards.scan import Fingerprint
from node.shards.seeds import Seeds
from node.shards.settings import ShardsSettings
from node.shards.space import Space, part_of
from node.shards.survey import Survey
from node.shards.transfer import Pace, Sources, carry
from node.swarm.torrent import PeerAddress
from protocol.errors import CancelledRequestError, InsufficientDiskError, InternalError, InvalidShardError, ShoalError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import ShardEntry

log = logging.getLogger(__name__)

CONTINUE_WAIT_S = 1.0
"""How long a part file that was left behind is given to be checked before peers are asked."""

POLL_S = 0.04
STILL_POLLS = 5
"""What it holds is known when it was found the same so many times."""
SLOWEST_CHECK_BYTES_S = 50e6
"""At least so fast is a part file looked through before its first byte counts."""


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
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._survey = survey
        self._seeds = seeds
        self._remember = remember
        self._hasher = hasher
        self._swarm = swarm
        self._discovery = discovery
        self._tasks = tasks
        self._space = Space(settings.shards_dir, settings.min_free_disk)
        self._slots = asyncio.Semaphore(settings.max_downloads)
        self._fetches: dict[tuple[ManifestDigest, int], Fetch] = {}
        self._turns: dict[ContentId, tuple[asyncio.Lock, int]] = {}

    def fetches(self) -> list[Fetch]:
        """In progress."""
        return list(self._fetches.values())

    def is_fetching(self, digest: ManifestDigest, shard_id: int) -> bool:
        return (digest, shard_id) in self._fetches

    async def tidy(self, digest: ManifestDigest, besides: Fetch | None = None) -> None:
        """Take the folder of a fetched manifest away, if nothing is in it and no other fetch is about to use it."""
        folder = self._catalog.folder_of(digest)
        busy = any(fetch.holding.digest == digest and fetch is not besides for fetch in self.fetches())
        if folder and not busy and self._catalog.folders()[folder].holding.fetched:
            await asyncio.to_thread(remove_if_empty, folder)
        self._survey.poke()

    async def fetch(self, holding: Holding, entry: ShardEntry, on_progress: OnProgress | None) -> FetchedShard:
        """Have the shard here and checked; callers for one shard share one fetch."""
        key = (holding.digest, entry.shard_id)
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = self._fetches[key] = Fetch(holding, entry)
            task = self._tasks.create_task(self._carry(fetch), name=f"fetch {entry.filename}")

            def abandon() -> None:
                self._drop(fetch)
                task.cancel()

            fetch.abandon = abandon
        return await fetch.join(on_progress)

    def _drop(self, fetch: Fetch) -> None:
        key = (fetch.holding.digest, fetch.entry.shard_id)
        if self._fetches.get(key) is fetch:
            del self._fetches[key]

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
        await self._catalog.wait_until(lambda: self._survey.done_once)
        async with self.alone_with(fetch.entry.content_id):
            path = await self._local(fetch)
            if path:
                return FetchedShard(path, "local", time.monotonic() - began)
            async with self._slots:
                path, moved = await self._download(fetch)
        return FetchedShard(path, "peers" if moved else "local", time.monotonic() - began, {"peers": moved})

    async def _local(self, fetch: Fetch) -> Path | None:
        """The shard's file, if it is here; a copy of it is made where only another manifest's shard is the same."""
        digest, entry = fetch.holding.digest, fetch.entry
        if any(file.state == "hashing" for file in self._catalog.of_shard(digest, entry.shard_id)):
            fetch.tell(FetchProgress("verifying", 0, entry.size))
            self._survey.hurry(self._catalog.of_shard(digest, entry.shard_id))
            await self._catalog.wait_until(
                lambda: all(file.state != "hashing" for file in self._catalog.of_shard(digest, entry.shard_id))
            )
        for file in self._catalog.of_shard(digest, entry.shard_id):
            if file.state == "seeding":
                return file.path
        for copy in self._catalog.of_content(entry.content_id):
            if copy.state == "seeding":
                return await self._copy(fetch, copy)
        return None

    async def _copy(self, fetch: Fetch, copy: ShardFile) -> Path:
        path = await self._target(fetch)
        async with self._space.reserved(path, fetch.entry.size):
            fetch.tell(FetchProgress("verifying", 0, fetch.entry.size))
            await asyncio.to_thread(link_or_copy, copy.path, path)
        hashed = await self._hasher.hash(path, fetch.entry.kind)
        if hashed.content.content_id != fetch.entry.content_id:
            raise InvalidShardError(f"{copy.path.name} was changed: it is not the shard that it was; fetch it again")
        file = self._seeding(fetch, path, hashed.fingerprint)
        await self._seeds.start(file, hashed.content.piece_layer, verified=True)
        self._catalog.put(file)
        await self._remember.write(file, hashed.content)
        return path

    async def _target(self, fetch: Fetch) -> Path:
        folder = self._catalog.folder_of(fetch.holding.digest)
        if folder is None:
            prepared = await asyncio.to_thread(
                prepare_folder, self._settings.shards_dir, fetch.holding, self._catalog.folders()
            )
            folder = prepared[0]
            self._catalog.hold_folder(*prepared)
        return shard_path(folder, fetch.entry)

    async def _download(self, fetch: Fetch) -> tuple[Path, int]:
        """Returns the file, and how many bytes of it came from peers."""
        entry = fetch.entry
        sources = Sources(self._settings, self._discovery, fetch)
        async with self._space.reserved(self._expected_path(fetch), entry.size):
            peers = await sources.first()
            path = await self._target(fetch)
            await asyncio.to_thread(set_aside, path)
            begun = await asyncio.to_thread(part_of(path).exists)
            pending = ShardFile(path, "downloading", entry.kind, None, fetch.holding, entry)
            self._catalog.put(pending)
            try:
                kept = await self._carry_through(fetch, path, sources, peers, begun=begun)
                await self._take_up(fetch, path)
            except BaseException:
                if self._catalog.get(path) is pending:
                    self._catalog.forget(path)
                await self.tidy(fetch.holding.digest, besides=fetch)
                raise
        return path, entry.size - kept

    async def _carry_through(
        self, fetch: Fetch, path: Path, sources: Sources, peers: Sequence[PeerAddress], *, begun: bool
    ) -> int:
        """Download, and begin anew where nothing comes. Returns how many bytes were there from an earlier try."""
        entry, pace = fetch.entry, Pace()
        patience_s = self._settings.restart_s + (entry.size / SLOWEST_CHECK_BYTES_S if begun else 0)
        kept: int | None = None
        while True:
            download: Download = await self._swarm.download(torrent_of(entry), path)
            try:
                if kept is None:
                    kept = await _kept(download) if begun else 0
                if await carry(download, fetch, sources, peers, self._settings, pace, patience_s):
                    return kept
                if pace.idle_s >= self._settings.stall_timeout_s:
                    raise sources.none(f"{pace.most} of {entry.size} bytes came, then none for {pace.idle_s:.0f} s")
                await download.cancel()
            except BaseException:
                pace.saw(download.progress().bytes_done)
                with suppress(ShoalError):
                    await asyncio.shield(download.cancel(delete=not begun and not pace.most))
                raise
            patience_s = self._settings.restart_s
            log.info("%s: nothing came for %.0f s, beginning anew", entry.filename, pace.idle_s)
            peers = await sources.look_up() or peers

    def _expected_path(self, fetch: Fetch) -> Path:
        """Where the shard will most likely lie."""
        digest, manifest = fetch.holding.digest, fetch.holding.manifest
        folder = self._catalog.folder_of(digest) or self._settings.shards_dir / folder_names(manifest.name, digest)[0]
        return shard_path(folder, fetch.entry)

    async def _take_up(self, fetch: Fetch, path: Path) -> None:
        """The swarm has checked every byte and seeds the file: look at its structure, and let it be known."""
        entry = fetch.entry
        fetch.tell(FetchProgress("verifying", entry.size, entry.size))
        try:
            fingerprint = await self._hasher.check(path, entry.kind)
        except (InvalidShardError, FileChangedError, OSError) as err:
            await self._swarm.remove(torrent_of(entry).info_hash)
            error = f"{entry.filename} came as its manifest says, and is not in order: {err}"
            seen = await asyncio.to_thread(Fingerprint.of, path)
            self._catalog.put(ShardFile(path, "invalid", entry.kind, seen, fetch.holding, entry, error))
            raise InvalidShardError(error) from None
        file = self._seeding(fetch, path, fingerprint)
        self._seeds.adopt(file)
        self._catalog.put(file)
        self._remember.later(file)

    def _seeding(self, fetch: Fetch, path: Path, fingerprint: Fingerprint) -> ShardFile:
        return ShardFile(path, "seeding", fetch.entry.kind, fingerprint, fetch.holding, fetch.entry)


async def _kept(download: Download) -> int:
    """Bytes that an earlier try left: known when the swarm has looked through the part file, before peers are asked."""
    loop = asyncio.get_running_loop()
    kept, still = 0, 0
    give_up = loop.time() + CONTINUE_WAIT_S
    while loop.time() < give_up and still < STILL_POLLS:
        await asyncio.sleep(POLL_S)
        found = download.progress().bytes_done
        still = still + 1 if found and found == kept else 0
        if found > kept:
            kept, give_up = found, loop.time() + CONTINUE_WAIT_S
    return kept
