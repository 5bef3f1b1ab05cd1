"""One walk towards a key: kademlia's crawl, with a window instead of rounds, and with all answers merged.

A round waits for its slowest peer, and after nodes died that is a timeout each. Here the next peer is asked as
soon as any answers. The stock crawl stops at the first value; this one asks all of the closest nodes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from kademlia.crawling import SpiderCrawl
from kademlia.node import Node

from node.discovery.dht_protocol import DhtProtocol, Reply
from node.discovery.values import ALPHA, KSIZE
from node.discovery.wire import parse_contacts
from protocol.records import Record, RecordKey, open_value

MAX_ASKED = 4 * KSIZE
MAX_FOUND = 1_024
"""Records of one walk that are opened."""
_MORE_ROUNDS = 3
"""How often holders are asked for another sample of records that did not fit one answer."""


class Crawl(SpiderCrawl):  # type: ignore[misc]
    """Find the nodes closest to a key and, with `values`, the records that they keep under it."""

    def __init__(
        self,
        protocol: DhtProtocol,
        key: RecordKey,
        peers: list[Node],
        *,
        values: bool,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(protocol, Node(key), peers, KSIZE, ALPHA)
        self.records: dict[bytes, Record] = {}
        """By their packed bytes; not yet merged."""
        self.closest: list[Node] = []
        """Those that answered, nearest first, at most k."""
        self._key = key
        self._values = values
        self._wall_clock = wall_clock
        self._method = "find_value" if values else "find_node"
        self._asked = 0
        self._holders: dict[bytes, Node] = {}  # that have more records than they sent
        self._deadline = 0.0

    async def find(self, deadline_s: float) -> None:
        """Walk until the closest nodes have all been asked, for at most `deadline_s`; then what was found counts.

        Without the bound a hostile peer could name ever nearer nodes that do not answer.
        """
        self._deadline = asyncio.get_running_loop().time() + deadline_s
        answered = await self._ask_nearest()
        for _ in range(_MORE_ROUNDS):
            before = len(self.records)
            if not self._holders or before >= MAX_FOUND:
                break
            await self._ask_again()
            if len(self.records) == before:
                break
        self.closest = [node for node in self.nearest if node.id in answered]

    async def _ask_nearest(self) -> set[bytes]:
        answered: set[bytes] = set()
        in_flight: dict[asyncio.Future[Reply], Node] = {}
        while True:
            room = min(self.alpha - len(in_flight), MAX_ASKED - self._asked)
            for peer in self.nearest.get_uncontacted()[: max(0, room)]:
                self.nearest.mark_contacted(peer)
                self._asked += 1
                in_flight[self._ask(peer)] = peer
            if not in_flight:
                return answered
            done = await self._wait(in_flight)
            if not done:
                return answered
            for reply in done:
                peer = in_flight.pop(reply)
                if self.protocol.handle_call_response(reply.result(), peer)[0]:
                    answered.add(peer.id)
                    self._take(peer, reply.result()[1])
                else:
                    self.nearest.remove([peer.id])

    async def _ask_again(self) -> None:
        in_flight = {self._ask(peer): peer for peer in self._holders.values()}
        while in_flight:
            done = await self._wait(in_flight)
            if not done:
                return
            for reply in done:
                self._take(in_flight.pop(reply), reply.result()[1])

    async def _wait(self, in_flight: dict[asyncio.Future[Reply], Node]) -> set[asyncio.Future[Reply]]:
        left_s = self._deadline - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait(in_flight, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)
        return done

    def _ask(self, peer: Node) -> asyncio.Future[Reply]:
        reply: asyncio.Future[Reply] = self.protocol.request((peer.ip, peer.port), self._method, self.node.id)
        return reply

    def _take(self, peer: Node, answer: Any) -> None:
        if isinstance(answer, dict):
            self._take_value(peer, answer)
            answer = answer.get("nodes")
        for contact in parse_contacts(answer, peer.ip, KSIZE):
            if contact.id != self.protocol.source_node.id and not self.protocol.is_suspect(contact):
                self.nearest.push(contact)

    def _take_value(self, peer: Node, answer: dict[Any, Any]) -> None:
        if not self._values or len(self.records) >= MAX_FOUND:
            return
        sample = open_value(self._key, answer.get("value"), now=self._wall_clock(), seen=self.records)
        self.records.update((record.packed, record) for record in sample)
        total = answer.get("total")
        if type(total) is int and total > len(sample) > 0:
            self._holders[peer.id] = peer
