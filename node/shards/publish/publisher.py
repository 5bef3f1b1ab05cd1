"""Puts a publication into the shards folder, and returns when it is seeded and was announced."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path

from node.files import Fingerprint
from node.shards.pins import Pins
from node.shards.publish.manifest_builder import Publication, hash_missing
from node.shards.publish.placement import place_files, target_folder
from node.shards.settings import ShardsSettings
from node.shards.store.announcer import Announcer
from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.hash_cache import HashCache
from node.shards.store.hasher import Hasher
from node.shards.store.scanner import Scanner
from protocol.errors import InvalidShardError
from protocol.ids import ContentId
from protocol.manifest import ShardEntry, SignedManifest

ANNOUNCE_TIMEOUT_S = 3.0


class Publisher:
    """Places one publication at a time."""

    def __init__(
        self,
        settings: ShardsSettings,
        catalog: Catalog,
        cache: HashCache,
        scanner: Scanner,
        announcer: Announcer,
        pins: Pins,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._cache = cache
        self._scanner = scanner
        self._announcer = announcer
        self._pins = pins
        self._placing = asyncio.Lock()

    async def publish(
        self, publication: Publication, signed: SignedManifest | None, hasher: Hasher
    ) -> tuple[Path, Publication]:
        """Have the files in the shards folder, seeded and pinned; `signed`, if given, lies beside them.

        Returns their folder, and the publication with all hashes. Raises InvalidParamsError if another file has a
        place, InvalidShardError for files that are not what their manifest says, OSError.
        """
        manifest = publication.manifest
        publication = await hash_missing(publication, manifest.shards, hasher, lambda *_: None)
        target, loose = target_folder(manifest, self._settings.shards_dir, keep_manifest=signed is not None)
        async with self._placing:
            present = {
                entry.filename: await self._content_id(hasher, target / entry.filename, entry)
                for entry in manifest.shards
            }
            await asyncio.to_thread(
                place_files,
                manifest,
                publication.files,
                target,
                signed,
                loose=loose,
                is_same=lambda _, entry: present[entry.filename] == entry.content_id,
                follow_links=False,
            )
            await asyncio.to_thread(self._keep_hashes, publication, target)
        await self._pins.pin(target / entry.filename for entry in manifest.shards)
        self._scanner.poke()
        for entry in manifest.shards:
            file = await self._catalog.wait_for(target / entry.filename, partial(_is_decided, entry=entry))
            if file is None or file.state != "seeding":
                raise InvalidShardError(f"{entry.filename} is not seeded: {file.error if file else 'it is gone'}")
        with suppress(TimeoutError):
            async with asyncio.timeout(ANNOUNCE_TIMEOUT_S):
                await self._announcer.wait_idle()
        return target, publication

    async def _content_id(self, hasher: Hasher, path: Path, entry: ShardEntry) -> ContentId | None:
        """Of a file of the entry's size, None if there is none."""
        fingerprint = await asyncio.to_thread(Fingerprint.of, path)
        if fingerprint is None or fingerprint.size != entry.size:
            return None
        return (await hasher.hash(path, entry.kind, check=False)).content.content_id

    def _keep_hashes(self, publication: Publication, target: Path) -> None:
        """A file that was linked is the one that was hashed; a copy has another time, and is hashed once more."""
        for entry in publication.manifest.shards:
            path, hashed = target / entry.filename, publication.hashed[entry.content_id]
            if Fingerprint.of(path) == hashed.fingerprint and path.samefile(publication.files[entry.filename]):
                self._cache.put(path, hashed.fingerprint, hashed.content, hashed.rows)


def _is_decided(file: ShardFile | None, entry: ShardEntry) -> bool:
    """Whether the catalog has a published file as its manifest says, or as invalid."""
    if file is None or file.state not in ("seeding", "invalid"):
        return False
    is_entry = file.shard is not None and file.shard.entry.content_id == entry.content_id
    return file.state == "invalid" or is_entry
