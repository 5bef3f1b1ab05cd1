"""One shard through the swarm: who is asked, how far it is, and when to give up."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Sequence

from node.shards.fetching import Fetch, FetchProgress
from node.shards.ports import Discovery, Download, FoundProvider
from node.shards.settings import ShardsSettings
from node.swarm.torrent import PeerAddress
from protocol.errors import NoSourceError, ShoalError

log = logging.getLogger(__name__)

TICK_S = 0.25
FIRST_RETRY_S = 0.2
RESOLVE_TIMEOUT_S = 5.0


class Sources:
    """The providers of one shard, and what was tried to find them."""

    def __init__(self, settings: ShardsSettings, discovery: Discovery, fetch: Fetch) -> None:
        self._settings = settings
        self._discovery = discovery
        self._fetch = fetch
        self.lookups = 0
        self.seen: dict[str, bool] = {}
        """host:port of every provider of the manifest that was found -> whether it has this shard."""
        self.whole = False
        """Whether the last look-up found one that has the whole shard."""

    async def look_up(self) -> list[PeerAddress]:
        """Ask discovery once: who has the shard, and who is fetching it too. Where that fails, nobody was found."""
        self.lookups += 1
        try:
            found: Sequence[FoundProvider] = await self._discovery.find_providers(self._fetch.holding.digest)
        except ShoalError as err:
            log.info("looking for providers of %s failed: %s", self._fetch.entry.filename, err)
            return []
        peers: list[PeerAddress] = []
        self.whole = False
        for provider in found:
            has = self._fetch.entry.shard_id in provider.on_disk
            self.seen[f"{provider.host}:{provider.bt_port}"] = has
            self.whole |= has
            if has or self._fetch.entry.shard_id in provider.fetching:
                peers += await _addresses(provider)
        return peers

    async def first(self) -> list[PeerAddress]:
        """Look until there is a provider that has the shard. Raises NoSourceError after `find_timeout_s`.

        Those who are only fetching it do not count: several that wait for each other would wait for long.
        """
        pause = FIRST_RETRY_S
        try:
            async with asyncio.timeout(self._settings.find_timeout_s):
                while not (peers := await self.look_up()) or not self.whole:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, self._settings.relookup_s)
        except TimeoutError:
            raise self.none(f"nobody had it within {self._settings.find_timeout_s:g} s") from None
        return peers

    def none(self, why: str) -> NoSourceError:
        """Say what was tried."""
        name = f"shard {self._fetch.entry.shard_id} of {self._fetch.holding.manifest.name!r}"
        seen = ", ".join(sorted(f"{who} ({'has it' if has else 'lacks it'})" for who, has in self.seen.items()))
        return NoSourceError(
            f"{name} ({self._fetch.entry.filename}): {why}; discovery was asked {self.lookups} times and named "
            f"{seen or 'no provider of that manifest'}; start a node that has it, and try again",
            {
                "digest": self._fetch.holding.digest,
                "shard_id": self._fetch.entry.shard_id,
                "providers": dict(self.seen),
            },
        )


async def _addresses(provider: FoundProvider) -> list[PeerAddress]:
    """A provider says where it is by name or by address; the swarm wants addresses."""
    try:
        ipaddress.ip_address(provider.host)
        return [PeerAddress(provider.host, provider.bt_port)]
    except ValueError:
        pass
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(
                provider.host, provider.bt_port, type=socket.SOCK_STREAM
            )
    except (OSError, TimeoutError) as err:
        log.info("cannot resolve the provider %s: %s", provider.host, err)
        return []
    return [PeerAddress(str(address[0]), provider.bt_port) for *_, address in found]


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
) -> bool:
    """Accompany a download, with ever new peers, to its end: True.

    False where nothing came for `patience_s` at the start, or for `restart_s` later: it is time to begin anew. Raises
    what the download raises.
    """
    failure: Exception | None = None
    done = False
    async with asyncio.TaskGroup() as beside:
        try:
            async with asyncio.timeout(patience_s) as patience:
                download.add_peers(peers)
                tasks = [
                    beside.create_task(_report(download, fetch, pace, patience, settings.restart_s)),
                    beside.create_task(_seek(download, sources, settings)),
                ]
                try:
                    await download.verified()
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


async def _report(download: Download, fetch: Fetch, pace: Pace, patience: asyncio.Timeout, restart_s: float) -> None:
    while True:
        now = download.progress()
        if pace.saw(now.bytes_done) and not patience.expired():
            later = asyncio.get_running_loop().time() + restart_s
            patience.reschedule(max(later, patience.when() or 0))
        fetch.tell(FetchProgress("downloading", now.bytes_done, now.bytes_total, now.rate_bytes_s, now.peers))
        await asyncio.sleep(TICK_S)


async def _seek(download: Download, sources: Sources, settings: ShardsSettings) -> None:
    while True:
        await asyncio.sleep(settings.relookup_s)
        download.add_peers(await sources.look_up())
