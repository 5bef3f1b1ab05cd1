"""A shard that cannot be read: what mends it is done, or said, by who it is that can."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protocol.errors import InsufficientMemoryError, InvalidShardError
from tests.support.bridge.streaming import numbered_files, numbers, publish_numbered
from torch_bridge import O3Client
from torch_bridge.shards.sources.factory import open_source
from torch_bridge.shards.sources.interface import ShardSource
from torch_bridge.streaming.shard_rows import FETCHED_AGAIN

ROWS = [60, 35]
ALL = [shard * 1000 + row for shard, rows in enumerate(ROWS) for row in range(rows)]


def overwrite_the_first_page(path: Path) -> None:
    """Its header (parquet-format, Thrift), so that no reader takes it. Size and times stay, as on a disk that rots."""
    seen = path.stat()
    raw = bytearray(path.read_bytes())
    raw[4:64] = bytes(60)
    path.write_bytes(raw)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def read(source: ShardSource, **more: Any) -> list[int]:
    return [sample for batch in numbers(source, **more) for sample in batch["id"].tolist()]


def published(tmp_path: Path, *, bad: bool) -> ShardSource:
    paths = numbered_files(tmp_path / "files", ROWS)
    if bad:
        overwrite_the_first_page(paths[0])
    publish_numbered(O3Client().at(f"file://{tmp_path}/origin"), paths)
    return open_source(f"file://{tmp_path}/origin", "tests/numbers", folder=tmp_path / "shards")


def refused(source: ShardSource, **more: Any) -> str:
    with pytest.raises(InvalidShardError) as error:
        read(source, **more)
    assert "fetch it again" not in error.value.message
    return error.value.message


def test_a_local_file_that_cannot_be_read_is_named_by_its_path(tmp_path: Path) -> None:
    first, _ = numbered_files(tmp_path, ROWS)
    overwrite_the_first_page(first)
    said = refused(open_source(tmp_path))
    assert f"{first} cannot be read" in said
    assert "write it again" in said


def test_a_local_file_that_changed_since_it_was_opened_is_said_to_have_changed(tmp_path: Path) -> None:
    first, _ = numbered_files(tmp_path, ROWS)
    source = open_source(tmp_path)
    source.manifest()
    overwrite_the_first_page(first)
    assert f"{first} changed since the data set was opened" in refused(source)


def test_a_bad_file_that_was_published_is_to_be_published_again(tmp_path: Path) -> None:
    said = refused(published(tmp_path, bad=True))
    assert "shard_00000.parquet has the bytes that were published" in said
    assert "publish that" in said


def test_a_published_file_that_rots_here_is_fetched_again(tmp_path: Path) -> None:
    source = published(tmp_path, bad=False)
    for entry in source.manifest().shards:
        overwrite_the_first_page(source.fetch(entry).path)
    assert sorted(read(source)) == ALL


def test_a_validation_shard_that_rots_here_is_fetched_again_or_named(tmp_path: Path) -> None:
    source = published(tmp_path, bad=False)
    first, _ = source.manifest().shards
    overwrite_the_first_page(source.fetch(first).path)
    data = numbers(source, validation_shard=first.filename)
    assert [sample for batch in data.validation_batches() for sample in batch["id"].tolist()] == ALL[: ROWS[0]]
    (tmp_path / "bad").mkdir()
    bad = numbers(published(tmp_path / "bad", bad=True), validation_shard=first.filename)
    with pytest.raises(InvalidShardError, match="has the bytes that were published"):
        list(bad.validation_batches())


def test_a_disk_that_damages_each_copy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = published(tmp_path, bad=False)
    fetch = type(source).fetch

    def onto_a_bad_disk(self: ShardSource, *args: Any, **more: Any) -> Any:
        found = fetch(self, *args, **more)
        overwrite_the_first_page(found.path)
        return found

    monkeypatch.setattr(type(source), "fetch", onto_a_bad_disk)
    said = refused(source)
    assert f"fetched again {FETCHED_AGAIN} times" in said
    assert "check the disk" in said


@pytest.mark.parametrize("local", [True, False])
def test_memory_that_ran_out_is_said_and_no_file_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    source = published(tmp_path, bad=False)
    if local:
        source = open_source(tmp_path / "files")

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise pa.ArrowMemoryError("malloc of size 1099511627776 failed")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", out_of_memory)
    with pytest.raises(InsufficientMemoryError, match=r"shard_0000\d.parquet cannot be decoded.*lanes=, window="):
        read(source)
    assert not list(tmp_path.rglob("*.bad-*"))
