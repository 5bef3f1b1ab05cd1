"""One fetch from top to bottom: `ShardFetch.run` reads locate, reserve, providers, download, check, adopt, announce."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from node.background import FirstErrorGroup
from node.clock import Clock
from node.files import Fingerprint, part_path, replace_file, whole_part_path
from node.shards.fetch.block_assignment import BlockAssignment, blocks_of
from node.shards.fetch.folders import ManifestFolders
from node.shards.fetch.job import FetchedShard, FetchJob
from node.shards.fetch.origin_feeder import OriginFeeder, WholeFileNeededError
from node.shards.fetch.origin_selector import OriginSelector
from node.shards.fetch.providers import Providers, peer_addresses
from node.shards.fetch.want_announcer import WantAnnouncer
from node.shards.fetch.whole_file import WholeFileDownload
from node.shards.interfaces import DownloadHandle, OriginCatalog, OriginReader, ProviderDirectory, TorrentClient
from node.shards.pins import Pins
from node.shards.settings import ShardsSettings
from node.shards.store.backfill import Backfill
from node.shards.store.catalog import Catalog, ShardFile, torrent_of
from node.shards.store.disk_space import DiskSpace
from node.shards.store.hasher import FileChangedError, Hasher
from node.shards.store.layout import link_or_copy, set_aside
from node.shards.store.scanner import Scanner
from node.shards.store.seeding import Seed, Seeding
from node.swarm.torrent import DownloadProgress, PeerAddress
from protocol.commands.shards import ShardSource
from protocol.content import ContentHash
from protocol.errors import InvalidShardError, OriginError, ShardInUseError, ShoalError

log = logging.getLogger(__name__)

RESUME_WAIT_S = 1.0
"""How long a part file that was left behind is given to be checked before peers are asked."""
RESUME_POLL_S = 0.04
RESUME_POLLS = 5
"""After so many equal answers it is known what a part file has."""
SLOWEST_CHECK_BYTES_S = 50e6
"""At least so fast is a part file looked through before its first byte counts."""
UNIT_TIMEOUT_S = 5.0
TICK_S = 0.25
RATE_MEMORY = 0.85
"""Of the origin's rate as reported, how much is left of it a tick later."""


@dataclass(frozen=True)
class FetchStore:
    """What a fetch uses of this node's files."""

    catalog: Catalog
    scanner: Scanner
    seeding: Seeding
    backfill: Backfill
    hasher: Hasher
    space: DiskSpace
    folders: ManifestFolders
    pins: Pins


