"""What needs no disk: slices of ranges, runs of chunks, what leaves the cache, sizes in words."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidParamsError
from torch_bridge.core.sizes import byte_count
from torch_bridge.objects.chunk_cache import CachedChunk, evicted
from torch_bridge.objects.ranges import ReadAhead, chunk_slices, runs

FILES = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 50)), max_size=30).map(
    lambda found: [CachedChunk(used, cost, f"c-{at}") for at, (used, cost) in enumerate(found)]
)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 700))
def test_pieces_make_up_the_range_and_nothing_else(start: int, length: int, chunk: int) -> None:
    end = start + length
    body = bytes(at % 251 for at in range(end))
    chunks = [body[at : at + chunk] for at in range(0, end, chunk)]
    found = chunk_slices(start, end, chunk)
    assert b"".join(chunks[index][first:stop] for index, first, stop in found) == body[start:end]
    assert all(0 <= first < stop <= chunk for _, first, stop in found)


@given(st.lists(st.integers(0, 60)), st.integers(1, 9))
def test_runs_hold_each_chunk_once_and_none_beside(chunks: list[int], most: int) -> None:
    found = runs(chunks, most)
    assert [at for run in found for at in range(*run)] == sorted(set(chunks))
    assert all(stop - first <= most for first, stop in found)
    for (first, stop), (next_first, _) in pairwise(found):
        assert stop < next_first or stop - first == most, "two requests where one would do"


@given(FILES, st.integers(0, 300), st.integers(0, 300), st.integers(0, 1000))
def test_eviction_makes_room_with_what_was_longest_unread(
    files: list[CachedChunk], pinned: int, need: int, limit: int
) -> None:
    going = evicted(files, pinned, need, limit)
    total = pinned + sum(one.cost for one in files)
    if total + need <= limit:
        assert going == []
    elif pinned + need > limit:
        assert going is None
    else:
        assert going is not None
        staying = set(files) - set(going)
        assert pinned + need + sum(one.cost for one in staying) <= limit
        assert all(gone.used_ns <= stays.used_ns for gone in going for stays in staying)


@pytest.mark.parametrize(
    ("text", "size"), [("10gb", 10**10), ("10 GiB", 10 << 30), ("1.5mb", 1_500_000), ("77", 77), (5, 5), ("2kb", 2000)]
)
def test_sizes_in_words(text: str | int, size: int) -> None:
    assert byte_count(text) == size


@pytest.mark.parametrize("text", ["", "gb", "-1gb", "10 gigs", "ib"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidParamsError, match="10gb"):
        byte_count(text)


def test_a_reader_that_goes_on_is_read_ahead_of_and_no_other() -> None:
    ahead = ReadAhead(8, 100)

    def after(key: str, start: int, end: int, *, busy: bool = False) -> list[int]:
        return list(ahead.after((key, start), (key, end), 3_050, busy=busy))

    assert after("a", 0, 150) == [], "one read says nothing"
    assert after("a", 150, 250) == [3, 4, 5, 6]
    assert after("a", 250, 350) == [], "enough is on its way"
    assert after("a", 350, 550, busy=True) == []
    assert after("a", 550, 650) == [7, 8, 9, 10, 11, 12, 13, 14]
    assert after("a", 650, 1_150) == [15, 16, 17, 18, 19]
    assert after("a", 2_000, 2_100) == [], "it went elsewhere"
    assert after("a", 2_100, 2_950) == [30], "the object ends"
    assert after("a", 2_950, 3_050) == []
    assert after("b", 0, 100) == [1, 2, 3, 4, 5, 6, 7, 8], "the next object after a whole one"
    assert after("c", 0, 100) == []


def test_nothing_is_read_ahead_where_that_is_turned_off() -> None:
    ahead = ReadAhead(0, 100)
    for start in range(0, 1_000, 100):
        assert not ahead.after(("a", start), ("a", start + 100), 1_000, busy=False)
