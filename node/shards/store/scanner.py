"""Brings the catalog in line with the shards folder: once at the start, and after every change on disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from node.files import Fingerprint
from node.shards.settings import ShardsSettings
from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.listing import FoundFile, Listing, classify, list_files
from node.shards.store.manifests import LocalManifest, read_manifest
from node.shards.store.verifier import Admission
from protocol.errors import InvalidManifestError
from protocol.manifest import MANIFEST_FILENAME
from protocol.signing import SigningKey

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sight:
    fingerprint: Fingerprint
    since: float
    """`time.monotonic()` when it was first seen like this."""


class Stillness:
    """How long each file has been as it is."""

    def __init__(self) -> None:
        self._seen: dict[Path, _Sight] = {}

    def since(self, path: Path, fingerprint: Fingerprint) -> float:
        """`time.monotonic()` of the last change, by what was seen or by the file's own time, whichever is earlier."""
        now = time.monotonic()
        sight = self._seen.get(path)
        if sight is None or sight.fingerprint != fingerprint:
            sight = self._seen[path] = _Sight(fingerprint, now)
        return min(sight.since, now - (time.time() - fingerprint.mtime_ns / 1e9))

    def keep_only(self, paths: set[Path]) -> None:
        self._seen = {path: sight for path, sight in self._seen.items() if path in paths}


