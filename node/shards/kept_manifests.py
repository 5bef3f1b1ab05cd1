"""Manifests that a node keeps because its settings name them, whether or not a shard of them is here."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from node.clock import Clock
from node.shards.service import Shards
from node.shards.store.layout import prepare_folder
from protocol.errors import ShoalError
from protocol.manifest import SignedManifest

log = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 30.0
LOOK_S = 10.0


class KeptManifests:
    """Has manifests in the shards folder, so that their names are known here, also after a restart.

    The cluster is told of a manifest with its first shard.
    """

    def __init__(self, shards: Shards, shards_dir: Path, clock: Clock) -> None:
        self._shards = shards
        self._shards_dir = shards_dir
        self._clock = clock

    async def keep(self, url: str) -> None:
        """Fetch the manifest at a URL or of a name, and write it again whenever it is gone, until cancelled."""
        signed = await self._resolve(url)
        is_here = False
        while True:
            pause_s = LOOK_S
            if self._shards.manifest(signed.digest) is None:
                is_here, pause_s = False, await self._write(signed)
            elif not is_here:
                is_here = True
                log.info("keeping manifest %s@%s of %s", signed.manifest.name, signed.digest[:12], url)
            await self._clock.sleep(pause_s)

    async def _resolve(self, url: str) -> SignedManifest:
        """Try again until the manifest is found."""
        pause_s, logged = FIRST_RETRY_S, ""
        while True:
            try:
                return await self._shards.resolve(None, url)
            except ShoalError as error:
                level = logging.DEBUG if error.code == logged else logging.WARNING
                log.log(level, "manifest %s is not here yet: %s", url, error)
                logged = error.code
            await self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)

    async def _write(self, signed: SignedManifest) -> float:
        """Write it; returns after how many seconds to look again. Evicting its last shard removes its folder."""
        try:
            await asyncio.to_thread(prepare_folder, self._shards_dir.resolve(), signed, ())
        except (ShoalError, OSError) as error:
            log.warning("manifest %s cannot be written: %s", signed.manifest.name, error)
            return LOOK_S
        return FIRST_RETRY_S
