"""Notices that something in the shards folder changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from watchfiles import Change, awatch

from node.shards.store.manifests import UNFINISHED_SUFFIXES

log = logging.getLogger(__name__)

GATHER_MS = 300
RETRY_S = 30.0


def _matters(_: Change, path: str) -> bool:
    name = Path(path).name
    return not name.startswith(".") and not name.lower().endswith(UNFINISHED_SUFFIXES)


async def watch(folder: Path, changed: Callable[[], None]) -> None:
    """Call `changed` soon after anything under `folder` changed, until cancelled.

    Where the system has no watches left it says so and tries again: the survey looks by itself now and then.
    """
    while True:
        try:
            async for _ in awatch(
                folder, watch_filter=_matters, debounce=GATHER_MS, step=50, ignore_permission_denied=True
            ):
                changed()
        except (OSError, RuntimeError) as err:
            log.warning("cannot watch %s: %s; changes are noticed at the next regular look", folder, err)
        await asyncio.sleep(RETRY_S)
