import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidRecordError
from protocol.ids import ManifestDigest, NodeId
from protocol.records import (
    MAX_RECORD_BYTES,
    MAX_TTL_S,
    MAX_VALUE_BYTES,
    Name,
    NodeInfo,
    Payload,
    Provider,
    RecordKey,
    bitmap_from_ids,
    directory_key,
    ids_from_bitmap,
    manifest_key,
    name_key,
    nodes_key,
    open_record,
    open_value,
    pack_value,
    seal,
)
from protocol.signing import SigningKey

NOW = 1_800_000_000.0
KEY = SigningKey(bytes(range(32)))
DIGEST = ManifestDigest("ab" * 32)
PLACE = manifest_key("default", DIGEST)
PROVIDER = Provider(host="10.0.0.1", rpc_port=7400, bt_port=7402, on_disk=b"\xff\x01", loaded=b"\x00\x80")
NAME = Name(name="org/tiny", kind="model", digest=DIGEST)
NODE = NodeInfo(host="::1", rpc_port=1, dht_port=2, bt_port=3, memory_available_bytes=1 << 40, cores=8)


@pytest.mark.parametrize("payload", [PROVIDER, NAME, NODE])
@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_record_comes_back(payload: Payload, withdrawn: bool) -> None:
    sealed = seal(PLACE, payload, KEY, ttl_s=300, now=NOW, withdrawn=withdrawn)
    assert open_record(PLACE, sealed.packed, now=NOW) == sealed
    assert (sealed.publisher, sealed.expires, sealed.withdrawn) == (KEY.node_id, int(NOW) + 300, withdrawn)
    assert sealed.payload == payload


def test_bitmaps_travel_as_bytes() -> None:
    packed = seal(PLACE, PROVIDER, KEY, ttl_s=300, now=NOW).packed
    assert msgpack.unpackb(packed[:-64])[4] == [1, "10.0.0.1", 7400, 7402, b"\xff\x01", b"\x00\x80", b""]


def test_keys_differ_by_cluster_and_kind() -> None:
    keys = [f(c, "x") for f in (manifest_key, name_key) for c in "ab"] + [
        f(c) for f in (directory_key, nodes_key) for c in "ab"
    ]  # type: ignore[operator]
    assert len(set(keys)) == 8
    assert {len(key) for key in keys} == {20}


@pytest.mark.parametrize("place", [manifest_key("other", DIGEST), name_key("default", DIGEST), RecordKey(bytes(20))])
def test_a_record_under_another_key_is_refused(place: RecordKey) -> None:
    packed = seal(PLACE, PROVIDER, KEY, ttl_s=300, now=NOW).packed
    with pytest.raises(InvalidRecordError, match="another key"):
        open_record(place, packed, now=NOW)


def test_time_bounds() -> None:
    packed = seal(PLACE, PROVIDER, KEY, ttl_s=300, now=NOW).packed
    open_record(PLACE, packed, now=NOW + 299)
    open_record(PLACE, packed, now=NOW - 59)
    for now in (NOW + 300, NOW + 1e6, NOW - 62, NOW - 1e6):
        with pytest.raises(InvalidRecordError):
            open_record(PLACE, packed, now=now)
    with pytest.raises(InvalidRecordError, match="too far ahead"):
        open_record(PLACE, seal(PLACE, PROVIDER, KEY, ttl_s=MAX_TTL_S + 120, now=NOW).packed, now=NOW)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_refused(place: int, change: int) -> None:
    packed = bytearray(seal(PLACE, PROVIDER, KEY, ttl_s=300, now=NOW).packed)
    packed[place % len(packed)] ^= change
    with pytest.raises(InvalidRecordError):
        open_record(PLACE, bytes(packed), now=NOW)


def forge(body: Any, key: SigningKey = KEY) -> bytes:
    """A record of any content that is signed as it must be."""
    packed = bytes(msgpack.packb(body))
    return packed + key.sign(b"shoal-record-v1\0" + PLACE + packed)


