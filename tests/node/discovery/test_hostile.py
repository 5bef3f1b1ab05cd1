"""A peer that sends whatever it likes: nothing raises, nothing floods the log, and what is honest is still found."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random

import msgpack
import pytest
from kademlia.node import Node

from node.discovery.crawl import MAX_ASKED
from node.discovery.dht_protocol import contact_id
from node.discovery.wire import MAX_DATAGRAM_BYTES
from protocol.signing import SigningKey
from tests.support.discovery.nodes import HOST, a_manifest, announce, kill, opened, provider_value
from tests.support.discovery.raw_peer import raw_peer
from tests.support.waiting import eventually


@pytest.fixture
def quiet(caplog):
    """Fails the test where the loop's exception handler or the log got a line."""
    failures = []
    loop_failures = lambda loop, context: failures.append(context)  # noqa: E731
    yield lambda: asyncio.get_running_loop().set_exception_handler(loop_failures)
    assert failures == []
    lines = [record.message for record in caplog.records if record.levelno >= logging.INFO]
    assert [line for line in lines if "part of the DHT" not in line] == []


async def test_garbage_does_not_raise_or_log_and_the_node_goes_on(quiet):
    quiet()
    rng = random.Random(7)
    async with opened() as node, raw_peer() as peer:
        signed = a_manifest()
        await announce(node, signed, 0)
        datagrams = [rng.randbytes(rng.randrange(0, 200)) for _ in range(300)]
        datagrams += [
            bytes([kind]) + bytes(20) + rng.randbytes(rng.randrange(0, 60)) for kind in (0, 1) for _ in range(300)
        ]
        datagrams += [
            b"\x00" + bytes(20) + b"\xdd\xff\xff\xff\xff",
            b"\x00" + bytes(20) + b"\x91" * 8_000,
            bytes(60_000),
        ]
        for count, datagram in enumerate(datagrams):
            peer.transport.sendto(datagram, (HOST, node.port))
            if count % 50 == 0:  # no more than the socket's buffer holds anywhere
                await eventually(lambda count=count: node._protocol.dropped >= count - 200)
        await eventually(lambda: node._protocol.dropped > 800)
        assert node.stats().nodes == 0
        reply = await peer.ask(node, "ping")
        assert msgpack.unpackb(reply[21:]) == node._protocol.source_node.id


ODD = [None, 0, -1, 1.5, True, "x" * 20, b"", b"x" * 19, b"y" * 20, [], {}, [[]], {"a": b"b"}, b"z" * 7_700]


async def test_requests_of_wrong_types_get_no_answer_and_do_no_harm(quiet):
    quiet()
    async with opened() as node, raw_peer() as peer:
        for method in (
            "ping",
            "identify",
            "store",
            "find_node",
            "find_value",
            "stun",
            "__init__",
            "datagram_received",
            "",
        ):
            for odd in ODD:
                peer.send(node, method, odd)
                peer.send(node, method, peer.id, odd)
                peer.send(node, method, peer.id, peer.id, odd)
                peer.send(node, method, peer.id, odd, odd, odd, odd)
            await asyncio.sleep(0.005)
        await peer.ask(node, "ping")
        assert node.stats().records == 0


async def test_records_that_are_not_what_they_should_be_are_refused_on_store():
    async with opened() as node, opened(node) as reader, raw_peer() as peer:
        signed = a_manifest()
        key, value = provider_value(signed)
        (packed,) = msgpack.unpackb(value)
        _, of_other_cluster = provider_value(signed, cluster="kelp")
        _, stale = provider_value(signed, now=1_000.0)
        for bad in (
            msgpack.packb([packed[:-1] + bytes([packed[-1] ^ 1])]),
            msgpack.packb([packed + bytes(3_000)]),
            of_other_cluster,
            stale,
        ):
            reply = await peer.ask(node, "store", key, bad)
            assert msgpack.unpackb(reply[21:]) is False
        assert await reader.find_providers(signed.digest) == []
        assert node.stats().records == 0
        reply = await peer.ask(node, "store", key, value)
        assert msgpack.unpackb(reply[21:]) is True
        assert len(await reader.find_providers(signed.digest)) == 1


async def test_only_who_proves_its_id_becomes_a_contact():
    async with opened() as node, raw_peer() as liar, raw_peer() as honest:
        victim = contact_id(SigningKey.generate().node_id)
        other = SigningKey.generate()
        for proof in (
            lambda asker, nonce: [bytes.fromhex(other.node_id), bytes(64)],
            lambda asker, nonce: [bytes.fromhex(other.node_id), liar.prove(asker, nonce)[1]],
            lambda asker, nonce: liar.prove(asker, bytes(16)),
            lambda asker, nonce: [],
            lambda asker, nonce: [5, "x"],
            lambda asker, nonce: {b"a": nonce},
        ):
            liar.answers["identify"] = proof
            liar.asked.clear()
            liar.send(node, "ping", victim)
            await eventually(lambda: liar.asked)
            await asyncio.sleep(0.05)
            assert node.stats().nodes == 0
        await honest.ask(node, "ping")
        await eventually(lambda: node.stats().nodes == 1)
        (contact,) = node._protocol.router.contacts()
        assert contact.id == honest.id


async def test_a_flood_of_claimed_ids_neither_fills_the_table_nor_is_answered_with_a_flood():
    async with opened(rpc_timeout_s=5) as node, raw_peer() as peer:
        del peer.answers["identify"]
        for count in range(2_000):
            peer.send(node, "ping", os.urandom(20))
            if count % 50 == 0:
                await eventually(lambda count=count: peer.replies.qsize() >= count - 200)
        await eventually(lambda: peer.replies.qsize() > 1_500)
        assert node.stats().nodes == 0
        assert node._membership._waiting.qsize() <= 256
        assert peer.asked.count("identify") < 100


