"""Signed, expiring records of the DHT: which node has which shards, their names, and the addresses of nodes.

A record lies under a 20-byte key that is made from the cluster's name, so clusters that share a DHT never see
each other's records. The key is signed with the record but not stored in it: a record copied under another key
does not verify. One value of a key is a set of records, merged by (publisher, subject), the highest sequence
number of each.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NewType

import msgpack
import msgspec

from protocol.errors import InvalidRecordError
from protocol.ids import ContentId, ManifestDigest, NodeId, Port
from protocol.manifest import ManifestName
from protocol.signing import SIGNATURE_BYTES, SigningKey, is_signed_by
from protocol.structs import prepared

RecordKey = NewType("RecordKey", bytes)
"""20 bytes: a kademlia key."""

MAX_VALUE_BYTES = 7_600
"""Of one key's value as sent: kademlia 2.2.3 breaks from 8,192 bytes of datagram on."""
MAX_RECORD_BYTES = 2_800
MAX_TTL_S = 3_600
_CLOCK_SKEW_S = 60
_MAX_BAD = 4
"""Bad records in one value before the rest is left unread: each costs a signature check, and an honest holder sends
none (except some that expired on the way)."""
MAX_RECORDS = 128
"""In one value: more do not fit. msgpack makes an array as soon as one is announced, so a few
KB of nested ones would otherwise take tens of MB."""
_MAX_FIELDS = 16

