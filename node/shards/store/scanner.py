"""Brings the catalog in line with the shards folder: once at the start, and after every change on disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from watchfiles import Change, awatch

from node.clock import Clock
from node.files import UNFINISHED_SUFFIXES, Fingerprint
from node.shards.settings import ShardsSettings
from node.shards.store.catalog import Catalog, ShardFile
from node.shards.store.listing import FoundFile, Listing, classify, list_files
from node.shards.store.manifests import LocalManifest, read_manifest
from node.shards.store.verifier import Verifier
from protocol.errors import InvalidManifestError
from protocol.manifest import MANIFEST_FILENAME
from protocol.signing import SigningKey

log = logging.getLogger(__name__)

WATCH_GATHER_MS = 300
"""Changes within so long are reported together."""
WATCH_RETRY_S = 30.0
LONGEST_PAUSE_S = 5.0
"""Between two scans of a folder that takes long to list."""


@dataclass(frozen=True, slots=True)
class _Sight:
    fingerprint: Fingerprint
    since: float
    """When it was first seen like this, on the scanner's clock."""


class Debounce:
    """How long each file has been as it is."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: dict[Path, _Sight] = {}

    def since(self, path: Path, fingerprint: Fingerprint) -> float:
        """When the file changed last, by what was seen or by the file's own time, whichever is earlier."""
        now = self._clock.now()
        sight = self._seen.get(path)
        if sight is None or sight.fingerprint != fingerprint:
            sight = self._seen[path] = _Sight(fingerprint, now)
        return min(sight.since, now - (time.time() - fingerprint.mtime_ns / 1e9))

    def keep_only(self, paths: set[Path]) -> None:
        self._seen = {path: sight for path, sight in self._seen.items() if path in paths}


