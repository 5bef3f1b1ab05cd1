"""Takes a file that is known to be wrong out of circulation: it is invalid at once, and soon neither seeded nor cached.

A file is known to be wrong from the swarm, which reads it while it seeds, from the backfill, which reads it once more,
or from a client that asks to have it verified.
"""

from __future__ import annotations

import asyncio

from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.hash_cache import HashCache
from node.shards.store.hasher import FileChangedError, Hasher
from node.shards.store.seeding import Seeding
from node.swarm.torrent import Torrent
from protocol.errors import InvalidShardError, ShardNotFoundError
from protocol.ids import ContentId
from protocol.manifest import Shard


class Quarantine:
    """Files that were good and are not any more."""

    def __init__(
        self, catalog: Catalog, cache: HashCache, seeding: Seeding, hasher: Hasher, tasks: asyncio.TaskGroup
    ) -> None:
        self._catalog = catalog
        self._cache = cache
        self._seeding = seeding
        self._hasher = hasher
        self._tasks = tasks
        self._withdrawing: set[asyncio.Task[None]] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no file that was found wrong is still seeded."""
        return not self._withdrawing

    async def wait_idle(self) -> None:
        while self._withdrawing:
            await asyncio.wait(self._withdrawing)

    async def verify(self, shard: Shard) -> ContentId | None:
        """Hash a shard's file again; it is invalid if it is not the shard. Returns what it holds, None if it cannot be
        read. Raises ShardNotFoundError.
        """
        entry, file = shard.entry, next(iter(self._catalog.of_shard(shard.ref)), None)
        if file is None or file.state == "downloading":
            raise ShardNotFoundError(f"{shard.label} is not on this node: FETCH_SHARD gets it")
        try:
            hashed = await self._hasher.hash(file.path, entry.kind, check=False)
        except (OSError, FileChangedError, InvalidShardError) as err:
            await self._isolate_to_the_end(file, f"{file.path.name} cannot be read whole: {err}")
            return None
        found = hashed.content.content_id
        if found != entry.content_id:
            error = f"{file.path.name} holds content {found}, its manifest says {entry.content_id}"
            await self._isolate_to_the_end(file, error)
        return found

    def on_invalid(self, torrent: Torrent, reason: str) -> None:
        """The swarm found that a file which it seeds is not what was hashed."""
        path = self._seeding.seeded_path(torrent)
        for file in self._catalog.of_torrent(torrent):
            if file.path == path:
                self.isolate(file, f"{file.path.name} is not what was hashed: {reason}")

    def isolate(self, file: ShardFile, error: str) -> None:
        """A file that was good is not. Does nothing if it is another file by now."""
        if file.state == "seeding" and self._catalog.rejected(file, error):
            self._withdraw(file)

    async def _isolate_to_the_end(self, file: ShardFile, error: str) -> None:
        """Return when it is not seeded any more: it does not hinder a fetch that begins then."""
        if file.state == "seeding" and self._catalog.rejected(file, error):
            await asyncio.shield(self._withdraw(file))  # it goes on if the caller is cancelled

    def _withdraw(self, file: ShardFile) -> asyncio.Task[None]:
        task = self._tasks.create_task(self._stop_seeding(file), name=f"withdraw {file.path.name}")
        self._withdrawing.add(task)
        task.add_done_callback(self._withdrawing.discard)
        return task

    async def _stop_seeding(self, file: ShardFile) -> None:
        await asyncio.to_thread(self._cache.forget, file.path)
        await self._seeding.stop(file)
