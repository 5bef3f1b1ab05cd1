"""A disk that really is full."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from node.origin.settings import OriginSettings
from protocol.content import hash_file
from protocol.errors import InsufficientDiskError
from protocol.manifest import Manifest, ShardEntry
from tests.support.bridge.shards import parquet_files, publish_at
from torch_bridge import O3Client, RetryPolicy, StreamingDownloader
from torch_bridge.shards import disk_space
from torch_bridge.shards.sources import range_download
from torch_bridge.shards.sources.origin import OriginSource

NAME = "tests/text"
MIB = 1 << 20


@pytest.fixture
def small_disk(tmpfs: Callable[[str], Path]) -> Path:
    """A file system of 8 MiB: two of the shards fit."""
    return tmpfs("8m")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    base = tmp_path_factory.mktemp("base")
    paths = parquet_files(tmp_path_factory.mktemp("files"), 4, row_bytes=15_000)
    return base, publish_at(O3Client(settings=OriginSettings()).at(f"file://{base}"), NAME, paths)


def source_of(base: Path, folder: Path) -> OriginSource:
    client = O3Client(settings=OriginSettings(), retry=RetryPolicy(total_s=1.0))
    return OriginSource(f"file://{base}", folder, dataset=NAME, client=client)


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    assert disk_space.free_bytes(folder) == 0
    return ballast


def test_downloads_at_the_same_time_do_not_take_each_others_room(
    published: tuple[Path, Manifest], small_disk: Path
) -> None:
    base, manifest = published
    source = source_of(base, small_disk)
    said: dict[str, InsufficientDiskError | None] = {}

    def fetch(entry: ShardEntry) -> None:
        try:
            source.fetch(entry)
            said[entry.filename] = None
        except InsufficientDiskError as error:
            said[entry.filename] = error

    source.manifest()
    threads = [threading.Thread(target=fetch, args=(entry,)) for entry in manifest.shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
        assert not thread.is_alive()
    came = sorted(name for name, error in said.items() if error is None)
    assert len(came) == 2
    assert sorted(path.name for path in small_disk.glob("shard*")) == came, "and nothing half-written"
    for entry in manifest.shards:
        if entry.filename in came:
            assert hash_file(small_disk / entry.filename).content_id == entry.content_id
        else:
            assert str(entry.size) in str(said[entry.filename])


def test_what_is_reserved_is_not_free_for_others(small_disk: Path) -> None:
    part = small_disk / "a.part"
    disk_space.reserve(part, 6 * MIB, 0, "a")
    assert part.stat().st_size == 0
    assert disk_space.free_bytes(small_disk) <= 2 * MIB
    disk_space.reserve(part, 6 * MIB, MIB, "a")  # what is reserved is not asked for twice
    with pytest.raises(InsufficientDiskError, match="3145728 bytes more"):
        disk_space.reserve(small_disk / "b.part", 3 * MIB, 0, "b")
    assert [path.name for path in small_disk.iterdir()] == ["a.part"]
    with part.open("ab") as file:
        file.write(bytes(MIB))
    disk_space.release(part)
    assert part.stat().st_size == MIB
    assert disk_space.free_bytes(small_disk) == 7 * MIB


def test_a_disk_that_fills_up_in_a_download_is_one_error_and_leaves_nothing_half_written(
    published: tuple[Path, Manifest], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, manifest = published
    monkeypatch.setattr(disk_space, "_allocate", lambda *_: 0)  # a file system that reserves nothing, as NFS
    monkeypatch.setattr(range_download, "RANGE_BYTES", 256 * 1024)
    source, (entry, *_) = source_of(base, small_disk), manifest.shards
    source.manifest()
    ballast: list[Path] = []

    def others_write(done: int, _: int) -> None:
        if not ballast and done > MIB:
            ballast.append(fill(small_disk))

    with pytest.raises(InsufficientDiskError, match=rf"is full: {entry.filename} needs {entry.size} bytes"):
        source.fetch(entry, on_progress=others_write)
    assert list(small_disk.glob("shard*")) == []
    ballast[0].unlink()
    assert hash_file(source.fetch(entry).path).content_id == entry.content_id


def test_a_reader_goes_through_more_than_the_disk_holds(published: tuple[Path, Manifest], small_disk: Path) -> None:
    base, manifest = published
    # One at a time: of two, the later shard may take the room of the earlier one, and is then deleted for it once more.
    with StreamingDownloader(source_of(base, small_disk), buffer_size=4, stop_free_bytes=0, at_once=1) as shards:
        for entry in manifest.shards:
            assert shards.wait_for_shard(entry, 20).stat().st_size == entry.size
            shards.consumed(entry)
        assert shards.status().deleted == 4
    assert list(small_disk.glob("shard*")) == []


def test_what_was_fetched_ahead_gives_way_to_what_is_waited_for(
    published: tuple[Path, Manifest], small_disk: Path
) -> None:
    base, manifest = published
    first, ahead, later, last = manifest.shards
    with StreamingDownloader(
        source_of(base, small_disk), buffer_size=4, stop_free_bytes=0, at_once=1, retry_first_s=0.05
    ) as shards:
        read = shards.wait_for_shard(first, 20)
        until = time.monotonic() + 20
        while len(shards.status().ready) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert shards.status().ready == (first.filename, ahead.filename)
        assert hash_file(shards.wait_for_shard(last, 20)).content_id == last.content_id
        assert hash_file(read).content_id == first.content_id, "it is being read"
        for entry in (last, first, ahead, later):
            assert hash_file(shards.wait_for_shard(entry, 20)).content_id == entry.content_id
            shards.consumed(entry)
        assert shards.status().deleted == 5
    assert list(small_disk.glob("shard*")) == []


def test_a_full_disk_at_the_start_and_on_the_way_is_said_and_passes(
    published: tuple[Path, Manifest], small_disk: Path
) -> None:
    base, manifest = published
    source = source_of(base, small_disk)
    source.manifest()
    ballast = fill(small_disk)
    shards = StreamingDownloader(source, stop_free_bytes=0)
    with pytest.raises(InsufficientDiskError, match="is full"):
        shards.start()
    ballast.unlink()
    first, second, *_ = manifest.shards
    with StreamingDownloader(source, [first, second], buffer_size=1, max_buffer=1, stop_free_bytes=0) as shards:
        shards.wait_for_shard(first, 20)
        ballast = fill(small_disk)
        shards.consumed(first)  # what it is past cannot be noted; it is deleted all the same
        ballast.unlink()
        assert shards.wait_for_shard(second, 20).exists()
