"""Records that this node keeps for the DHT: only valid ones, merged by subject, bounded, answered by fair samples."""

from __future__ import annotations

import bisect
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgpack
from kademlia.storage import IStorage

from protocol.ids import NodeId
from protocol.records import MAX_RECORDS, MAX_VALUE_BYTES, Record, RecordKey, open_record, open_value

_RECORD_OVERHEAD_BYTES = 1_024
_HEADER_BYTES = 3
"""MessagePack's header of one record in a value."""

Subject = tuple[NodeId, bytes]


@dataclass(frozen=True, slots=True)
class StorageBounds:
    """How much a node keeps for others."""

    max_bytes: int = 32 * 1024 * 1024
    """Of all records, each with 1 KiB for the dictionaries around it."""
    records_per_key: int = 256
    records_per_publisher: int = 4_096
    subjects_per_key: int = 128
    """Of one publisher under one key: names in the directory; of provider and node records there is one."""


class StoredRecord(NamedTuple):
    """A record in the storage. Its payload stays packed: that is half the memory, and reading checks it again."""

    publisher: NodeId
    sequence: int
    expires: int
    withdrawn: bool
    packed: bytes


class RecordStorage(IStorage):  # type: ignore[misc]
    """kademlia's storage as a set of records a key. Nothing in it is older than its expiry, as seen from outside.

    A full storage drops records of keys that are far from `own_id` for those of nearer keys: other nodes are closer
    to the far ones. Above `records_per_key` it drops a random one, so that the holders of a popular key hold
    different samples. This node's own records (`pin`) are never dropped.
    """

    def __init__(
        self, own_id: bytes, bounds: StorageBounds | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives Unix time in seconds."""
        self._own = int.from_bytes(own_id, "big")
        self._bounds = bounds or StorageBounds()
        self._clock = clock
        self._keys: dict[RecordKey, dict[Subject, StoredRecord]] = {}
        self._distances: list[int] = []  # of every key from own_id, ascending; the key is distance ^ own_id
        self._pinned: set[tuple[RecordKey, Subject]] = set()
        self._per_publisher: Counter[NodeId] = Counter()
        self._size_bytes = 0
        self._random = random.Random()

    def merge(self, key: RecordKey, value: object) -> bool:
        """Keep the valid records of a value. False if none was valid, or there was no room for any."""
        records = open_value(key, value, now=self._clock())
        return sum(self._keep(key, record) for record in records) > 0

    def pin(self, key: RecordKey, record: Record) -> None:
        """Keep a record of this node's own: bounds do not apply to it, and it is not dropped for others."""
        self._put(key, record.subject, _stored(record))
        self._pinned.add((key, record.subject))

    def answer(self, key: RecordKey, size_bytes: int = MAX_VALUE_BYTES) -> tuple[bytes, int] | None:
        """A value of a fair sample, at most `size_bytes`, and how many records there are; None without any."""
        live = self._live(key)
        if not live:
            return None
        return fair_sample(live.values(), min(size_bytes, MAX_VALUE_BYTES), self._random), len(live)

    def records(self, key: RecordKey) -> list[Record]:
        """All records under a key, opened and checked again."""
        now = self._clock()
        return [open_record(key, kept.packed, now=now) for kept in self._live(key).values()]

    def sweep(self) -> None:
        """Drop everything that has expired."""
        for key in list(self._keys):
            self._live(key)

    def count(self) -> int:
        """Records that are valid and not withdrawn."""
        now = self._clock()
        return sum(
            not kept.withdrawn and kept.expires > now for subjects in self._keys.values() for kept in subjects.values()
        )

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __setitem__(self, key: RecordKey, value: object) -> None:
        self.merge(key, value)

    def __getitem__(self, key: RecordKey) -> bytes:
        answer = self.answer(key)
        if answer is None:
            raise KeyError(key)
        return answer[0]

    def get(self, key: RecordKey, default: bytes | None = None) -> bytes | None:
        answer = self.answer(key)
        return default if answer is None else answer[0]

    def iter_older_than(self, seconds_old: float) -> Iterator[tuple[RecordKey, bytes]]:
        """Nothing: kademlia would publish it again, and a record is for its publisher to refresh."""
        return iter(())

    def __iter__(self) -> Iterator[tuple[RecordKey, bytes]]:
        """Nothing: kademlia would hand it to every joiner (under wrong keys); publishers do that themselves."""
        return iter(())

    def _keep(self, key: RecordKey, record: Record) -> bool:
        subject, kept = record.subject, _stored(record)
        subjects = self._live(key)
        old = subjects.get(subject)
        if old is not None:
            if kept.sequence > old.sequence:
                self._put(key, subject, kept)
            return kept.sequence >= old.sequence
        if self._per_publisher[record.publisher] >= self._bounds.records_per_publisher:
            return False
        if sum(publisher == record.publisher for publisher, _ in subjects) >= self._bounds.subjects_per_key:
            return False
        if not self._make_room(key, _cost(kept)):
            return False
        if len(subjects) >= self._bounds.records_per_key and not self._drop_one(key):
            return False
        self._put(key, subject, kept)
        return True

    def _make_room(self, key: RecordKey, cost: int) -> bool:
        if self._size_bytes + cost > self._bounds.max_bytes:
            self.sweep()
        own_distance = self._distance(key)
        index = len(self._distances) - 1
        while self._size_bytes + cost > self._bounds.max_bytes:
            if index < 0 or self._distances[index] <= own_distance:
                return False
            far = RecordKey((self._distances[index] ^ self._own).to_bytes(20, "big"))
            if not self._drop_one(far) or far not in self._keys:
                index -= 1
        return True

    def _drop_one(self, key: RecordKey) -> bool:
        loose = [subject for subject in self._keys[key] if (key, subject) not in self._pinned]
        if loose:
            self._drop(key, self._random.choice(loose))
        return bool(loose)

    def _live(self, key: RecordKey) -> dict[Subject, StoredRecord]:
        now = self._clock()
        subjects = self._keys.get(key, {})
        for subject in [s for s, kept in subjects.items() if kept.expires <= now]:
            self._drop(key, subject)
        return subjects

    def _put(self, key: RecordKey, subject: Subject, kept: StoredRecord) -> None:
        subjects = self._keys.get(key)
        if subjects is None:
            subjects = self._keys[key] = {}
            bisect.insort(self._distances, self._distance(key))
        old = subjects.get(subject)
        subjects[subject] = kept
        self._size_bytes += _cost(kept) - (_cost(old) if old is not None else 0)
        if old is None:
            self._per_publisher[kept.publisher] += 1

    def _drop(self, key: RecordKey, subject: Subject) -> None:
        subjects = self._keys[key]
        kept = subjects.pop(subject)
        self._pinned.discard((key, subject))
        self._size_bytes -= _cost(kept)
        self._per_publisher[kept.publisher] -= 1
        if not self._per_publisher[kept.publisher]:
            del self._per_publisher[kept.publisher]
        if not subjects:
            del self._keys[key]
            self._distances.pop(bisect.bisect_left(self._distances, self._distance(key)))

    def _distance(self, key: RecordKey) -> int:
        return int.from_bytes(key, "big") ^ self._own


def _stored(record: Record) -> StoredRecord:
    return StoredRecord(record.publisher, record.sequence, record.expires, record.withdrawn, record.packed)


def _cost(kept: StoredRecord) -> int:
    return len(kept.packed) + _RECORD_OVERHEAD_BYTES


def fair_sample(records: Iterable[StoredRecord | Record], size_bytes: int, rng: random.Random) -> bytes:
    """A value of a random choice of records, at most `size_bytes` long.

    Every publisher gets one record in before any gets a second. Withdrawn ones come last: they only matter to a
    reader that found an older record elsewhere.
    """
    by_publisher: dict[tuple[bool, NodeId], list[StoredRecord | Record]] = {}
    for record in records:
        by_publisher.setdefault((record.withdrawn, record.publisher), []).append(record)
    ranked: list[tuple[bool, int, float, StoredRecord | Record]] = []
    for (withdrawn, _), own in by_publisher.items():
        rng.shuffle(own)
        ranked += [(withdrawn, turn, rng.random(), record) for turn, record in enumerate(own)]
    ranked.sort(key=lambda item: item[:3])
    chosen: list[bytes] = []
    room = size_bytes - _HEADER_BYTES
    for *_, record in ranked:
        size = len(record.packed) + _HEADER_BYTES
        if size <= room and len(chosen) < MAX_RECORDS:
            chosen.append(record.packed)
            room -= size
    return bytes(msgpack.packb(chosen))
