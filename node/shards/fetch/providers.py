"""Who has one shard: the providers that discovery finds, and what is said where nobody gives it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Sequence
from typing import Any

from node.shards.fetch.job import Fetch
from node.shards.fetch.origin_selector import Supply
from node.shards.interfaces import Discovery, FoundProvider, FoundWant
from node.shards.settings import ShardsSettings
from node.swarm.torrent import PeerAddress
from protocol.errors import NoSourceError, ShoalError

log = logging.getLogger(__name__)

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
        self.whole = False
        try:
            found: Sequence[FoundProvider] = await self._discovery.find_providers(self._fetch.shard.digest)
        except ShoalError as err:
            log.info("looking for providers of %s failed: %s", self._fetch.entry.filename, err)
            return []
        peers: list[PeerAddress] = []
        for provider in found:
            has = self._fetch.entry.shard_id in provider.on_disk
            self.seen[f"{provider.host}:{provider.bt_port}"] = has
            self.whole |= has
            if has or self._fetch.entry.shard_id in provider.fetching:
                peers += await addresses(provider)
        return peers

    async def first(self, *, insist: bool = True) -> list[PeerAddress]:
        """Look until there is a provider that has the shard. Raises NoSourceError after `find_timeout_s`.

        Those who are only fetching it do not count: several that wait for each other would wait for long. Without
        `insist`, where an origin can help, the wait is `origin_after_s`, and then those who are fetching it do.
        """
        pause = FIRST_RETRY_S
        peers: list[PeerAddress] = []
        try:
            async with asyncio.timeout(self._settings.find_timeout_s if insist else self._settings.origin_after_s):
                while not (peers := await self.look_up()) or not self.whole:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, self._settings.relookup_s)
        except TimeoutError:
            if insist:
                raise self.none(f"nobody had it within {self._settings.find_timeout_s:g} s") from None
        return peers

    def none(self, why: str) -> NoSourceError:
        """Say what was tried."""
        return NoSourceError(
            f"{self._name}: {why}; {self._asked}; start a node that has it, and try again", self._details
        )

    def failed(self, why: str, supply: Supply) -> ShoalError:
        """Say what was tried, where origins were tried too; of the kind of what the best of them said last."""
        errors = supply.errors
        if not errors:
            return self.none(why)
        told = next((error for error in errors.values() if error.retryable), next(iter(errors.values())))
        said = "; ".join(error.message for error in errors.values())
        return type(told)(
            f"{self._name}: {why}; {said}; {self._asked}; what came is kept for the next try",
            {**told.details, **self._details},
        )

    @property
    def _name(self) -> str:
        return self._fetch.shard.label

    @property
    def _asked(self) -> str:
        seen = ", ".join(sorted(f"{who} ({'has it' if has else 'lacks it'})" for who, has in self.seen.items()))
        return f"discovery was asked {self.lookups} times and named {seen or 'no provider of that manifest'}"

    @property
    def _details(self) -> dict[str, Any]:
        return {
            "digest": self._fetch.shard.digest,
            "shard_id": self._fetch.entry.shard_id,
            "providers": dict(self.seen),
        }


async def addresses(provider: FoundProvider | FoundWant) -> list[PeerAddress]:
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
    except (OSError, TimeoutError, UnicodeError) as err:  # the last for labels that no name can have
        log.info("cannot resolve the provider %s: %s", provider.host, err)
        return []
    return [PeerAddress(str(address[0]), provider.bt_port) for *_, address in found]
