"""Records that this node keeps for the DHT: only valid ones, merged by subject, and no more than fit its bounds."""

from __future__ import annotations

import bisect
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kademlia.storage import IStorage

from node.discovery.sampling import fair_sample, read_value
from protocol.ids import NodeId
from protocol.records import MAX_VALUE_BYTES, Record, RecordKey, open_record, pack_value

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
    come to hold different samples. Our own records (`pin`) never go, and no bound counts them.
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
        self._random = random.Random()  # noqa: S311  which records a sample has is no secret

    def merge(self, key: RecordKey, value: object) -> bool:
        """Keep the valid records of a value. False if none was valid, or none found room."""
        records = read_value(key, value, self._clock())
        return sum(self._keep(key, record) for record in records) > 0

    def pin(self, key: RecordKey, record: Record) -> None:
        """Keep a record of our own; it stays until it expires or `unpin` is called."""
        self._pinned.add((key, record.subject))
        self._put(key, record.subject, _kept(record))

    def unpin(self, key: RecordKey, subject: Subject) -> None:
        """Give a record of our own the place of any other: it may make room, and expires."""
        self._pinned.discard((key, subject))

    def answer(self, key: RecordKey, size_bytes: int = MAX_VALUE_BYTES) -> tuple[bytes, int] | None:
        """A value of a fair sample, at most `size_bytes`, and how many records there are; None without any."""
        live = self._live(key)
        if not live:
            return None
        return pack_value_of(fair_sample(live.values(), min(size_bytes, MAX_VALUE_BYTES), self._random)), len(live)

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
        if len(subjects) >= MAX_RECORDS_PER_KEY:
            self._drop(key, self._random.choice([s for s in subjects if (key, s) not in self._pinned]))
        if not self._make_room(key, _cost(kept)):
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
            loose = [s for s in self._keys[far] if (far, s) not in self._pinned]
            if loose:
                self._drop(far, self._random.choice(loose))
            if len(loose) <= 1:
                place -= 1
        return True

    def _live(self, key: RecordKey) -> dict[Subject, Kept]:
        now = self._clock()
        subjects = self._keys.get(key, {})
        for subject in [s for s, kept in subjects.items() if kept.expires <= now]:
            self._drop(key, subject)
        return subjects

    def _put(self, key: RecordKey, subject: Subject, kept: Kept) -> None:
        if subject in self._keys.get(key, ()):
            self._drop(key, subject, unpin=False)
        if key not in self._keys:
            self._keys[key] = {}
            bisect.insort(self._distances, self._distance(key))
        self._keys[key][subject] = kept
        if (key, subject) not in self._pinned:
            self._per_publisher[kept.publisher] += 1
            self._size_bytes += _cost(kept)

    def _drop(self, key: RecordKey, subject: Subject, *, unpin: bool = True) -> None:
        kept = self._keys[key].pop(subject)
        if not self._keys[key]:
            del self._keys[key]
            self._distances.pop(bisect.bisect_left(self._distances, self._distance(key)))
        if (key, subject) not in self._pinned:
            self._per_publisher[kept.publisher] -= 1
            if not self._per_publisher[kept.publisher]:
                del self._per_publisher[kept.publisher]
            self._size_bytes -= _cost(kept)
        elif unpin:
            self._pinned.discard((key, subject))

    def _distance(self, key: RecordKey) -> int:
        return int.from_bytes(key, "big") ^ self._own
