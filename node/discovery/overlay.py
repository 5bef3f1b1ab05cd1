"""Look up and store at the nodes that are closest to a key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from kademlia.node import Node

from node.discovery.crawl import Crawl
from node.discovery.dht_protocol import DhtProtocol
from node.discovery.storage import RecordStorage
from node.discovery.values import UdpAddress
from protocol.ids import NodeId
from protocol.records import Record, RecordKey, pack_value

# Together well below dht_protocol.MAX_OUTSTANDING, from which on requests fail unsent.
_CONCURRENT_WALKS = 16
_CONCURRENT_STORES = 16


class Overlay:
    """The DHT as seen from one node. No method raises for what peers do."""

    def __init__(
        self,
        protocol: DhtProtocol,
        storage: RecordStorage,
        *,
        walk_deadline_s: float,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.storage = storage
        self._protocol = protocol
        self._walk_deadline_s = walk_deadline_s
        self._wall_clock = wall_clock
        self._walks = asyncio.Semaphore(_CONCURRENT_WALKS)
        self._stores = asyncio.Semaphore(_CONCURRENT_STORES)

    async def records(self, key: RecordKey) -> list[Record]:
        """The newest record of every subject, from here and from the closest nodes; without withdrawn ones."""
        found = await self._walk(key, values=True)
        merged = newest([*self.storage.records(key), *found.records.values()])
        return [record for record in merged if not record.withdrawn]

    async def closest(self, key: RecordKey) -> list[Node]:
        """The nodes closest to a key that answer, without this one."""
        return (await self._walk(key, values=False)).closest

    async def store(self, key: RecordKey, record: Record, nodes: Iterable[Node]) -> dict[bytes, UdpAddress]:
        """Send a record to these nodes at once. Returns id and address of those that keep it now."""
        value = pack_value([record])
        async with self._stores:
            calls = [(node, self._protocol.request((node.ip, node.port), "store", key, value)) for node in nodes]
            if calls:
                await asyncio.wait([reply for _, reply in calls])
        kept: dict[bytes, UdpAddress] = {}
        for node, reply in calls:
            happened, accepted = self._protocol.handle_call_response(reply.result(), node)
            if happened and accepted is True:
                kept[node.id] = (node.ip, node.port)
        return kept

    def neighbours(self, key: RecordKey) -> list[Node]:
        """The closest contacts in the routing table."""
        near: list[Node] = self._protocol.router.find_neighbors(Node(key))
        return near

    def not_suspect(self, nodes: Iterable[Node]) -> list[Node]:
        """Those that did not fail to answer just now."""
        return [node for node in nodes if not self._protocol.is_suspect(node)]

    async def _walk(self, key: RecordKey, *, values: bool) -> Crawl:
        async with self._walks:
            crawl = Crawl(self._protocol, key, self.neighbours(key), values=values, wall_clock=self._wall_clock)
            await crawl.find(self._walk_deadline_s)
            return crawl


def newest(records: Iterable[Record]) -> list[Record]:
    """One record a subject, that of the highest sequence number; withdrawn ones are kept."""
    merged: dict[tuple[NodeId, bytes], Record] = {}
    for record in records:
        kept = merged.get(record.subject)
        if kept is None or record.sequence > kept.sequence:
            merged[record.subject] = record
    return list(merged.values())
