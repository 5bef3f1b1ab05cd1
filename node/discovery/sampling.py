"""Which records of a key go into an answer of one datagram, and what is read out of such an answer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import msgpack

from protocol.errors import InvalidRecordError
from protocol.ids import NodeId
from protocol.records import Record, RecordKey, open_record

_OVERHEAD_BYTES = 3
"""MessagePack's header of one record in a value."""
_MAX_RECORDS = 128
"""In one value: more do not fit a datagram."""
_MAX_BAD = 4
"""Bad records in one value before the rest goes unread: each costs a signature check, and an honest holder sends none
(but some that expired on the way)."""


class Sampled(Protocol):
    """What sampling needs of a record; `Record` and a storage's own form have it."""

    @property
    def publisher(self) -> NodeId: ...
    @property
    def withdrawn(self) -> bool: ...
    @property
    def packed(self) -> bytes: ...


def fair_sample(records: Iterable[Sampled], size_bytes: int, rng: random.Random) -> bytes:
    """A value of a random choice of records, at most `size_bytes` long.

    Every publisher gets one record in before any gets a second. Withdrawn ones come last: they only matter to a
    reader who met an older record elsewhere.
    """
    by_publisher: dict[tuple[bool, NodeId], list[Sampled]] = {}
    for record in records:
        by_publisher.setdefault((record.withdrawn, record.publisher), []).append(record)
    ranked: list[tuple[bool, int, float, Sampled]] = []
    for (withdrawn, _), own in by_publisher.items():
        rng.shuffle(own)
        ranked += [(withdrawn, turn, rng.random(), record) for turn, record in enumerate(own)]
    ranked.sort(key=lambda item: item[:3])
    chosen: list[bytes] = []
    room = size_bytes - _OVERHEAD_BYTES
    for *_, record in ranked:
        need = len(record.packed) + _OVERHEAD_BYTES
        if need <= room and len(chosen) < _MAX_RECORDS:
            chosen.append(record.packed)
            room -= need
    return bytes(msgpack.packb(chosen))


def read_value(key: RecordKey, value: object, now: float, seen: Mapping[bytes, Record] | None = None) -> list[Record]:
    """The valid records of a value that a peer sent. `seen` has those of this key that were checked before, packed."""
    if not isinstance(value, bytes):
        return []
    try:
        packed: Any = msgpack.unpackb(value, max_array_len=_MAX_RECORDS, max_map_len=0, max_ext_len=0)
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


def newest(records: Iterable[Record]) -> list[Record]:
    """One record a subject, that of the highest sequence number; withdrawn ones are still among them."""
    merged: dict[tuple[NodeId, bytes], Record] = {}
    for record in records:
        kept = merged.get(record.subject)
        if kept is None or record.sequence > kept.sequence:
            merged[record.subject] = record
    return list(merged.values())
