"""Who may delete what, and the other decisions of the data shards' part."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from node.origin.settings import OriginSettings
from protocol.errors import InsufficientDiskError, InvalidParamsError, InvalidShardError, ShardInUseError
from tests.support.bridge.shards import overwrite_in_the_middle, parquet_files, publish_at
from torch_bridge import O3Client
from torch_bridge.shards import disk_space
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.readers import ReaderLedger, ReaderState, needed
from torch_bridge.shards.shard_file import check_parquet, extract_shard_id
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.shards.sources.origin import OriginSource
from torch_bridge.shards.status import adapted_size
from torch_bridge.shards.window import next_to_fetch


def reader(remaining: str, held: str = "", *, expected: int = 1, epoch: int = 0) -> ReaderState:
    return ReaderState(expected=expected, epoch=epoch, remaining=tuple(remaining), held=tuple(held))


def test_what_any_reader_of_any_run_needs_stays() -> None:
    both = [reader("cd", expected=2), reader("d", "b", expected=2)]
    assert needed({"one": both}, {"one": 2}) == set("bcd")
    assert needed({"one": both}, {"one": 1}) is None
    assert needed({"one": both, "two": [reader("a")]}, {"one": 2, "two": 1}) == set("abcd")
    ahead = [reader("c", epoch=0), reader("abc", "a", epoch=1)]
    assert needed({"one": ahead}, {"one": 2}) == set("ac")


def _read_until_killed(folder: Path, said: Any) -> None:
    ledger = ReaderLedger(folder, "run", "rank1")
    ledger.write(reader("ab", expected=2))
    said.put("there")
    signal.pause()


def test_a_reader_that_was_killed_needs_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    mine = ReaderLedger(tmp_path, "run", "rank0")
    mine.write(reader("b", expected=2))
    assert mine.delete(["a"], lambda _: True) == []
    child = context.Process(target=_read_until_killed, args=(tmp_path, said))
    child.start()
    assert said.get(timeout=10) == "there"
    assert mine.delete(["a"], lambda _: True) == []
    with pytest.raises(ShardInUseError, match="rank1"):
        ReaderLedger(tmp_path, "run", "rank1")
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(10)
    assert mine.delete(["a", "b"], lambda _: True) == ["a"]
    mine.close()


def test_a_reader_that_was_through_before_another_began_counts_as_registered(tmp_path: Path) -> None:
    """Ranks start at different times, and a small epoch may be over for one before the other has imported torch."""
    early = ReaderLedger(tmp_path, "run", "rank0", reader("a", expected=2))
    early.write(reader("", expected=2))
    assert early.delete(["a"], lambda _: True) == []
    early.close()
    late = ReaderLedger(tmp_path, "run", "rank1", reader("", expected=2))
    assert late.delete(["a"], lambda _: True) == ["a"]
    late.close()
    broken_off = ReaderLedger(tmp_path, "other", "rank0", reader("a", expected=2))
    broken_off.close()
    alone = ReaderLedger(tmp_path, "other", "rank1", reader("", expected=2))
    assert alone.delete(["a"], lambda _: True) == [], "one that was killed in its epoch comes again"
    alone.close()
    next_epoch = ReaderLedger(tmp_path, "run", "rank1", reader("", expected=2, epoch=1))
    assert next_epoch.delete(["a"], lambda _: True) == []
    next_epoch.close()


def test_two_runs_in_one_folder_delete_nothing_of_each_other(tmp_path: Path) -> None:
    parquet_files(tmp_path, 3)
    source = LocalSource(tmp_path, deletes=True)
    first, *_ = source.manifest().shards
    slow = StreamingDownloader(source, run="slow", stop_free_bytes=0)
    quick = StreamingDownloader(source, run="quick", stop_free_bytes=0)
    with slow, quick:
        path = quick.wait_for_shard(first, 10)
        quick.consumed(first)
        assert path.exists()
        slow.wait_for_shard(first, 10)
        slow.consumed(first)
        assert not path.exists()


def test_state_goes_by_name_and_pinned_shards_stay(tmp_path: Path) -> None:
    parquet_files(tmp_path, 3)
    source = LocalSource(tmp_path, deletes=True)
    with StreamingDownloader(source, [0, 1], pinned=[2], stop_free_bytes=0) as shards:
        validation = shards.wait_for_shard(2, 10)
        shards.consumed(2)
        assert shards.wait_for_shard("shard_00000.parquet", 10).exists()
        shards.consumed(0)
        state = json.loads(json.dumps(shards.state_dict()))
    assert validation.exists()
    assert "shard_00000.parquet" in state["consumed"]
    with StreamingDownloader(source, stop_free_bytes=0) as again:
        again.load_state_dict(state)
        assert again.wait_for_shard(1, 10).exists()
        assert "shard_00000.parquet" not in again.status().ready


def test_a_distrusted_file_of_a_folder_is_one_error(tmp_path: Path) -> None:
    """As of any source: handed out once more if its bytes are right, for a reader that ran out of memory for one."""
    (path,) = parquet_files(tmp_path, 1)
    with StreamingDownloader(LocalSource(tmp_path), stop_free_bytes=0) as shards:
        shards.wait_for_shard(0, 10)
        shards.distrust(0, "its rows do not decode")
        assert shards.wait_for_shard(0, 10) == path
        shards.distrust(0, "its rows do not decode")
        with pytest.raises(InvalidShardError, match="no other copy is better: its rows do not decode"):
            shards.wait_for_shard(0, 10)


def test_a_file_of_a_folder_that_changed_is_one_error(tmp_path: Path) -> None:
    (path,) = parquet_files(tmp_path, 1)
    with StreamingDownloader(LocalSource(tmp_path), stop_free_bytes=0) as shards:
        shards.wait_for_shard(0, 10)
        overwrite_in_the_middle(path)
        shards.distrust(0, "its rows do not decode")
        with pytest.raises(InvalidShardError, match=f"{path} changed since the data set was opened"):
            shards.wait_for_shard(0, 10)


def test_below_five_gigabytes_it_warns_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The defaults: 5 GB to warn below, 1 GB to stop below."""
    parquet_files(tmp_path, 3)
    source = LocalSource(tmp_path, deletes=True)
    free = [5_000_000_000]
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: free[0])

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    with StreamingDownloader(source, [0], keep_behind=9, disk_patience_s=0.2) as shards:
        shards.wait_for_shard(0, 10)
        assert warnings() == []
    with StreamingDownloader(source, buffer_size=1, max_buffer=1, keep_behind=9, disk_patience_s=0.2) as shards:
        free[0] = 4_999_999_999
        for number in (0, 1):
            assert shards.wait_for_shard(number, 10).exists(), "it goes on"
            shards.consumed(number)
        free[0] = 1_000_000_000
        assert shards.wait_for_shard(2, 10).exists()
    assert warnings() == [f"{tmp_path} has 4999999999 bytes free: below 1000000000 no shard is fetched"]
    free[0] = 999_999_999
    with (
        StreamingDownloader(source, disk_patience_s=0.2) as shards,
        pytest.raises(InsufficientDiskError, match="999999999 bytes are free"),
    ):
        shards.wait_for_shard(0, 10)


