"""Records that this node keeps for the DHT: only valid ones, merged by subject, and no more than fit its bounds."""

from __future__ import annotations

import bisect
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kademlia.storage import IStorage

from node.discovery.sampling import fair_sample
from protocol.ids import NodeId
from protocol.records import MAX_VALUE_BYTES, Record, RecordKey, open_record, open_value

MAX_BYTES = 32 * 1024 * 1024
"""Of all records, each with `_RECORD_OVERHEAD_BYTES`."""
MAX_RECORDS_PER_KEY = 256
MAX_RECORDS_PER_PUBLISHER = 4_096
MAX_SUBJECTS_PER_KEY = 128
"""Of one publisher under one key: names in the directory; of provider and node records there is one."""
_RECORD_OVERHEAD_BYTES = 1_024

Subject = tuple[NodeId, bytes]


class Kept(NamedTuple):
    """A record as it is kept. Its payload stays packed: that is half the memory, and reading checks it again."""

    publisher: NodeId
    sequence: int
    expires: int
    withdrawn: bool
    packed: bytes


class RecordStorage(IStorage):  # type: ignore[misc]
    """kademlia's storage as a set of records a key. Nothing in it is older than its expiry, as seen from outside.

    When it is full, the records of keys that are far from `own_id` make room for those of nearer keys: others
    are more responsible for them. Above `MAX_RECORDS_PER_KEY` a random one goes, so that holders of a popular key
    come to hold different samples. Our own records (`pin`) never make room.
    """

    def __init__(self, own_id: bytes, *, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.time) -> None:
        self._own = int.from_bytes(own_id, "big")
        self._max_bytes = max_bytes
        self._clock = clock
        self._keys: dict[RecordKey, dict[Subject, Kept]] = {}
        self._distances: list[int] = []  # of every key from own_id, ascending; the key is distance ^ own_id
        self._pinned: set[tuple[RecordKey, Subject]] = set()
        self._per_publisher: Counter[NodeId] = Counter()
        self._size_bytes = 0
        self._random = random.Random()

    def merge(self, key: RecordKey, value: object) -> bool:
        """Keep the valid records of a value. False if none was valid, or none found room."""
        records = open_value(key, value, now=self._clock())
        return sum(self._keep(key, record) for record in records) > 0

    def pin(self, key: RecordKey, record: Record) -> None:
        """Keep a record of our own: bounds do not refuse it, and it does not make room for others."""
        self._put(key, record.subject, _kept(record))
        self._pinned.add((key, record.subject))

    def answer(self, key: RecordKey, size_bytes: int = MAX_VALUE_BYTES) -> tuple[bytes, int] | None:
        """A value of a fair sample, at most `size_bytes`, and how many records there are; None without any."""
        live = self._live(key)
        if not live:
            return None
        return fair_sample(live.values(), min(size_bytes, MAX_VALUE_BYTES), self._random), len(live)

    def records(self, key: RecordKey) -> list[Record]:
        """Everything that is kept under a key, opened and checked again."""
        now = self._clock()
        return [open_record(key, kept.packed, now=now) for kept in self._live(key).values()]

    def sweep(self) -> None:
        """Let go of everything that has expired."""
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
        subject, kept = record.subject, _kept(record)
        subjects = self._live(key)
        old = subjects.get(subject)
        if old is not None:
            if kept.sequence > old.sequence:
                self._put(key, subject, kept)
            return kept.sequence >= old.sequence
        if self._per_publisher[record.publisher] >= MAX_RECORDS_PER_PUBLISHER:
            return False
        if sum(publisher == record.publisher for publisher, _ in subjects) >= MAX_SUBJECTS_PER_KEY:
            return False
        if not self._make_room(key, _cost(kept)):
            return False
        if len(subjects) >= MAX_RECORDS_PER_KEY and not self._drop_one(key):
            return False
        self._put(key, subject, kept)
        return True

    def _make_room(self, key: RecordKey, cost: int) -> bool:
        if self._size_bytes + cost > self._max_bytes:
            self.sweep()
        own_distance = self._distance(key)
        place = len(self._distances) - 1
        while self._size_bytes + cost > self._max_bytes:
            if place < 0 or self._distances[place] <= own_distance:
                return False
            far = RecordKey((self._distances[place] ^ self._own).to_bytes(20, "big"))
            if not self._drop_one(far) or far not in self._keys:
                place -= 1
        return True

    def _drop_one(self, key: RecordKey) -> bool:
        loose = [subject for subject in self._keys[key] if (key, subject) not in self._pinned]
        if loose:
            self._drop(key, self._random.choice(loose))
        return bool(loose)

    def _live(self, key: RecordKey) -> dict[Subject, Kept]:
        now = self._clock()
        subjects = self._keys.get(key, {})
        for subject in [s for s, kept in subjects.items() if kept.expires <= now]:
            self._drop(key, subject)
        return subjects

    def _put(self, key: RecordKey, subject: Subject, kept: Kept) -> None:
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


def _kept(record: Record) -> Kept:
    return Kept(record.publisher, record.sequence, record.expires, record.withdrawn, record.packed)


def _cost(kept: Kept) -> int:
    return len(kept.packed) + _RECORD_OVERHEAD_BYTES