@dataclass(frozen=True)
class FetchNetwork:
    """Where a shard comes from if it is not here."""

    torrents: TorrentClient
    directory: ProviderDirectory
    origins: OriginCatalog | None


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A file that came, and from where."""

    path: Path
    bytes_by_source: dict[str, int]
    content: ContentHash | None = None
    """Of a copy, or of a whole file from an origin. None if the swarm downloaded the file: it seeds it already."""


class ShardFetch:
    """One fetch of one shard. `run()` is called once; its steps are the methods below it, in their order."""

    def __init__(
        self,
        job: FetchJob,
        settings: ShardsSettings,
        store: FetchStore,
        network: FetchNetwork,
        slots: asyncio.Semaphore,
        tasks: asyncio.TaskGroup,
        clock: Clock,
    ) -> None:
        self._job = job
        self._shard = job.shard
        self._entry = job.shard.entry
        self._torrent = torrent_of(job.shard.entry)
        self._settings = settings
        self._store = store
        self._network = network
        self._slots = slots
        self._tasks = tasks
        self._clock = clock
        self._providers = Providers(settings, network.directory, job.shard, clock)
        self._feeder: OriginFeeder | None = None
        """None until `providers`, and if no origin has anything of this manifest."""
        self._file: ShardFile | None = None
        """The catalog's record of the file that this fetch writes; None before it writes one."""

    async def run(self) -> FetchedShard:
        """Have the shard here, checked and seeded. Raises what `Shards.fetch` raises."""
        started_at = self._clock.now()
        try:
            path = await self.locate()
            if path is not None:
                return FetchedShard(path, "local", self._clock.now() - started_at)
            async with self.reserve():
                peers = await self.providers()
                came = await self.download(peers)
                fingerprint = await self.check(came)
                await self.adopt(came, fingerprint)
                await self.announce(came, fingerprint)
        finally:
            self._close()
        source = _main_source(came.bytes_by_source)
        return FetchedShard(came.path, source, self._clock.now() - started_at, came.bytes_by_source)

    # Locate

    async def locate(self) -> Path | None:
        """The shard's file if it is here, or a new copy of another manifest's file that has the same content."""
        catalog = self._store.catalog
        if any(file.state == "hashing" for file in catalog.of_shard(self._shard.ref)):
            self._job.report(DownloadProgress(0, self._entry.size, phase="verifying"))
            self._store.scanner.hurry(catalog.of_shard(self._shard.ref))
        for file in await catalog.wait_for_shard(self._shard.ref):
            if file.state == "seeding":
                return file.path
        for copy in catalog.of_content(self._entry.content_id):
            if copy.state == "invalid":  # just now, perhaps: a swarm that still seeds it would take the shard as here
                await self._store.seeding.stop(copy)
        for copy in catalog.of_content(self._entry.content_id):
            if copy.state == "seeding" and (path := await self._copy(copy)):
                return path
        return None

    async def _copy(self, copy: ShardFile) -> Path | None:
        """None if the copied file is not the shard any more: it is invalid from then on."""
        path = await self._store.folders.path(self._shard)
        await self._leave_unpinned(path)
        await self._start_file(path)
        async with self._store.space.reserved(path, self._entry.size):
            self._job.report(DownloadProgress(0, self._entry.size, phase="verifying"))
            await asyncio.to_thread(link_or_copy, copy.path, path)
        try:
            hashed = await self._store.hasher.hash(path, self._entry.kind)
            is_wrong = hashed.content.content_id != self._entry.content_id
        except (InvalidShardError, FileChangedError):
            is_wrong = True
        if is_wrong:
            log.warning(
                "%s is not the shard that it was: %s is fetched from elsewhere", copy.path, self._entry.filename
            )
            await asyncio.to_thread(path.unlink, missing_ok=True)
            self._store.catalog.rejected(copy, f"{copy.path.name} was changed: it is not the shard that it was")
            await self._store.backfill.forget(copy)
            await self._store.seeding.stop(copy)
            self._close()
            return None
        came = _Arrival(path, {}, hashed.content)
        await self.adopt(came, hashed.fingerprint)
        await self.announce(came, hashed.fingerprint)
        return path

    # Reserve

    @asynccontextmanager
    async def reserve(self) -> AsyncIterator[None]:
        """Hold one of the `max_downloads` slots, and disk space for the shard, for the length of the block."""
        path = self._store.folders.expected_path(self._shard)
        async with self._slots, self._store.space.reserved(path, self._entry.size):
            yield

    # Providers

    async def providers(self) -> list[PeerAddress]:
        """Find peers that have the shard. If an origin has it, look for `origin_after_s`, then let the origin begin."""
        self._feeder = await self._make_feeder()
        peers = await self._providers.first(has_origin=self._feeder is not None)
        if self._feeder and not self._providers.any_complete:
            self._feeder.begin()
        return peers

    async def _make_feeder(self) -> OriginFeeder | None:
        origins = self._network.origins.locations(self._shard.signed) if self._network.origins else ()
        if not origins:
            return None
        directory, content_id = self._network.directory, self._entry.content_id
        unit_bytes = await _range_unit_bytes(origins[0])
        assignment = BlockAssignment(directory.node_id, content_id, blocks_of(self._torrent, unit_bytes))
        bt_port = self._network.torrents.port
        want_announcer = WantAnnouncer(directory, content_id, assignment, bt_port, peer_addresses, self._clock)
        selector = OriginSelector(origins, self._entry, self._torrent, self._clock)
        return OriginFeeder(
            self._settings, self._providers, selector, want_announcer, self._tasks, self._clock, unit_bytes=unit_bytes
        )

    # Download

    async def download(self, peers: Sequence[PeerAddress]) -> _Arrival:
        """Have all bytes of the shard in its file: from peers with an origin beside them, or whole from an origin."""
        path = await self._store.folders.path(self._shard)
        await self._leave_unpinned(path)
        await asyncio.to_thread(set_aside, path)
        await self._start_file(path)
        try:
            return await self._download_by_swarm(path, peers)
        except WholeFileNeededError:
            log.info("%s has no torrent anywhere: an origin gives it in one piece", self._entry.filename)
        assert self._feeder is not None, "only a feeder needs a shard whole"
        try:
            return await self._download_whole(path, self._feeder)
        except OriginError:
            if not (self._feeder.selector.exhausted and self._feeder.saw_other_fetchers):
                raise
            log.info("%s: no origin gives it to this node, other nodes that fetch it may", self._entry.filename)
        return await self._download_by_swarm(path, peers)

    async def _leave_unpinned(self, path: Path) -> None:
        """Before a byte comes for a lease alone: the file gets no pin, also if the node is killed meanwhile."""
        if self._job.for_lease:
            known = self._store.catalog.get(path)
            is_free = known is None and not await asyncio.to_thread(path.exists)
            await self._store.pins.coming(path, known, is_free=is_free)

    async def _start_file(self, path: Path) -> None:
        """Tell the catalog that this fetch writes the file from now on. Raises ShardInUseError if another does."""
        catalog = self._store.catalog
        while (known := catalog.get(path)) and known.state == "seeding":
            if catalog.gone(known):  # another file, which is set aside
                await self._store.seeding.stop(known)
        self._file = catalog.fetch_started(known, path, self._shard)
        if self._file is None:
            raise ShardInUseError(f"{path.name} is being fetched as a shard of another manifest: wait for its end")

    def _close(self) -> None:
        """End the record of a file that did not come, and what the feeder announces. Does nothing twice."""
        file, self._file = self._file, None
        if file and self._store.catalog.fetch_failed(file):  # not if it was finished or rejected
            self._store.pins.did_not_come(file.path)
        if self._feeder:
            self._feeder.close()

    async def _download_by_swarm(self, path: Path, peers: Sequence[PeerAddress]) -> _Arrival:
        """Download, and restart the download if nothing comes. Raises WholeFileNeededError."""
        feeder, pace = self._feeder, _Pace(self._clock)
        has_part = await asyncio.to_thread(part_path(path).exists)
        patience_s = self._settings.restart_s + (self._entry.size / SLOWEST_CHECK_BYTES_S if has_part else 0)
        resumed_bytes: int | None = None
        while True:
            layer = await feeder.first_layer() if feeder and feeder.begun else b""
            download: DownloadHandle = await self._network.torrents.download(self._torrent, path, layer)
            try:
                if resumed_bytes is None:
                    resumed_bytes = await self._resumed_bytes(download) if has_part else 0
                if await self._follow(download, peers, pace, patience_s):
                    break
                if pace.idle_s >= self._settings.stall_timeout_s:
                    came = f"{pace.most} of {self._entry.size} bytes came, then none for {pace.idle_s:.0f} s"
                    raise self._providers.no_source(came)
                await download.cancel()
            except BaseException as err:
                pace.observe(download.progress().bytes_done)
                is_useless = not pace.most and (not has_part or isinstance(err, WholeFileNeededError))
                with suppress(ShoalError):
                    await asyncio.shield(download.cancel(delete=is_useless))
                raise
            patience_s = self._settings.restart_s
            log.info("%s: nothing came for %.0f s, the download is restarted", self._entry.filename, pace.idle_s)
            peers = await self._providers.look_up() or peers
        from_peers = self._entry.size - resumed_bytes - (feeder.kept_bytes if feeder else 0)
        if not feeder or not feeder.origin_bytes:
            return _Arrival(path, {"peers": from_peers})
        return _Arrival(path, ({"peers": from_peers} if from_peers > 0 else {}) | {"origin": feeder.origin_bytes})

    async def _resumed_bytes(self, download: DownloadHandle) -> int:
        """Bytes that an earlier try left: known when the swarm has checked the part file, before peers are asked."""
        resumed, equal = 0, 0
        give_up_at = self._clock.now() + RESUME_WAIT_S
        while self._clock.now() < give_up_at and equal < RESUME_POLLS:
            await self._clock.sleep(RESUME_POLL_S)
            found = download.progress().bytes_done
            equal = equal + 1 if found and found == resumed else 0
            if found > resumed:
                resumed, give_up_at = found, self._clock.now() + RESUME_WAIT_S
        return resumed

    async def _follow(
        self, download: DownloadHandle, peers: Sequence[PeerAddress], pace: _Pace, patience_s: float
    ) -> bool:
        """See a download to its end, with new peers and what the origin gives: True.

        False if nothing came for `patience_s` at the start, or for `restart_s` later: it is time to restart it; never
        once the origin feeds it, which has a patience of its own. Raises what the download or the feeder raises.
        """
        end: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        end.add_done_callback(lambda future: future.cancelled() or future.exception())
        async with FirstErrorGroup() as beside:
            download.add_peers(peers)
            tasks = [
                beside.create_task(self._report(download, pace, patience_s, end)),
                beside.create_task(self._look_up_again(download)),
                beside.create_task(_settle(end, download.verified)),
            ]
            if self._feeder:
                tasks.append(beside.create_task(_settle(end, partial(self._feeder.feed, download))))
            try:
                return await end
            finally:
                for task in tasks:
                    task.cancel()

    async def _report(
        self, download: DownloadHandle, pace: _Pace, patience_s: float, end: asyncio.Future[bool]
    ) -> None:
        """Tell the job how far the download is; end it with False if nothing comes for too long."""
        feeder = self._feeder
        give_up_at = self._clock.now() + patience_s
        rate_at, rate_bytes, origin_rate = self._clock.now(), feeder.origin_bytes if feeder else 0, 0.0
        reported = 0
        while True:
            now, progress = self._clock.now(), download.progress()
            if pace.observe(progress.bytes_done):
                give_up_at = max(give_up_at, now + self._settings.restart_s)
            bytes_done = progress.bytes_done
            if feeder:
                if feeder.begun:
                    give_up_at = float("inf")
                if now > rate_at:
                    rate = (feeder.origin_bytes - rate_bytes) / (now - rate_at)
                    origin_rate += (1 - RATE_MEMORY) * (rate - origin_rate)
                    rate_at, rate_bytes = now, feeder.origin_bytes
                # A piece that came in part may be dropped: what is reported does not fall.
                bytes_done = reported = min(progress.bytes_total, max(reported, bytes_done + feeder.pending_bytes))
            rate_bytes_s = progress.rate_bytes_s + origin_rate
            self._job.report(DownloadProgress(bytes_done, progress.bytes_total, rate_bytes_s, progress.peers))
            if now >= give_up_at and not end.done():
                end.set_result(False)
            await self._clock.sleep(min(TICK_S, give_up_at - now) if give_up_at > now else TICK_S)

    async def _look_up_again(self, download: DownloadHandle) -> None:
        while True:
            await self._clock.sleep(self._settings.relookup_s)
            download.add_peers(await self._providers.look_up())

    async def _download_whole(self, path: Path, feeder: OriginFeeder) -> _Arrival:
        """Download the shard whole from an origin: this node is its first seed."""
        whole = WholeFileDownload(
            feeder.selector,
            self._job,
            path,
            self._clock,
            patience_s=self._settings.stall_timeout_s,
            lull_s=feeder.lull_s,
        )

        def failed() -> ShoalError:
            came = f"{whole.bytes_done} of {self._entry.size} bytes came in one piece"
            return self._providers.no_source_or_origin(came, feeder.selector.errors)

        async with AsyncExitStack() as space:
            if await asyncio.to_thread(part_path(path).exists):  # Some of it counts, and the space reserved is for it.
                await space.enter_async_context(self._store.space.reserved(whole.part, self._entry.size))
            content = await whole.run(failed)
        await asyncio.to_thread(replace_file, whole.part, path)
        await asyncio.to_thread(part_path(path).unlink, missing_ok=True)
        return _Arrival(path, {"origin": whole.origin_bytes}, content)

    # Check

    async def check(self, came: _Arrival) -> Fingerprint:
        """Check that the file has the structure of its kind. Raises InvalidShardError; the file is invalid then."""
        assert self._file is not None, "a file came"
        self._job.report(DownloadProgress(self._entry.size, self._entry.size, phase="verifying"))
        try:
            return await self._store.hasher.check(came.path, self._entry.kind)
        except (InvalidShardError, FileChangedError, OSError) as err:
            error = f"{self._entry.filename} came as its manifest says, and is not in order: {err}"
            fingerprint = await asyncio.to_thread(Fingerprint.of, came.path)
            self._store.catalog.rejected(self._file, error, fingerprint)
            if came.content is None:
                await self._network.torrents.remove(self._torrent.info_hash)
            raise InvalidShardError(error) from None

    # Adopt

    async def adopt(self, came: _Arrival, fingerprint: Fingerprint) -> None:
        """Have the file seeded."""
        seed = Seed(came.path, self._torrent, fingerprint)
        if came.content is None:
            self._store.seeding.adopt(seed)
        else:
            await self._store.seeding.start(seed, came.content.piece_layer)

    # Announce

    async def announce(self, came: _Arrival, fingerprint: Fingerprint) -> None:
        """Tell the catalog that the shard is here, and so the announcer, which tells the cluster; keep its hash."""
        assert self._file is not None, "a file came"
        file = self._store.catalog.fetch_finished(self._file, fingerprint)
        assert file, f"{came.path} was changed by another task while it was fetched"
        await self._store.pins.came(came.path, fingerprint)
        if came.content is None:
            self._store.backfill.later(file)
            await asyncio.to_thread(whole_part_path(came.path).unlink, missing_ok=True)
        else:
            await self._store.backfill.write(file, came.content)


