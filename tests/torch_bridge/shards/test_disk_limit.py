"""A limit in bytes for all readers of a folder: the arithmetic, and readers in memory that go at any pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidParamsError
from protocol.ids import ContentId, ShardId
from protocol.manifest import ShardEntry
from torch_bridge.core.ranks import Ranks
from torch_bridge.shards.disk_limit import DiskLimit, SharedOrder, bytes_through, evictions, used_bytes
from torch_bridge.shards.readers import LedgerView, ReaderState
from torch_bridge.shards.sources.interface import DiskUse
from torch_bridge.streaming.disk_needs import DiskNeeds, LocalReaders, merged
from torch_bridge.streaming.order import EpochOrder, OrderSettings, ShardSpan, open_at_once

SIZES = {"a": 10, "b": 20, "c": 30, "d": 40}


def test_each_shard_and_each_download_counts_once() -> None:
    use = DiskUse(shards={"a": 12}, parts={"b": 5, "d": 7}, other_bytes=100)
    assert used_bytes(use, {"a", "b", "c"}, SIZES.__getitem__) == 100 + 12 + 20 + 30 + 7, "b is promised its 20 bytes"
    assert used_bytes(use, set(), SIZES.__getitem__) == 100 + 12 + 5 + 7


def test_what_is_needed_before_a_shard_has_room_first() -> None:
    assert bytes_through("c", "abcd", {"b", "d"}, SIZES.__getitem__) == 20 + 30
    assert bytes_through("c", "abcd", set("abcd"), SIZES.__getitem__) == 10 + 20 + 30


def test_what_no_reader_needs_goes_first_and_then_what_is_needed_last() -> None:
    use = DiskUse(shards=dict.fromkeys("abcd", 10), parts={"e": 3})
    rank = {name: place for place, name in enumerate("dcba")}
    assert evictions(1, use, {"b"}, {"b", "c", "d"}, rank) == ["e"]
    assert evictions(14, use, {"b"}, {"b", "c", "d"}, rank) == ["e", "a", "c"]
    assert evictions(99, use, {"b"}, None, rank) == ["e", "a", "c", "d"], "what a reader holds never goes"
    assert evictions(0, use, set(), set(), rank) == []


def entry(name: str, size: int) -> ShardEntry:
    return ShardEntry(shard_id=ShardId(0), filename=name, size=size, content_id=ContentId("0" * 64), kind="file")


class Disk:
    """A source and the ledger of its readers, in memory."""

    folder = Path("memory")

    def __init__(self, sizes: dict[str, int], expected: int) -> None:
        self.sizes, self.expected = sizes, expected
        self.here: set[str] = set()
        self.states: dict[str, ReaderState | None] = {}
        self.runs: dict[str, dict[str, ReaderState | None]] = {"run": self.states}
        self.other_bytes = 0
        self.me = ""

    def cost_bytes(self, size_bytes: int) -> int:
        return size_bytes

    def disk_use(self) -> DiskUse:
        return DiskUse({name: self.sizes[name] for name in self.here}, {}, self.other_bytes)

    def size_bytes(self) -> int:
        return 1 << 30  # more than this is never reserved for what readers write

    def view(self) -> LedgerView:
        return LedgerView("run", self.me, self.runs, {"run": self.expected})

    def discard(self, name: str) -> bool:
        self.here.discard(name)
        return True


class Reader:
    """One that fetches what its next batch decodes, and deletes what it and all others are past."""

    def __init__(
        self, disk: Disk, name: str, limit: DiskLimit, spans: Sequence[ShardSpan], names: Sequence[str]
    ) -> None:
        self.disk, self.name, self.limit = disk, name, limit
        self.spans = {names[span.shard]: span for span in spans}
        self.order = list(self.spans)
        self.past: set[str] = set()
        self.has: set[str] = set()
        self.at = -1
        self.write()

    def state(self) -> ReaderState:
        left = tuple(name for name in self.order if name not in self.past)
        state = ReaderState(expected=self.disk.expected, epoch=0, remaining=left, held=tuple(sorted(self.has)))
        return self.limit.stated(state)

    def write(self) -> None:
        self.disk.states[self.name] = self.state()

    def fetch(self, name: str, *, wanted: bool) -> bool:
        if name in self.has:
            return True
        self.disk.me = self.name
        disk: Any = self.disk
        if self.limit.take(name, self.state(), disk, disk.discard, 0.0 if wanted else None) is not None:
            return False
        self.has.add(name)
        self.write()
        self.disk.here.add(name)
        return True

    def decode(self, number: int) -> bool:
        """Whether all that it takes was there."""
        needs = [
            name for name, span in self.spans.items() if span.first <= number <= span.last and name not in self.past
        ]
        if not all(self.fetch(name, wanted=True) for name in needs):
            return False
        for name in [name for name, span in self.spans.items() if span.last <= number]:
            self.past.add(name)
            self.has.discard(name)
        self.write()
        needed = self.disk.view().needed()
        assert needed is not None
        self.disk.here -= {name for name in self.disk.here if name not in needed}
        return True


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_readers_at_any_pace_keep_the_limit_and_the_one_behind_always_moves(data: st.DataObject) -> None:
    """At the least limit that is not refused, with files that an earlier run left."""
    rows = tuple(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6)))
    sizes = [data.draw(st.integers(1, 9)) for _ in rows]
    order = EpochOrder(
        rows,
        OrderSettings(
            batch_size=data.draw(st.integers(1, 9)),
            seed=data.draw(st.integers(0, 99)),
            shuffle=data.draw(st.booleans()),
            lanes=data.draw(st.integers(1, 5)),
            block_rows=data.draw(st.integers(1, 30)),
            window=data.draw(st.integers(1, 40)),
        ),
    )
    ranks, workers, base = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    names = [f"shard{shard}" for shard in range(len(rows))]
    needs = DiskNeeds(order, sizes, lambda size: size, LocalReaders(Ranks(0, ranks, 0, ranks), workers), base)
    limit_bytes = max(needs.together_bytes(), 1)
    disk = Disk(dict(zip(names, sizes, strict=True)), ranks * workers)
    shared = [names[span.shard] for span in needs.spans()]
    readers: dict[Reader, list[int]] = {}
    entries = {name: entry(name, size) for name, size in disk.sizes.items()}
    for rank in range(ranks):
        for worker in range(workers):
            numbers = order.numbers(base, rank=rank, ranks=ranks, worker=worker, workers=workers)
            spans = order.decoded(numbers)
            own = SharedOrder(shared, limit_bytes, open_at_once(spans, sizes), lambda room: "")
            source: Any = disk
            limit = DiskLimit(source, entries, limit_bytes, own, ())
            readers[Reader(disk, f"{rank}-{worker}", limit, spans, names)] = list(numbers)
    left = data.draw(st.sets(st.sampled_from(names)))
    disk.here |= left
    first, *_ = readers
    disk.me = first.name
    ledger: Any = disk
    first.limit.require(first.state(), ledger, names)
    first.limit.shrink(first.state(), ledger, disk.discard)
    while any(readers.values()):
        behind = min((reader for reader in readers if readers[reader]), key=lambda reader: readers[reader][0])
        chosen = data.draw(st.sampled_from([behind, *(reader for reader in readers if readers[reader])]))
        if data.draw(st.booleans()) and (ahead := [name for name in chosen.order if name not in chosen.past]):
            chosen.fetch(data.draw(st.sampled_from(ahead)), wanted=False)
        elif chosen.decode(readers[chosen][0]):
            readers[chosen].pop(0)
        else:
            assert chosen is not behind, "what is needed first always has room"
        assert sum(disk.sizes[name] for name in disk.here) <= limit_bytes
    assert disk.here <= left - set(shared)


def limit_of(disk: Disk, limit_bytes: int, shared: SharedOrder | None = None, **more: Any) -> DiskLimit:
    source: Any = disk
    entries = {name: entry(name, size) for name, size in disk.sizes.items()}
    return DiskLimit(source, entries, limit_bytes, shared, more.pop("pinned", ()), **more)


def state(remaining: str, held: str = "", *, expected: int = 1, **more: Any) -> ReaderState:
    return ReaderState(
        expected=expected, epoch=more.pop("epoch", 0), remaining=tuple(remaining), held=tuple(held), **more
    )


def take(limit: DiskLimit, disk: Disk, name: str, mine: ReaderState, waiting_s: float | None = 0.0) -> Any:
    disk.me = "me"
    ledger: Any = disk
    disk.states["me"] = mine
    return limit.take(name, mine, ledger, disk.discard, waiting_s)


def test_readers_that_have_not_begun_need_everything() -> None:
    disk = Disk(SIZES, 2)
    limit = limit_of(disk, 60, SharedOrder("abcd", 60, 40, lambda room: ""))
    mine = state("cd", expected=2)
    assert "1 of 2 readers have begun epoch 0" in take(limit, disk, "d", mine).text
    disk.states["other"] = state("d", expected=2)
    assert take(limit, disk, "d", state("d", expected=2)) is None


def test_an_earlier_epoch_comes_first() -> None:
    disk = Disk(SIZES, 2)
    limit = limit_of(disk, 60, SharedOrder("abcd", 60, 40, lambda room: ""))
    disk.states["slow"] = state("d", expected=2)
    assert take(limit, disk, "a", state("abc", expected=2, epoch=1)) is None
    assert take(limit, disk, "b", state("bc", expected=2, epoch=1)) is not None, "40 + 20 bytes, and a for the slow one"
    disk.states["slow"] = state("bcd", expected=2, epoch=1)
    assert take(limit, disk, "b", state("bc", expected=2, epoch=1)) is None


def test_other_runs_keep_what_they_need() -> None:
    disk = Disk(SIZES, 1)
    shared = SharedOrder("abcd", 40, 40, lambda room: "")
    limit = limit_of(disk, 70, shared)
    disk.runs["validation"] = {"rank0": state("d", together_bytes=40)}
    assert take(limit, disk, "c", state("cd")) is None
    ledger: Any = disk
    with pytest.raises(InvalidParamsError, match=r"at least 80 bytes.*40 for other runs"):
        limit.require(state("abcd"), ledger, "abcd")


def test_a_reader_may_leave_the_order_only_if_the_others_can_spare_the_room() -> None:
    """As two ranks that take unequally many batches a step: the one behind waits for the one ahead."""
    for limit_bytes, spared in ((79, False), (80, True)):
        disk = Disk(SIZES, 2)
        disk.here.update("ab")
        limit = limit_of(disk, limit_bytes, SharedOrder("abcd", 40, 40, lambda room: ""), out_of_step_s=1e-9)
        disk.states["behind"] = state("abc", "a", expected=2, own_bytes=40)
        assert take(limit, disk, "d", state("d", expected=2), 0.0) is not None, "not at once"
        found = take(limit, disk, "d", state("d", expected=2), 1.0)
        assert (found is None) == spared
    assert disk.here == {"a", "b"}, "there was room beside them"
    disk.here.update("c")
    assert take(limit, disk, "d", state("d", expected=2), 1.0) is None
    assert disk.here == {"a", "b"}, "c comes again when it is its turn"


def test_it_is_final_if_no_other_reader_can_change_it() -> None:
    disk = Disk(SIZES, 2)
    limit = limit_of(disk, 60, SharedOrder("abcd", 60, 40, lambda room: ""))
    disk.states["other"] = state("bc", "bc", expected=2)
    waits = take(limit, disk, "d", state("d", expected=2))
    assert not waits.is_final
    assert "other holds b, c" in waits.text
    disk.states["other"] = state("bc", "bc", expected=2, waits="a")
    assert take(limit, disk, "d", state("d", expected=2)).is_final, "all wait for each other"
    disk.states["other"] = state("bc", "bc", expected=2)
    hasty = limit_of(disk, 60, SharedOrder("abcd", 60, 40, lambda room: ""), stalled_s=-1.0)
    assert take(hasty, disk, "d", state("d", expected=2)).is_final, "nothing has moved for too long"
    disk.other_bytes = 30
    assert take(limit, disk, "d", state("d", expected=2)).is_final, "30 bytes of others, 40 of the shard"


def test_without_a_shared_order_each_reader_has_its_part() -> None:
    disk = Disk(SIZES, 2)
    limit = limit_of(disk, 100)
    ledger: Any = disk
    limit.require(state("ab", expected=2), ledger, "abcd")
    assert take(limit, disk, "b", state("ab", "c", expected=2)) is None
    over = take(limit, disk, "c", state("c", "d", expected=2))
    assert over.gives_way
    assert over.is_final
    with pytest.raises(InvalidParamsError, match=r"disk_limit=79 .* at least 80 bytes .*largest shard, for each of 2"):
        limit_of(disk, 79).require(state("ab", expected=2), ledger, "abcd")


def test_what_a_node_s_leases_hold_counts_until_it_is_released() -> None:
    disk = Disk(SIZES, 2)
    disk.disk_use = lambda: None  # type: ignore[method-assign,assignment,return-value]
    limit = limit_of(disk, 60, SharedOrder("abcd", 60, 40, lambda room: ""))
    disk.states["other"] = state("", "b", expected=2, kept=("a",))
    assert take(limit, disk, "c", state("cd", expected=2)) is None
    assert take(limit, disk, "d", state("cd", expected=2)) is not None
    assert limit.used_bytes(state("c", "c", kept=("b",)), disk.view()) == 10 + 20 + 30


def test_the_advice_fits_and_is_the_least_change() -> None:
    order = EpochOrder((100,) * 12, OrderSettings(batch_size=10, lanes=8, block_rows=25, window=50))
    needs = DiskNeeds(order, [1000] * 12, lambda size: size, LocalReaders(Ranks(0, 1, 0, 1), 4))
    least = needs.together_bytes()
    said = needs.advice(least - 1)
    lanes = int(said.partition("lanes=")[2].split()[0])
    fewer = replace(needs, order=EpochOrder(order.shard_rows, replace(order.settings, lanes=lanes)))
    assert fewer.together_bytes() < least
    assert f"({fewer.together_bytes()} bytes of shards" in said
    assert "shards of at most" in said
    assert "no one change" in needs.advice(1)


def test_a_pinned_shard_has_room_besides_all_others() -> None:
    disk = Disk(SIZES, 1)
    limit = limit_of(disk, 60, SharedOrder("bc", 50, 50, lambda room: ""), pinned=("a",))
    assert take(limit, disk, "c", state("bc")) is None
    assert take(limit, disk, "a", state("bc", "bc")) is None
    ledger: Any = disk
    limit.require(state("bc"), ledger, "bc")
    with pytest.raises(InvalidParamsError, match=r"at least 60 bytes .* 10 for a"):
        limit_of(disk, 59, SharedOrder("bc", 50, 50, lambda room: ""), pinned=("a",)).require(state("bc"), ledger, "bc")


def test_later_epochs_are_counted_at_the_first() -> None:
    order = EpochOrder((30, 10, 20, 30, 7, 45, 12, 33), OrderSettings(batch_size=4, lanes=3, block_rows=10, window=20))
    readers = LocalReaders(Ranks(0, 1, 0, 1), 1)
    each = [
        DiskNeeds(EpochOrder(order.shard_rows, replace(order.settings, epoch=epoch)), order.shard_rows, int, readers)
        for epoch in range(8)
    ]
    alone = [needs.together_bytes() for needs in each]
    assert len(set(alone)) > 1
    assert replace(each[0], epochs=range(8)).together_bytes() == max(alone)


def test_readers_of_one_machine_of_several_need_their_own_lanes_alone() -> None:
    order = EpochOrder((100,) * 8, OrderSettings(batch_size=10, shuffle=False, lanes=2, block_rows=100))
    alone = LocalReaders(Ranks(1, 2, 0, 1), 1)
    assert len(alone.spans(order, 0)) == 4
    assert len(LocalReaders(Ranks(1, 2, 1, 2), 1).spans(order, 0)) == 8
    assert merged([ShardSpan(1, 5, 6), ShardSpan(1, 2, 3)]) == [ShardSpan(1, 2, 6)]
