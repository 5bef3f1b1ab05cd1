"""StreamingShardDataset within a limit of the disk: several processes, and the folder's blocks sampled all the time."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from node.origin.settings import OriginSettings
from protocol.errors import InsufficientDiskError, InvalidParamsError
from tests.support.bridge.streaming import NAME, numbered_files, publish_numbered
from torch_bridge import O3Client, Ranks, RetryPolicy
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.sources.origin import OriginSource
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Buffering, Ordering

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torch's own DataLoader
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores, on purpose
]
ROWS = [60, 35, 80, 52, 40, 60, 20, 75, 61, 60]
ALL = sorted(shard * 1000 + row for shard, rows in enumerate(ROWS) for row in range(rows))
ORDERING = Ordering(lanes=4, block_rows=20, window=40)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten shards of 15 to 60 KB at an origin."""
    base = tmp_path_factory.mktemp("base")
    paths = numbered_files(tmp_path_factory.mktemp("files"), ROWS, row_bytes=750)
    publish_numbered(O3Client(settings=OriginSettings()).at(f"file://{base}"), paths)
    return base


def dataset(base: Path, folder: Path, disk_limit: int | str | None, **more: Any) -> StreamingShardDataset:
    client = O3Client(settings=OriginSettings(), retry=RetryPolicy(total_s=1.0))
    source = OriginSource(f"file://{base}", folder, dataset=NAME, client=client)
    settings: dict[str, Any] = {"columns": ["id"], "ordering": ORDERING, "disk_limit": disk_limit} | more
    return StreamingShardDataset(source, batch_size=8, **settings)


