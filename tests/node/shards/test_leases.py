"""Leases decided over time: what is held, by how many, until when, and never more than a node keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from node.shards import leases as module
from node.shards.leases import Leases
from protocol.errors import BusyError
from protocol.ids import ContentId
from protocol.manifest import Manifest, Shard, ShardEntry, ShardRef, sign_manifest
from protocol.signing import SigningKey

ENTRIES = tuple(
    ShardEntry(shard_id=i, filename=f"{i}.bin", size=5, content_id=ContentId(f"{i:064x}"), kind="file")
    for i in range(8)
)
SIGNED = sign_manifest(Manifest(name="set", kind="dataset", shards=ENTRIES), SigningKey(bytes(32)))


def shard(number: int) -> Shard:
    return SIGNED.shard(number)


def ref(number: int) -> ShardRef:
    return SIGNED.shard(number).ref


def taken(leases: Leases, lease: str, number: int, now: float, ttl_s: float) -> None:
    leases.end(leases.begin(lease, shard(number), now), lease, ref(number), now, ttl_s)


def test_a_lease_holds_from_the_beginning_of_the_fetch_until_it_expires() -> None:
    leases = Leases()
    fetch = leases.begin("a", shard(0), 100)
    assert leases.holders(ref(0), 10_000) == (1, 0.0), "a fetch may take as long as it takes"
    leases.end(fetch, "a", ref(0), 10_000, ttl_s=5)
    assert leases.holders(ref(0), 10_000) == (1, 5)
    assert leases.holders(ref(0), 10_004.5) == (1, 0.5)
    assert leases.holders(ref(0), 10_005) == (0, 0)
    assert leases.renew("a", [ref(0)], 10_005, 60) == [], "what has expired is not taken again"
    assert leases.of_lease("a", 10_005) == []
    assert leases.summaries(10_005) == []


def test_a_fetch_that_fails_leaves_the_lease_as_it_was() -> None:
    leases = Leases()
    leases.end(leases.begin("a", shard(0), 0), "a", ref(0), 1, None)
    assert leases.holders(ref(0), 1).leases == 0
    taken(leases, "a", 0, 0, ttl_s=10)
    leases.end(leases.begin("a", shard(0), 1), "a", ref(0), 2, None)
    assert leases.holders(ref(0), 2) == (1, 8)


def test_one_of_two_fetches_that_fails_does_not_take_the_hold_of_the_other() -> None:
    leases = Leases()
    first, second = (leases.begin("a", shard(0), 0) for _ in range(2))
    leases.end(first, "a", ref(0), 1, None)
    assert leases.holders(ref(0), 1).leases == 1
    leases.end(second, "a", ref(0), 2, 30)
    assert leases.holders(ref(0), 2) == (1, 30)


def test_a_lease_released_in_the_middle_of_a_fetch_does_not_come_back_with_it() -> None:
    leases = Leases()
    fetch = leases.begin("a", shard(0), 0)
    assert leases.release("a", ref(0), 1)
    leases.end(fetch, "a", ref(0), 2, 60)
    assert leases.holders(ref(0), 2).leases == 0
    assert not leases.release("a", ref(0), 3)


def test_renewal_makes_no_lease_shorter_and_touches_no_other() -> None:
    leases = Leases()
    for number in range(3):
        taken(leases, "a", number, 0, ttl_s=10)
    taken(leases, "b", 1, 0, ttl_s=100)
    assert leases.renew("a", [ref(1), ref(2), ref(7)], 5, 60) == [(shard(1), 60), (shard(2), 60)]
    assert leases.renew("a", [ref(1)], 5, 1) == [(shard(1), 60)]
    assert leases.holders(ref(1), 5) == (2, 95)
    assert leases.summaries(5) == [("a", 3, 5), ("b", 1, 95)]
    assert leases.of_lease("a", 11) == [shard(1), shard(2)]
    assert leases.release("a", ref(1), 11)
    assert leases.holders(ref(1), 11) == (1, 89)


def test_there_are_bounds_and_what_has_expired_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LEASES", 2)
    monkeypatch.setattr(module, "MAX_HOLDS", 3)
    leases = Leases()
    taken(leases, "a", 0, 0, ttl_s=10)
    taken(leases, "b", 0, 0, ttl_s=100)
    with pytest.raises(BusyError, match="2 leases that hold 2 shards"):
        leases.begin("c", shard(0), 1)
    taken(leases, "b", 1, 0, ttl_s=100)
    with pytest.raises(BusyError, match="release some"):
        leases.begin("b", shard(2), 1)
    taken(leases, "b", 1, 5, ttl_s=100)
    taken(leases, "c", 0, 10, ttl_s=10)
    assert [one.lease for one in leases.summaries(10)] == ["b", "c"]


@dataclass
class Model:
    """What leases ought to be, written down naively."""

    expires_at: float
    fetches: set[int] = field(default_factory=set)


NAMES, NUMBERS = st.sampled_from("abc"), st.integers(0, 3)


class LeasesOverTime(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.leases, self.now = Leases(), 0.0
        self.model: dict[tuple[str, int], Model] = {}
        self.open: list[tuple[int, str, int]] = []

    def held(self, lease: str, number: int) -> bool:
        model = self.model.get((lease, number))
        return model is not None and (bool(model.fetches) or model.expires_at > self.now)

    @rule(seconds=st.integers(0, 20))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(lease=NAMES, number=NUMBERS)
    def begin(self, lease: str, number: int) -> None:
        fetch = self.leases.begin(lease, shard(number), self.now)
        model = self.model.setdefault((lease, number), Model(self.now))
        model.fetches.add(fetch)
        self.open.append((fetch, lease, number))

    @rule(place=st.integers(0, 9), ttl_s=st.one_of(st.none(), st.integers(1, 30)))
    def end(self, place: int, ttl_s: int | None) -> None:
        if not self.open:
            return
        fetch, lease, number = self.open.pop(place % len(self.open))
        self.leases.end(fetch, lease, ref(number), self.now, ttl_s)
        model = self.model.get((lease, number))
        if model and fetch in model.fetches:
            model.fetches.discard(fetch)
            model.expires_at = max(model.expires_at, self.now + ttl_s if ttl_s else 0)

    @rule(lease=NAMES, numbers=st.sets(NUMBERS), ttl_s=st.integers(1, 30))
    def renew(self, lease: str, numbers: set[int], ttl_s: int) -> None:
        found = self.leases.renew(lease, [ref(number) for number in sorted(numbers)], self.now, ttl_s)
        held = [number for number in sorted(numbers) if self.held(lease, number)]
        for number in held:
            self.model[lease, number].expires_at = max(self.model[lease, number].expires_at, self.now + ttl_s)
        assert [one.entry.shard_id for one, _ in found] == held
        assert all(left_s >= ttl_s for _, left_s in found)

    @rule(lease=NAMES, number=NUMBERS)
    def release(self, lease: str, number: int) -> None:
        assert self.leases.release(lease, ref(number), self.now) == self.held(lease, number)
        self.model.pop((lease, number), None)

    @invariant()
    def is_as_it_ought_to_be(self) -> None:
        for number in range(4):
            holders = [lease for lease in "abc" if self.held(lease, number)]
            found = self.leases.holders(ref(number), self.now)
            assert found.leases == len(holders)
            ends = [self.model[lease, number].expires_at - self.now for lease in holders]
            assert found.expires_in_s == max(0.0, *ends, 0.0)
        held = {lease: [n for n in range(4) if self.held(lease, n)] for lease in "abc"}
        for lease, numbers in held.items():
            assert [one.entry.shard_id for one in self.leases.of_lease(lease, self.now)] == numbers
        summaries = {one.lease: one.shards for one in self.leases.summaries(self.now)}
        assert summaries == {lease: len(numbers) for lease, numbers in held.items() if numbers}


TestLeasesOverTime = LeasesOverTime.TestCase
TestLeasesOverTime.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