class Scanner:
    """Scans the folder when it is poked, when a file should have become quiet, and every `rescan_s`."""

    def __init__(
        self, settings: ShardsSettings, catalog: Catalog, verifier: Verifier, key: SigningKey, clock: Clock
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._verifier = verifier
        self._key = key
        self._clock = clock
        self._debounce = Debounce(clock)
        self._poked = asyncio.Event()
        self._not_ours: dict[Path, Fingerprint] = {}
        """Files called manifest.json that are about something else."""
        self._unsettled: set[Path] = set()
        """Folders whose manifest may still be written to."""
        self._idle = asyncio.Event()
        self._scanned = asyncio.Event()

    @property
    def is_scanned(self) -> bool:
        """Whether the folder was scanned since the start."""
        return self._scanned.is_set()

    async def wait_scanned(self) -> None:
        """Wait until the folder was scanned once."""
        await self._scanned.wait()

    @property
    def is_idle(self) -> bool:
        """Whether everything that was seen is in the catalog."""
        return self._idle.is_set()

    async def wait_idle(self) -> None:
        await self._idle.wait()

    def poke(self) -> None:
        """Something changed on disk: scan soon."""
        self._poked.set()
        self._idle.clear()

    def hurry(self, files: Iterable[ShardFile]) -> None:
        """Read these files next: somebody waits for them."""
        for file in files:
            self._verifier.hurry(file.path)

    async def run(self) -> None:
        while True:
            self._poked.clear()
            self._idle.clear()
            began = self._clock.now()
            try:
                delay_s = await self._scan()
            except Exception:
                # It is tried again; the node and what it seeds go on.
                log.exception("could not scan %s", self._settings.shards_dir)
                delay_s = self._settings.rescan_s
            self._scanned.set()
            if not (self._unsettled or self._poked.is_set()):
                self._idle.set()
            # If a scan takes long, a file that grows does not make it the only thing that the node does.
            await self._clock.sleep(min(LONGEST_PAUSE_S, 4 * (self._clock.now() - began)))
            try:
                async with self._clock.timeout(min(delay_s, self._settings.rescan_s)):
                    await self._poked.wait()
            except TimeoutError:
                continue

    async def watch(self) -> None:
        """Poke soon after anything in the folder changed, until cancelled.

        If the system has no watches left, say so and try again: `run` scans every `rescan_s` by itself.
        """
        folder = self._settings.shards_dir
        while True:
            try:
                async for _ in awatch(
                    folder, watch_filter=_is_shard, debounce=WATCH_GATHER_MS, step=50, ignore_permission_denied=True
                ):
                    self.poke()
            except (OSError, RuntimeError) as err:
                log.warning("cannot watch %s: %s; changes are noticed at the next regular scan", folder, err)
            await self._clock.sleep(WATCH_RETRY_S)

    async def _scan(self) -> float:
        """Return in how many seconds the next scan is due."""
        listing = await asyncio.to_thread(list_files, self._settings.shards_dir)
        unsettled = self._unsettled = await self._read_manifests(listing)
        settled = {folder: files for folder, files in listing.items() if folder not in unsettled}
        found = classify(settled, self._catalog.folders())
        self._debounce.keep_only(found.keys() | {folder / MANIFEST_FILENAME for folder in listing})
        await self._drop_missing(listing, found, unsettled)
        delays = [self._settings.settle_s / 2] if unsettled else []
        due = [record for file in found.values() if (record := await self._record(file))]
        for record in due:
            assert record.fingerprint, "a file on disk has one"
            delay_s = await self._verifier.consider(record, self._debounce.since(record.path, record.fingerprint))
            if delay_s is not None:
                delays.append(delay_s)
        if not self.is_scanned:
            present = {folder / name for folder, files in listing.items() for name in files}
            await self._verifier.prune(self._settings.shards_dir, present)
        return max(0.05, min(delays, default=self._settings.rescan_s))

    async def _read_manifests(self, listing: Listing) -> set[Path]:
        """Bring the catalog's folders up to date. Return the folders whose manifest may still be written to."""
        for folder, held in self._catalog.folders().items():
            if MANIFEST_FILENAME in listing.get(folder, ()):
                continue
            if not await asyncio.to_thread((folder / MANIFEST_FILENAME).exists):
                self._catalog.manifest_released(held)
        unsettled: set[Path] = set()
        for folder, files in listing.items():
            fingerprint = files.get(MANIFEST_FILENAME)
            if fingerprint and not await self._read_manifest(folder, fingerprint):
                unsettled.add(folder)
        return unsettled

    async def _read_manifest(self, folder: Path, fingerprint: Fingerprint) -> bool:
        """Bring the catalog up to date with one folder's manifest. Returns False if it may still be written to."""
        path, known = folder / MANIFEST_FILENAME, self._catalog.manifest_in(folder)
        record = self._catalog.get(path)
        if fingerprint in (known and known.fingerprint, record and record.fingerprint, self._not_ours.get(path)):
            return True
        quiet_s = self._clock.now() - self._debounce.since(path, fingerprint)
        if quiet_s < self._settings.settle_s:
            return False
        try:
            signed = await asyncio.to_thread(read_manifest, path, self._key)
        except InvalidManifestError as err:
            if quiet_s < self._settings.incomplete_s or not await asyncio.to_thread(path.exists):
                return False
            log.warning("%s is left out: %s", path, err)
            if known:
                self._catalog.manifest_released(known)
            if seen := self._catalog.seen(record, path, "manifest", fingerprint):
                self._catalog.rejected(seen, err.message)
            return True
        if signed is None:
            self._not_ours[path] = fingerprint
            if known:
                self._catalog.manifest_released(known)
        elif not self._catalog.manifest_held(known, LocalManifest(folder, signed, fingerprint)):
            return True  # A download wrote it meanwhile.
        if record:
            self._catalog.gone(record)
        return True

    async def _drop_missing(self, listing: Listing, found: dict[Path, FoundFile], unsettled: set[Path]) -> None:
        """Forget the files that were deleted or moved, or are not shards any more."""
        for file in self._catalog.files():
            path = file.path
            if path in found or path.parent in unsettled or file.state == "downloading":
                continue
            if file.kind == "manifest" and path.name in listing.get(path.parent, ()):
                continue
            if path.name not in listing.get(path.parent, ()) and await asyncio.to_thread(path.exists):
                continue  # It came after the listing was made; the next scan sees it.
            if self._catalog.gone(file):
                log.info("%s is gone: it is not seeded any more", path)
                await self._verifier.withdraw(file)

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
            await self._verifier.withdraw(known)
        return record


def _same_owner(known: ShardFile, file: FoundFile) -> bool:
    if file.shard is None:
        return known.shard is None or known.shard.manifest.kind == "file"
    return known.shard is not None and known.shard.ref == file.shard.ref


def _is_shard(_: Change, path: str) -> bool:
    name = Path(path).name
    return not name.startswith(".") and not name.lower().endswith(UNFINISHED_SUFFIXES)
