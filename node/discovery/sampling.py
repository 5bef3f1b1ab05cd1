"""Which records of a key go into an answer of one datagram."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Protocol

import msgpack

from protocol.ids import NodeId
from protocol.records import MAX_RECORDS, Record

_OVERHEAD_BYTES = 3
"""MessagePack's header of one record in a value."""


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
        if need <= room and len(chosen) < MAX_RECORDS:
            chosen.append(record.packed)
            room -= need
    return bytes(msgpack.packb(chosen))


def newest(records: Iterable[Record]) -> list[Record]:
    """One record a subject, that of the highest sequence number; withdrawn ones are still among them."""
    merged: dict[tuple[NodeId, bytes], Record] = {}
    for record in records:
        kept = merged.get(record.subject)
        if kept is None or record.sequence > kept.sequence:
            merged[record.subject] = record
    return list(merged.values())
