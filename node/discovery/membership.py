"""Membership of the DHT: join through the bootstrap nodes, prove contacts, drop dead ones, join again."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
from collections import OrderedDict
from collections.abc import Callable, Collection

from kademlia.node import Node

from node.clock import Clock
from node.discovery.dht_protocol import DhtProtocol
from node.discovery.overlay import Overlay
from node.discovery.values import DiscoverySettings, UdpAddress
from protocol.records import RecordKey

log = logging.getLogger(__name__)

_WORKERS = 8
_MAX_WAITING = 256
"""Peers whose identity is still to be checked; further ones are checked at their next datagram."""
_MAX_REMEMBERED = 64
_LAST_RETRY_S = 10.0
_RESOLVE_S = 2.0
_FRESH_S = 3.0
"""How long a failed attempt to join keeps lookups from trying once more themselves."""
_REFRESH_WALKS = 8
"""Buckets without a lookup for an hour (Kademlia paper, section 2.3) that are refreshed at a time."""


class Membership:
    """Keeps the routing table."""

    def __init__(self, settings: DiscoverySettings, protocol: DhtProtocol, overlay: Overlay, clock: Clock) -> None:
        self.joined: Callable[[Node], None] = lambda node: None
        """Called with every contact that is new or has a new address."""
        self._settings = settings
        self._clock = clock
        self._protocol = protocol
        self._overlay = overlay
        self._waiting: asyncio.Queue[tuple[bytes, UdpAddress]] = asyncio.Queue(_MAX_WAITING)
        self._pending: set[bytes] = set()
        self._remembered: OrderedDict[UdpAddress, None] = OrderedDict()
        self._alone = asyncio.Event()
        self._joining = asyncio.Lock()
        self._warned = False
        self._tried_at = float("-inf")

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Begin the background work; it ends when it is cancelled."""
        work = [tasks.create_task(self._prove_contacts()) for _ in range(_WORKERS)]
        return [*work, tasks.create_task(self._keep_joined())]

    def seen(self, contact_id: bytes, address: UdpAddress) -> None:
        """A peer asked or answered. If it is not a contact yet, it is asked to prove its id."""
        self._protocol.clear_suspicion(address)
        known = self._protocol.router.contact(contact_id)
        if known is not None and (known.ip, known.port) == address:
            self._protocol.router.touch(contact_id)
        else:
            self._prove_later(contact_id, address)

    def crowded(self, oldest: Node) -> None:
        """Ask the longest unheard contact of a full bucket whether it is still there."""
        self._prove_later(oldest.id, (oldest.ip, oldest.port))

    def alone(self) -> None:
        """The last contact is gone: join again now."""
        self._alone.set()

    async def join(self) -> bool:
        """Try the bootstrap nodes and former contacts once, all at the same time. True if there is a contact now."""
        async with self._joining:
            if len(self._protocol.router):
                return True
            await self._admit_all([*await self._bootstrap_addresses(), *self._remembered])
            self._tried_at = self._clock.now()
            if not len(self._protocol.router):
                return False
            await self._walk_to_own_id()
            return True

    async def join_if_alone(self) -> None:
        """For a lookup: try to join first if there is no contact, unless that has just failed."""
        if not len(self._protocol.router) and self._clock.now() > self._tried_at + _FRESH_S:
            await self.join()

    async def _keep_joined(self) -> None:
        retry_s = self._settings.retry_s
        while True:
            try:
                if not len(self._protocol.router):
                    self._alone.clear()
                    if not await self.join():
                        self._warn_alone()
                        await self._pause(retry_s)
                        retry_s = min(retry_s * 1.5, _LAST_RETRY_S)
                        continue
                self._warned = False
                retry_s = self._settings.retry_s
                await self._pause(self._settings.upkeep_s)
                await self._look_for_missing()
                await self._walk_to_own_id()
                for contact_id in self._protocol.get_refresh_ids()[:_REFRESH_WALKS]:
                    await self._overlay.closest(RecordKey(contact_id))
                self._overlay.storage.sweep()
            except Exception:
                # A defect here must not end discovery for good; the pause keeps it from flooding the log.
                log.exception("keeping the DHT's routing table failed; it goes on in %.0f s", _LAST_RETRY_S)
                await self._clock.sleep(_LAST_RETRY_S)

    async def _pause(self, seconds: float) -> None:
        # With jitter, so that nodes that lost the same bootstrap node do not all come back at one moment.
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(seconds * random.uniform(0.7, 1.3)):
                await self._alone.wait()

    def _warn_alone(self) -> None:
        if self._settings.bootstrap and not self._warned:
            names = ", ".join(f"{host}:{port}" for host, port in self._settings.bootstrap)
            log.warning("no DHT node answers at %s; trying again in the background", names)
            self._warned = True

    async def _look_for_missing(self) -> None:
        """Ask bootstrap nodes and former contacts that are not contacts now.

        So groups that joined through different bootstrap nodes become one, and a wrongly dropped contact comes back.
        """
        known = {(node.ip, node.port) for node in self._protocol.router.contacts()}
        missing = {*await self._bootstrap_addresses(), *self._remembered} - known
        for address in missing - await self._admit_all(missing):
            self._remembered.pop(address, None)

    async def _admit_all(self, addresses: Collection[UdpAddress]) -> set[UdpAddress]:
        """Ask all at once for their identity. Returns the addresses that proved it."""
        found = await asyncio.gather(*map(self._protocol.identify, set(addresses)))
        admitted = [node for node in found if node is not None]
        for node in admitted:
            self._admit(node)
        return {(node.ip, node.port) for node in admitted}

    async def _walk_to_own_id(self) -> None:
        await self._overlay.closest(RecordKey(self._protocol.source_node.id))

    async def _prove_contacts(self) -> None:
        while True:
            contact_id, address = await self._waiting.get()
            try:
                node = await self._protocol.identify(address)
                if node is not None:
                    self._admit(node)
                else:
                    self._protocol.handle_call_response((False, None), Node(contact_id, *address))
            except Exception:
                log.exception("checking the DHT contact %s:%d failed", *address)
            finally:
                self._pending.discard(contact_id)

    def _prove_later(self, contact_id: bytes, address: UdpAddress) -> None:
        if contact_id not in self._pending and not self._waiting.full():
            self._pending.add(contact_id)
            self._waiting.put_nowait((contact_id, address))

    def _admit(self, node: Node) -> None:
        router = self._protocol.router
        if node.id == self._protocol.source_node.id:
            return
        address = (node.ip, node.port)
        known = router.contact(node.id)
        is_new = known is None or (known.ip, known.port) != address
        first = not len(router)
        router.add_contact(node)
        self._protocol.clear_suspicion(address)
        self._remembered[address] = None
        self._remembered.move_to_end(address)
        if len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        if first:
            log.info("part of the DHT through %s:%d", *address)
        if is_new:
            self.joined(node)

    async def _bootstrap_addresses(self) -> list[UdpAddress]:
        found = await asyncio.gather(*(_resolve(host, port) for host, port in self._settings.bootstrap))
        return [address for address in found if address is not None]


async def _resolve(host: str, port: int) -> UdpAddress | None:
    """IPv4 address of a host. None if it does not resolve now; it may later."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.IPv4Address(host)), port
    try:
        async with asyncio.timeout(_RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, family=socket.AF_INET, type=socket.SOCK_DGRAM
            )
    except (OSError, UnicodeError, TimeoutError) as err:
        log.debug("the bootstrap host %s does not resolve: %s", host, err)
        return None
    address = found[0][4]
    return str(address[0]), int(address[1])
