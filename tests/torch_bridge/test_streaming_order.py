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
        for batch in order.taken_by(base, rank=rank, ranks=ranks, worker=worker, workers=workers)
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
        assert order.number(*order.place(number)) == number
        assert all(spans[shard].first <= number <= spans[shard].last for shard, _ in batch)
