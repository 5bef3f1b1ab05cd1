"""Learns the piece layers of fetched files, so that they need not be read again at the next start."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from node.files import fsync_file
from node.shards.store.catalog import ShardFile
from node.shards.store.hash_cache import HashCache
from node.shards.store.hasher import FileChangedError, Hasher
from protocol.content import ContentHash
from protocol.errors import ShoalError

log = logging.getLogger(__name__)


class Backfill:
    """Reads fetched files once more when there is nothing else to hash. They are seeded meanwhile."""

    def __init__(self, cache: HashCache, hasher: Hasher) -> None:
        self._cache = cache
        self._hasher = hasher
        self._queue: dict[Path, ShardFile] = {}
        self._queued = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to read."""
        return self._idle.is_set()

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def later(self, file: ShardFile) -> None:
        """Read this file when there is time."""
        self._queue[file.path] = file
        self._queued.set()
        self._idle.clear()

    async def write(self, file: ShardFile, content: ContentHash) -> None:
        """Keep what is known of this file, once its bytes are on the disk: after a power cut a file of the same size
        and time may hold zeros, and what is remembered is trusted unread.
        """
        if file.fingerprint:
            await asyncio.to_thread(fsync_file, file.path)
            await asyncio.to_thread(self._cache.put, file.path, file.fingerprint, content)

    async def forget(self, file: ShardFile) -> None:
        """This file is not what was hashed."""
        await asyncio.to_thread(self._cache.forget, file.path)

    async def run(self, on_wrong: Callable[[ShardFile, str], None]) -> None:
        """Call `on_wrong` with a file that is not what it was when it came."""
        while True:
            if not self._queue:
                self._queued.clear()
                self._idle.set()
                await self._queued.wait()
            path, file = next(iter(self._queue.items()))
            entry = file.shard.entry if file.shard else None
            try:
                hashed = await self._hasher.hash(path, entry.kind if entry else "file", check=False)
            except (ShoalError, FileChangedError, OSError) as err:
                log.info("%s is hashed at the next start instead: %s", path, err)
            else:
                if hashed.fingerprint != file.fingerprint:
                    pass  # The scanner sees it too, and treats it as a new file.
                elif entry and hashed.content.content_id != entry.content_id:
                    on_wrong(file, f"{path.name} changed on disk after it came: it holds {hashed.content.content_id}")
                else:
                    try:
                        await self.write(file, hashed.content)
                    except OSError as err:
                        log.info("%s is hashed at the next start instead: %s", path, err)
            finally:
                if self._queue.get(path) is file:
                    del self._queue[path]
