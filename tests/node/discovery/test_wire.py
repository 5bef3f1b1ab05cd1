"""Datagrams and contacts that come from outside, and the routing table that they may come into."""

from __future__ import annotations

import random
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st
from kademlia.node import Node

from node.discovery.dht_protocol import MAX_BUCKETS, BoundedRoutingTable
from node.discovery.wire import MAX_DATAGRAM_BYTES, DhtAnswer, DhtRequest, parse, parse_contacts
from tests.support.discovery.nodes import HOST


def test_a_routing_table_stays_bounded_whatever_ids_come():
    own = Node(bytes(20))
    table = BoundedRoutingTable(own, 20)
    rng = random.Random(3)
    for _ in range(40):
        prefix = rng.randbytes(19)
        for last in range(0, 63, 3):
            table.add_contact(Node(prefix + bytes([last]), HOST, 1))
    for _ in range(3_000):
        table.add_contact(Node(rng.randbytes(20), HOST, 1))
    assert len(table.buckets) <= MAX_BUCKETS
    assert len(table) <= MAX_BUCKETS * 20


@given(st.binary(max_size=300))
def test_any_datagram_parses_or_does_not(datagram):
    assert isinstance(parse(datagram), DhtRequest | DhtAnswer | None)


@given(st.sampled_from([b"\x00", b"\x01"]), st.binary(max_size=200))
def test_any_body_parses_or_does_not(kind, body):
    assert isinstance(parse(kind + bytes(20) + body), DhtRequest | DhtAnswer | None)


def test_announced_lengths_take_no_memory():
    nested = [
        b"\x01" + bytes(20) + head * 2_000 for head in (b"\xdc\x16\xff", b"\xdc\x00\xff", b"\xde\x00\x10\x00", b"\x91")
    ]
    nested.append(b"\x01" + bytes(20) + b"\xdd\xff\xff\xff\xff")
    tracemalloc.start()
    try:
        for datagram in nested:
            assert parse(datagram[:MAX_DATAGRAM_BYTES]) is None
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_contacts_from_elsewhere_do_not_lead_to_this_machine():
    items = [[b"a" * 20, "127.0.0.1", 80], [b"b" * 20, "10.0.0.7", 7401]]
    assert [contact.ip for contact in parse_contacts(items, "10.0.0.1", 20)] == ["10.0.0.7"]
    assert len(parse_contacts(items, "127.0.0.1", 20)) == 2
    assert len(parse_contacts(items * 30, "127.0.0.1", 20)) == 20