class Survey:
    """Looks at the folder whenever it is poked, when a file should have become quiet, and every now and then."""

    def __init__(self, settings: ShardsSettings, catalog: Catalog, admission: Admission, key: SigningKey) -> None:
        self._settings = settings
        self._catalog = catalog
        self._admission = admission
        self._key = key
        self._still = Stillness()
        self._poked = asyncio.Event()
        self._not_ours: dict[Path, Fingerprint] = {}
        self._unsettled: set[Path] = set()
        self._idle = asyncio.Event()
        self._scanned = asyncio.Event()

    @property
    def is_scanned(self) -> bool:
        """Whether the folder was looked at since the start."""
        return self._scanned.is_set()

    async def wait_scanned(self) -> None:
        """Wait until the folder was looked at."""
        await self._scanned.wait()

    @property
    def is_idle(self) -> bool:
        """Whether everything that was seen is in the catalog."""
        return self._idle.is_set()

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def poke(self) -> None:
        """Something changed on disk: look soon."""
        self._poked.set()
        self._idle.clear()

    def hurry(self, files: Iterable[ShardFile]) -> None:
        """Somebody waits for these files."""
        for file in files:
            self._admission.hurry(file.path)

    async def run(self) -> None:
        while True:
            self._poked.clear()
            self._idle.clear()
            began = time.monotonic()
            try:
                delay = await self._look()
            except Exception:
                # A survey that failed is tried again; the node and what it seeds go on.
                log.exception("could not survey %s", self._settings.shards_dir)
                delay = self._settings.rescan_s
            self._scanned.set()
            if not (self._unsettled or self._poked.is_set()):
                self._idle.set()
            # Where a look takes long, a file that grows does not make it the only thing that the node does.
            await asyncio.sleep(min(5.0, 4 * (time.monotonic() - began)))
            try:
                async with asyncio.timeout(min(delay, self._settings.rescan_s)):
                    await self._poked.wait()
            except TimeoutError:
                continue

    async def _look(self) -> float:
        """Return in how many seconds the next look is due."""
        listing = await asyncio.to_thread(list_files, self._settings.shards_dir)
        unsettled = self._unsettled = await self._read_manifests(listing)
        settled = {folder: files for folder, files in listing.items() if folder not in unsettled}
        found = classify(settled, self._catalog.folders())
        self._still.keep_only(found.keys() | {folder / MANIFEST_FILENAME for folder in listing})
        await self._drop_missing(listing, found, unsettled)
        delays = [self._settings.settle_s / 2] if unsettled else []
        due = [record for file in found.values() if (record := await self._record(file))]
        for record in due:
            assert record.fingerprint, "a file on disk has one"
            delay = await self._admission.consider(record, self._still.since(record.path, record.fingerprint))
            if delay is not None:
                delays.append(delay)
        if not self.is_scanned:
            present = {folder / name for folder, files in listing.items() for name in files}
            await self._admission.prune(self._settings.shards_dir, present)
        return max(0.05, min(delays, default=self._settings.rescan_s))

    async def _read_manifests(self, listing: Listing) -> set[Path]:
        """Bring the catalog's folders up to date. Return the folders whose manifest may still be written to."""
        unsettled: set[Path] = set()
        for folder, held in self._catalog.folders().items():
            if MANIFEST_FILENAME in listing.get(folder, ()):
                continue
            if not await asyncio.to_thread((folder / MANIFEST_FILENAME).exists):
                self._catalog.manifest_released(held)
        for folder, files in listing.items():
            fingerprint = files.get(MANIFEST_FILENAME)
            path = folder / MANIFEST_FILENAME
            known = self._catalog.manifest_in(folder)
            if fingerprint is None or (known and known.fingerprint == fingerprint):
                continue
            if self._not_ours.get(path) == fingerprint or self._is_known_invalid(path, fingerprint):
                continue
            quiet_s = time.monotonic() - self._still.since(path, fingerprint)
            if quiet_s < self._settings.settle_s:
                unsettled.add(folder)
                continue
            try:
                signed = await asyncio.to_thread(read_manifest, path, self._key)
            except InvalidManifestError as err:
                if quiet_s < self._settings.incomplete_s or not await asyncio.to_thread(path.exists):
                    unsettled.add(folder)
                    continue
                log.warning("%s is left out: %s", path, err)
                if known:
                    self._catalog.manifest_released(known)
                record = self._catalog.seen(self._catalog.get(path), path, "manifest", fingerprint)
                if record:
                    self._catalog.rejected(record, err.message)
                continue
            if signed is None:
                self._not_ours[path] = fingerprint
                if known:
                    self._catalog.manifest_released(known)
            elif not self._catalog.manifest_held(known, LocalManifest(folder, signed, fingerprint)):
                continue  # A download wrote it meanwhile.
            if record := self._catalog.get(path):
                self._catalog.gone(record)
        return unsettled

    def _is_known_invalid(self, path: Path, fingerprint: Fingerprint) -> bool:
        file = self._catalog.get(path)
        return file is not None and file.fingerprint == fingerprint

    async def _drop_missing(self, listing: Listing, found: dict[Path, FoundFile], unsettled: set[Path]) -> None:
        """Forget the files that went away, or are no shards any more."""
        for file in self._catalog.files():
            path = file.path
            if path in found or path.parent in unsettled or file.state == "downloading":
                continue
            if file.kind == "manifest" and path.name in listing.get(path.parent, ()):
                continue
            if path.name not in listing.get(path.parent, ()) and await asyncio.to_thread(path.exists):
                continue  # It came after the listing was made; the next look sees it.
            if self._catalog.gone(file):
                log.info("%s is gone: it is seeded no longer", path)
                await self._admission.withdraw(file)

    async def _record(self, file: FoundFile) -> ShardFile | None:
        """Bring the catalog up to date with a file. Returns its record if it is still to be decided what it is."""
        known = self._catalog.get(file.path)
        if known and known.state == "downloading":
            return None
        if known and known.fingerprint == file.fingerprint and _same_owner(known, file):
            return known if known.state == "hashing" else None
        is_current = True
        if (known or self.is_scanned) and not (known and known.fingerprint == file.fingerprint):
            is_current = await asyncio.to_thread(Fingerprint.of, file.path) == file.fingerprint
        record = self._catalog.seen(known, file.path, file.kind, file.fingerprint, file.shard) if is_current else None
        if record is None:
            self.poke()  # The listing is out of date.
        elif known:
            await self._admission.withdraw(known)
        return record


def _same_owner(known: ShardFile, file: FoundFile) -> bool:
    if file.shard is None:
        return known.shard is None or known.shard.manifest.kind == "file"
    return known.shard is not None and known.shard.ref == file.shard.ref
