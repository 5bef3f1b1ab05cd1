"""Which training process this is, asked when an iteration begins: trainers say it after data sets were made."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from protocol.errors import InvalidParamsError
from tests.support.bridge.forkserver import forkserver
from torch_bridge.batches.dataset import StreamingBatchDataset
from torch_bridge.core.ranks import Ranks
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Ordering

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def dataset(folder: Path) -> StreamingShardDataset:
    return StreamingShardDataset(LocalSource(folder), batch_size=8, ordering=Ordering(lanes=2, block_rows=8, window=16))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        ids = range(shard * 80, shard * 80 + 80)
        pq.write_table(pa.table({"id": ids}), shards / f"shard_{shard:05d}.parquet")
    return shards


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Ranks(0, 1, 0, 1)),
        ({"WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Ranks(2, 4, 2, 4)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, Ranks(2, 4, 0, 2)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, Ranks(2, 4, 2, 4)),
    ],
)
def test_found_in_the_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], found: Ranks) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Ranks.found() == found


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"RANK": "1"}, "rank must be in"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be a whole number, not 'one'"),
    ],
)
def test_an_environment_that_does_not_say_which_process_this_is_is_refused_at_the_first_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], what: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    samples = dataset(folder)
    files = StreamingBatchDataset(folder.as_uri(), tmp_path / "cache", cache_size=2, max_bytes="1mb")
    for data in (samples, files):
        with pytest.raises(InvalidParamsError, match=what):
            next(iter(data))


def test_pickled_before_ranks_are_known_it_asks_where_it_is_unpickled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = pickle.dumps(dataset(folder))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pickle.loads(early).ranks == Ranks(1, 2, 1, 2)
    known = pickle.dumps(dataset(folder))
    monkeypatch.delenv("RANK")
    assert pickle.loads(known).ranks == Ranks(1, 2, 1, 2), "a worker without the environment is of that rank"


def _train(rank: int, folder: Path, meeting: Path, workers: int, how: str | None, answers: Any) -> None:
    """What Lightning's DDP does: the data set is made, then the process group."""
    data = dataset(folder)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=2)
    loader = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=how)
    answers.put((rank, [int(sample) for batch in loader for sample in batch["id"]]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("workers", "how"), [(0, None), (1, "fork"), (1, "forkserver")])
def test_two_processes_that_made_their_data_sets_first_see_every_sample_once(
    folder: Path, tmp_path: Path, workers: int, how: str | None
) -> None:
    context: multiprocessing.context.BaseContext = forkserver()
    answers = context.Queue()
    arguments = (folder, tmp_path / "meeting", workers, how, answers)
    processes = [context.Process(target=_train, args=(rank, *arguments)) for rank in range(2)]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    seen = dict(answers.get(timeout=50) for _ in processes)
    for process in processes:
        process.join(50)
        assert process.exitcode == 0
    assert sorted(seen) == [0, 1]
    assert sorted([*seen[0], *seen[1]]) == list(range(160))
