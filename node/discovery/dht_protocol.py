"""kademlia's protocol over datagrams, with hostile input in mind.

The requests are kademlia's, and one more: `identify(id, nonce)` -> `[public key, signature]`. A contact id is the
SHA-1 of a node's public key, and only a node that proves to own it comes into the routing table. `find_value` answers
`{value, nodes, total}`: a sample of the records, nearer nodes, and how many records there are.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from kademlia.node import Node
from kademlia.protocol import KademliaProtocol
from kademlia.routing import RoutingTable

from node.discovery.storage import RecordStorage
from node.discovery.values import KSIZE, UdpAddress
from node.discovery.wire import MAX_DATAGRAM_BYTES, DhtAnswer, DhtRequest, is_id, pack_answer, pack_request, parse
from protocol.ids import NodeId
from protocol.records import MAX_VALUE_BYTES, RecordKey
from protocol.signing import SigningKey, is_signed_by

log = logging.getLogger(__name__)

NONCE_BYTES = 16
MAX_BUCKETS = 192
"""An honest table has about log2 of the network's size; a hostile peer could split one bucket 150 times."""
MAX_OUTSTANDING = 2_048
_MAX_WRITE_BUFFER_BYTES = 1 << 20
_ANSWER_ROOM_BYTES = 160
"""For an answer's message id, map keys and headers."""
_SUSPECT_S = 15.0
"""How long a peer that did not answer is left out of walks, when others still name it."""
_MAX_SUSPECTS = 1_024
_LATE_S = 0.1
_GRACE_S = 0.3

Reply = tuple[bool, Any]
"""Whether an answer came, and the answer."""


class _Call(NamedTuple):
    reply: asyncio.Future[Reply]
    address: UdpAddress
    datagram: bytes
    deadline: float


def contact_id(node_id: NodeId) -> bytes:
    """The kademlia id of a node: SHA-1 of its public key, so that no node can take another's id."""
    return hashlib.sha1(bytes.fromhex(node_id), usedforsecurity=False).digest()


class BoundedRoutingTable(RoutingTable):  # type: ignore[misc]
    """kademlia's routing table with a bound, and with contacts that can be looked up by id."""

    def __init__(self, own: Node, ksize: int) -> None:
        super().__init__(None, ksize, own)
        self.crowded: Callable[[Node], None] = lambda oldest: None
        """Called with the longest unheard contact of a full bucket; it makes room if it no longer answers."""

    def add_contact(self, node: Node) -> None:
        """Add, or move to the end of its bucket with the address it has now (Kademlia paper, section 4.2)."""
        while True:
            index = self.get_bucket_for(node)
            bucket = self.buckets[index]
            if bucket.add_node(node):
                return
            splits = bucket.has_in_range(self.node) or bucket.depth() % 5 != 0
            if not splits or len(self.buckets) >= MAX_BUCKETS:
                self.crowded(bucket.head())
                return
            self.split_bucket(index)

    def contact(self, contact_id: bytes) -> Node | None:
        """The contact of that id, also one that waits for room in its bucket."""
        bucket = self.buckets[self.get_bucket_for(Node(contact_id))]
        found: Node | None = bucket.nodes.get(contact_id) or bucket.replacement_nodes.get(contact_id)
        return found

    def touch(self, contact_id: bytes) -> None:
        """A contact was heard: the others of its bucket are asked first whether they are still there."""
        bucket = self.buckets[self.get_bucket_for(Node(contact_id))]
        if contact_id in bucket.nodes:
            bucket.nodes.move_to_end(contact_id)

    def contacts(self) -> list[Node]:
        return [node for bucket in self.buckets for node in bucket.get_nodes()]

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)


