"""Every sample once an epoch, in one order, whoever reads."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from torch_bridge.streaming.order import EpochOrder, OrderSettings

orders = st.builds(
    EpochOrder,
    st.lists(st.integers(0, 90), max_size=6).map(tuple),
    st.builds(
        OrderSettings,
        batch_size=st.integers(1, 9),
        seed=st.integers(0, 99),
        epoch=st.integers(0, 3),
        shuffle=st.booleans(),
        lanes=st.integers(1, 9),
        block_rows=st.integers(1, 20),
        window=st.integers(1, 40),
    ),
)
counts = st.integers(1, 5)


def read(order: EpochOrder, base: int, ranks: int, workers: int) -> dict[int, list[tuple[int, int]]]:
    return {
        batch.number: list(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True))
        for rank in range(ranks)
        for worker in range(workers)
        for batch in order.taken(order.numbers(base, rank=rank, ranks=ranks, worker=worker, workers=workers))
    }


@settings(deadline=None)
@given(orders, counts, counts)
def test_each_sample_once_and_in_the_same_batch_for_all_numbers(order: EpochOrder, ranks: int, workers: int) -> None:
    alone, shared = read(order, 0, 1, 1), read(order, 0, ranks, workers)
    assert alone == shared
    assert sorted(alone) == list(range(order.batches))
    samples = [sample for batch in alone.values() for sample in batch]
    assert sorted(samples) == [(shard, row) for shard, rows in enumerate(order.shard_rows) for row in range(rows)]


@settings(deadline=None)
@given(orders, st.data())
def test_continued_anywhere_with_other_numbers(order: EpochOrder, data: st.DataObject) -> None:
    base = data.draw(st.integers(0, order.batches))
    rest = read(order, base, data.draw(counts), data.draw(counts))
    assert rest == {number: batch for number, batch in read(order, 0, 1, 1).items() if number >= base}


@settings(deadline=None)
@given(orders)
def test_no_shard_is_read_outside_its_span(order: EpochOrder) -> None:
    spans = {span.shard: span for span in order.spans()}
    for number, batch in read(order, 0, 1, 1).items():
        assert order.number(*order.lane_of(number)) == number
        assert all(spans[shard].first <= number <= spans[shard].last for shard, _ in batch)


@settings(deadline=None)
@given(orders, counts, counts, st.data())
def test_a_reader_spans_the_shards_of_its_own_batches(
    order: EpochOrder, ranks: int, workers: int, data: st.DataObject
) -> None:
    numbers = order.numbers(
        data.draw(st.integers(0, order.batches)),
        rank=data.draw(st.integers(0, ranks - 1)),
        ranks=ranks,
        worker=data.draw(st.integers(0, workers - 1)),
        workers=workers,
        skip=data.draw(st.integers(0, 2)),
    )
    spans = {span.shard: span for span in order.spans(numbers)}
    read: dict[int, list[int]] = {}
    for batch in order.taken(numbers):
        for shard in batch.shards.tolist():
            read.setdefault(shard, []).append(batch.number)
    for shard, found in read.items():
        assert spans[shard].first <= min(found) <= max(found) <= spans[shard].last
    assert {number for span in spans.values() for number in (span.first, span.last)} <= set(numbers)
    if not order.settings.shuffle:
        assert {shard: (span.first, span.last) for shard, span in spans.items()} == {
            shard: (min(found), max(found)) for shard, found in read.items()
        }


def test_a_reader_of_every_second_lane_fetches_the_shards_of_its_lanes_alone() -> None:
    order = EpochOrder((100,) * 8, OrderSettings(batch_size=10, shuffle=False, lanes=2, block_rows=100))
    found = [
        {span.shard for span in order.spans(order.numbers(0, rank=rank, ranks=2, worker=0, workers=1))}
        for rank in range(2)
    ]
    assert [len(shards) for shards in found] == [4, 4]
    assert not found[0] & found[1]
