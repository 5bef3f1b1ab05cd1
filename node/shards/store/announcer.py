"""Tells the provider directory which shards are here, after every change that matters to others."""

from __future__ import annotations

import asyncio
import logging

from node.clock import Clock
from node.shards.interfaces import ProviderDirectory
from node.shards.store.catalog import Catalog
from protocol.ids import ManifestDigest

log = logging.getLogger(__name__)

GATHER_S = 0.05
"""Changes within so long are announced together: a folder of shards becomes known one file after the other."""
RETRY_S = 5.0
MAX_AT_ONCE = 8

Announcement = tuple[frozenset[int], frozenset[int], frozenset[int]]
"""Shards on disk, loaded, and on their way here."""


class Announcer:
    """One announcement a manifest at a time, and only if it says something new."""

    def __init__(
        self, catalog: Catalog, directory: ProviderDirectory, rpc_port: int, bt_port: int, clock: Clock
    ) -> None:
        self._catalog = catalog
        self._directory = directory
        self._rpc_port = rpc_port
        self._bt_port = bt_port
        self._clock = clock
        self._announced: dict[ManifestDigest, Announcement] = {}
        self._failed: set[ManifestDigest] = set()
        """To be announced again at `_retry_at`."""
        self._retry_at = 0.0
        self._is_announcing = False
        self._finished = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether every change was announced, or tried."""
        return not self._is_announcing and not self._catalog.has_unannounced()

    async def wait_idle(self) -> None:
        while not self.is_idle:
            self._finished.clear()
            await self._finished.wait()

    async def run(self) -> None:
        while True:
            await self._wait_for_news()
            self._is_announcing = True
            await self._clock.sleep(GATHER_S)
            failed = await self._announce_all(self._catalog.take_unannounced())
            self._is_announcing = False
            self._finished.set()
            if failed and not self._failed:
                self._retry_at = self._clock.now() + RETRY_S
            self._failed |= failed

    async def _wait_for_news(self) -> None:
        """Wait for a change; what failed counts as one once it is time to try again."""
        if not self._failed:
            await self._catalog.wait_unannounced()
            return
        try:
            async with self._clock.timeout(self._retry_at - self._clock.now()):
                await self._catalog.wait_unannounced()
        except TimeoutError:
            failed, self._failed = self._failed, set()
            self._catalog.announce_again(failed)

    async def _announce_all(self, digests: set[ManifestDigest]) -> set[ManifestDigest]:
        """Return those that failed."""
        slots = asyncio.Semaphore(MAX_AT_ONCE)
        failed: set[ManifestDigest] = set()

        async def announce(digest: ManifestDigest) -> None:
            async with slots:
                try:
                    await self._announce(digest)
                except Exception as err:
                    # Whatever it is, the shards stay here and the node goes on.
                    log.warning("could not announce manifest %s: %r; trying again in %g s", digest, err, RETRY_S)
                    failed.add(digest)

        async with asyncio.TaskGroup() as tasks:
            for digest in digests:
                tasks.create_task(announce(digest))
        return failed

    async def _announce(self, digest: ManifestDigest) -> None:
        on_disk = self._catalog.on_disk(digest)
        loaded = self._catalog.loaded(digest) & on_disk
        signed = self._catalog.manifest(digest)
        fetching = self._catalog.fetching(digest)
        if signed is None or not (on_disk or fetching):
            if digest in self._announced:
                await self._directory.withdraw_shards(digest)
                del self._announced[digest]
        elif self._announced.get(digest) != (on_disk, loaded, fetching):
            await self._directory.announce_shards(
                signed, on_disk, loaded, self._rpc_port, self._bt_port, fetching=fetching
            )
            self._announced[digest] = (on_disk, loaded, fetching)
