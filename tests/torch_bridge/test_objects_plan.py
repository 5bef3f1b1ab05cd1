"""What needs no disk: pieces of ranges, runs of chunks, what leaves the cache, sizes in words."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidParamsError
from torch_bridge.objects.lru import Kept, evicted
from torch_bridge.objects.ranges import pieces, runs, size_of

FILES = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 50)), max_size=30).map(
    lambda found: [Kept(used, cost, f"c-{at}") for at, (used, cost) in enumerate(found)]
)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 700))
def test_pieces_make_up_the_range_and_nothing_else(start: int, length: int, chunk: int) -> None:
    end = start + length
    body = bytes(at % 251 for at in range(end))
    chunks = [body[at : at + chunk] for at in range(0, end, chunk)]
    found = pieces(start, end, chunk)
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
    files: list[Kept], pinned: int, need: int, limit: int
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
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "gb", "-1gb", "10 gigs", "ib"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidParamsError, match="10gb"):
        size_of(text)
