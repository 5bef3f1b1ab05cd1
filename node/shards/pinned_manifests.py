"""Manifests that a node holds because it was told to, whether or not a shard of them is here."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from node.shards.service import Shards
from node.shards.store.layout import prepare_folder
from protocol.errors import ShoalError

log = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 30.0
LOOK_S = 10.0


async def keep_held(shards: Shards, shards_dir: Path, url: str) -> None:
    """Fetch a manifest, trying again until it is there, and see to it that this node holds it from then on.

    It is written into the shards folder, so that its name is known here also after a restart. The cluster is told of it
    with its first shard.
    """
    signed, pause_s, told = None, FIRST_RETRY_S, ""
    while signed is None:
        try:
            signed = await shards.resolve(None, url)
        except ShoalError as error:
            log.log(logging.DEBUG if error.code == told else logging.WARNING, "manifest not held yet: %s", error)
            told = error.code
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)
    held = False
    while True:
        pause_s = LOOK_S
        if shards.manifest(signed.digest) is None:
            held, pause_s = False, FIRST_RETRY_S
            # Evicting the last shard of a fetched manifest takes its folder along.
            try:
                await asyncio.to_thread(prepare_folder, shards_dir.resolve(), signed, ())
            except (ShoalError, OSError) as error:
                log.warning("manifest %s cannot be held: %s", signed.manifest.name, error)
                pause_s = LOOK_S
        elif not held:
            held = True
            log.info("holding %s@%s of %s", signed.manifest.name, signed.digest[:12], url)
        await asyncio.sleep(pause_s)
