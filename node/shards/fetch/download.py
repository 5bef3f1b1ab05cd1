"""Brings one shard from outside into the shards folder: from peers, origins beside them, or whole from an origin."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

from node.background import to_the_end_then
from node.files import Fingerprint
from node.shards.fetch.block_assignment import Lease, blocks_of
from node.shards.fetch.job import Fetch, FetchProgress
from node.shards.fetch.origin_feeder import Feeder, WholeNeededError
from node.shards.fetch.origin_selector import Supply
from node.shards.fetch.providers import Sources, addresses
from node.shards.fetch.transfer import Pace, carry
from node.shards.fetch.want_announcer import Wanting
from node.shards.fetch.whole_file import Whole
from node.shards.interfaces import Discovery, Download, Origin, OriginPlace, Swarm
from node.shards.settings import ShardsSettings
from node.shards.store.backfill import Remember
from node.shards.store.catalog import Catalog, ShardFile, torrent_of
from node.shards.store.disk_space import Space, part_of, whole_part_of
from node.shards.store.hasher import FileChangedError, Hasher
from node.shards.store.layout import prepare_folder, set_aside
from node.shards.store.manifests import folder_names, shard_path
from node.shards.store.seeding import Seed, Seeds
from node.swarm.torrent import PeerAddress
from protocol.errors import InvalidShardError, OriginError, ShardInUseError, ShoalError
from protocol.manifest import ShardEntry

log = logging.getLogger(__name__)

CONTINUE_WAIT_S = 1.0
"""How long a part file that was left behind is given to be checked before peers are asked."""

UNIT_TIMEOUT_S = 5.0
POLL_S = 0.04
STILL_POLLS = 5
"""What it holds is known when it was found the same so many times."""
SLOWEST_CHECK_BYTES_S = 50e6
"""At least so fast is a part file looked through before its first byte counts."""


class Intake:
    """Has the disk's space, the folder, and whatever source there is for each shard that comes."""

    def __init__(
        self,
        settings: ShardsSettings,
        catalog: Catalog,
        seeds: Seeds,
        remember: Remember,
        hasher: Hasher,
        swarm: Swarm,
        discovery: Discovery,
        origin: Origin | None,
        space: Space,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._seeds = seeds
        self._remember = remember
        self._hasher = hasher
        self._swarm = swarm
        self._discovery = discovery
        self._origin = origin
        self._space = space
        self._tasks = tasks
        self.folders = asyncio.Lock()
        """Held while a manifest's folder is made or taken away, and the catalog told."""

    async def target(self, fetch: Fetch) -> Path:
        async with self.folders:
            folder = self._catalog.folder_of(fetch.shard.digest) or await self._prepare(fetch)
        return shard_path(folder, fetch.entry)

    async def _prepare(self, fetch: Fetch) -> Path:
        prepare = partial(prepare_folder, self._settings.shards_dir, fetch.shard.signed, self._catalog.folders())
        # Also of a fetch that is cancelled meanwhile: `tidy` takes away what is held. If the scanner was quicker, the
        # catalog has this manifest already.
        held = await to_the_end_then(prepare, lambda held: self._catalog.manifest_held(None, held))
        return held.folder

    async def start(self, path: Path, fetch: Fetch) -> ShardFile:
        """Tell the catalog that this fetch writes the file from now on. Raises ShardInUseError if another does."""
        while (known := self._catalog.get(path)) and known.state == "seeding":
            if self._catalog.gone(known):  # another file, which is set aside
                await self._seeds.stop(known)
        pending = self._catalog.fetch_started(known, path, fetch.shard)
        if pending is None:
            raise ShardInUseError(f"{path.name} is being fetched as a shard of another manifest: wait for its end")
        return pending

    def finish(self, pending: ShardFile, fingerprint: Fingerprint) -> ShardFile:
        """Tell the catalog that the file is here, checked and seeded."""
        file = self._catalog.fetch_finished(pending, fingerprint)
        assert file, f"{pending.path} was changed by somebody else while it was fetched"
        return file

    async def bring(self, fetch: Fetch) -> tuple[Path, dict[str, int]]:
        """Have the shard here, checked and seeded. Returns its file, and how many bytes came from where."""
        entry = fetch.entry
        sources = Sources(self._settings, self._discovery, fetch)
        feeder = await self._feeder(fetch, sources)
        async with self._space.reserved(self._expected_path(fetch), entry.size):
            try:
                peers = await sources.first(insist=feeder is None)
                if feeder and not sources.whole:
                    feeder.begin()
                path = await self.target(fetch)
                await asyncio.to_thread(set_aside, path)
                begun = await asyncio.to_thread(part_of(path).exists)
                pending = await self.start(path, fetch)
                try:
                    moved = await self._bring_to(fetch, pending, sources, peers, feeder, begun=begun)
                except BaseException:
                    self._catalog.fetch_failed(pending)
                    raise
            finally:
                if feeder:
                    feeder.close()
        return path, moved

    async def _bring_to(
        self,
        fetch: Fetch,
        pending: ShardFile,
        sources: Sources,
        peers: Sequence[PeerAddress],
        feeder: Feeder | None,
        *,
        begun: bool,
    ) -> dict[str, int]:
        path = pending.path
        try:
            kept = await self._carry_through(fetch, path, sources, peers, feeder, begun=begun)
        except WholeNeededError:
            assert feeder is not None, "only a feeder needs a shard whole"
            whole = Whole(feeder.supply, fetch, path, self._settings.stall_timeout_s, feeder.lull_s)
            try:
                await self._come_whole(fetch, pending, whole, sources)
            except OriginError:
                if not (feeder.supply.exhausted and feeder.accompanied):
                    raise
                log.info("%s: no origin gives it here, others that fetch it may", fetch.entry.filename)
            else:
                return {"origin": whole.origin_bytes}
            begun = await asyncio.to_thread(part_of(path).exists)
            kept = await self._carry_through(fetch, path, sources, peers, feeder, begun=begun)
        await self._take_up(fetch, pending)
        await asyncio.to_thread(whole_part_of(path).unlink, missing_ok=True)
        from_peers = fetch.entry.size - kept - (feeder.kept_bytes if feeder else 0)
        if not feeder or not feeder.origin_bytes:
            return {"peers": from_peers}
        return ({"peers": from_peers} if from_peers > 0 else {}) | {"origin": feeder.origin_bytes}

    async def _feeder(self, fetch: Fetch, sources: Sources) -> Feeder | None:
        """None where no origin has anything of this manifest."""
        places = self._origin.locations(fetch.shard.signed) if self._origin else ()
        if not places:
            return None
        torrent = torrent_of(fetch.entry)
        unit_bytes = await _unit_bytes(places[0])
        blocks = blocks_of(torrent, unit_bytes)
        lease = Lease(self._discovery.node_id, torrent.content_id, len(blocks))
        block_pieces = len(blocks[0].pieces)
        wanting = Wanting(self._discovery, torrent.content_id, lease, block_pieces, self._swarm.port, addresses)
        supply = Supply(places, fetch.entry, torrent)
        return Feeder(self._settings, torrent, blocks, unit_bytes, sources, supply, wanting, self._tasks)

    async def _carry_through(
        self,
        fetch: Fetch,
        path: Path,
        sources: Sources,
        peers: Sequence[PeerAddress],
        feeder: Feeder | None,
        *,
        begun: bool,
    ) -> int:
        """Download, and begin anew where nothing comes. Returns how many bytes were there from an earlier try."""
        entry, pace = fetch.entry, Pace()
        patience_s = self._settings.restart_s + (entry.size / SLOWEST_CHECK_BYTES_S if begun else 0)
        kept: int | None = None
        while True:
            layer = await feeder.first_layer() if feeder and feeder.begun else b""
            download = await self._begin(entry, path, layer)
            try:
                if kept is None:
                    kept = await _kept(download) if begun else 0
                if await carry(download, fetch, sources, peers, self._settings, pace, patience_s, feeder):
                    return kept
                if pace.idle_s >= self._settings.stall_timeout_s:
                    raise sources.none(f"{pace.most} of {entry.size} bytes came, then none for {pace.idle_s:.0f} s")
                await download.cancel()
            except BaseException as err:
                pace.saw(download.progress().bytes_done)
                useless = not pace.most and (not begun or isinstance(err, WholeNeededError))
                with suppress(ShoalError):
                    await asyncio.shield(download.cancel(delete=useless))
                raise
            patience_s = self._settings.restart_s
            log.info("%s: nothing came for %.0f s, beginning anew", entry.filename, pace.idle_s)
            peers = await sources.look_up() or peers

    async def _begin(self, entry: ShardEntry, path: Path, layer: bytes) -> Download:
        if layer:
            download: Download = await self._swarm.download(torrent_of(entry), path, layer)
        else:
            download = await self._swarm.download(torrent_of(entry), path)
        return download

    async def _come_whole(self, fetch: Fetch, pending: ShardFile, whole: Whole, sources: Sources) -> None:
        """No torrent of it is to be had: take it whole from an origin, and be its first seed."""
        entry, path = fetch.entry, pending.path
        log.info("%s has no torrent anywhere: it comes whole from an origin", entry.filename)
        async with AsyncExitStack() as room:
            if await asyncio.to_thread(part_of(path).exists):  # Something in it counts, and the room is for it.
                await room.enter_async_context(self._space.reserved(whole.part, entry.size))
            content = await whole.fetch(
                lambda: sources.failed(f"{whole.bytes_done} of {entry.size} bytes came whole", whole.supply)
            )
        await asyncio.to_thread(whole.part.replace, path)
        await asyncio.to_thread(part_of(path).unlink, missing_ok=True)
        fingerprint = await self._in_order(fetch, pending)
        await self._seeds.start(Seed(path, torrent_of(entry), fingerprint), content.piece_layer)
        await self._remember.write(self.finish(pending, fingerprint), content)

    def _expected_path(self, fetch: Fetch) -> Path:
        """Where the shard will most likely lie."""
        digest, manifest = fetch.shard.digest, fetch.shard.manifest
        folder = self._catalog.folder_of(digest) or self._settings.shards_dir / folder_names(manifest.name, digest)[0]
        return shard_path(folder, fetch.entry)

    async def _take_up(self, fetch: Fetch, pending: ShardFile) -> None:
        """The swarm has checked every byte and seeds the file: look at its structure, and let it be known."""
        try:
            fingerprint = await self._in_order(fetch, pending)
        except InvalidShardError:
            await self._swarm.remove(torrent_of(fetch.entry).info_hash)
            raise
        self._seeds.adopt(Seed(pending.path, torrent_of(fetch.entry), fingerprint))
        self._remember.later(self.finish(pending, fingerprint))

    async def _in_order(self, fetch: Fetch, pending: ShardFile) -> Fingerprint:
        """The file's fingerprint, if its structure is what its kind must be; else it is invalid: InvalidShardError."""
        entry, path = fetch.entry, pending.path
        fetch.tell(FetchProgress("verifying", entry.size, entry.size))
        try:
            return await self._hasher.check(path, entry.kind)
        except (InvalidShardError, FileChangedError, OSError) as err:
            error = f"{entry.filename} came as its manifest says, and is not in order: {err}"
            seen = await asyncio.to_thread(Fingerprint.of, path)
            self._catalog.rejected(pending, error, seen)
            raise InvalidShardError(error) from None


async def _unit_bytes(place: OriginPlace) -> int:
    """1 also where the place cannot be used here: a node without its key takes no blocks from it."""
    with suppress(ShoalError, TimeoutError):
        async with asyncio.timeout(UNIT_TIMEOUT_S):
            return max(1, await place.range_unit_bytes())
    return 1


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
