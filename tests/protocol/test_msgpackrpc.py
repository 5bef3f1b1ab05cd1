import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.commands.common import Envelope
from protocol.errors import MalformedMessageError, MessageTooLargeError
from protocol.msgpackrpc import (
    CLIENT_LIMITS,
    MAX_MSGID,
    SERVER_LIMITS,
    Decoder,
    Limits,
    Message,
    Notification,
    NotRpc,
    Request,
    Response,
    encode,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=35)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | TEXT
    | st.binary(max_size=40)
    | st.integers(0, 300).map(bytes)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=18) | st.dictionaries(TEXT, inner, max_size=5), max_leaves=20
)
MSGIDS = st.integers(0, MAX_MSGID)
PARAMS = st.lists(VALUES, max_size=2)
MESSAGES = st.one_of(
    st.builds(Request, MSGIDS, TEXT, PARAMS),
    st.builds(Response, st.none() | MSGIDS, VALUES, VALUES),
    st.builds(Notification, TEXT, PARAMS),
)


def decoded(*chunks: bytes, limits: Limits = SERVER_LIMITS) -> list[Message]:
    decoder = Decoder(limits)
    return [message for chunk in chunks for message in decoder.feed(chunk)]


def announced(tag: int, length: int, length_bytes: int = 4) -> bytes:
    return bytes([tag]) + length.to_bytes(length_bytes)


@settings(max_examples=50)
@given(st.lists(MESSAGES, max_size=3), st.data())
def test_messages_come_through_however_the_bytes_are_cut(messages: list[Any], data: st.DataObject) -> None:
    stream = b"".join(encode(message) for message in messages)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=20)))
    chunks = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert decoded(*chunks) == messages


@settings(max_examples=30)
@given(MESSAGES)
def test_one_byte_at_a_time(message: Any) -> None:
    stream = encode(message)
    decoder = Decoder(SERVER_LIMITS)
    for place in range(len(stream) - 1):
        assert list(decoder.feed(stream[place : place + 1])) == []
        assert decoder.buffered_bytes == place + 1
    assert list(decoder.feed(stream[-1:])) == [message]
    assert decoder.buffered_bytes == 0


@settings(max_examples=50)
@given(VALUES)
def test_the_walk_finds_the_end_where_msgpack_does(value: Any) -> None:
    for packed in (msgpack.packb([value]), msgpack.packb([value], use_bin_type=False)):
        decoder = Decoder(CLIENT_LIMITS)
        assert len(list(decoder.feed(packed + b"\x93"))) == 1
        assert decoder.buffered_bytes == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 16, 17, 255, 256, 65_535, 65_536])
def test_extension_types_of_every_length(size: int) -> None:
    value = msgpack.ExtType(7, bytes(size))
    assert decoded(encode(Notification("N", [value, 1])), encode(Notification("M", []))) == [
        Notification("N", [value, 1]),
        Notification("M", []),
    ]


@settings(max_examples=300)
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda head, rest: head + rest, st.sampled_from([b"\x94\x00\x07", b"\x93\x02"]), st.binary(max_size=100)
    )
)
def test_any_bytes_give_messages_or_one_of_two_errors(data: bytes) -> None:
    decoder = Decoder(SERVER_LIMITS)
    try:
        messages = list(decoder.feed(data))
    except (MalformedMessageError, MessageTooLargeError) as err:
        with pytest.raises(type(err)):
            list(decoder.feed(b"\xc0"))
    else:
        assert all(isinstance(message, Request | Response | Notification | NotRpc) for message in messages)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(announced(0xC6, (1 << 32) - 1), id="bin of 4 GiB"),
        pytest.param(announced(0xDB, (1 << 32) - 1), id="str of 4 GiB"),
        pytest.param(announced(0xC9, (1 << 32) - 1), id="ext of 4 GiB"),
        pytest.param(announced(0xDD, (1 << 32) - 1), id="array of 4 Gi items"),
        pytest.param(announced(0xDF, (1 << 32) - 1), id="map of 4 Gi pairs"),
        pytest.param(announced(0xDF, 40_000), id="map of more values than the limit, fewer keys"),
        pytest.param(announced(0xC6, SERVER_LIMITS.max_message_bytes), id="one byte too long"),
        pytest.param(
            announced(0xDD, 30_000) + announced(0xDD, 30_000) + announced(0xDD, 30_000), id="sum of nested counts"
        ),
    ],
)
def test_a_length_is_refused_when_announced(lengths: bytes) -> None:
    decoder = Decoder(SERVER_LIMITS)
    with pytest.raises(MessageTooLargeError):
        list(decoder.feed(b"\x94\x00\x2a\xa4LOAD\x91" + lengths))
    assert decoder.msgid == 42


def test_a_5_gb_message_in_parts_is_refused_at_the_limit() -> None:
    # No single MessagePack length reaches 5 GB: two bins of 2.5 GB do.
    decoder = Decoder(Limits(max_message_bytes=1 << 40, max_items=100))
    half = announced(0xC6, 2_500_000_000)
    assert list(decoder.feed(b"\x93\x02\xa1N\x92" + half)) == []
    assert decoder.buffered_bytes < 20
    strict = Decoder(SERVER_LIMITS)
    with pytest.raises(MessageTooLargeError, match="above"):
        list(strict.feed(b"\x93\x02\xa1N\x92" + half))
    assert strict.buffered_bytes < 20


