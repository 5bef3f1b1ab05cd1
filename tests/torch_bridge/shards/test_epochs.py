"""Several epochs, readers in different ones, workers that were spawned."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest

from node.origin.settings import OriginSettings
from protocol.content import hash_file
from protocol.manifest import Manifest
from tests.support.bridge.shards import parquet_files, publish_at
from torch_bridge import O3Client, StreamingDownloader
from torch_bridge.shards.sources.origin import OriginSource

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # servers and processes of their own

NAME = "tests/text"
SHARDS = 14


@pytest.fixture
def published(tmp_path: Path) -> tuple[OriginSource, Manifest]:
    base = tmp_path / "base"
    base.mkdir()
    client = O3Client(settings=OriginSettings())
    manifest = publish_at(client.at(f"file://{base}"), NAME, parquet_files(tmp_path / "files", SHARDS, row_bytes=50))
    return OriginSource(f"file://{base}", tmp_path / "here", dataset=NAME, client=client), manifest


def here(source: OriginSource) -> set[str]:
    return {path.name for path in source.folder.glob("*.parquet")}


def test_three_epochs_in_three_orders_with_two_kept_behind(published: tuple[OriginSource, Manifest]) -> None:
    source, manifest = published
    by_name = {entry.filename: entry for entry in manifest.shards}
    most = 0
    with StreamingDownloader(source, [], buffer_size=2, max_buffer=2, keep_behind=2, stop_free_bytes=0) as shards:
        for epoch in range(3):
            order = random.Random(epoch).sample(sorted(by_name), SHARDS)
            shards.set_order(order)
            assert shards.state_dict()["epoch"] == epoch + 1
            for place, name in enumerate(order):
                path = shards.wait_for_shard(name, 20)
                assert hash_file(path).content_id == by_name[name].content_id
                assert here(source) >= set(order[max(place - 2, 0) : place + 1]), "those behind it are still there"
                shards.consumed(name)
                most = max(most, len(here(source)))
    # Two behind, two ahead, two that are begun; those behind of the epoch before are on top where they come again.
    assert most <= 2 + 2 + 2 + 2 < SHARDS
    assert here(source) >= set(order[-2:])


def test_an_order_that_is_left_early_leaves_nothing_behind(published: tuple[OriginSource, Manifest]) -> None:
    source, _ = published
    with StreamingDownloader(source, [0, 1, 2], buffer_size=3, stop_free_bytes=0) as shards:
        for number in (0, 1, 2):
            shards.wait_for_shard(number, 20)
        shards.set_order([5])
        path = shards.wait_for_shard(5, 20)
        assert here(source) == {path.name}
        assert shards.status().ready == (path.name,)


def test_readers_in_different_epochs_delete_nothing_of_each_other(published: tuple[OriginSource, Manifest]) -> None:
    source, _ = published
    options: dict[str, Any] = {
        "buffer_size": 1,
        "max_buffer": 1,
        "expected_readers": 2,
        "stop_free_bytes": 0,
        "at_once": 1,
    }
    slow = StreamingDownloader(source, [0, 1, 2], reader="slow", **options)
    quick = StreamingDownloader(source, [0, 1, 2], reader="quick", **options)
    with slow, quick:
        first = slow.wait_for_shard(0, 20)
        for number in (0, 1, 2):
            quick.wait_for_shard(number, 20)
            quick.consumed(number)
        assert len(here(source)) == 3, "the slow one is past none of them"
        quick.set_order([2, 1, 0])
        path = quick.wait_for_shard(2, 20)
        slow.consumed(0)
        assert not first.exists(), "nobody holds it, and the quick one fetches it again when it is its turn"
        slow.wait_for_shard(1, 20)
        slow.consumed(1)
        slow.wait_for_shard(2, 20)
        slow.consumed(2)
        assert path.exists(), "the quick one reads it"
        quick.consumed(2)
        for number in (1, 0):
            assert quick.wait_for_shard(number, 20).exists()
            quick.consumed(number)
        slow.set_order([0])
        assert slow.wait_for_shard(0, 20).exists()


def _epochs(source: OriginSource, reader: int, said: Any) -> None:
    names = [entry.filename for entry in source.manifest().shards]
    read = 0
    with StreamingDownloader(
        source, [], reader=f"rank0-worker{reader}", expected_readers=2, keep_behind=1, stop_free_bytes=0
    ) as shards:
        for epoch in range(2):
            mine = random.Random(epoch).sample(names, len(names))[reader::2]
            shards.set_order(mine)
            for name in mine:
                read += shards.wait_for_shard(name, 20).stat().st_size
                shards.consumed(name)
    said.put(read)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=[pytest.mark.slow, pytest.mark.timeout(180)])])
def test_two_workers_read_two_epochs(published: tuple[OriginSource, Manifest], method: str) -> None:
    source, manifest = published
    source.manifest()
    context: Any = multiprocessing.get_context(method)
    said = context.Queue()
    children = [context.Process(target=_epochs, args=(source, reader, said)) for reader in range(2)]
    for child in children:
        child.start()
    assert said.get(timeout=30) + said.get(timeout=30) == 2 * manifest.total_bytes
    for child in children:
        child.join(10)
        assert child.exitcode == 0


def test_a_state_goes_on_in_the_middle_of_the_second_epoch(published: tuple[OriginSource, Manifest]) -> None:
    source, _ = published
    with StreamingDownloader(source, [0, 1], stop_free_bytes=0) as shards:
        shards.set_order([1, 3, 2])
        shards.wait_for_shard(1, 20)
        shards.consumed(1)
        state = shards.state_dict()
    with StreamingDownloader(source, stop_free_bytes=0) as again:
        again.load_state_dict(state)
        assert again.wait_for_shard(3, 20).exists()
        assert again.wait_for_shard(2, 20).exists()
        assert again.state_dict() == state
        assert set(again.status().ready) == {"shard_00003.parquet", "shard_00002.parquet"}
