"""Which nodes have one shard, as discovery says, and the error if none of them gives it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from node.clock import Clock
from node.discovery import ProviderInfo, WantInfo
from node.shards.interfaces import ProviderDirectory
from node.shards.settings import ShardsSettings
from node.swarm.torrent import PeerAddress
from protocol.errors import NoSourceError, OriginError, ShoalError
from protocol.manifest import Shard

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.2
RESOLVE_TIMEOUT_S = 5.0


class Providers:
    """The providers of one shard, and what was tried to find them."""

    def __init__(self, settings: ShardsSettings, directory: ProviderDirectory, shard: Shard, clock: Clock) -> None:
        self._settings = settings
        self._directory = directory
        self._shard = shard
        self._clock = clock
        self._lookups = 0
        self._found: dict[str, bool] = {}
        """host:port of every provider of the manifest that was found -> whether it has this shard."""
        self.any_complete = False
        """Whether the last look-up found one that has the whole shard."""

    async def look_up(self) -> list[PeerAddress]:
        """Ask discovery once who has the shard and who fetches it too. If discovery fails, no provider was found."""
        self._lookups += 1
        self.any_complete = False
        try:
            found: Sequence[ProviderInfo] = await self._directory.find_providers(self._shard.digest)
        except ShoalError as err:
            log.info("looking for providers of %s failed: %s", self._shard.entry.filename, err)
            return []
        peers: list[PeerAddress] = []
        for provider in found:
            is_complete = self._shard.entry.shard_id in provider.on_disk
            self._found[f"{provider.host}:{provider.bt_port}"] = is_complete
            self.any_complete |= is_complete
            if is_complete or self._shard.entry.shard_id in provider.fetching:
                peers += await peer_addresses(provider)
        return peers

    async def first(self, *, has_origin: bool) -> list[PeerAddress]:
        """Look until there is a provider that has the shard.

        Nodes that only fetch it do not count: several that wait for each other would wait for long. If an origin can
        help, the wait is `origin_after_s`, and then they do. Without one, raises NoSourceError after `find_timeout_s`.
        """
        pause_s = FIRST_RETRY_S
        peers: list[PeerAddress] = []
        timeout_s = self._settings.origin_after_s if has_origin else self._settings.find_timeout_s
        try:
            async with self._clock.timeout(timeout_s):
                while not (peers := await self.look_up()) or not self.any_complete:
                    await self._clock.sleep(pause_s)
                    pause_s = min(2 * pause_s, self._settings.relookup_s)
        except TimeoutError:
            if not has_origin:
                raise self.no_source(f"no peer had it within {timeout_s:g} s") from None
        return peers

    def no_source(self, why: str) -> NoSourceError:
        """The error of a fetch for which only peers were asked: what was tried."""
        return NoSourceError(
            f"{self._shard.label}: {why}; {self._asked}; start a node that has it, and try again", self._details
        )

    def no_source_or_origin(self, why: str, errors: Mapping[str, OriginError]) -> ShoalError:
        """The error of a fetch for which origins were asked too: of the kind of the best origin's last error."""
        if not errors:
            return self.no_source(why)
        kind = next((error for error in errors.values() if error.retryable), next(iter(errors.values())))
        messages = "; ".join(error.message for error in errors.values())
        return type(kind)(
            f"{self._shard.label}: {why}; {messages}; {self._asked}; what came is kept for the next try",
            {**kind.details, **self._details},
        )

    @property
    def _asked(self) -> str:
        found = ", ".join(
            f"{address} ({'has it' if is_complete else 'lacks it'})"
            for address, is_complete in sorted(self._found.items())
        )
        return f"discovery was asked {self._lookups} times and named {found or 'no provider of that manifest'}"

    @property
    def _details(self) -> dict[str, Any]:
        return {
            "digest": self._shard.digest,
            "shard_id": self._shard.entry.shard_id,
            "providers": dict(self._found),
        }


async def peer_addresses(provider: ProviderInfo | WantInfo) -> list[PeerAddress]:
    """The addresses of a provider's BitTorrent port; its host may be a name. Empty if the name does not resolve."""
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