ODD_ANSWERS = [
    None,
    5,
    "text",
    [[[]]] * 30,
    {"value": None, "nodes": None, "total": None},
    {"value": b"\xc1", "nodes": [["x", HOST, 1]], "total": 1 << 60},
    {"value": msgpack.packb([bytes(300)] * 20), "nodes": [[bytes(20), "name.invalid", 7]], "total": 99},
    {b"value": b"", "nodes": {"a": 1}, "total": "9"},
    [[os.urandom(20), HOST, 70_000], [os.urandom(20), 5, 5], [os.urandom(19), HOST, 5], [bytes(20), HOST, True]],
    [[os.urandom(20), "224.0.0.1", 5], [os.urandom(20), "0.0.0.0", 5], [os.urandom(20), "255.255.255.255", 5]],
]


async def test_whatever_a_contact_answers_the_others_records_are_found(quiet):
    quiet()
    async with raw_peer() as peer, opened() as node, opened(node) as provider:
        await peer.ask(node, "ping")
        await eventually(lambda: node.stats().nodes == 2)
        for place, answer in enumerate(ODD_ANSWERS):
            peer.asked.clear()
            odd = dict.fromkeys(("find_node", "find_value", "store"), lambda *_, answer=answer: answer)
            peer.answers = {"identify": peer.prove} | odd
            signed = a_manifest(f"set-{place}")
            await announce(provider, signed, 0)
            assert [p.node_id for p in await node.find_providers(signed.digest)] == [provider.node_id]
            await node.list_nodes()
            await announce(node, a_manifest(f"other-{place}"), 0)
            assert {"find_value", "store"} <= set(peer.asked)


async def test_a_peer_that_names_ever_nearer_nodes_is_asked_a_bounded_number_of_times():
    async with raw_peer() as peer, opened(walk_deadline_s=20.0) as node, opened(node) as provider:
        signed = a_manifest()
        await announce(provider, signed, 0)

        distances = itertools.count(1 << 60, -1)

        def nearer(asker, key):
            ids = [int.from_bytes(key, "big") ^ next(distances) for _ in range(20)]
            return [[contact.to_bytes(20, "big"), HOST, peer.port] for contact in ids]

        await peer.ask(node, "ping")
        await eventually(lambda: node.stats().nodes == 2)
        peer.answers |= {"find_value": nearer, "find_node": nearer}
        peer.asked.clear()
        assert len(await node.find_providers(signed.digest)) == 1
        assert 10 < peer.asked.count("find_value") <= MAX_ASKED


async def test_a_peer_that_names_many_dead_nodes_does_not_outlast_a_lookups_deadline():
    hurried = {"rpc_timeout_s": 5, "walk_deadline_s": 0.3}
    async with raw_peer() as peer, opened(**hurried) as node, opened(node) as provider, raw_peer() as dead:
        signed = a_manifest()
        await announce(provider, signed, 0)
        dead.answers.clear()
        await peer.ask(node, "ping")
        await eventually(lambda: node.stats().nodes == 2)
        peer.answers["find_value"] = lambda *_: [[os.urandom(20), HOST, dead.port] for _ in range(20)]
        async with asyncio.timeout(4):  # less than one timeout of a dead node
            assert len(await node.find_providers(signed.digest)) == 1


async def test_an_answer_counts_only_from_where_it_was_asked_for():
    async with opened() as node, raw_peer() as asked, raw_peer() as other:
        prove = asked.answers.pop("identify")
        receive = asked.datagram_received

        def answer_elsewhere(data, addr):
            receive(data, addr)
            if data[0] == 0:
                _, args = msgpack.unpackb(data[21:])
                other.transport.sendto(b"\x01" + data[1:21] + msgpack.packb(prove(*args)), addr)

        asked.datagram_received = answer_elsewhere
        await asked.ask(node, "ping")
        await eventually(lambda: node._protocol.dropped)
        assert node.stats().nodes == 0
        await eventually(lambda: not node._membership._pending)  # or it would not be asked again
        asked.answers["identify"] = prove
        await asked.ask(node, "ping")
        await eventually(lambda: node.stats().nodes == 1)


async def test_of_120_providers_answers_are_samples_that_fit_and_a_lookup_merges_several():
    async with opened() as one, opened(one) as two, opened(one) as reader, raw_peer() as peer:
        signed = a_manifest()
        for _ in range(120):
            key, value = provider_value(signed)
            for holder in (one, two):
                await peer.ask(holder, "store", key, value)
        answers = [await peer.ask(holder, "find_value", key) for holder in (one, two) for _ in range(4)]
        assert all(len(datagram) <= MAX_DATAGRAM_BYTES for datagram in answers)
        samples = [frozenset(msgpack.unpackb(msgpack.unpackb(datagram[21:])["value"])) for datagram in answers]
        assert len(set(samples)) == 8
        assert all(len(sample) < 60 for sample in samples)
        # Two samples would be about 75 of the 120; it asks again as long as holders have more than they sent.
        assert len(await reader.find_providers(signed.digest)) > 95


async def test_an_answer_with_a_full_value_and_twenty_neighbours_fits_a_datagram():
    async with opened() as node, raw_peer() as peer:
        for _ in range(40):
            node._protocol.router.add_contact(Node(os.urandom(20), "255.255.255.250", 65_535))
        signed = a_manifest()
        for _ in range(80):
            key, value = provider_value(signed)
            node._overlay.storage.merge(key, value)
        datagram = await peer.ask(node, "find_value", key)
        body = msgpack.unpackb(datagram[21:])
        assert len(datagram) <= MAX_DATAGRAM_BYTES
        assert len(body["nodes"]) == 20
        assert len(body["value"]) > 6_000
        kill(node)