GOOD = [bytes.fromhex(KEY.node_id), int(NOW * 1000), int(NOW) + 300, False, [1, "10.0.0.1", 1, 2, b"", b""]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, b"short"),
        (0, KEY.node_id),
        (0, None),
        (1, int(NOW * 1000) + 61_000),
        (1, "1"),
        (1, 1.5),
        (2, None),
        (2, True),
        (3, 0),
        (4, []),
        (4, None),
        (4, [9, "10.0.0.1", 1, 2, b"", b""]),
        (4, [1, "10.0.0.1", 0, 2, b"", b""]),
        (4, [1, "10.0.0.1", 1, 65_536, b"", b""]),
        (4, [1, "a b", 1, 2, b"", b""]),
        (4, [1, "", 1, 2, b"", b""]),
        (4, [1, "10.0.0.1", 1, 2, b""]),
        (4, [2, "../x/y", "model", "zz"]),
        (4, {"1": 2}),
    ],
)
def test_wrong_fields_are_refused_even_when_well_signed(field: int, value: Any) -> None:
    assert open_record(PLACE, forge(GOOD), now=NOW).payload == Provider("10.0.0.1", 1, 2, b"", b"")
    body = [*GOOD]
    body[field] = value
    with pytest.raises(InvalidRecordError):
        open_record(PLACE, forge(body), now=NOW)


def test_a_record_signed_by_someone_else_is_refused() -> None:
    with pytest.raises(InvalidRecordError, match="signature"):
        open_record(PLACE, forge(GOOD, SigningKey(bytes(32))), now=NOW)


def test_oversized_records_and_values() -> None:
    with pytest.raises(InvalidRecordError, match="above"):
        seal(PLACE, Provider("h", 1, 2, bytes(MAX_RECORD_BYTES), b""), KEY, ttl_s=300, now=NOW)
    with pytest.raises(InvalidRecordError, match="size"):
        open_record(PLACE, forge([*GOOD[:4], [1, "h", 1, 2, bytes(MAX_RECORD_BYTES), b""]]), now=NOW)
    packed = seal(PLACE, PROVIDER, KEY, ttl_s=300, now=NOW).packed
    assert open_value(PLACE, msgpack.packb([packed, bytes(MAX_VALUE_BYTES)]), now=NOW) == []


def test_a_value_keeps_what_is_valid_and_drops_the_rest() -> None:
    records = [seal(PLACE, PROVIDER, SigningKey.generate(), ttl_s=300, now=NOW) for _ in range(5)]
    stale = seal(PLACE, PROVIDER, KEY, ttl_s=300, now=NOW - 1000).packed
    value = msgpack.packb([b"junk", stale, *(record.packed for record in records), 5, None, forge([1])])
    assert open_value(PLACE, value, now=NOW) == records


def test_as_many_as_fit() -> None:
    smallest = [Provider("h", 1, 2, b"", b""), Name("a", "file", DIGEST), NodeInfo("h", 1, 2, 3, 0, 1)]
    for payload in smallest:
        records = [seal(PLACE, payload, KEY, ttl_s=300, now=NOW) for _ in range(100)]
        value = pack_value(records)
        assert len(value) <= MAX_VALUE_BYTES
        found = open_value(PLACE, value, now=NOW)
        assert found == records[: len(found)]
        assert len(found) > 30
        assert len(value) + len(found) + len(records[0].packed) + 6 > MAX_VALUE_BYTES
    assert pack_value([]) == b"\x90"


@settings(max_examples=200)
@given(st.binary(max_size=300) | st.lists(st.binary(max_size=200), max_size=5).map(msgpack.packb))
def test_any_bytes_are_refused_in_one_way(data: bytes) -> None:
    assert open_value(PLACE, data, now=NOW) == []
    with pytest.raises(InvalidRecordError):
        open_record(PLACE, data, now=NOW)


def test_nested_arrays_take_no_memory() -> None:
    bomb = b"\xdc\x10\x00" * 1000 + bytes(4096)
    tracemalloc.start()
    try:
        assert open_value(PLACE, bomb, now=NOW) == []
        with pytest.raises(InvalidRecordError):
            open_record(PLACE, bomb[:MAX_RECORD_BYTES], now=NOW)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@given(st.frozensets(st.integers(0, 5000), max_size=50))
def test_bitmaps(ids: frozenset[int]) -> None:
    bitmap = bitmap_from_ids(ids)
    assert ids_from_bitmap(bitmap) == ids
    assert not bitmap.endswith(b"\0")


def test_subject_tells_names_apart() -> None:
    first = seal(PLACE, NAME, KEY, ttl_s=300, now=NOW)
    other = seal(PLACE, Name("org/tiny", "model", ManifestDigest("cd" * 32)), KEY, ttl_s=300, now=NOW)
    assert first.subject != other.subject
    assert seal(PLACE, NODE, KEY, ttl_s=300, now=NOW).subject == (NodeId(KEY.node_id), b"")
