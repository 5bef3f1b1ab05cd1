"""What becomes of a shard that is here: looked through again, found wrong, or given up."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path

from node.shards.fetch.fetcher import Fetcher
from node.shards.leases import LeasedId, Leases
from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.disk_space import invalid_of, part_of, whole_part_of
from node.shards.store.hash_cache import Index
from node.shards.store.hasher import FileChangedError, Hasher
from node.shards.store.manifests import shard_path
from node.shards.store.seeding import Seeds
from node.shards.store.verifier import Admission
from node.swarm.torrent import Torrent
from protocol.errors import InvalidShardError, ShardInUseError, ShardNotFoundError
from protocol.ids import ContentId
from protocol.manifest import Shard


class Custody:
    """Verifies and evicts, and takes a file out of circulation as soon as it is known to be wrong."""

    def __init__(
        self,
        catalog: Catalog,
        index: Index,
        seeds: Seeds,
        admission: Admission,
        fetcher: Fetcher,
        hasher: Hasher,
        leases: Leases,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._seeds = seeds
        self._admission = admission
        self._fetcher = fetcher
        self._hasher = hasher
        self._leases = leases
        self._tasks = tasks
        self._withdrawing: set[asyncio.Task[None]] = set()

    @property
    def is_idle(self) -> bool:
        """Whether nothing that was found wrong is seeded still."""
        return not self._withdrawing

    async def wait_idle(self) -> None:
        while self._withdrawing:
            await asyncio.wait(self._withdrawing)

    async def evict(self, shard: Shard) -> Path:
        """Delete a shard's file, and what an unfinished download or a bad file left of it. Returns where it was."""
        if shard.entry.shard_id in self._catalog.loaded(shard.digest):
            raise ShardInUseError(f"{shard.label} is loaded: unload it first")
        if self._fetcher.is_fetching(shard.ref):
            raise ShardInUseError(f"{shard.label} is being fetched: cancel that first")
        self._check_leases(shard)
        async with self._fetcher.alone_with(shard.entry.content_id):
            self._check_leases(shard)
            folder = self._catalog.folder_of(shard.digest)
            gone: list[Path] = []
            for file in self._catalog.of_shard(shard.ref):
                await self._admission.withdraw(file)
                await asyncio.to_thread(_unlink, file.path)
                await asyncio.to_thread(self._index.forget, file.path)
                self._catalog.evicted(file)
                gone.append(file.path)
            if folder:
                path = shard_path(folder, shard.entry)
                left_over = await asyncio.to_thread(_unlink, part_of(path))
                left_over |= await asyncio.to_thread(_unlink, whole_part_of(path))
                left_over |= await asyncio.to_thread(_unlink, invalid_of(path))
                gone += [path] if left_over else []
            if not gone:
                raise ShardNotFoundError(f"{shard.label} is not on this node; LIST_FILES shows what is")
            await self._fetcher.remove_unused_folder(shard.digest)
        return gone[0]

    def _check_leases(self, shard: Shard) -> None:
        leased = LeasedId(shard.digest, shard.entry.shard_id, shard.entry.content_id)
        holders = self._leases.holders(leased, time.monotonic())
        if holders.leases:
            count = "1 lease" if holders.leases == 1 else f"{holders.leases} leases"
            raise ShardInUseError(
                f"{shard.label} is held by {count} for {holders.expires_in_s:.0f} s more: "
                "release it, or wait until then",
                {"leases": holders.leases, "expires_in_s": holders.expires_in_s},
            )

    async def verify(self, shard: Shard) -> ContentId | None:
        """Hash a shard's file again. Returns what it holds, None if it cannot be read."""
        entry, file = shard.entry, next(iter(self._catalog.of_shard(shard.ref)), None)
        if file is None or file.state == "downloading":
            raise ShardNotFoundError(f"{shard.label} is not on this node: FETCH_SHARD gets it")
        try:
            hashed = await self._hasher.hash(file.path, entry.kind, check=False)
        except (OSError, FileChangedError, InvalidShardError) as err:
            await self._distrust(file, f"{file.path.name} cannot be read whole: {err}")
            return None
        found = hashed.content.content_id
        if found != entry.content_id:
            await self._distrust(file, f"{file.path.name} holds content {found}, its manifest says {entry.content_id}")
        return found

    def on_invalid(self, torrent: Torrent, reason: str) -> None:
        """The swarm noticed that a file which it seeds is not what it was."""
        path = self._seeds.seeded_path(torrent)
        for file in self._catalog.of_torrent(torrent):
            if file.path == path:
                self.distrust(file, f"{file.path.name} is not what was hashed: {reason}")

    def distrust(self, file: ShardFile, error: str) -> None:
        """A file that was good is not: from now on it is invalid, and soon neither seeded nor remembered."""
        if self._is_now_invalid(file, error):
            self._withdraw(file)

    async def _distrust(self, file: ShardFile, error: str) -> None:
        """Done when it is seeded no more: whoever fetches it then is not in the way of its end."""
        if self._is_now_invalid(file, error):
            await asyncio.shield(self._withdraw(file))  # also where nobody waits for the answer any more

    def _is_now_invalid(self, file: ShardFile, error: str) -> bool:
        """False where it was not good, or is another file by now."""
        return file.state == "seeding" and self._catalog.rejected(file, error) is not None

    def _withdraw(self, file: ShardFile) -> asyncio.Task[None]:
        task = self._tasks.create_task(self._stop_seeding(file), name=f"withdraw {file.path.name}")
        self._withdrawing.add(task)
        task.add_done_callback(self._withdrawing.discard)
        return task

    async def _stop_seeding(self, file: ShardFile) -> None:
        await asyncio.to_thread(self._index.forget, file.path)
        await self._seeds.stop(file)


def _unlink(path: Path) -> bool:
    with suppress(FileNotFoundError):
        path.unlink()
        return True
    return False
