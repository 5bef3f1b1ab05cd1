"""Learns the piece layers of fetched files, so that they need not be read again at the next start."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.hash_cache import Index
from node.shards.store.hasher import FileChangedError, Hasher
from protocol.content import ContentHash
from protocol.errors import ShoalError

log = logging.getLogger(__name__)


class Remember:
    """Reads fetched files once more when there is nothing else to hash. They are seeded meanwhile."""

    def __init__(self, catalog: Catalog, index: Index, hasher: Hasher) -> None:
        self._catalog = catalog
        self._index = index
        self._hasher = hasher
        self._queue: dict[Path, ShardFile] = {}
        self._queued = asyncio.Event()

    @property
    def idle(self) -> bool:
        return not self._queue

    def later(self, file: ShardFile) -> None:
        """Read this file when there is time."""
        self._queue[file.path] = file
        self._queued.set()

    async def write(self, file: ShardFile, content: ContentHash) -> None:
        """Keep what is known of this file, once its bytes are on the disk: after a power cut a file of the same size
        and time may hold zeros, and what is remembered is trusted unread.
        """
        if file.fingerprint:
            await asyncio.to_thread(_sync, file.path)
            await asyncio.to_thread(self._index.put, file.path, file.fingerprint, content)

    async def forget(self, file: ShardFile) -> None:
        """This file is not what was hashed."""
        await asyncio.to_thread(self._index.forget, file.path)

    async def run(self, on_wrong: Callable[[ShardFile, str], None]) -> None:
        """Call `on_wrong` with a file that is not what it was when it came."""
        while True:
            if not self._queue:
                self._queued.clear()
                self._catalog.pulse()
                await self._queued.wait()
            path, file = next(iter(self._queue.items()))
            try:
                hashed = await self._hasher.hash(path, file.entry.kind if file.entry else "file", check=False)
            except (ShoalError, FileChangedError, OSError) as err:
                log.info("%s is hashed at the next start instead: %s", path, err)
            else:
                if hashed.fingerprint != file.fingerprint:
                    pass  # The survey sees it too, and treats it as a new file.
                elif file.entry and hashed.content.content_id != file.entry.content_id:
                    on_wrong(file, f"{path.name} changed on disk after it came: it holds {hashed.content.content_id}")
                else:
                    try:
                        await self.write(file, hashed.content)
                    except OSError as err:
                        log.info("%s is hashed at the next start instead: %s", path, err)
            finally:
                if self._queue.get(path) is file:
                    del self._queue[path]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
