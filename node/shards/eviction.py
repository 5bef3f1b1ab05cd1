"""Deletes a shard's file, unless it is loaded, being fetched, or leased; for a lease that ends, unless it is pinned."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from node.clock import Clock
from node.files import invalid_path, part_path, whole_part_path
from node.shards.fetch.fetcher import Fetcher
from node.shards.leases import Leases
from node.shards.pins import Pins
from node.shards.store.catalog import Catalog
from node.shards.store.hash_cache import HashCache
from node.shards.store.manifests import shard_path
from node.shards.store.verifier import Verifier
from protocol.errors import ShardInUseError, ShardNotFoundError
from protocol.manifest import Shard


class Eviction:
    """Evicts one shard at a time of each content."""

    def __init__(
        self,
        catalog: Catalog,
        cache: HashCache,
        verifier: Verifier,
        fetcher: Fetcher,
        leases: Leases,
        pins: Pins,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._cache = cache
        self._verifier = verifier
        self._fetcher = fetcher
        self._leases = leases
        self._pins = pins
        self._clock = clock

    async def evict(self, shard: Shard, *, unless_pinned: bool = False) -> Path:
        """Delete a shard's file, and what an unfinished download or a bad file left of it. Returns its path.

        Raises ShardInUseError, with `unless_pinned` for a pinned one too, and ShardNotFoundError.
        """
        if shard.entry.shard_id in self._catalog.loaded(shard.digest):
            raise ShardInUseError(f"{shard.label} is loaded: unload it first")
        if self._fetcher.is_fetching(shard.ref):
            raise ShardInUseError(f"{shard.label} is being fetched: cancel that first")
        self._check(shard, unless_pinned)
        async with self._fetcher.alone_with(shard.entry.content_id):
            self._check(shard, unless_pinned)
            deleted = await self._delete(shard, keep_others=unless_pinned)
            if not deleted:
                raise ShardNotFoundError(f"{shard.label} is not on this node; LIST_FILES shows what is")
            await self._fetcher.remove_unused_folder(shard.digest)
        return deleted[0]

    async def _delete(self, shard: Shard, *, keep_others: bool) -> list[Path]:
        """`keep_others`: a file that was set aside stays if the shard is not here, for it may be somebody's."""
        folder = self._catalog.folder_of(shard.digest)
        deleted: list[Path] = []
        for file in self._catalog.of_shard(shard.ref):
            await self._verifier.withdraw(file)
            await asyncio.to_thread(_unlink, file.path)
            await asyncio.to_thread(self._cache.forget, file.path)
            known = self._catalog.get(file.path)
            if known and known.fingerprint == file.fingerprint:  # it may have been found unreadable meanwhile
                self._catalog.evicted(known)
            await self._pins.gone(file.path)
            deleted.append(file.path)
        if folder:
            path = shard_path(folder, shard.entry)
            left_over = [part_path(path), whole_part_path(path)]
            if deleted or not keep_others:
                left_over.append(invalid_path(path))
            if any([await asyncio.to_thread(_unlink, one) for one in left_over]):
                deleted.append(path)
        return deleted

    def _check(self, shard: Shard, unless_pinned: bool) -> None:
        if unless_pinned and self._pins.keeps(shard.ref, self._catalog.of_shard(shard.ref)):
            raise ShardInUseError(
                f"{shard.label} is pinned: it was pulled, loaded, published or put here by hand; UNPIN ends that, "
                "EVICT_SHARD deletes it"
            )
        holders = self._leases.holders(shard.ref, self._clock.now())
        if holders.leases:
            count = "1 lease" if holders.leases == 1 else f"{holders.leases} leases"
            raise ShardInUseError(
                f"{shard.label} is held by {count} for {holders.expires_in_s:.0f} s more: "
                "release it, or wait until then",
                {"leases": holders.leases, "expires_in_s": holders.expires_in_s},
            )


def _unlink(path: Path) -> bool:
    with suppress(FileNotFoundError):
        path.unlink()
        return True
    return False
