"""What lay in a folder before a run stays there; what a run fetched goes, also if the run was killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from node.origin.settings import OriginSettings
from protocol.content import hash_file
from protocol.manifest import Manifest
from tests.support.bridge.shards import overwrite_in_the_middle, parquet_files, publish_at
from torch_bridge import O3Client, StreamingDownloader
from torch_bridge.shards.sources import origin as origin_source
from torch_bridge.shards.sources.origin import OriginSource

NAME, OTHER = "tests/text", "tests/other"
SHARDS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An origin with two data sets whose files have the same names."""
    base, files = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("files")
    store = O3Client(settings=OriginSettings()).at(f"file://{base}")
    publish_at(store, NAME, parquet_files(files / "set", SHARDS, row_bytes=50))
    publish_at(store, OTHER, parquet_files(files / "other", 2, row_bytes=60))
    return base


@pytest.fixture
def manifest(base: Path, tmp_path: Path) -> Manifest:
    return source_of(base, tmp_path / "looked").manifest()


def source_of(base: Path, folder: Path, name: str = NAME, **more: Any) -> OriginSource:
    return OriginSource(f"file://{base}", folder, dataset=name, client=O3Client(settings=OriginSettings()), **more)


def epoch(source: OriginSource) -> int:
    """One epoch with a small buffer; returns how many shards the reader is done with."""
    with StreamingDownloader(source, buffer_size=1, max_buffer=1, stop_free_bytes=0) as shards:
        for entry in source.manifest().shards:
            assert hash_file(shards.wait_for_shard(entry, 20)).content_id == entry.content_id
            shards.consumed(entry)
        return shards.status().deleted


def here(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard_*"))


def test_copies_that_lay_there_before_stay_and_the_rest_goes(base: Path, manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    own = [entry.filename for entry in manifest.shards[1:4]]
    for entry in manifest.shards[1:4]:
        shutil.copy(base / "shards" / entry.content_id, folder / entry.filename)
    for _ in range(2):
        assert epoch(source_of(base, folder)) == SHARDS, "it is done with all of them"
        assert here(folder) == own


def test_what_was_fetched_to_be_kept_stays_for_other_runs_too(base: Path, manifest: Manifest, tmp_path: Path) -> None:
    first, second, third, *_ = manifest.shards
    keeping, training = source_of(base, tmp_path, deletes=False), source_of(base, tmp_path)
    keeping.fetch(first)
    training.fetch(second)
    assert keeping.fetch(second).source == "local", "now it is wanted here"
    assert keeping.discard(first) is True
    assert here(tmp_path) == [first.filename, second.filename]
    training.fetch(third)
    epoch(source_of(base, tmp_path))
    assert here(tmp_path) == [first.filename, second.filename]
    assert epoch(keeping) == SHARDS
    assert len(here(tmp_path)) == SHARDS


def _read_and_wait(source: OriginSource, said: Any) -> None:
    with StreamingDownloader(source, buffer_size=3, max_buffer=3, stop_free_bytes=0) as shards:
        for entry in source.manifest().shards[:3]:
            shards.wait_for_shard(entry, 20)
        said.put(True)
        signal.pause()


def test_what_a_killed_run_left_is_deleted_by_the_next(base: Path, manifest: Manifest, tmp_path: Path) -> None:
    own = manifest.shards[4].filename
    shutil.copy(base / "shards" / manifest.shards[4].content_id, tmp_path / own)
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    source = source_of(base, tmp_path)
    source.manifest()
    child = context.Process(target=_read_and_wait, args=(source, said))
    child.start()
    assert said.get(timeout=20)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(10)
    assert len(here(tmp_path)) >= 4
    epoch(source_of(base, tmp_path))
    assert here(tmp_path) == [own]


def test_killed_before_a_file_has_its_name_a_run_leaves_a_part_that_counts(
    base: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = manifest.shards[0]

    def killed(*_: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(origin_source, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            source_of(base, tmp_path).fetch(entry)
    assert here(tmp_path) == [f"{entry.filename}.part"]
    source = source_of(base, tmp_path)
    assert source.fetch(entry).bytes_by_source == {"origin": 0}
    assert source.discard(entry)
    assert here(tmp_path) == []


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b"{"), lambda path: path.write_bytes(b"")]
)
def test_without_the_record_of_its_fetch_a_file_stays(
    base: Path, manifest: Manifest, tmp_path: Path, damage: Any
) -> None:
    source, entry = source_of(base, tmp_path), manifest.shards[0]
    path = source.fetch(entry).path
    damage(tmp_path / ".shards" / f"{entry.filename}.checked")
    assert source.discard(entry) is True
    assert path.exists()


def test_a_file_that_was_put_in_the_place_of_a_fetched_one_stays(
    base: Path, manifest: Manifest, tmp_path: Path
) -> None:
    source, entry = source_of(base, tmp_path), manifest.shards[0]
    path = source.fetch(entry).path
    shutil.copy(base / "shards" / entry.content_id, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    source.discard(entry)
    assert path.exists()


def test_what_came_as_the_disk_got_full_is_deleted_too(
    base: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source, entry = source_of(base, tmp_path), manifest.shards[0]
    with monkeypatch.context() as patched:
        patched.setattr(origin_source, "atomic_write", full)
        path = source.fetch(entry).path
    source.discard(entry)
    assert not path.exists()


def test_a_record_survives_a_restart_of_the_machine_and_a_doubt(
    base: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = manifest.shards
    source = source_of(base, tmp_path)
    for entry in (first, second):
        source.fetch(entry)
    assert source.distrust(first, "a reader says so") is False
    monkeypatch.setattr(origin_source, "_boot", lambda: "another start of the machine")
    again = source_of(base, tmp_path)
    assert again.fetch(second).source == "local"
    for entry in (first, second):
        again.discard(entry)
    assert here(tmp_path) == []


def test_two_data_sets_in_one_folder_delete_nothing_of_each_other(base: Path, tmp_path: Path) -> None:
    text, other = source_of(base, tmp_path), source_of(base, tmp_path, OTHER)
    entry, others = text.manifest().shards[0], other.manifest().shards[0]
    assert entry.filename == others.filename
    text.fetch(entry)
    path = other.fetch(others).path
    assert text.discard(entry) is True
    assert hash_file(path).content_id == others.content_id
    other.discard(others)
    assert not path.exists()


def test_own_files_of_other_content_are_all_kept_and_fetched_ones_three_at_most(
    base: Path, manifest: Manifest, tmp_path: Path
) -> None:
    source, (first, second, *_) = source_of(base, tmp_path), manifest.shards
    for number in range(5):
        (tmp_path / first.filename).write_text(f"mine {number}")
        assert source.fetch(first).source == "origin"
        overwrite_in_the_middle(source.fetch(second).path)
        assert source.distrust(second, "a reader says so")
        source.discard(first)
    kept = sorted(path.read_text() for path in tmp_path.glob(f"{first.filename}.bad-*"))
    assert kept == [f"mine {number}" for number in range(5)]
    assert len(list(tmp_path.glob(f"{second.filename}.bad-*"))) == 3