def blocks(folder: Path) -> int:
    """As `du` counts them, without the folders."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


@contextmanager
def sampled(folder: Path) -> Iterator[list[int]]:
    found, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            found.append(blocks(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def least_limit(base: Path, folder: Path, workers: int = 0, **more: Any) -> int:
    """What the refusal of one byte says."""
    data = dataset(base, folder, 1, **more)
    with pytest.raises(InvalidParamsError) as refused:
        next(iter(DataLoader(data, batch_size=None, num_workers=workers)))
    found = re.search(r"Give disk_limit=(\d+) or more", str(refused.value))
    assert found, refused.value
    return int(found[1])


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(180)
def test_the_least_limit_that_is_named_is_kept_and_gives_the_same_samples(
    base: Path, tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "shards"
    least = least_limit(base, tmp_path / "asked", workers)
    data = dataset(base, folder, least)
    found = []
    with sampled(folder) as sizes:
        loader = DataLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        for epoch in range(2):
            data.set_epoch(epoch)
            found.append(ids(loader))
        del loader
        gc.collect()
    assert sorted(flat(found[0])) == sorted(flat(found[1])) == ALL
    assert found[0] == ids(dataset(base, tmp_path / "free", None)), "the order does not depend on the limit"
    assert 60_000 < max(sizes) <= least
    assert sorted(folder.glob("*.parquet*")) == []
    with pytest.raises(InvalidParamsError, match="lanes="):
        ids(DataLoader(dataset(base, folder, least - 1), batch_size=None, num_workers=workers))


def _rank(base: Path, folder: Path, rank: int, limit: int, said: Any) -> None:
    data = dataset(base, folder, limit, ranks=Ranks(rank, 2, rank, 2))
    loader = DataLoader(data, batch_size=None, num_workers=2)
    for epoch in range(2):
        data.set_epoch(epoch)
        said.put((epoch, flat(ids(loader))))
    said.close()
    said.join_thread()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_ranks_with_two_workers_each_at_their_own_pace(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    least = least_limit(base, tmp_path / "asked", 2, ranks=Ranks(0, 2, 0, 2))
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    children = [context.Process(target=_rank, args=(base, folder, rank, least, said)) for rank in range(2)]
    with sampled(folder) as sizes:
        for child in children:
            child.start()
        found = [said.get(timeout=100) for _ in range(4)]
        for child in children:
            child.join(30)
            assert child.exitcode == 0
    for epoch in range(2):
        assert sorted(sample for one, samples in found if one == epoch for sample in samples) == ALL
    assert 60_000 < max(sizes) <= least


def test_what_an_earlier_run_left_above_the_limit_goes_at_the_start(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    left = dataset(base, folder, None, buffering=Buffering(keep_behind=99))
    ids(left)
    (folder / "shard_00000.parquet").rename(folder / "shard_00000.parquet.part")
    before = blocks(folder)
    least = least_limit(base, tmp_path / "asked")
    data = dataset(base, folder, least)
    batches = iter(data)
    found = [next(batches)["id"].tolist()]
    with sampled(folder) as sizes:
        found += ids(batches)
    assert sorted(flat(found)) == ALL
    assert max(sizes) <= least < before


def test_shards_kept_behind_give_way_and_the_status_says_what_is_there(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    least = least_limit(base, tmp_path / "asked", validation_shard="shard_00003.parquet")
    buffering = Buffering(keep_behind=99)
    data = dataset(base, folder, f"{least}b", buffering=buffering, validation_shard="shard_00003.parquet")
    found = []
    with sampled(folder) as sizes:
        for batch in data:
            found.append(batch["id"].tolist())
            status = data.status()
            assert status is not None
            assert status.disk_limit == least
            assert 0 < status.disk_bytes <= least
    assert sorted(flat(found)) == [sample for sample in ALL if sample // 1000 != 3]
    assert max(sizes) <= least
    assert (folder / "shard_00003.parquet").exists()
    assert len(list(folder.glob("*.parquet"))) > 1, "what there is room for stays behind"


def test_a_state_is_continued_with_another_limit(base: Path, tmp_path: Path) -> None:
    whole = ids(dataset(base, tmp_path / "free", None))
    first = dataset(base, tmp_path / "shards", "10mb")
    batches = iter(first)
    taken = [next(batches)["id"].tolist() for _ in range(7)]
    state = json.loads(json.dumps(first.state_dict()))
    batches.close()  # type: ignore[attr-defined]
    again = dataset(base, tmp_path / "shards", least_limit(base, tmp_path / "asked"))
    again.load_state_dict(state)
    assert taken + ids(again) == whole


def two_ranks(base: Path, folder: Path, limit: int) -> list[Iterator[Any]]:
    readers = [iter(dataset(base, folder, limit, ranks=Ranks(rank, 2, rank, 2))) for rank in range(2)]
    started = [threading.Thread(target=next, args=(reader,)) for reader in readers]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(30)
        assert not thread.is_alive()
    return readers


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_rank_that_runs_ahead_of_one_that_stands_still_ends_if_the_limit_holds_what_both_may_need(
    base: Path, tmp_path: Path
) -> None:
    """As ranks of a TextLoader, which take unequally many batches a step: here one takes all, the other none."""
    folder = tmp_path / "shards"
    alone = least_limit(base, tmp_path / "asked", ranks=Ranks(0, 2, 0, 1))
    limit = 2 * alone
    ahead, behind = two_ranks(base, folder, limit)
    with sampled(folder) as sizes:
        found = flat(ids(ahead))
        found += flat(ids(behind))
    assert max(sizes) <= limit
    assert len(found) == len(ALL) - 2 * 8
    assert set(found) < set(ALL)


def test_refused_values(base: Path, tmp_path: Path) -> None:
    for wrong in (0, -5, "0gb", "10 apples", 1e9, True, ""):
        with pytest.raises(InvalidParamsError, match=r"disk_limit must be above 0|is not a number of bytes"):
            dataset(base, tmp_path, wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidParamsError, match="given twice"):
        dataset(base, tmp_path, "1gb", buffering=Buffering(disk_limit="1gb"))


def test_a_folder_that_others_fill_is_refused_by_its_bytes(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "foreign").write_bytes(os.urandom(1_000_000))
    with pytest.raises(InvalidParamsError, match=r"10\d{5} for the ledger, the manifest and other files there"):
        ids(dataset(base, folder, "500kb"))


def test_a_disk_that_others_fill_meanwhile_is_one_error(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    limit = least_limit(base, tmp_path / "asked")
    batches = iter(dataset(base, folder, limit))
    next(batches)
    (folder / "foreign").write_bytes(os.urandom(limit))
    batches.gi_frame.f_locals["downloader"]._disk_patience_s = 0.2  # type: ignore[attr-defined]
    with pytest.raises(InsufficientDiskError, match=r"disk_limit=\d+ has no room .* bytes there are not shards"):
        ids(batches)


def test_own_files_stay_and_are_named_if_they_leave_no_room(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    ids(dataset(base, folder, None, buffering=Buffering(keep_behind=99)))
    copies = sorted(folder.glob("*.parquet"))
    for path in copies[2:]:  # a person's own: no source has noted that it fetched them
        (folder / ".shards" / f"{path.name}.checked").unlink()
    source = OriginSource(f"file://{base}", folder, dataset=NAME)
    shards = StreamingDownloader(source, disk_limit="300kb", disk_patience_s=0.2)
    named = rf"no reader holds .*{copies[-1].name}.* the source keeps"
    with shards, pytest.raises(InsufficientDiskError, match=named):
        shards.wait_for_shard(copies[0].name)
    assert all(path.exists() for path in copies[2:])
