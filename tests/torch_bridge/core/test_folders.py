"""Folders that belong to another user, are shared on purpose, or cannot be written at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import InvalidParamsError
from tests.support.bridge.shards import ROWS, parquet_files, publish_at
from tests.support.users import NOBODY, as_nobody
from torch_bridge import O3CheckpointManager, O3Client, O3Dataset, StreamingBatchDataset, StreamingShardDataset
from torch_bridge.core.folders import home_of, user_folder
from torch_bridge.objects.formats import RecordFormat
from torch_bridge.shards.sources.factory import open_source

SHARDS = 2


@pytest.fixture
def base() -> Iterator[Path]:
    """Other users may look into it, which they may not into `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def origin(base: Path) -> str:
    url = f"file://{base}/origin"
    publish_at(O3Client().at(url), "me/train", parquet_files(base / "files", SHARDS))
    (base / "objects").mkdir()
    (base / "objects" / "one.bin").write_bytes(bytes(100))
    return url


def samples_of_shards(origin: str, folder: Path) -> int:
    source = open_source(origin, "me/train", folder=folder)
    return sum(len(batch["text"]) for batch in StreamingShardDataset(source, batch_size=50))


def samples_of_objects(origin: str, folder: Path) -> int:
    where = origin.replace("/origin", "/objects")
    data = O3Dataset(where, "", O3Client(), folder, format=RecordFormat(10))
    assert data[0] == bytes(10)
    return len(data)


def samples_of_files(origin: str, folder: Path) -> int:
    where = origin.replace("/origin", "/objects")
    return sum(1 for _ in StreamingBatchDataset(where, folder, cache_size=1, max_bytes=1000))


def checkpoint(origin: str, folder: Path) -> str:
    with O3CheckpointManager(f"{origin}-checkpoints", key_file=folder / "key") as manager:
        return manager.node_id


USES: dict[str, Callable[[str, Path], int]] = {
    "folder": samples_of_shards,
    "cache_dir": samples_of_objects,
    "files": samples_of_files,
}
RIGHT = {"folder": SHARDS * ROWS, "cache_dir": 10, "files": 1}


@pytest.mark.parametrize("use", USES)
def test_another_users_folder_is_refused_by_name(base: Path, origin: str, use: str) -> None:
    folder = base / "kept"
    assert USES[use](origin, folder) == RIGHT[use]
    setting = "folder=" if use == "folder" else "cache_dir="
    with pytest.raises(InvalidParamsError) as refused:
        as_nobody(lambda: USES[use](origin, folder))
    said = refused.value.message
    assert str(folder) in said
    assert "user nobody" in said
    assert "belongs to root" in said
    assert setting in said


@pytest.mark.parametrize("use", USES)
def test_a_folder_that_is_shared_on_purpose_serves_both_users(base: Path, origin: str, use: str) -> None:
    folder = base / "kept"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, -1, NOBODY)
    folder.chmod(0o2775)
    before = os.umask(0o002)
    try:
        assert USES[use](origin, folder) == RIGHT[use]
    finally:
        os.umask(before)
    assert as_nobody(lambda: USES[use](origin, folder), umask=0o002) == RIGHT[use]


def test_another_users_key_is_refused_by_name(base: Path, origin: str) -> None:
    checkpoint(origin, base)
    with pytest.raises(InvalidParamsError, match=f"{base}/key.*key_file="):
        as_nobody(lambda: checkpoint(origin, base))


def test_shards_of_a_folder_are_read_without_writing_into_it(base: Path) -> None:
    """Permission bits, and another owner: nothing appears beside the shards."""
    paths = parquet_files(base / "data", SHARDS)
    (base / "data").chmod(0o555)

    def read() -> int:
        data = StreamingShardDataset(open_source(base / "data"), batch_size=50)
        return sum(len(batch["text"]) for batch in data)

    assert read() == as_nobody(read) == SHARDS * ROWS
    assert sorted((base / "data").iterdir()) == paths


@pytest.fixture
def read_only(tmpfs: Callable[[str], Path]) -> Path:
    """A full file system with shards, mounted read-only: no byte of it is free, as of an image."""
    disk = tmpfs("1m")
    parquet_files(disk / "data", SHARDS)
    (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    return disk


def test_shards_on_a_read_only_disk_are_read(read_only: Path) -> None:
    data = StreamingShardDataset(open_source(read_only / "data"), batch_size=50)
    assert sum(len(batch["text"]) for batch in data) == SHARDS * ROWS


@pytest.mark.parametrize("use", USES)
def test_a_read_only_disk_is_named_where_something_is_written(read_only: Path, origin: str, use: str) -> None:
    setting = "folder=" if use == "folder" else "cache_dir="
    with pytest.raises(InvalidParamsError, match=rf"{read_only}/kept.* read-only file system.*{setting}"):
        USES[use](origin, read_only / "kept")


def test_the_folder_in_the_temporary_folder_is_this_users_own(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    mine = user_folder("mark")
    assert mine == base / f"shoal-{os.getuid()}" / "mark"
    assert mine.parent.stat().st_mode & 0o777 == 0o700
    (base / f"shoal-{NOBODY}").mkdir(mode=0o777)  # somebody was there first
    with pytest.raises(InvalidParamsError, match=f"shoal-{NOBODY} should be a folder of user nobody, and is one of"):
        as_nobody(lambda: user_folder("mark"))


def test_a_link_in_place_of_the_own_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"shoal-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidParamsError, match="or a link"):
        user_folder("mark")


def test_the_first_data_set_has_the_folder_and_others_one_of_their_own(tmp_path: Path) -> None:
    state = tmp_path / ".shards"
    homes: list[Any] = [home_of(name, tmp_path, state) for name in ("me/train", "me/val", "me-val", "me/train")]
    assert homes[0] == homes[3] == tmp_path
    assert {home.parent for home in homes[1:3]} == {tmp_path}
    assert homes[1] != homes[2]
    assert home_of("../../ü", tmp_path, state).parent == tmp_path
