"""What has to be so before a file found on disk is seeded: whole, in order, hashed, and what its manifest says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from node.shards.settings import ShardsSettings
from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.hash_cache import Index
from node.shards.store.hasher import FileChangedError, Hasher
from node.shards.store.listing import Fingerprint, FoundFile
from node.shards.store.manifests import Holding, sign_loose
from node.shards.store.seeding import Seeds
from protocol.content import ContentHash
from protocol.errors import InvalidShardError, ShoalError
from protocol.manifest import ShardEntry
from protocol.signing import SigningKey

log = logging.getLogger(__name__)


class Admission:
    """Takes one file after the other from "hashing" to "seeding" or "invalid"."""

    def __init__(
        self,
        settings: ShardsSettings,
        catalog: Catalog,
        index: Index,
        hasher: Hasher,
        seeds: Seeds,
        key: SigningKey,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._index = index
        self._hasher = hasher
        self._seeds = seeds
        self._key = key
        self._queue: dict[Path, tuple[FoundFile, float]] = {}
        self._queued = asyncio.Event()
        self._broken: dict[Path, FoundFile] = {}
        """Files that were not whole when they were last read, and may still be written."""

    async def consider(self, file: FoundFile, since: float) -> float | None:
        """Admit a file that is known from before, queue one that is to be read; `since` is when it last changed.

        Return in how many seconds to ask again, where the file was not quiet for long enough.
        """
        if file.path in self._queue:
            self._queue[file.path] = (file, since)
            return None
        quiet_s = time.monotonic() - since
        if quiet_s < self._settings.settle_s:
            return self._settings.settle_s - quiet_s
        whole = not (file.entry and file.entry.size != file.fingerprint.size) and self._broken.get(file.path) != file
        if not whole and quiet_s < self._settings.incomplete_s:
            return self._settings.incomplete_s - quiet_s
        if file.entry and file.entry.size != file.fingerprint.size:
            self._refuse(
                file, f"{file.path.name} has {file.fingerprint.size} bytes, its manifest says {file.entry.size}"
            )
            return None
        content, rows = await asyncio.to_thread(self._known, file)
        if content:
            await self._admit(file, content, rows)
        else:
            self._queue[file.path] = (file, since)
            self._queued.set()
        return None

    def hurry(self, path: Path) -> None:
        """Somebody waits for this file: read it next."""
        if path in self._queue:
            self._queue = {path: self._queue[path], **self._queue}

    async def run(self, look_again: Callable[[], None]) -> None:
        """Read the queued files, one after the other; call `look_again` where one was not decided."""
        while True:
            if not self._queue:
                self._queued.clear()
                await self._queued.wait()
            path, (file, since) = next(iter(self._queue.items()))
            try:
                await self._read(file, since)
            except FileChangedError:
                log.info("%s is being written to: it is looked at again when it is quiet", path)
            except Exception as err:
                log.exception("could not take up %s", path)
                self._refuse(file, f"{path.name} could not be taken up: {err!r}")
            finally:
                if path in self._queue and self._queue[path][0] is file:
                    del self._queue[path]
            if self._is_current(file):
                look_again()

    async def _read(self, file: FoundFile, since: float) -> None:
        content, rows = await asyncio.to_thread(self._known, file)
        if content is None:
            try:
                hashed = await self._hasher.hash(file.path, file.kind)
            except InvalidShardError as err:
                if await asyncio.to_thread(Fingerprint.of, file.path) != file.fingerprint:
                    return  # it is being written to: the survey sees it
                if time.monotonic() - since >= self._settings.incomplete_s:
                    self._refuse(file, err.message)
                else:
                    self._broken[file.path] = file
                return
            except OSError as err:
                self._refuse(file, f"{file.path.name} cannot be read: {err}")
                return
            if hashed.fingerprint != file.fingerprint:
                return
            content, rows = hashed.content, hashed.rows
            await asyncio.to_thread(self._index.put, file.path, file.fingerprint, content, rows)
        await self._admit(file, content, rows)

    def _known(self, file: FoundFile) -> tuple[ContentHash | None, int | None]:
        """What is remembered of a file, if that is all that is needed: a loose parquet file's manifest has its rows,
        whether it was hashed just now or long ago, and so the same digest everywhere.
        """
        rows = self._index.rows(file.path, file.fingerprint)
        if file.kind == "parquet" and file.entry is None and rows is None:
            return None, None
        return self._index.get(file.path, file.fingerprint), rows

    async def _admit(self, file: FoundFile, content: ContentHash, rows: int | None) -> None:
        if not self._is_current(file):
            return
        try:
            holding, entry = self._owner(file, content, rows)
        except ShoalError as err:
            self._refuse(file, err.message)
            return
        seeding = ShardFile(file.path, "seeding", file.kind, file.fingerprint, holding, entry)
        try:
            await self._seeds.start(seeding, content.piece_layer)
        except (ShoalError, OSError) as err:
            self._refuse(file, f"{file.path.name} cannot be seeded: {err}")
            return
        if self._is_current(file):
            self._catalog.put(seeding)
        else:
            await self._seeds.stop(seeding)

    def _owner(self, file: FoundFile, content: ContentHash, rows: int | None) -> tuple[Holding, ShardEntry]:
        if file.holding and file.entry:
            if content.content_id != file.entry.content_id:
                raise InvalidShardError(
                    f"{file.path.name} holds content {content.content_id}, its manifest says {file.entry.content_id}"
                )
            return file.holding, file.entry
        entry = ShardEntry(
            shard_id=0,
            filename=file.path.name,
            size=content.size,
            content_id=content.content_id,
            kind=file.kind,
            rows=rows,
        )
        return sign_loose(entry, self._key), entry

    def _refuse(self, file: FoundFile, error: str) -> None:
        if self._is_current(file):
            log.warning("%s is invalid: %s", file.path, error)
            self._catalog.put(
                ShardFile(file.path, "invalid", file.kind, file.fingerprint, file.holding, file.entry, error)
            )

    def _is_current(self, file: FoundFile) -> bool:
        """Whether the catalog still waits for what becomes of this very file."""
        known = self._catalog.get(file.path)
        return (
            known is not None
            and (known.state, known.fingerprint) == ("hashing", file.fingerprint)
            and known.holding is file.holding
        )

    async def withdraw(self, file: ShardFile) -> None:
        """The file is gone, or not what it was: what was seeded of it is no longer."""
        self._queue.pop(file.path, None)
        self._broken.pop(file.path, None)
        await self._seeds.stop(file)

    async def prune(self, root: Path, present: set[Path]) -> None:
        """Forget the hashes of files under `root` that are no longer there."""
        await asyncio.to_thread(self._index.keep_only, root, present)
