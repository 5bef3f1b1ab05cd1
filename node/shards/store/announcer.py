"""Tells discovery which shards are here, after every change that matters to others."""

from __future__ import annotations

import asyncio
import logging

from node.shards.interfaces import Discovery
from node.shards.store.catalog import Catalog
from protocol.ids import ManifestDigest

log = logging.getLogger(__name__)

GATHER_S = 0.05
"""Changes within so long are told together: a folder of shards becomes known one file after the other."""
RETRY_S = 5.0
AT_A_TIME = 8

News = tuple[frozenset[int], frozenset[int], frozenset[int]]
"""Shards on disk, loaded, and on their way here."""


class Announcer:
    """One announcement a manifest at a time, and only where it says something new."""

    def __init__(self, catalog: Catalog, discovery: Discovery, rpc_port: int, bt_port: int) -> None:
        self._catalog = catalog
        self._discovery = discovery
        self._rpc_port = rpc_port
        self._bt_port = bt_port
        self._told: dict[ManifestDigest, News] = {}
        self._failed: set[ManifestDigest] = set()
        """To be told again at `_retry_at`."""
        self._retry_at: float | None = None
        self._telling = False
        self._all_told = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether everything known was told, or tried."""
        return not self._telling and not self._catalog.untold()

    async def wait_idle(self) -> None:
        while not self.is_idle:
            self._all_told.clear()
            await self._all_told.wait()

    async def run(self) -> None:
        while True:
            try:
                async with asyncio.timeout_at(self._retry_at):
                    await self._catalog.wait_untold()
            except TimeoutError:
                self._catalog.untold_again(self._failed)
                self._failed, self._retry_at = set(), None
                continue
            self._telling = True
            await asyncio.sleep(GATHER_S)
            failed = await self._tell_all(self._catalog.take_untold())
            self._telling = False
            self._all_told.set()
            if failed:
                self._failed.update(failed)
                self._retry_at = self._retry_at or asyncio.get_running_loop().time() + RETRY_S

    async def _tell_all(self, digests: set[ManifestDigest]) -> list[ManifestDigest]:
        """Return those that failed."""
        turns = asyncio.Semaphore(AT_A_TIME)
        failed: list[ManifestDigest] = []

        async def tell(digest: ManifestDigest) -> None:
            async with turns:
                try:
                    await self._tell(digest)
                except Exception as err:
                    # Whatever it is, the shards stay here and the node goes on.
                    log.warning("could not announce manifest %s: %r; trying again in %g s", digest, err, RETRY_S)
                    failed.append(digest)

        async with asyncio.TaskGroup() as tasks:
            for digest in digests:
                tasks.create_task(tell(digest))
        return failed

    async def _tell(self, digest: ManifestDigest) -> None:
        on_disk = self._catalog.on_disk(digest)
        loaded = self._catalog.loaded(digest) & on_disk
        signed = self._catalog.manifest(digest)
        fetching = self._catalog.fetching(digest)
        if signed is None or not (on_disk or fetching):
            if digest in self._told:
                await self._discovery.withdraw_shards(digest)
                del self._told[digest]
        elif self._told.get(digest) != (on_disk, loaded, fetching):
            await self._discovery.announce_shards(
                signed, on_disk, loaded, self._rpc_port, self._bt_port, fetching=fetching
            )
            self._told[digest] = (on_disk, loaded, fetching)
