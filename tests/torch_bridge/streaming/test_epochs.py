"""Epochs follow each other, and continue as trainers expect, for any number of workers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from torch_bridge.core.ranks import Ranks
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Ordering

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torch's own DataLoader
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores, on purpose
]
ORDERING = Ordering(lanes=2, block_rows=10, window=20)
WORKERS = pytest.mark.parametrize("workers", [0, 1, 2, 3])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(2):
        ids = range(shard * 100, shard * 100 + 100)
        pq.write_table(pa.table({"id": ids}), tmp_path / f"shard_{shard:05d}.parquet")
    return tmp_path


def dataset(folder: Path, **options: Any) -> StreamingShardDataset:
    return StreamingShardDataset(LocalSource(folder), batch_size=16, ordering=ORDERING, **options)


def ids(batches: Any) -> list[list[int]]:
    return [[int(sample) for sample in batch["id"]] for batch in batches]


@pytest.fixture
def epochs(folder: Path) -> list[list[list[int]]]:
    """The batches of the first epochs, as one process reads each when it chose it."""
    data, found = dataset(folder), []
    for epoch in range(4):
        data.set_epoch(epoch)
        found.append(ids(data))
    assert all(sorted(itertools.chain(*one)) == list(range(200)) for one in found)
    assert len({str(one) for one in found}) == 4
    return found


@WORKERS
@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_advance_by_themselves_and_a_sanity_check_skips_none(
    folder: Path, epochs: list[list[list[int]]], workers: int, persistent: bool
) -> None:
    data = dataset(folder)
    if persistent and not workers:
        persistent = False
    loader = DataLoader(data, batch_size=None, num_workers=workers, persistent_workers=persistent, prefetch_factor=None)
    assert ids(itertools.islice(loader, 2)) == epochs[0][:2]
    for epoch in range(3):
        seen = []
        for number, batch in enumerate(loader, 1):
            seen.append(batch)
            assert data.epoch == epoch
            assert data.state_at(number)["epoch"] == epoch
        assert ids(seen) == epochs[epoch]
    data.set_epoch(1)
    assert ids(loader) == epochs[1]
    data.set_epoch(1)
    assert ids(loader) == epochs[1], "chosen again, it is read again"
    assert ids(loader) == epochs[2]


def read(loader: StatefulDataLoader[Any], epoch: int, choose: bool) -> list[list[int]]:
    data: Any = loader.dataset
    if choose:
        data.set_epoch(epoch)
    return ids(loader)


@WORKERS
def test_a_state_at_an_epoch_s_last_batch_begins_the_next_one(
    folder: Path, epochs: list[list[list[int]]], workers: int
) -> None:
    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(dataset(folder), batch_size=None, num_workers=workers)

    last = len(epochs[0])
    for at in (last, last - 1, 5):
        first = loader()
        for number, _ in enumerate(first, 1):
            if number == at:
                state = json.loads(json.dumps(first.state_dict()))
                break
        del first
        for choose in (True, False):
            again = loader()
            again.load_state_dict(state)
            if at == last:
                assert read(again, 1, choose) == epochs[1], (workers, choose)
                assert read(again, 2, choose) == epochs[2], (workers, choose)
            else:
                assert read(again, 0, choose) == epochs[0][at:], (workers, choose)
                assert read(again, 1, choose) == epochs[1], (workers, choose)


@WORKERS
def test_a_finished_epoch_that_is_chosen_again_yields_nothing_more_and_says_so(
    folder: Path, epochs: list[list[list[int]]], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    first = StatefulDataLoader(dataset(folder), batch_size=None, num_workers=workers)
    list(first)
    again = StatefulDataLoader(dataset(folder), batch_size=None, num_workers=workers)
    again.load_state_dict(first.state_dict())
    data: Any = again.dataset
    data.set_epoch(0)
    assert ids(again) == ids(again) == []
    assert workers or "set_epoch(1) begins the next" in caplog.text
    data.set_epoch(1)
    assert ids(again) == epochs[1]
    assert ids(again) == epochs[2]


@WORKERS
def test_a_state_of_the_data_set_is_continued_with_any_workers_and_then_epochs_follow(
    folder: Path, epochs: list[list[list[int]]], workers: int
) -> None:
    for at in (3, len(epochs[0])):
        data = dataset(folder)
        list(itertools.islice(data, at))
        other = dataset(folder)
        other.load_state_dict(data.state_at(at))
        loader = DataLoader(other, batch_size=None, num_workers=workers)
        if at == 3:
            assert ids(loader) == epochs[0][3:]
        assert ids(loader) == epochs[1]
        assert other.state_at(2) == (dataset_at(folder, 1)).state_at(2)


def dataset_at(folder: Path, epoch: int) -> StreamingShardDataset:
    data = dataset(folder)
    data.set_epoch(epoch)
    return data


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_length_is_that_of_this_rank_s_epoch(folder: Path, ranks: int, drop_last: bool) -> None:
    for rank in range(ranks):
        ordering = Ordering(lanes=2, block_rows=10, window=20, drop_last=drop_last)
        data = StreamingShardDataset(
            LocalSource(folder), batch_size=16, ordering=ordering, ranks=Ranks(rank, ranks, rank, ranks), run=str(rank)
        )
        for _ in range(2):
            assert len(DataLoader(data, batch_size=None)) == len(data) == sum(1 for _ in iter(data))


def test_a_rank_that_has_nothing_left_of_a_continued_epoch_waits_for_the_others(folder: Path) -> None:
    def rank(number: int, count: int) -> StreamingShardDataset:
        return dataset(folder, ranks=Ranks(number, count, number, count))

    for ranks, continued in [(4, 4), (4, 2), (3, 5)]:
        whole = [ids(rank(number, ranks)) for number in range(ranks)]
        batches = min(map(len, whole))
        assert len(whole[0]) == batches + 1, "the last round is not for all ranks"
        first = rank(0, ranks)
        reading = iter(first)
        for _ in range(batches):
            next(reading)
        state = json.loads(json.dumps(first.state_dict()))
        reading.close()
        again = [rank(number, continued) for number in range(continued)]
        for one in again:
            one.load_state_dict(state)
        rest = [ids(one) for one in again]
        left = sum(map(len, whole)) - ranks * batches
        assert list(map(len, rest)) == [1] * left + [0] * (continued - left)
        assert [one.epoch for one in again] == [0] * continued
        assert sorted(itertools.chain(*itertools.chain(*[ids(one) for one in again]))) == list(range(200))
        assert [one.epoch for one in again] == [1] * continued


def test_a_rank_that_was_through_before_the_others_begins_the_next_epoch_with_them(folder: Path) -> None:
    ranks = [dataset(folder, ranks=Ranks(number, 4, number, 4)) for number in range(4)]
    states = []
    for one in ranks:
        ids(one)
        states.append(json.loads(json.dumps(one.state_dict())))
    again = [dataset(folder, ranks=Ranks(number, 4, number, 4)) for number in range(4)]
    for one, state in zip(again, states, strict=True):
        one.load_state_dict(state)
    assert sorted(itertools.chain(*itertools.chain(*[ids(one) for one in again]))) == list(range(200))
    assert [one.epoch for one in again] == [1] * 4