Host = Annotated[str, msgspec.Meta(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:_-]+\Z")]


class Provider(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A node has these shards of a manifest; under `manifest_key`."""

    host: Host
    rpc_port: Port
    bt_port: Port
    on_disk: bytes
    """Bitmap of the shards whose bytes are here and checked, shard 0 in the highest bit of the first byte."""
    loaded: bytes
    """Bitmap of the shards that a stage has loaded."""
    fetching: bytes = b""
    """Bitmap of the shards that are on their way to the node: it passes on the pieces that it has."""


class Name(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A publisher gives a manifest this name; under `name_key` and `directory_key`."""

    name: ManifestName
    kind: Literal["model", "dataset", "file"]
    digest: ManifestDigest


class NodeInfo(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A node's addresses and resources, as it states them; under `nodes_key`."""

    host: Host
    rpc_port: Port
    dht_port: Port
    bt_port: Port
    memory_available_bytes: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    cores: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]


class Want(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """A node fetches its part of a shard's pieces from the origin; under `wanted_key`. Short-lived."""

    host: Host
    bt_port: Port
    block_pieces: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)] = 0
    """How many adjacent pieces are shared out together: only nodes with the same number share a content out."""


Payload = Provider | Name | NodeInfo | Want


class Record(msgspec.Struct, frozen=True):
    """One record with its signature checked, as `open_value` returns it."""

    publisher: NodeId
    sequence: int
    """Milliseconds since 1970 on the publisher's clock; a higher one replaces a lower."""
    expires: int
    """Seconds since 1970."""
    withdrawn: bool
    """Whether it withdraws the publisher's earlier record; kept until it expires, never returned by a lookup."""
    payload: Payload
    packed: bytes
    """As stored and sent."""

    @property
    def subject(self) -> tuple[NodeId, bytes]:
        """The publisher's records with the same subject replace each other."""
        digest = self.payload.digest if isinstance(self.payload, Name) else ""
        return self.publisher, digest.encode()


def manifest_key(cluster: str, digest: ManifestDigest) -> RecordKey:
    return _key(cluster, "manifest", digest)


def name_key(cluster: str, name: str) -> RecordKey:
    return _key(cluster, "name", name)


def directory_key(cluster: str) -> RecordKey:
    """Where the names of a cluster's models and data sets are listed."""
    return _key(cluster, "directory", "")


def nodes_key(cluster: str) -> RecordKey:
    return _key(cluster, "nodes", "")


def wanted_key(cluster: str, content_id: ContentId) -> RecordKey:
    return _key(cluster, "wanted", content_id)


def _key(cluster: str, what: str, subject: str) -> RecordKey:
    return RecordKey(hashlib.sha1(f"shoal-1\0{cluster}\0{what}\0{subject}".encode(), usedforsecurity=False).digest())


def seal(
    key: RecordKey,
    payload: Payload,
    signer: SigningKey,
    *,
    ttl_s: int,
    now: float | None = None,
    withdrawn: bool = False,
) -> Record:
    """Sign a payload for a key. Raises InvalidRecordError if the record is too large to be stored."""
    seconds = time.time() if now is None else now
    sequence, expires = int(seconds * 1000), int(seconds + ttl_s)
    body = bytes(
        msgpack.packb(
            [
                bytes.fromhex(signer.node_id),
                sequence,
                expires,
                withdrawn,
                msgspec.to_builtins(payload, builtin_types=(bytes,)),
            ]
        )
    )
    packed = body + signer.sign(_signed_bytes(key, body))
    if len(packed) > MAX_RECORD_BYTES:
        raise InvalidRecordError(f"a record of {len(packed)} bytes is above the DHT's {MAX_RECORD_BYTES}")
    return Record(signer.node_id, sequence, expires, withdrawn, payload, packed)


def open_record(key: RecordKey, packed: bytes, *, now: float | None = None) -> Record:
    """Decode and check one record of `key`. Raises InvalidRecordError, for forged, stale and oversized ones too."""
    seconds = time.time() if now is None else now
    if not isinstance(packed, bytes) or not SIGNATURE_BYTES < len(packed) <= MAX_RECORD_BYTES:
        raise InvalidRecordError("a record is missing or has an impossible size")
    body, signature = packed[:-SIGNATURE_BYTES], packed[-SIGNATURE_BYTES:]
    try:
        public, sequence, expires, withdrawn, payload = msgpack.unpackb(body, max_array_len=_MAX_FIELDS, max_map_len=0)
        record = Record(
            publisher=NodeId(public.hex()),
            sequence=msgspec.convert(sequence, int),
            expires=msgspec.convert(expires, int),
            withdrawn=msgspec.convert(withdrawn, bool),
            payload=msgspec.convert(payload, prepared(Payload)),
            packed=packed,
        )
    except (ValueError, TypeError, AttributeError, RecursionError, msgspec.ValidationError) as err:
        raise InvalidRecordError(f"not a record: {err}") from None
    if not seconds < record.expires <= seconds + MAX_TTL_S + _CLOCK_SKEW_S:
        raise InvalidRecordError(f"the record expires at {record.expires}, which is past or too far ahead")
    if record.sequence > (seconds + _CLOCK_SKEW_S) * 1000:
        raise InvalidRecordError("the record's sequence number lies in the future")
    if not is_signed_by(record.publisher, _signed_bytes(key, body), signature):
        raise InvalidRecordError("the record's signature is not its publisher's, or it was made for another key")
    return record


def pack_value(records: Iterable[Record]) -> bytes:
    """The value of a key: its records, as many as fit MAX_VALUE_BYTES, in the order given."""
    chosen: list[bytes] = []
    size = 3
    for record in records:
        size += len(record.packed) + 3
        if size > MAX_VALUE_BYTES:
            break
        chosen.append(record.packed)
    return bytes(msgpack.packb(chosen))


def open_value(
    key: RecordKey, value: object, *, now: float | None = None, seen: Mapping[bytes, Record] | None = None
) -> list[Record]:
    """The valid records of a value that a DHT peer sent; invalid ones are left out.

    `seen` has records of this key that were checked before, by their packed bytes.
    """
    if not isinstance(value, bytes) or len(value) > MAX_VALUE_BYTES:
        return []
    try:
        packed: Any = msgpack.unpackb(value, max_array_len=MAX_RECORDS, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, RecursionError):
        return []
    records: list[Record] = []
    bad = 0
    for item in packed if isinstance(packed, list) else ():
        known = seen.get(item) if seen is not None and isinstance(item, bytes) else None
        if known is not None:
            records.append(known)
            continue
        try:
            records.append(open_record(key, item, now=now))
        except InvalidRecordError:
            bad += 1
            if bad >= _MAX_BAD:
                break
    return records


def bitmap_from_ids(shard_ids: Iterable[int]) -> bytes:
    """Bitmap with these bits set, shard 0 in the highest bit of the first byte, no longer than it needs to be."""
    bits = bytearray()
    for shard_id in shard_ids:
        byte, bit = divmod(shard_id, 8)
        bits.extend(bytes(max(0, byte + 1 - len(bits))))
        bits[byte] |= 0x80 >> bit
    return bytes(bits)


def ids_from_bitmap(bitmap: bytes) -> frozenset[int]:
    return frozenset(byte * 8 + bit for byte, value in enumerate(bitmap) for bit in range(8) if value & (0x80 >> bit))


def _signed_bytes(key: RecordKey, body: bytes) -> bytes:
    return b"shoal-record-v1\0" + key + body
