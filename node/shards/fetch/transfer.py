"""One shard through the swarm, with the origin beside it: how far it is, and when to begin anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from node.shards.fetch.job import Fetch, FetchProgress
from node.shards.fetch.origin_feeder import Feeder
from node.shards.fetch.providers import Sources
from node.shards.interfaces import Download
from node.shards.settings import ShardsSettings
from node.swarm.torrent import PeerAddress

TICK_S = 0.25
RATE_MEMORY = 0.85
"""Of the origin's rate as told, how much is left of it a tick later."""


class Pace:
    """When a download last got further than ever before, whatever was begun anew in between."""

    def __init__(self) -> None:
        self.most = 0
        """Bytes that were here at a time."""
        self._at = asyncio.get_running_loop().time()

    def saw(self, bytes_done: int) -> bool:
        """Take note. Returns whether it is more than ever before."""
        if bytes_done <= self.most:
            return False
        self.most, self._at = bytes_done, asyncio.get_running_loop().time()
        return True

    @property
    def idle_s(self) -> float:
        return asyncio.get_running_loop().time() - self._at


async def carry(
    download: Download,
    fetch: Fetch,
    sources: Sources,
    peers: Sequence[PeerAddress],
    settings: ShardsSettings,
    pace: Pace,
    patience_s: float,
    feeder: Feeder | None = None,
) -> bool:
    """Accompany a download, with ever new peers and what the origin gives, to its end: True.

    False where nothing came for `patience_s` at the start, or for `restart_s` later: it is time to begin anew; never
    while the origin feeds it, which has a patience of its own. Raises what the download or the feeder raises.
    """
    end: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
    end.add_done_callback(lambda future: future.cancelled() or future.exception())
    failure: Exception | None = None
    done = False
    async with asyncio.TaskGroup() as beside:
        try:
            async with asyncio.timeout(patience_s) as patience:
                download.add_peers(peers)
                tasks = [
                    beside.create_task(_report(download, fetch, pace, patience, settings.restart_s, feeder)),
                    beside.create_task(_seek(download, sources, settings)),
                    beside.create_task(_settle(end, download.verified)),
                ]
                if feeder:
                    tasks.append(beside.create_task(_settle(end, partial(feeder.feed, download))))
                try:
                    await end
                    done = True
                finally:
                    for task in tasks:
                        task.cancel()
        except TimeoutError:
            pass
        except Exception as err:
            failure = err  # The group would wrap it.
    if failure:
        raise failure
    return done


async def _settle(end: asyncio.Future[Path], work: Callable[[], Awaitable[Any]]) -> None:
    try:
        result = await work()
    except Exception as err:
        if not end.done():
            end.set_exception(err)
    else:
        if not end.done():
            end.set_result(result)


async def _report(
    download: Download,
    fetch: Fetch,
    pace: Pace,
    patience: asyncio.Timeout,
    restart_s: float,
    feeder: Feeder | None,
) -> None:
    loop = asyncio.get_running_loop()
    at, fed, fed_rate = loop.time(), feeder.origin_bytes if feeder else 0, 0.0
    told = 0
    while True:
        now = download.progress()
        if pace.saw(now.bytes_done) and not patience.expired():
            later = loop.time() + restart_s
            patience.reschedule(max(later, patience.when() or 0))
        bytes_done = now.bytes_done
        if feeder:
            if feeder.begun and not patience.expired():
                patience.reschedule(None)
            passed_s = loop.time() - at
            if passed_s > 0:
                fed_rate += (1 - RATE_MEMORY) * ((feeder.origin_bytes - fed) / passed_s - fed_rate)
                at, fed = loop.time(), feeder.origin_bytes
            bytes_done = told = min(now.bytes_total, max(told, bytes_done + feeder.pending_bytes))
        fetch.tell(FetchProgress("downloading", bytes_done, now.bytes_total, now.rate_bytes_s + fed_rate, now.peers))
        await asyncio.sleep(TICK_S)


async def _seek(download: Download, sources: Sources, settings: ShardsSettings) -> None:
    while True:
        await asyncio.sleep(settings.relookup_s)
        download.add_peers(await sources.look_up())
