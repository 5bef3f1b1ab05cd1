"""StreamingShardDataset in real data loaders: one order for any workers, and exact continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from protocol.errors import InvalidParamsError, TimedOutError
from tests.support.bridge.forkserver import forkserver
from torch_bridge import Ranks
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.shards.sources.subset import ShardSubset
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Buffering, Ordering

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torch's own DataLoader
ORDERING = Ordering(lanes=4, block_rows=10, window=24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard, rows in enumerate((70, 35, 90, 52)):
        ids = range(shard * 1000, shard * 1000 + rows)
        pq.write_table(pa.table({"id": ids, "x": ids}), tmp_path / f"shard_{shard:05d}.parquet", row_group_size=20)
    return tmp_path


def dataset(folder: Path, **more: Any) -> StreamingShardDataset:
    return StreamingShardDataset(LocalSource(folder), batch_size=8, columns=["id"], ordering=ORDERING, **more)


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def loader(data: StreamingShardDataset, workers: int, how: str = "fork") -> DataLoader[Any]:
    return DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=how if workers else None)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
def test_one_order_for_all_numbers_of_workers(folder: Path) -> None:
    alone = ids(dataset(folder))
    assert len({sample for batch in alone for sample in batch}) == sum(map(len, alone)) == 247
    for workers in (0, 1, 2, 4):
        assert ids(loader(dataset(folder), workers)) == alone


def test_the_same_in_spawned_workers(folder: Path) -> None:
    """Processes that share nothing with this one but what is pickled."""
    assert ids(loader(dataset(folder), 2, forkserver().get_start_method())) == ids(dataset(folder))


def test_continued_with_other_workers_and_ranks(folder: Path) -> None:
    alone = ids(dataset(folder))
    data = dataset(folder)
    batches = iter(loader(data, 2))
    assert [next(batches)["id"].tolist() for _ in range(5)] == alone[:5]
    state = data.state_at(5)
    del batches  # its workers end, and with them their leases
    for rank in range(3):
        again = dataset(folder, ranks=Ranks(rank, 3, 0, 1))
        again.load_state_dict(state)
        assert ids(loader(again, rank)) == alone[5 + rank :: 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader(folder: Path, workers: int) -> None:
    alone = ids(dataset(folder))
    first = StatefulDataLoader(dataset(folder), batch_size=None, num_workers=workers)
    batches = iter(first)
    assert [next(batches)["id"].tolist() for _ in range(7)] == alone[:7]
    state = first.state_dict()
    del batches, first  # its workers end, and with them their leases
    again = StatefulDataLoader(dataset(folder), batch_size=None, num_workers=workers)
    again.load_state_dict(state)
    assert ids(again) == alone[7:]


def test_another_batch_size_cannot_be_continued(folder: Path) -> None:
    state = dataset(folder).state_at(1)
    other = StreamingShardDataset(LocalSource(folder), batch_size=4, ordering=ORDERING)
    with pytest.raises(InvalidParamsError, match="batch_size=8"):
        other.load_state_dict(state)


def test_what_makes_no_sense_is_refused_where_it_is_built() -> None:
    for wrong in ({"lanes": 0}, {"block_rows": 0}, {"window": -1}):
        with pytest.raises(InvalidParamsError, match="at least 1"):
            Ordering(**wrong)
    for wrong in ({"buffer_size": 0}, {"buffer_size": 5, "max_buffer": 4}):
        with pytest.raises(InvalidParamsError, match="buffer_size"):
            Buffering(**wrong)
    for wrong in ({"keep_behind": -1}, {"stop_free_bytes": -1}, {"shard_timeout_s": 0}):
        with pytest.raises(InvalidParamsError, match=next(iter(wrong))):
            Buffering(**wrong)
    assert Buffering(buffer_size=40).largest_buffer == 40


def test_too_little_free_disk_is_said_by_the_data_set_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": range(9)}), tmp_path / "shard_00000.parquet")
    full = Buffering(stop_free_bytes=1 << 60, shard_timeout_s=0.5)
    with pytest.raises(TimedOutError, match="stop_free_bytes"):
        next(iter(StreamingShardDataset(LocalSource(tmp_path, deletes=True), batch_size=3, buffering=full)))


def test_a_source_says_what_lies_on_disk(folder: Path) -> None:
    source = LocalSource(folder)
    first, second, *others = source.manifest().shards
    (folder / first.filename).unlink()
    chosen = ShardSubset(source, [second.filename, others[0].filename])
    assert chosen.on_disk([first, second, *others]) == [second, *others]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_validation_shard_is_never_trained_on(folder: Path, workers: int) -> None:
    """By no rank or worker, in no epoch, fresh or continued; it is what `validation_batches` yields."""
    held = list(range(2000, 2090))
    data = dataset(folder, validation_shard="shard_00002.parquet")
    rest = sorted(sample for batch in ids(dataset(folder)) for sample in batch if sample not in held)
    assert len(rest) == 247 - 90
    for epoch in range(2):
        data.set_epoch(epoch)
        batches = ids(loader(data, workers))
        assert sorted(sample for batch in batches for sample in batch) == rest
        assert len(batches) == len(data)
    shares = [
        sample
        for rank in range(2)
        for batch in ids(dataset(folder, validation_shard="shard_00002.parquet", ranks=Ranks(rank, 2, 0, 1)))
        for sample in batch
    ]
    assert sorted(shares) == rest
    assert [sample for batch in ids(data.validation_batches()) for sample in batch] == held
    state = data.state_at(3)
    assert "shard_00002.parquet" not in state["shards"]
    with pytest.raises(InvalidParamsError, match="shard_00002"):
        dataset(folder).load_state_dict(state)
