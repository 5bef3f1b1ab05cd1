"""Tells the other nodes that this one takes its part of a shard from the origin, and keeps hearing who else does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from node.shards.lease import Lease
from node.shards.ports import Discovery, FoundWant
from node.swarm.torrent import PeerAddress
from protocol.errors import ShoalError
from protocol.ids import ContentId, NodeId

log = logging.getLogger(__name__)

TTL_S = 12
"""A node that dies without a word holds its blocks for so long, and `lease.MEMORY_S` more."""
SETTLE_S = 0.5
"""Nodes that begin at the same moment have heard of each other then."""
POLL_S = 1.0
FIRST_ANSWER_S = 3.0
"""How long a DHT whose nodes are gone may hold up the first byte."""
WITHDRAW_S = 1.0
MAX_PEERS = 256

Resolve = Callable[[FoundWant], Awaitable[list[PeerAddress]]]


class Wanting:
    """One shard's wish in the DHT, for as long as `run()` goes on."""

    def __init__(
        self, discovery: Discovery, content_id: ContentId, lease: Lease, bt_port: int, resolve: Resolve
    ) -> None:
        self.lease = lease
        self.peers: dict[NodeId, list[PeerAddress]] = {}
        """Everybody who wants the shard, or did: they pass on the pieces that they have."""
        self._discovery = discovery
        self._content_id = content_id
        self._bt_port = bt_port
        self._resolve = resolve
        self._settled = asyncio.Event()

    async def settled(self) -> None:
        """Wait until nodes that began at the same moment had time to hear of each other, or the DHT did not answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_ANSWER_S):
                await self._settled.wait()

    async def run(self) -> None:
        """Want the shard until cancelled. Raises nothing: without agreement the shard comes too, only dearer."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._announce())
                await asyncio.sleep(SETTLE_S)
                while True:
                    await self._look()
                    self._settled.set()
                    await asyncio.sleep(POLL_S)
        except Exception:
            log.exception("cannot agree with others on who takes content %s from the origin", self._content_id)
            self._settled.set()
        finally:
            with suppress(TimeoutError, ShoalError):
                async with asyncio.timeout(WITHDRAW_S):
                    await self._discovery.withdraw_want(self._content_id)

    async def _announce(self) -> None:
        try:
            await self._discovery.announce_want(self._content_id, self._bt_port, ttl_s=TTL_S)
        except ShoalError as err:
            log.warning("cannot tell others that content %s is wanted: %s", self._content_id, err)

    async def _look(self) -> None:
        try:
            found: Sequence[FoundWant] = await self._discovery.find_wants(self._content_id)
        except ShoalError as err:
            log.info("looking for others that want content %s failed: %s", self._content_id, err)
            found = ()
        self.lease.heard(asyncio.get_running_loop().time(), (want.node_id for want in found))
        for want in found:
            if not self.peers.get(want.node_id) and len(self.peers) < MAX_PEERS:
                self.peers[want.node_id] = await self._resolve(want)
