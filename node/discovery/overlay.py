"""Look up and store at the nodes that are closest to a key."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from kademlia.node import Node

from node.discovery.crawl import Crawl
from node.discovery.dht_protocol import DhtProtocol
from node.discovery.sampling import newest
from node.discovery.storage import RecordStorage
from node.discovery.values import Address
from protocol.records import Record, RecordKey, pack_value

# Together well below dht_protocol.MAX_OUTSTANDING, from which on requests fail unsent.
_CONCURRENT_WALKS = 16
_CONCURRENT_STORES = 16


class Overlay:
    """The DHT as seen from one node. Whatever peers do, nothing is raised."""

    def __init__(self, protocol: DhtProtocol, storage: RecordStorage) -> None:
        self.storage = storage
        self._protocol = protocol
        self._walks = asyncio.Semaphore(_CONCURRENT_WALKS)
        self._stores = asyncio.Semaphore(_CONCURRENT_STORES)

    async def records(self, key: RecordKey) -> list[Record]:
        """The newest record of every subject, here and at the closest nodes; without withdrawn ones."""
        found = await self._walk(key, values=True)
        merged = newest([*self.storage.records(key), *found.records.values()])
        return [record for record in merged if not record.withdrawn]

    async def closest(self, key: RecordKey) -> list[Node]:
        """The nodes closest to a key that answer, ourselves not among them."""
        return (await self._walk(key, values=False)).closest

    async def store(self, key: RecordKey, record: Record, nodes: Iterable[Node]) -> dict[bytes, Address]:
        """Send a record to these nodes at once. Gives id and address of those that keep it now."""
        value = pack_value([record])
        async with self._stores:
            calls = [(node, self._protocol.request((node.ip, node.port), "store", key, value)) for node in nodes]
            if calls:
                await asyncio.wait([reply for _, reply in calls])
        kept: dict[bytes, Address] = {}
        for node, reply in calls:
            happened, accepted = self._protocol.handle_call_response(reply.result(), node)
            if happened and accepted is True:
                kept[node.id] = (node.ip, node.port)
        return kept

    def neighbours(self, key: RecordKey) -> list[Node]:
        """The closest contacts that we know without asking."""
        near: list[Node] = self._protocol.router.find_neighbors(Node(key))
        return near

    def not_suspect(self, nodes: Iterable[Node]) -> list[Node]:
        """Those that did not fail to answer just now."""
        return [node for node in nodes if not self._protocol.is_suspect(node)]

    async def _walk(self, key: RecordKey, *, values: bool) -> Crawl:
        async with self._walks:
            crawl = Crawl(self._protocol, key, self.neighbours(key), values=values)
            await crawl.find()
            return crawl
