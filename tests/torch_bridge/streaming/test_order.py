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
GOLDEN = [
    [(0, 1), (0, 4), (0, 0)],
    [(1, 0), (0, 2), (1, 1)],
    [(1, 2), (2, 2), (1, 3)],
    [(0, 3), (2, 4), (2, 0)],
    [(2, 3)],
    [(2, 1), (2, 5)],
]


def samples(order: EpochOrder, number: int) -> list[tuple[int, int]]:
    """Shard and row of each sample of a batch."""
    found: list[tuple[int, int]] = []
    for part in order.parts(number):
        rows = [
            (shard, piece.first_row + row)
            for shard, piece in order.pieces(part.lane, part.window)
            for row in range(piece.rows)
        ]
        mixed = order.mixed(part.lane, part.window)
        found += (rows if mixed is None else [rows[at] for at in mixed])[part.start : part.stop]
    return found


def drawn_numbers(data: st.DataObject, order: EpochOrder, ranks: int, workers: int) -> range:
    """The batches of some reader that continues somewhere."""
    return order.numbers(
        data.draw(st.integers(0, order.batches)),
        rank=data.draw(st.integers(0, ranks - 1)),
        ranks=ranks,
        worker=data.draw(st.integers(0, workers - 1)),
        workers=workers,
        skip=data.draw(st.integers(0, 2)),
    )


def read(order: EpochOrder, base: int, ranks: int, workers: int) -> dict[int, list[tuple[int, int]]]:
    return {
        number: samples(order, number)
        for rank in range(ranks)
        for worker in range(workers)
        for number in order.numbers(base, rank=rank, ranks=ranks, worker=worker, workers=workers)
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
    numbers = drawn_numbers(data, order, ranks, workers)
    spans = {span.shard: span for span in order.spans(numbers)}
    read: dict[int, list[int]] = {}
    for number in numbers:
        for shard, _ in samples(order, number):
            read.setdefault(shard, []).append(number)
    for shard, found in read.items():
        assert spans[shard].first <= min(found) <= max(found) <= spans[shard].last
    assert {number for span in spans.values() for number in (span.first, span.last)} <= set(numbers)
    if not order.settings.shuffle:
        assert {shard: (span.first, span.last) for shard, span in spans.items()} == {
            shard: (min(found), max(found)) for shard, found in read.items()
        }


def decodings(order: EpochOrder, numbers: range) -> dict[int, list[int]]:
    """The batches with which a reader decodes windows with rows of each shard: each window with its first batch."""
    found: dict[int, list[int]] = {}
    decoded: set[tuple[int, int]] = set()
    for number in numbers:
        for part in order.parts(number):
            if (part.lane, part.window) not in decoded:
                decoded.add((part.lane, part.window))
                for shard, _ in order.pieces(part.lane, part.window):
                    found.setdefault(shard, []).append(number)
    return found


@settings(deadline=None)
@given(orders, counts, counts, st.data())
def test_a_reader_decodes_each_shard_between_the_batches_that_are_said(
    order: EpochOrder, ranks: int, workers: int, data: st.DataObject
) -> None:
    numbers = drawn_numbers(data, order, ranks, workers)
    said = {span.shard: (span.first, span.last) for span in order.decoded(numbers)}
    assert said == {shard: (min(found), max(found)) for shard, found in decodings(order, numbers).items()}


@settings(deadline=None)
@given(orders, counts, counts, st.data())
def test_readers_that_take_turns_decode_each_shard_between_the_batches_that_are_said(
    order: EpochOrder, ranks: int, workers: int, data: st.DataObject
) -> None:
    base = data.draw(st.integers(0, order.batches))
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        for worker in range(workers):
            mine = decodings(order, order.numbers(base, rank=rank, ranks=ranks, worker=worker, workers=workers))
            for shard, numbers in mine.items():
                found.setdefault(shard, []).extend(numbers)
    said = {span.shard: span for span in order.decoded(range(base, order.end(base, ranks)), ranks * workers)}
    assert said.keys() == found.keys()
    whole = {span.shard: span for span in order.spans(range(base, order.end(base, ranks)))}
    for shard, numbers in found.items():
        assert said[shard].first == min(numbers)
        assert max(numbers) <= said[shard].last <= whole[shard].last


@settings(deadline=None)
@given(orders, counts, counts, st.data())
def test_a_reader_s_pieces_of_all_shards_are_those_of_its_windows(
    order: EpochOrder, ranks: int, workers: int, data: st.DataObject
) -> None:
    numbers = drawn_numbers(data, order, ranks, workers)
    windows = {(part.lane, part.window) for number in numbers for part in order.parts(number)}
    of_windows = {(shard, piece) for window in windows for shard, piece in order.pieces(*window)}
    of_shards = [(shard, piece) for shard in range(len(order.shard_rows)) for piece in order.pieces_of(shard, numbers)]
    assert len(of_shards) == len(of_windows)
    assert set(of_shards) == of_windows


def test_the_order_is_the_one_of_earlier_releases() -> None:
    """A state that they saved is continued by this one."""
    order = EpochOrder((5, 4, 6), OrderSettings(batch_size=3, seed=1, lanes=2, block_rows=2, window=4))
    assert [samples(order, number) for number in range(order.batches)] == GOLDEN


def test_a_reader_of_every_second_lane_fetches_the_shards_of_its_lanes_alone() -> None:
    order = EpochOrder((100,) * 8, OrderSettings(batch_size=10, shuffle=False, lanes=2, block_rows=100))
    found = [
        {span.shard for span in order.spans(order.numbers(0, rank=rank, ranks=2, worker=0, workers=1))}
        for rank in range(2)
    ]
    assert [len(shards) for shards in found] == [4, 4]
    assert not found[0] & found[1]
