"""Tells the other nodes that this one takes its part of a shard from the origin, and keeps hearing who else does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from node.shards.fetch.block_assignment import Lease
from node.shards.interfaces import Discovery, FoundWant
from node.swarm.torrent import PeerAddress
from protocol.errors import ShoalError
from protocol.ids import ContentId, NodeId

log = logging.getLogger(__name__)

TTL_S = 12
"""A node that dies without a word holds its blocks for so long, and `lease.MISSES` look-ups more."""
SETTLE_S = 0.5
"""Nodes that begin at the same moment have heard of each other then."""
POLL_S = 1.0
FIRST_ANSWER_S = 3.0
"""How long a DHT whose nodes are gone may hold up the first byte."""
WITHDRAW_S = 1.0
MAX_PEERS = 256
RESOLVED_AT_ONCE = 8

Resolve = Callable[[FoundWant], Awaitable[list[PeerAddress]]]


class Wanting:
    """One shard's wish in the DHT, for as long as `run()` goes on."""

    def __init__(
        self,
        discovery: Discovery,
        content_id: ContentId,
        lease: Lease,
        block_pieces: int,
        bt_port: int,
        resolve: Resolve,
    ) -> None:
        self.lease = lease
        self.peers: dict[NodeId, list[PeerAddress]] = {}
        """Everybody who wants the shard, or did: they pass on the pieces that they have."""
        self.holds = True
        """Whether this node takes its part. False, where no origin gives it anything: others take it then."""
        self._discovery = discovery
        self._content_id = content_id
        self._block_pieces = block_pieces
        self._bt_port = bt_port
        self._resolve = resolve
        self._settled = asyncio.Event()
        self._resolving = asyncio.Semaphore(RESOLVED_AT_ONCE)

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
                    await self._look(tasks)
                    if not self.holds:
                        await self._withdraw()
                    await asyncio.sleep(POLL_S)
        except Exception:
            log.exception("cannot agree with others on who takes content %s from the origin", self._content_id)
            self.lease.forget()
            self._settled.set()
        finally:
            await self._withdraw()

    async def _withdraw(self) -> None:
        with suppress(TimeoutError, ShoalError):
            async with asyncio.timeout(WITHDRAW_S):
                await self._discovery.withdraw_want(self._content_id)

    async def _announce(self) -> None:
        try:
            await self._discovery.announce_want(
                self._content_id, self._bt_port, block_pieces=self._block_pieces, ttl_s=TTL_S
            )
        except ShoalError as err:
            log.warning("cannot tell others that content %s is wanted: %s", self._content_id, err)

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        try:
            found: Sequence[FoundWant] = await self._discovery.find_wants(self._content_id)
        except ShoalError as err:
            log.info("looking for others that want content %s failed: %s", self._content_id, err)
            found = ()
        # Who shares it out in other blocks, because other origins are asked first there, is a peer and no more.
        self.lease.heard(want.node_id for want in found if want.block_pieces == self._block_pieces)
        self._settled.set()
        for want in found:
            if want.node_id not in self.peers and len(self.peers) < MAX_PEERS:
                self.peers[want.node_id] = []
                tasks.create_task(self._know(want))

    async def _know(self, want: FoundWant) -> None:
        """Learn where it is: names that do not resolve hold up neither the download nor each other."""
        async with self._resolving:
            self.peers[want.node_id] = await self._resolve(want)
