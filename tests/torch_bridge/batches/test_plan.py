"""The planner of batches and what limits, with no files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidParamsError
from torch_bridge.batches.plan import Consumer, RemoteFile, epoch_order, own_share, part_of, pass_order, plan_batches
from torch_bridge.batches.stats import ConsumerTimes, time_report
from torch_bridge.core.sizes import byte_count

FILES = st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 100), max_size=40).map(
    lambda sizes: [RemoteFile(key, size) for key, size in sizes.items()]
)


@given(FILES, st.integers(1, 9), st.integers(100, 400))
def test_batches_hold_every_file_once_in_order_and_keep_both_bounds(
    files: list[RemoteFile], cache_size: int, max_bytes: int
) -> None:
    batches = plan_batches(files, cache_size, max_bytes)
    assert [file for batch in batches for file in batch.files] == files
    assert [batch.number for batch in batches] == list(range(len(batches)))
    for batch in batches:
        assert 1 <= len(batch.files) <= cache_size
        assert batch.size <= max_bytes // 2 or len(batch.files) == 1


@given(FILES, st.integers(0, 5), st.integers(0, 5), st.integers(1, 6))
def test_shares_are_of_each_file_once_and_of_equal_length(
    files: list[RemoteFile], seed: int, epoch: int, count: int
) -> None:
    order = epoch_order(files, seed, epoch)
    shares = [own_share(order, Consumer(index, count, index, count)) for index in range(count)]
    assert sorted(file for share in shares for file in share) == sorted(files)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(FILES.filter(bool), st.integers(0, 3), st.randoms())
def test_the_order_follows_from_names_seed_and_epoch_alone(files: list[RemoteFile], seed: int, pick: object) -> None:
    order = epoch_order(files, seed, 1)
    assert epoch_order(list(reversed(files)), seed, 1) == order
    assert epoch_order(order[1:], seed, 1) == order[1:]
    assert epoch_order(files, seed, 1, shuffle=False) == files
    assert sorted(pass_order(order, seed, 1, 3, shuffle=True)) == sorted(order)


def test_epochs_seeds_and_passes_differ() -> None:
    files = [RemoteFile(f"{number}", 1) for number in range(20)]
    orders = [epoch_order(files, seed, epoch) for seed in range(2) for epoch in range(2)]
    orders += [pass_order(orders[0], 0, 0, number, shuffle=True) for number in (1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    # One fixed order: a change of it would break runs that go on.
    assert [file.key for file in orders[0][:6]] == ["10", "11", "13", "6", "5", "16"]


@given(st.integers(0, 1000), st.integers(1, 9))
def test_the_parts_of_a_machine_sum_to_the_whole(total: int, count: int) -> None:
    assert sum(part_of(total, Consumer(0, count, index, count)) for index in range(count)) == total


def test_a_file_that_can_never_be_here_is_named() -> None:
    with pytest.raises(InvalidParamsError, match="'big' has 101 bytes and the disk may hold 100"):
        plan_batches([RemoteFile("small", 1), RemoteFile("big", 101)], 4, 100)


def test_the_longer_of_the_two_limits() -> None:
    slow = time_report(
        [ConsumerTimes(download_s=6.0, train_s=1.0, decode_s=1.0), ConsumerTimes(download_s=2.0, train_s=2.0)], 2
    )
    assert (slow.limit, slow.download_s, slow.train_s) == ("download", 8.0, 3.0)
    assert "epochs_per_subset=4" in slow.advice
    assert time_report([ConsumerTimes(download_s=1.0, train_s=2.0)], 1).limit == "training"
    assert time_report([], 1).limit == "training"
    assert time_report([ConsumerTimes(download_s=1.0)], 1).limit == "download"


def test_byte_counts() -> None:
    assert [byte_count(text) for text in (7, "7", "10gb", "1.5 MB", "2GiB", "8kb")] == [
        7,
        7,
        10**10,
        1_500_000,
        2 << 30,
        8000,
    ]
    wrong: list[Any] = ["", "gb", "ten gb", "1 xb", 1e9, True, None]
    for text in wrong:
        with pytest.raises(InvalidParamsError, match="not a number of bytes"):
            byte_count(text)
