"""Tells other nodes that this one takes its blocks of a shard from the origin, and keeps asking who else does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from node.clock import Clock
from node.discovery import WantInfo
from node.shards.fetch.block_assignment import BlockAssignment
from node.shards.interfaces import ProviderDirectory
from node.swarm.torrent import PeerAddress
from protocol.errors import ShoalError
from protocol.ids import ContentId, NodeId

log = logging.getLogger(__name__)

TTL_S = 12
"""A node that dies keeps its blocks for so long, and for `block_assignment.MISSES` look-ups more."""
SETTLE_S = 0.5
"""By then, nodes that begin at the same moment have heard of each other."""
POLL_S = 1.0
FIRST_ANSWER_S = 3.0
"""How long a DHT whose nodes are gone may hold up the first byte."""
WITHDRAW_S = 1.0
MAX_PEERS = 256
RESOLVED_AT_ONCE = 8

Resolve = Callable[[WantInfo], Awaitable[list[PeerAddress]]]


class WantAnnouncer:
    """This node's want of one shard, in the DHT for as long as `run()` goes on."""

    def __init__(
        self,
        directory: ProviderDirectory,
        content_id: ContentId,
        assignment: BlockAssignment,
        bt_port: int,
        resolve: Resolve,
        clock: Clock,
    ) -> None:
        self.assignment = assignment
        self.peers: dict[NodeId, list[PeerAddress]] = {}
        """Every node that wants the shard, or did: it passes on the pieces that it has."""
        self.takes_blocks = True
        """Whether this node takes its blocks. False if no origin gives it anything: others take them then."""
        self._directory = directory
        self._content_id = content_id
        self._bt_port = bt_port
        self._resolve = resolve
        self._clock = clock
        self._settled = asyncio.Event()
        self._resolving = asyncio.Semaphore(RESOLVED_AT_ONCE)

    async def settled(self) -> None:
        """Wait until nodes that began at the same moment had time to hear of each other, or the DHT did not answer."""
        with suppress(TimeoutError):
            async with self._clock.timeout(FIRST_ANSWER_S):
                await self._settled.wait()

    async def run(self) -> None:
        """Want the shard until cancelled.

        Raises nothing: without agreement the shard comes too, but blocks may leave the origin more than once.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._announce())
                await self._clock.sleep(SETTLE_S)
                while True:
                    await self._look_up(tasks)
                    if not self.takes_blocks:
                        await self._withdraw()
                    await self._clock.sleep(POLL_S)
        except Exception:
            log.exception("cannot agree with other nodes on who takes content %s from the origin", self._content_id)
            self.assignment.forget_others()
            self._settled.set()
        finally:
            await self._withdraw()

    async def _withdraw(self) -> None:
        with suppress(TimeoutError, ShoalError):
            async with asyncio.timeout(WITHDRAW_S):
                await self._directory.withdraw_want(self._content_id)

    async def _announce(self) -> None:
        try:
            await self._directory.announce_want(
                self._content_id, self._bt_port, block_pieces=self.assignment.block_pieces, ttl_s=TTL_S
            )
        except ShoalError as err:
            log.warning("cannot announce that content %s is wanted: %s", self._content_id, err)

    async def _look_up(self, tasks: asyncio.TaskGroup) -> None:
        try:
            found: Sequence[WantInfo] = await self._directory.find_wants(self._content_id)
        except ShoalError as err:
            log.info("looking for other nodes that want content %s failed: %s", self._content_id, err)
            found = ()
        # A node that asks other origins first may have blocks of another size: it is a peer, and has no part in this.
        block_pieces = self.assignment.block_pieces
        self.assignment.update_others(want.node_id for want in found if want.block_pieces == block_pieces)
        self._settled.set()
        for want in found:
            if want.node_id not in self.peers and len(self.peers) < MAX_PEERS:
                self.peers[want.node_id] = []
                tasks.create_task(self._resolve_peer(want))

    async def _resolve_peer(self, want: WantInfo) -> None:
        """Learn its addresses: names that do not resolve hold up neither the download nor each other."""
        async with self._resolving:
            self.peers[want.node_id] = await self._resolve(want)
