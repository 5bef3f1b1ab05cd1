"""StreamingShardDataset in real data loaders: one order for any workers, and exact continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from protocol.errors import InvalidParamsError
from torch_bridge.shards.local_source import LocalSource
from torch_bridge.streaming.dataset import StreamingShardDataset

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torch's own DataLoader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard, rows in enumerate((70, 35, 90, 52)):
        ids = range(shard * 1000, shard * 1000 + rows)
        pq.write_table(pa.table({"id": ids, "x": ids}), tmp_path / f"shard_{shard:05d}.parquet", row_group_size=20)
    return tmp_path


def dataset(folder: Path, **more: Any) -> StreamingShardDataset:
    settings: dict[str, Any] = dict(batch_size=8, columns=["id"], lanes=4, block_rows=10, window=24, **more)
    return StreamingShardDataset(LocalSource(folder), **settings)


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
    assert ids(loader(dataset(folder), 2, "spawn")) == ids(dataset(folder))


def test_continued_with_other_workers_and_ranks(folder: Path) -> None:
    alone = ids(dataset(folder))
    data = dataset(folder)
    batches = iter(loader(data, 2))
    assert [next(batches)["id"].tolist() for _ in range(5)] == alone[:5]
    state = data.state_at(5)
    del batches  # its workers end, and with them their leases
    for rank in range(3):
        again = dataset(folder, rank=rank, world_size=3, local_world_size=1)
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
    other = StreamingShardDataset(LocalSource(folder), batch_size=4, lanes=4, block_rows=10, window=24)
    with pytest.raises(InvalidParamsError, match="batch_size=8"):
        other.load_state_dict(state)
