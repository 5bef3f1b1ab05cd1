"""Which files the swarm seeds from: two files may be one torrent, and the swarm wants one of them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import NamedTuple

from node.files import Fingerprint
from node.shards.interfaces import TorrentClient
from node.shards.store.catalog import ShardFile
from node.shards.store.hash_cache import HashCache
from node.swarm.torrent import Torrent
from protocol.errors import ShoalError
from protocol.ids import InfoHash

log = logging.getLogger(__name__)


class Seed(NamedTuple):
    """A file that is seeded, or could be in place of a copy of it."""

    path: Path
    torrent: Torrent
    fingerprint: Fingerprint


class Seeding:
    """Adds and removes torrents so that each good file is seeded once, whatever its copies."""

    def __init__(self, swarm: TorrentClient, cache: HashCache) -> None:
        self._swarm = swarm
        self._cache = cache
        self._copies: dict[InfoHash, dict[Path, Seed]] = {}
        self._lock = asyncio.Lock()

    async def start(self, seed: Seed, piece_layer: bytes) -> None:
        """Seed a good file. Raises ShoalError if the swarm refuses it."""
        async with self._lock:
            copies = self._copies.setdefault(seed.torrent.info_hash, {})
            if not copies:
                await self._swarm.seed(seed.torrent, seed.path, piece_layer)
            copies[seed.path] = seed

    def adopt(self, seed: Seed) -> None:
        """Count a file that the swarm downloaded, and has seeded since."""
        self._copies.setdefault(seed.torrent.info_hash, {})[seed.path] = seed

    async def stop(self, file: ShardFile | Seed) -> None:
        """Stop to seed this file; a copy of it takes over. Does nothing if it is not seeded, or was replaced."""
        if file.torrent is None:
            return
        info_hash = file.torrent.info_hash
        async with self._lock:
            copies = self._copies.get(info_hash, {})
            seeded = copies.get(file.path)
            if seeded is None or seeded.fingerprint != file.fingerprint:
                return
            was_seeded = next(iter(copies)) == file.path
            del copies[file.path]
            if not copies:
                del self._copies[info_hash]
            if not was_seeded:
                return
            await self._swarm.remove(info_hash)
            for copy in list(copies.values()):
                if await self._takes_over(copy):
                    return
                del copies[copy.path]
            self._copies.pop(info_hash, None)

    async def _takes_over(self, copy: Seed) -> bool:
        content = await asyncio.to_thread(self._cache.get, copy.path, copy.fingerprint)
        if content is None:
            return False
        try:
            await self._swarm.seed(copy.torrent, copy.path, content.piece_layer)
        except (ShoalError, OSError) as err:
            log.warning("%s is not seeded in place of a copy of it: %s", copy.path, err)
            return False
        return True

    def seeded_path(self, torrent: Torrent) -> Path | None:
        """The file that the swarm reads for this torrent."""
        return next(iter(self._copies.get(torrent.info_hash, {})), None)
