"""Decides whether a file found on disk is seeded: whole, in order, hashed, and what its manifest says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from node.clock import Clock
from node.files import Fingerprint
from node.shards.settings import ShardsSettings
from node.shards.store.catalog import Catalog, ShardFile, torrent_of
from node.shards.store.hash_cache import HashCache
from node.shards.store.hasher import FileChangedError, Hasher
from node.shards.store.manifests import sign_loose
from node.shards.store.seeding import Seed, Seeding
from protocol.content import ContentHash
from protocol.errors import InvalidShardError, ShoalError
from protocol.manifest import Shard, ShardEntry, ShardKind
from protocol.signing import SigningKey

log = logging.getLogger(__name__)


class Verifier:
    """Takes one file after the other from "hashing" to "seeding" or "invalid"."""

    def __init__(
        self,
        settings: ShardsSettings,
        catalog: Catalog,
        cache: HashCache,
        hasher: Hasher,
        seeding: Seeding,
        key: SigningKey,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._cache = cache
        self._hasher = hasher
        self._seeding = seeding
        self._key = key
        self._clock = clock
        self._queue: dict[Path, tuple[ShardFile, float]] = {}
        self._queued = asyncio.Event()
        self._broken: dict[Path, ShardFile] = {}
        """Files that were not whole when they were last read, and may still be written."""

    async def consider(self, file: ShardFile, since: float) -> float | None:
        """Admit a file whose hash is known, queue one that is to be read; `since` is when it last changed.

        Returns in how many seconds to ask again if the file was not quiet for long enough.
        """
        if file.path in self._queue:
            self._queue[file.path] = (file, since)
            return None
        quiet_s = self._clock.now() - since
        if quiet_s < self._settings.settle_s:
            return self._settings.settle_s - quiet_s
        entry, size = file.shard.entry if file.shard else None, _fingerprint(file).size
        whole = not (entry and entry.size != size) and self._broken.get(file.path) is not file
        if not whole and quiet_s < self._settings.incomplete_s:
            return self._settings.incomplete_s - quiet_s
        if entry and entry.size != size:
            self._reject(file, f"{file.path.name} has {size} bytes, its manifest says {entry.size}")
            return None
        content, rows = await asyncio.to_thread(self._known, file)
        if content:
            await self._admit(file, content, rows)
        else:
            self._queue[file.path] = (file, since)
            self._queued.set()
        return None

    def hurry(self, path: Path) -> None:
        """Read this file next: somebody waits for it."""
        if path in self._queue:
            self._queue = {path: self._queue[path], **self._queue}

    async def run(self, on_undecided: Callable[[], None]) -> None:
        """Read the queued files, one after the other; call `on_undecided` if it is not clear yet what one is."""
        while True:
            if not self._queue:
                self._queued.clear()
                await self._queued.wait()
            path, (file, since) = next(iter(self._queue.items()))
            try:
                await self._read(file, since)
            except FileChangedError:
                log.info("%s is being written to: it is read again when it is quiet", path)
            except Exception as err:
                log.exception("could not read %s", path)
                self._reject(file, f"{path.name} could not be read: {err!r}")
            finally:
                if path in self._queue and self._queue[path][0] is file:
                    del self._queue[path]
            if self._catalog.get(file.path) is file:
                on_undecided()

    async def _read(self, file: ShardFile, since: float) -> None:
        content, rows = await asyncio.to_thread(self._known, file)
        if content is None:
            try:
                hashed = await self._hasher.hash(file.path, _kind(file))
            except InvalidShardError as err:
                if await asyncio.to_thread(Fingerprint.of, file.path) != file.fingerprint:
                    return  # it is being written to: the scanner sees it
                if self._clock.now() - since >= self._settings.incomplete_s:
                    self._reject(file, err.message)
                else:
                    self._broken[file.path] = file
                return
            except OSError as err:
                self._reject(file, f"{file.path.name} cannot be read: {err}")
                return
            if hashed.fingerprint != file.fingerprint:
                return
            content, rows = hashed.content, hashed.rows
            await asyncio.to_thread(self._cache.put, file.path, hashed.fingerprint, content, rows)
        await self._admit(file, content, rows)

    def _known(self, file: ShardFile) -> tuple[ContentHash | None, int | None]:
        """The cached hash and rows of a file. Neither counts if the rows of a loose parquet file are not known: its
        manifest names them, and has the same digest everywhere.
        """
        fingerprint = _fingerprint(file)
        rows = self._cache.rows(file.path, fingerprint)
        if file.kind == "parquet" and file.shard is None and rows is None:
            return None, None
        return self._cache.get(file.path, fingerprint), rows

    async def _admit(self, file: ShardFile, content: ContentHash, rows: int | None) -> None:
        if self._catalog.get(file.path) is not file:
            return
        try:
            shard = self._shard_of(file, content, rows)
        except ShoalError as err:
            self._reject(file, err.message)
            return
        seed = Seed(file.path, torrent_of(shard.entry), _fingerprint(file))
        try:
            await self._seeding.start(seed, content.piece_layer)
        except (ShoalError, OSError) as err:
            self._reject(file, f"{file.path.name} cannot be seeded: {err}")
            return
        if not self._catalog.admitted(file, shard):
            await self._seeding.stop(seed)

    def _shard_of(self, file: ShardFile, content: ContentHash, rows: int | None) -> Shard:
        if file.shard:
            expected = file.shard.entry.content_id
            if content.content_id != expected:
                raise InvalidShardError(
                    f"{file.path.name} holds content {content.content_id}, its manifest says {expected}"
                )
            return file.shard
        entry = ShardEntry(
            shard_id=0,
            filename=file.path.name,
            size=content.size,
            content_id=content.content_id,
            kind=_kind(file),
            rows=rows,
        )
        return sign_loose(entry, self._key)

    def _reject(self, file: ShardFile, error: str) -> None:
        if self._catalog.rejected(file, error):
            log.warning("%s is invalid: %s", file.path, error)

    async def withdraw(self, file: ShardFile) -> None:
        """Stop to seed a file that is gone or was changed, and forget that it was to be read."""
        self._queue.pop(file.path, None)
        self._broken.pop(file.path, None)
        await self._seeding.stop(file)

    async def prune(self, root: Path, present: set[Path]) -> None:
        """Forget the hashes of files under `root` that are not there any more."""
        await asyncio.to_thread(self._cache.keep_only, root, present)


def _fingerprint(file: ShardFile) -> Fingerprint:
    assert file.fingerprint, f"{file.path} is not on disk yet"
    return file.fingerprint


def _kind(file: ShardFile) -> ShardKind:
    assert file.kind != "manifest", f"{file.path} is not a shard"
    return file.kind