def test_a_full_disk_with_nothing_left_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_files(tmp_path, 1)
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 10)
    shards = StreamingDownloader(LocalSource(tmp_path, deletes=True), disk_patience_s=0.2)
    with shards, pytest.raises(InsufficientDiskError, match="10 bytes are free"):
        shards.wait_for_shard(0, 10)


def test_a_limit_that_one_reader_has_alone(tmp_path: Path) -> None:
    parquet_files(tmp_path / "files", 4)
    client = O3Client(settings=OriginSettings())
    manifest = publish_at(client.at(f"file://{tmp_path}"), "tests/text", sorted((tmp_path / "files").iterdir()))
    source = OriginSource(f"file://{tmp_path}", tmp_path / "here", dataset="tests/text", client=client)
    size = source.cost_bytes(manifest.shards[0].size)
    limit = 2 * size + 60_000
    with StreamingDownloader(
        source, stop_free_bytes=0, disk_limit=limit, disk_patience_s=0.2, retry_first_s=0.05
    ) as shards:
        shards.wait_for_shard(0, 10)
        while len(shards.status().ready) < 2:
            time.sleep(0.01)
        assert shards.status().disk_bytes <= limit
        shards.wait_for_shard(3, 10)
        assert shards.status().ready == ("shard_00000.parquet", "shard_00003.parquet"), "what was ahead gave way"
        with pytest.raises(InsufficientDiskError, match=r"reader holds shard_00000.parquet, shard_00003.parquet"):
            shards.wait_for_shard(1, 10)
        for number in (0, 3, 1, 2):
            assert shards.wait_for_shard(number, 10).exists()
            assert shards.status().disk_bytes <= limit
            shards.consumed(number)
    assert list((tmp_path / "here").glob("*.parquet*")) == []
    with pytest.raises(InvalidParamsError, match=r"the largest shard, for each of 3 readers"):
        StreamingDownloader(source, disk_limit=limit, expected_readers=3).start()


@pytest.mark.parametrize(
    ("name", "number"),
    [("shard_00042.parquet", 42), ("train-00003-of-00010.parquet", 3), ("a/b2/v1_007.tar.gz", 7)],
)
def test_a_file_name_says_its_number(name: str, number: int) -> None:
    assert extract_shard_id(name) == number


def test_a_name_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="no shard number"):
        extract_shard_id("readme.parquet")


def test_the_buffer_follows_what_was_measured() -> None:
    assert adapted_size(3, 1, 8, download_s=10, consume_s=2) == 4
    assert adapted_size(3, 1, 8, download_s=1, consume_s=100) == 2
    assert adapted_size(8, 1, 8, download_s=100, consume_s=1) == 8
    assert adapted_size(3, 1, 8, download_s=0, consume_s=1) == 3


def test_pinned_then_wanted_then_the_order() -> None:
    none: tuple[str, ...] = ()
    plan = {"here": none, "on_the_way": none, "consumed": none, "not_now": none, "wanted": none, "ahead": 2}
    assert next_to_fetch("abc", **plan | {"pinned": "z"}) == "z"
    assert next_to_fetch("abc", **plan | {"pinned": none, "wanted": "c"}) == "c"
    assert next_to_fetch("abc", **plan | {"pinned": none, "here": "a"}) == "b"
    assert next_to_fetch("abc", **plan | {"pinned": none, "here": "ab"}) is None
    assert next_to_fetch("abc", **plan | {"pinned": none, "not_now": "a", "here": "b"}) == "c"


def test_a_cut_off_parquet_file_is_refused(tmp_path: Path) -> None:
    (path,) = parquet_files(tmp_path, 1)
    check_parquet(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InvalidShardError, match="does not end"):
        check_parquet(path)
