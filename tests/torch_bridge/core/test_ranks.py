"""Which training process this is, asked when an iteration begins: trainers say it after data sets were made."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import sys
import types
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


class DataLoaderDispatcher:
    """As Accelerate's class of this name, as far as the check looks: the default for an IterableDataset."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset


class DataLoaderShard(DataLoaderDispatcher):
    """With dispatch_batches=False, around an IterableDatasetShard."""


class IterableDatasetShard(DataLoaderDispatcher):
    """Gives each process its part of what the data set yields."""


def accelerated(monkeypatch: pytest.MonkeyPatch, loader: Any, processes: int) -> None:
    """Accelerate 1.15 is iterating `loader` (accelerate/state.py, GradientState)."""
    state = types.ModuleType("accelerate.state")
    state.GradientState = lambda: types.SimpleNamespace(active_dataloader=loader)  # type: ignore[attr-defined]
    state.PartialState = lambda: types.SimpleNamespace(num_processes=processes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "accelerate.state", state)


@pytest.mark.parametrize("wrapped", [DataLoaderDispatcher, lambda data: DataLoaderShard(IterableDatasetShard(data))])
@pytest.mark.parametrize("kind", ["shards", "files"])
def test_accelerate_may_not_split_a_rank_s_part_again(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path, wrapped: Any, kind: str
) -> None:
    """Half of the samples of two ranks would be lost: what it does first on each rank is `set_epoch`."""

    def made(ranks: Ranks | None = None) -> Any:
        if kind == "files":
            return StreamingBatchDataset(
                folder.as_uri(), tmp_path / "cache", cache_size=2, max_bytes=10**6, ranks=ranks
            )
        return StreamingShardDataset(LocalSource(folder), batch_size=8, ranks=ranks)

    for rank in range(2):
        data = made(Ranks(rank, 2, rank, 2))
        accelerated(monkeypatch, wrapped(data), processes=2)
        for step in (lambda data: data.set_epoch(0), iter):
            with pytest.raises(
                InvalidParamsError, match=r"most samples would be lost: leave the loader out of prepare"
            ):
                step(data)
        made(Ranks(rank, 2, rank, 2)).set_epoch(0)  # another one than Accelerate iterates
    alone = made(Ranks(0, 1, 0, 1))
    accelerated(monkeypatch, wrapped(alone), processes=2)
    alone.set_epoch(0)
    assert len(list(alone)) == len(list(folder.iterdir()) if kind == "files" else made())


def test_a_loader_that_accelerate_leaves_whole_is_read(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """With one process of its own, as where other parts of a program make the ranks."""
    data = StreamingShardDataset(LocalSource(folder), batch_size=8, ranks=Ranks(1, 2, 1, 2))
    for wrapped in (DataLoaderDispatcher(data), DataLoaderShard(data)):
        accelerated(monkeypatch, wrapped, processes=1)
        data.set_epoch(0)
        assert len(list(data)) == len(data)


def test_a_rank_without_a_batch_is_warned_of_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """160 samples make 3 batches: one rank of four has none, and the others would wait for it."""
    given = [
        StreamingShardDataset(
            LocalSource(folder), batch_size=60, ordering=Ordering(lanes=1), ranks=Ranks(rank, 4, rank, 4)
        )
        for rank in range(4)
    ]
    assert [[len(list(data)) for _ in range(2)] for data in given] == [[1, 1], [1, 1], [1, 1], [0, 0]]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("rank 3 of 4 gets no batch in epoch 0: 160 samples in 1 lanes make 3 batches of 60")
    assert "lower batch_size=, or use fewer ranks" in said


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 200), (4, 60)])
def test_an_epoch_without_a_batch_for_any_rank_is_refused(folder: Path, ranks: int, batch_size: int) -> None:
    for rank in range(ranks):
        data = StreamingShardDataset(
            LocalSource(folder),
            batch_size=batch_size,
            ordering=Ordering(lanes=1, drop_last=True),
            ranks=Ranks(rank, ranks, rank, ranks),
        )
        with pytest.raises(InvalidParamsError, match=r"epoch 0 has no batch .*160 samples .*drop_last=False"):
            iter(data)


@pytest.mark.parametrize(("workers", "world"), [(0, 3), (2, 2)])
def test_a_rank_without_a_file_is_warned_of(folder: Path, tmp_path: Path, workers: int, world: int) -> None:
    """Two files for three ranks, or for two of two workers: the last rank has none, and one of its workers says so."""
    log = logging.FileHandler(tmp_path / "log")  # that workers share
    logging.getLogger("torch_bridge.batches.dataset").addHandler(log)
    try:
        given = []
        for rank in range(world):
            cache, ranks = tmp_path / f"cache{rank}", Ranks(rank, world, rank, world)
            data = StreamingBatchDataset(
                folder.as_uri(), cache, cache_size=8, max_bytes=10**6, decode=_size, ranks=ranks
            )
            given.append(len(list(DataLoader(data, batch_size=None, num_workers=workers))))
    finally:
        logging.getLogger("torch_bridge.batches.dataset").removeHandler(log)
        log.close()
    assert given == ([1, 1, 0] if workers == 0 else [2, 0])
    (said,) = (tmp_path / "log").read_text().splitlines()
    assert said.startswith(f"rank {world - 1} of {world} gets no file in epoch 0")


def _size(path: Path, _: Any) -> int:
    return path.stat().st_size