class _Pace:
    """When a download last got further than ever before, over all its restarts."""

    def __init__(self, clock: Clock) -> None:
        self.most = 0
        """The most bytes that were here at a time."""
        self._clock = clock
        self._moved_at = clock.now()

    def observe(self, bytes_done: int) -> bool:
        """Whether so many bytes are more than ever before."""
        if bytes_done <= self.most:
            return False
        self.most, self._moved_at = bytes_done, self._clock.now()
        return True

    @property
    def idle_s(self) -> float:
        return self._clock.now() - self._moved_at


async def _settle(end: asyncio.Future[bool], work: Callable[[], Awaitable[Any]]) -> None:
    """Do the work; its end, or its error, is the end of the download unless that has ended."""
    try:
        await work()
    except Exception as err:
        if not end.done():
            end.set_exception(err)
    else:
        if not end.done():
            end.set_result(True)


async def _range_unit_bytes(origin: OriginReader) -> int:
    """1 also if the origin cannot be used by this node: a node without its key takes no blocks from it."""
    with suppress(ShoalError, TimeoutError):
        async with asyncio.timeout(UNIT_TIMEOUT_S):
            return max(1, await origin.range_unit_bytes())
    return 1


def _main_source(bytes_by_source: dict[str, int]) -> ShardSource:
    """Where most of the bytes came from."""
    if not any(bytes_by_source.values()):
        return "local"
    return "origin" if bytes_by_source.get("origin", 0) > bytes_by_source.get("peers", 0) else "peers"