def test_the_largest_message_fits_and_one_byte_more_does_not() -> None:
    limits = Limits(max_message_bytes=1000, max_items=10)
    fits = encode(Notification("N", [bytes(1000 - 8)]))
    assert len(fits) == 1000
    assert len(decoded(fits, limits=limits)) == 1
    with pytest.raises(MessageTooLargeError):
        decoded(encode(Notification("N", [bytes(1000 - 7)])), limits=limits)


def test_depth_has_a_limit() -> None:
    def nested(depth: int) -> bytes:
        return b"\x93\x02\xa1N" + b"\x91" * (depth - 1) + b"\x90"

    assert len(decoded(nested(SERVER_LIMITS.max_depth))) == 1
    with pytest.raises(MessageTooLargeError, match="nests"):
        decoded(nested(SERVER_LIMITS.max_depth + 1) + b"")
    with pytest.raises(MessageTooLargeError, match="nests"):
        decoded(b"\x91" * 1_000_000)
    with pytest.raises(MessageTooLargeError, match="nests"):
        decoded(b"\x91" + b"\x81\xa1k" * 1_000)


def test_announced_arrays_and_maps_take_no_memory() -> None:
    tracemalloc.start()
    try:
        for tag in (0xDD, 0xDF):
            decoder = Decoder(Limits(max_message_bytes=1 << 40, max_items=1 << 40, max_depth=1_000))
            list(decoder.feed(b"\x93\x02\xa1N" + announced(tag, 1 << 24) * 900))
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_the_byte_that_is_never_used() -> None:
    good = encode(Notification("N", []))
    decoder = Decoder(SERVER_LIMITS)
    messages = decoder.feed(good + b"\x94\x00\x07\xa1X\x91\xc1")
    assert next(messages) == Notification("N", [])
    with pytest.raises(MalformedMessageError, match="0xc1"):
        next(messages)
    assert decoder.msgid == 7


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", b"\x80", b"\xc0", b"{}"])
def test_what_begins_with_no_array_is_another_protocol(data: bytes) -> None:
    with pytest.raises(MalformedMessageError, match="begins with an array"):
        decoded(data)


@pytest.mark.parametrize(
    ("packed", "msgid"),
    [
        (b"\x90", None),
        (msgpack.packb([0]), None),
        (msgpack.packb([0, 7]), 7),
        (msgpack.packb([0, 7, "X"]), 7),
        (msgpack.packb([0, 7, "X", {}]), 7),
        (msgpack.packb([0, 7, 3, []]), 7),
        (msgpack.packb([0, 7, "X", [], 1]), 7),
        (msgpack.packb([0, -1, "X", []]), None),
        (msgpack.packb([0, True, "X", []]), None),
        (msgpack.packb([0, MAX_MSGID + 1, "X", []]), None),
        (msgpack.packb([0, "7", "X", []]), None),
        (msgpack.packb([1, 7, None]), None),
        (msgpack.packb([2, 7, []]), None),
        (msgpack.packb([3, 7, "X", []]), None),
        (msgpack.packb([0, 7, "X", [{1: 2}]]), 7),
        (b"\x94\x00\x07\xa1X\x91\x81\x90\x01", 7),  # an array as a key
        (b"\x94\x00\x07\xa1X\x91\xa2\xff\xfe", 7),  # text that is not UTF-8
        (b"\x94\x00\x07\xa1X\x91\xd4\xff\x00", 7),  # a timestamp of one byte
    ],
)
def test_whole_messages_that_are_no_rpc_do_not_end_the_stream(packed: bytes, msgid: int | None) -> None:
    bad, good = decoded(packed + encode(Notification("N", [])))
    assert isinstance(bad, NotRpc)
    assert bad.msgid == msgid
    assert good == Notification("N", [])


def test_a_method_may_be_bin_of_any_bytes() -> None:
    first, second = decoded(msgpack.packb([0, 1, b"STATUS", []]) + msgpack.packb([2, b"\xff", []]))
    assert first == Request(1, "STATUS", [])
    assert second == Notification("\\xff", [])


def test_an_empty_payload_at_the_end_of_the_buffer() -> None:
    assert decoded(b"\x93\x02\xa1N\x91", b"\xc4", b"\x00") == [Notification("N", [b""])]
    assert decoded(b"\x93\x02\xa0", b"\x90") == [Notification("", [])]


def test_a_request_says_what_it_costs() -> None:
    small, large, many = decoded(
        encode(Request(1, "A", [])) + encode(Request(1, "A", [bytes(5000)])) + encode(Request(1, "A", [[{}] * 5000]))
    )
    assert isinstance(small, Request)
    assert isinstance(large, Request)
    assert isinstance(many, Request)
    assert small.cost_bytes < 1000 < 5000 < large.cost_bytes < 6000 < 64 * 5000 < many.cost_bytes


def test_structs_are_packed_as_maps_with_bytes_as_bin() -> None:
    packed = encode(Request(1, "A", [{"e": Envelope(request_id="r", recipient="n")}, b"\x00\xff"]))
    assert msgpack.unpackb(packed)[3] == [{"e": {"request_id": "r", "from": None, "to": "n"}}, b"\x00\xff"]


def test_what_has_no_messagepack_form_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        encode(Notification("N", [object()]))
    with pytest.raises(TypeError, match="int"):
        encode(Notification("N", [1 << 64]))
    with pytest.raises(ValueError):
        encode(Notification("N", ["\ud800"]))
