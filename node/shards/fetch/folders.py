"""The folders of fetched manifests: made for the first shard, removed with the last one.

One of them is made or removed at a time, and the catalog told, so that a fetch never writes into a folder that an
eviction removes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

from node.background import to_the_end_then
from node.shards.store.catalog import Catalog
from node.shards.store.layout import prepare_folder, remove_if_empty
from node.shards.store.manifests import LocalManifest, folder_names, shard_path
from protocol.ids import ManifestDigest
from protocol.manifest import Shard


class ManifestFolders:
    """The folders under `shards_dir` into which fetches write."""

    def __init__(self, shards_dir: Path, catalog: Catalog) -> None:
        self._shards_dir = shards_dir
        self._catalog = catalog
        self._lock = asyncio.Lock()

    def expected_path(self, shard: Shard) -> Path:
        """The path at which the shard will most likely lie; nothing is made."""
        name, _ = folder_names(shard.manifest.name, shard.digest)
        return shard_path(self._catalog.folder_of(shard.digest) or self._shards_dir / name, shard.entry)

    async def path(self, shard: Shard) -> Path:
        """The path at which the shard is to lie; its manifest's folder is there.

        Raises InvalidManifestError if the folder or the file cannot have its name.
        """
        async with self._lock:
            folder = self._catalog.folder_of(shard.digest) or await self._make(shard)
        return shard_path(folder, shard.entry)

    async def _make(self, shard: Shard) -> Path:
        prepare = partial(prepare_folder, self._shards_dir, shard.signed, self._catalog.folders())
        # The catalog has the folder also if the fetch is cancelled meanwhile, so that `remove_unused` finds it. If the
        # scanner was quicker, the catalog has it already.
        local = await to_the_end_then(prepare, lambda local: self._catalog.manifest_held(None, local))
        return local.folder

    async def remove_unused(self, digest: ManifestDigest, is_used: Callable[[], bool]) -> None:
        """Remove the folder of a fetched manifest if nothing else is in it and no fetch is about to use it."""
        async with self._lock:
            folder = self._catalog.folder_of(digest)
            local = self._catalog.manifest_in(folder) if folder else None
            if local and local.fetched and not is_used():
                await to_the_end_then(partial(remove_if_empty, local.folder), partial(self._removed, local))

    def _removed(self, local: LocalManifest, is_gone: bool) -> None:
        if is_gone:
            self._catalog.manifest_released(local)
