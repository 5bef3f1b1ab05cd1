import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.transport.core.wire import (
    Ack,
    ChannelAddress,
    Chunk,
    Heartbeat,
    Hello,
    MalformedHeaderError,
    PullRequest,
    Reset,
    answer_key,
    decode,
    encode,
    pull_request,
    token_of,
)
from node.transport.ticket import peer_of
from protocol.errors import TransportError
from tests.support.pipeline.tickets import ticket_of

u64 = st.integers(0, 2**64 - 1)
addresses = st.builds(ChannelAddress, *(st.binary(min_size=size, max_size=size) for size in (8, 8, 16)))
datas = st.builds(Chunk, addresses, u64, st.integers(-(2**63), 2**63 - 1), u64, st.integers(0, 255))
texts = st.text(max_size=80)
others = st.one_of(
    st.builds(Ack, addresses, u64, u64, u64),
    st.builds(Heartbeat, addresses),
    st.builds(Hello, addresses, texts),
    st.builds(Reset, addresses, st.integers(0, 255)),
    st.builds(PullRequest, *(st.binary(min_size=size, max_size=size) for size in (8, 8, 24)), texts, texts),
)
messages = st.builds(
    lambda first, rest: first + rest, st.lists(datas, max_size=1), st.lists(others, max_size=6)
).filter(bool)


@given(messages)
def test_a_header_comes_back_as_it_was(entries):
    assert decode(encode(entries)) == entries


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda raw: "\1" + raw.decode("latin-1"))))
def test_garbage_is_refused_and_nothing_else(name):
    try:
        entries = decode(name)
    except MalformedHeaderError:
        return
    assert encode(entries) == name


@given(messages, st.data())
def test_a_cut_header_never_reads_as_more_than_it_holds(entries, data):
    name = encode(entries)
    cut = name[: data.draw(st.integers(0, len(name) - 1))]
    with contextlib.suppress(MalformedHeaderError):
        assert len(decode(cut)) < len(entries)


def test_a_huge_header_is_refused():
    with pytest.raises(MalformedHeaderError):
        decode("\1" + "\3" * 70_000)


def test_a_chunk_that_is_not_first_is_refused():
    data = Chunk(ChannelAddress(bytes(8), bytes(8), bytes(16)), 0, 0, 0, 0)
    with pytest.raises(MalformedHeaderError):
        decode(encode([data, data]))


def test_tokens_differ_by_key_channel_and_direction():
    tokens = {
        token_of(key * 16, channel * 8, from_outlet=out)
        for key in (b"a", b"b")
        for channel in (b"x", b"y")
        for out in (True, False)
    }
    assert len(tokens) == 8


def test_the_proof_of_a_pull_differs_by_key_and_by_every_field():
    fields = [
        (key * 16, channel * 8, offer * 8, ticket, name)
        for key in (b"a", b"b")
        for channel in (b"x", b"y")
        for offer in (b"o", b"p")
        for ticket, name in (("t", "ab"), ("ta", "b"))
    ]
    assert len({pull_request(*each).proof for each in fields}) == len(fields)
    assert len({answer_key(key * 16, channel * 8) for key in (b"a", b"b") for channel in (b"x", b"y")}) == 4


def test_a_ticket_names_its_key():
    assert peer_of(ticket_of(7)) == bytes([7]) * 32
    assert peer_of(ticket_of(7, address=b"\1" + bytes(16) + b"\x80\x08")) == bytes([7]) * 32
    assert peer_of(ticket_of(7, relay=b"\1\5https", address=b"", count=0)) == bytes([7]) * 32


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "node",
        "junk",
        "node!!!!",
        ticket_of(1).upper(),
        ticket_of(1)[:-5],
        ticket_of(1) + "aaaaaaaa",
        ticket_of(1, address=b"", count=0),
        ticket_of(1, address=b"\2\x7f\0\0\1\x80\x08"),
        ticket_of(1, address=b"\0\x7f\0\0\1\0"),
        ticket_of(1, count=100),
        ticket_of(1, relay=b"\2"),
        "node" + "a" * 5000,
        b"node",
        None,
    ],
)
def test_a_bad_ticket_is_named(bad):
    with pytest.raises(TransportError, match="not an iroh node ticket"):
        peer_of(bad)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567=A1", max_size=120))
def test_any_text_is_a_ticket_or_a_transport_error(text):
    with contextlib.suppress(TransportError):
        assert len(peer_of("node" + text)) == 32