class DhtProtocol(KademliaProtocol):  # type: ignore[misc]
    """One UDP socket of the DHT. Membership sets its callbacks."""

    def __init__(self, key: SigningKey, storage: RecordStorage, *, timeout_s: float) -> None:
        own = Node(contact_id(key.node_id))
        super().__init__(own, storage, KSIZE)
        self.router = BoundedRoutingTable(own, KSIZE)
        self.seen: Callable[[bytes, UdpAddress], None] = lambda contact_id, address: None
        """Called with every peer that asks or answers."""
        self.lost: Callable[[], None] = lambda: None
        """Called when the last contact is gone."""
        self.dropped = 0
        """Datagrams that were malformed, or that no request waited for."""
        self._key = key
        self._timeout_s = timeout_s
        self._calls: dict[bytes, _Call] = {}
        self._suspects: OrderedDict[UdpAddress, float] = OrderedDict()
        self._answers: dict[str, Callable[..., Any]] = {
            "ping": self.rpc_ping,
            "identify": self.rpc_identify,
            "store": self.rpc_store,
            "find_node": self.rpc_find_node,
            "find_value": self.rpc_find_value,
        }

    # ---- incoming. Nothing may raise out of here: asyncio would close the socket or log a traceback a datagram.

    def datagram_received(self, data: bytes, addr: UdpAddress) -> None:
        message = parse(data)
        if isinstance(message, DhtAnswer):
            call = self._calls.get(message.message_id)
            if call is not None and call.address == addr:
                del self._calls[message.message_id]
                if not call.reply.done():
                    call.reply.set_result((True, message.result))
                return
        elif isinstance(message, DhtRequest) and message.method in self._answers and message.args:
            sender_id, *args = message.args
            if is_id(sender_id):
                try:
                    result = self._answers[message.method](addr, sender_id, *args)
                except Exception as err:  # it comes from outside; a warning a datagram would flood the log
                    log.debug("a request %s from %s failed: %r", message.method, addr, err)
                else:
                    self._send(pack_answer(message.message_id, result), addr)
                    if sender_id != self.source_node.id:
                        self.seen(sender_id, addr)
                    return
        self.dropped += 1

    def error_received(self, exc: Exception) -> None:
        log.debug("a datagram could not be sent: %s", exc)

    def connection_lost(self, exc: Exception | None) -> None:
        for call in self._calls.values():
            if not call.reply.done():
                call.reply.set_result((False, None))
        self._calls.clear()

    def rpc_ping(self, sender: UdpAddress, sender_id: bytes) -> bytes:
        return bytes(self.source_node.id)

    def rpc_identify(self, sender: UdpAddress, sender_id: bytes, nonce: bytes) -> list[bytes]:
        if not isinstance(nonce, bytes) or len(nonce) != NONCE_BYTES:
            raise ValueError(f"the nonce must be {NONCE_BYTES} bytes")
        return [bytes.fromhex(self._key.node_id), self._key.sign(_identity_bytes(nonce, sender_id))]

    def rpc_store(self, sender: UdpAddress, sender_id: bytes, key: bytes, value: bytes) -> bool:
        if not is_id(key) or not isinstance(value, bytes) or len(value) > MAX_VALUE_BYTES:
            raise ValueError("store takes a key of 20 bytes and a value")
        kept: bool = self.storage.merge(RecordKey(key), value)
        return kept

    def rpc_find_node(self, sender: UdpAddress, sender_id: bytes, key: bytes) -> list[tuple[bytes, str, int]]:
        if not is_id(key):
            raise ValueError("the key must be 20 bytes")
        near = self.router.find_neighbors(Node(key), exclude=Node(sender_id, *sender))
        return [(node.id, node.ip, node.port) for node in near]

    def rpc_find_value(self, sender: UdpAddress, sender_id: bytes, key: bytes) -> Any:
        near = self.rpc_find_node(sender, sender_id, key)
        room = MAX_DATAGRAM_BYTES - _ANSWER_ROOM_BYTES - sum(32 + len(host) for _, host, _ in near)
        found = self.storage.answer(RecordKey(key), room)
        return near if found is None else {"value": found[0], "total": found[1], "nodes": near}

    # ---- outgoing

    def request(self, address: UdpAddress, method: str, *args: Any) -> asyncio.Future[Reply]:
        """Ask; the reply is `(False, None)` after the timeout. Sent twice, for a network that loses datagrams."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply] = loop.create_future()
        if len(self._calls) >= MAX_OUTSTANDING or self.transport is None or self.transport.is_closing():
            reply.set_result((False, None))
            return reply
        message_id = os.urandom(20)
        datagram = pack_request(message_id, method, (self.source_node.id, *args))
        deadline = loop.time() + self._timeout_s
        self._calls[message_id] = _Call(reply, address, datagram, deadline)
        self._send(datagram, address)
        loop.call_later(self._timeout_s * 0.4, self._repeat, message_id)
        return reply

    # kademlia's `call_...` go through these; without them rpcudp's `__getattr__` would send by itself.

    def ping(self, address: UdpAddress, *args: Any) -> asyncio.Future[Reply]:
        return self.request(address, "ping", *args[1:])

    def store(self, address: UdpAddress, *args: Any) -> asyncio.Future[Reply]:
        return self.request(address, "store", *args[1:])

    def find_node(self, address: UdpAddress, *args: Any) -> asyncio.Future[Reply]:
        return self.request(address, "find_node", *args[1:])

    def find_value(self, address: UdpAddress, *args: Any) -> asyncio.Future[Reply]:
        return self.request(address, "find_value", *args[1:])

    async def identify(self, address: UdpAddress) -> Node | None:
        """The node at an address, its id proven; None if no node answers or the proof is wrong."""
        nonce = os.urandom(NONCE_BYTES)
        happened, answer = await self.request(address, "identify", nonce)
        if not happened or not isinstance(answer, list) or len(answer) != 2:
            return None
        public, signature = answer
        if not isinstance(public, bytes) or not isinstance(signature, bytes) or len(public) != 32:
            return None
        node_id = NodeId(public.hex())
        if not is_signed_by(node_id, _identity_bytes(nonce, self.source_node.id), signature):
            return None
        return Node(contact_id(node_id), *address)

    def handle_call_response(self, result: Reply, node: Node) -> Reply:
        """Note whether a peer answered. One that did not is removed from the table until it is heard again."""
        address = (node.ip, node.port)
        if result[0]:
            self._suspects.pop(address, None)
            self.seen(node.id, address)
            return result
        known = self.router.contact(node.id)
        if known is not None and (known.ip, known.port) == address:
            self.router.remove_contact(known)
            log.debug("%s:%d does not answer and is no longer a contact", *address)
            if not len(self.router):
                self.lost()
        self._suspects[address] = asyncio.get_running_loop().time() + _SUSPECT_S
        self._suspects.move_to_end(address)
        if len(self._suspects) > _MAX_SUSPECTS:
            self._suspects.popitem(last=False)
        return result

    def welcome_if_new(self, node: Node) -> None:
        """kademlia would add an unproven contact here, and send it records under wrong keys."""
        self.seen(node.id, (node.ip, node.port))

    def is_suspect(self, node: Node) -> bool:
        """Whether the node failed to answer in the last 15 s."""
        until = self._suspects.get((node.ip, node.port))
        return until is not None and until > asyncio.get_running_loop().time()

    def clear_suspicion(self, address: UdpAddress) -> None:
        self._suspects.pop(address, None)

    def _send(self, datagram: bytes, address: UdpAddress) -> None:
        if len(datagram) > MAX_DATAGRAM_BYTES:
            log.warning("a datagram of %d bytes to %s:%d was not sent: too long", len(datagram), *address)
        elif not self.transport.is_closing() and self.transport.get_write_buffer_size() < _MAX_WRITE_BUFFER_BYTES:
            self.transport.sendto(datagram, address)

    def _repeat(self, message_id: bytes) -> None:
        call = self._calls.get(message_id)
        if call is None:
            return
        if call.reply.done():
            del self._calls[message_id]
            return
        self._send(call.datagram, call.address)
        loop = asyncio.get_running_loop()
        loop.call_at(max(call.deadline, loop.time() + self._timeout_s * 0.5), self._expire, message_id, True)

    def _expire(self, message_id: bytes, may_extend: bool) -> None:
        call = self._calls.get(message_id)
        if call is None:
            return
        loop = asyncio.get_running_loop()
        if may_extend and loop.time() > call.deadline + _LATE_S:
            # This loop was late itself: the answer may lie unread in the socket.
            loop.call_later(_GRACE_S, self._expire, message_id, False)
            return
        del self._calls[message_id]
        if not call.reply.done():
            call.reply.set_result((False, None))


def _identity_bytes(nonce: bytes, asker_id: bytes) -> bytes:
    return b"shoal-dht-identity-v1\0" + nonce + asker_id
