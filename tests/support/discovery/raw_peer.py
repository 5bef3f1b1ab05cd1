"""A peer of the DHT made of a bare socket, for tests that send and answer what no honest node would."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager

import msgpack

from node.discovery.dht_protocol import contact_id
from protocol.signing import SigningKey
from tests.support.discovery.nodes import HOST


class RawPeer(asyncio.DatagramProtocol):
    """A peer of the DHT that answers as it is told, by method."""

    def __init__(self, key: SigningKey | None = None):
        self.key = key or SigningKey.generate()
        self.id = contact_id(self.key.node_id)
        self.answers = {"identify": self.prove, "find_node": lambda *_: [], "find_value": lambda *_: []}
        self.asked: list[str] = []
        """Once for each request; it is sent again where the answer is slow."""
        self.seen: set[bytes] = set()
        self.replies: asyncio.Queue[bytes] = asyncio.Queue()

    def connection_made(self, transport):
        self.transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data, addr):
        if data[0] == 1:
            self.replies.put_nowait(data)
            return
        method, args = msgpack.unpackb(data[21:])
        if data[1:21] not in self.seen:
            self.seen.add(data[1:21])
            self.asked.append(method)
        if method in self.answers:
            self.transport.sendto(b"\x01" + data[1:21] + msgpack.packb(self.answers[method](*args)), addr)

    def prove(self, asker_id, nonce):
        signed = b"shoal-dht-identity-v1\0" + nonce + asker_id
        return [bytes.fromhex(self.key.node_id), self.key.sign(signed)]

    def send(self, node, method, *args):
        self.transport.sendto(b"\x00" + os.urandom(20) + msgpack.packb([method, args]), (HOST, node.port))

    async def ask(self, node, method, *args):
        self.send(node, method, self.id, *args)
        async with asyncio.timeout(5):
            return await self.replies.get()


@asynccontextmanager
async def raw_peer(key=None):
    transport, peer = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: RawPeer(key), local_addr=(HOST, 0)
    )
    try:
        yield peer
    finally:
        transport.close()
        await asyncio.sleep(0)
