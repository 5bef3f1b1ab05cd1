"""Takes what is published into the shards folder, and returns when it is seeded and was announced."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path

from node.files import Fingerprint
from node.shards.publish.manifest_builder import Chosen, checked
from node.shards.publish.placement import place_all, place_of
from node.shards.settings import ShardsSettings
from node.shards.store.announcer import Announcer
from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.hash_cache import Index
from node.shards.store.hasher import Hasher
from node.shards.store.scanner import Survey
from protocol.errors import InvalidShardError
from protocol.manifest import ShardEntry, SignedManifest

TELL_TIMEOUT_S = 3.0


class Publisher:
    """One publication is placed at a time."""

    def __init__(
        self, settings: ShardsSettings, catalog: Catalog, index: Index, survey: Survey, announcer: Announcer
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._index = index
        self._survey = survey
        self._announcer = announcer
        self._turn = asyncio.Lock()

    async def take_up(self, chosen: Chosen, signed: SignedManifest | None, hasher: Hasher) -> tuple[Path, Chosen]:
        """Have the files in the shards folder, seeded; with `signed` that manifest lies beside them.

        Returns their folder, and what was hashed for it. Raises InvalidParamsError for what is in the way,
        InvalidShardError for files that are not what their manifest says, OSError.
        """
        manifest = chosen.manifest
        chosen = await checked(chosen, manifest.shards, hasher, lambda *_: None)
        target, loose = place_of(manifest, self._settings.shards_dir, keep_manifest=signed is not None)
        async with self._turn:
            there = {
                entry.filename: await self._content(hasher, target / entry.filename, entry) for entry in manifest.shards
            }
            await asyncio.to_thread(
                place_all,
                manifest,
                chosen.files,
                target,
                signed,
                loose=loose,
                is_same=lambda _, entry: there[entry.filename] == entry.content_id,
                follow_links=False,
            )
            await asyncio.to_thread(self._remember, chosen, target)
        self._survey.poke()
        for entry in manifest.shards:
            file = await self._catalog.wait_for(target / entry.filename, partial(_is_decided, entry=entry))
            if file is None or file.state != "seeding":
                raise InvalidShardError(f"{entry.filename} is not seeded: {file.error if file else 'it is gone'}")
        with suppress(TimeoutError):
            async with asyncio.timeout(TELL_TIMEOUT_S):
                await self._announcer.wait_idle()
        return target, chosen

    async def _content(self, hasher: Hasher, path: Path, entry: ShardEntry) -> str | None:
        seen = await asyncio.to_thread(Fingerprint.of, path)
        if seen is None or seen.size != entry.size:
            return None
        return (await hasher.hash(path, entry.kind, check=False)).content.content_id

    def _remember(self, chosen: Chosen, target: Path) -> None:
        """A file that was linked is the one that was hashed; a copy has another time, and is hashed once more."""
        for entry in chosen.manifest.shards:
            path, hashed = target / entry.filename, chosen.hashed[entry.content_id]
            if Fingerprint.of(path) == hashed.fingerprint and path.samefile(chosen.files[entry.filename]):
                self._index.put(path, hashed.fingerprint, hashed.content, hashed.rows)


def _is_decided(file: ShardFile | None, entry: ShardEntry) -> bool:
    """Whether a published file is what its manifest says, as the catalog has it, or invalid."""
    if file is None or file.state not in ("seeding", "invalid"):
        return False
    is_ours = file.shard is not None and file.shard.entry.content_id == entry.content_id
    return file.state == "invalid" or is_ours
