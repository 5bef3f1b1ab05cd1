"""StreamingBatchDataset where the disk is full, the folder is another's, a decode function raises, a parent forks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from protocol.errors import InsufficientDiskError, InvalidParamsError
from tests.support.bridge.batches import SIZE, bodies, bytes_here, dataset, folder_of
from tests.support.bridge.o3_client import in_fork
from torch_bridge.batches.sources.origin import OriginFiles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # servers and processes of their own

FILES = bodies(9)
NAMES = sorted(key.rpartition("/")[2] for key in FILES)


@pytest.fixture
def origin(tmp_path: Path) -> Any:
    return folder_of(tmp_path / "origin", FILES)


@pytest.fixture
def small_disk(tmpfs: Callable[[str], Path]) -> Path:
    return tmpfs("160k")


def test_a_full_disk_is_told_and_a_smaller_bound_goes_on(origin: Any, small_disk: Path) -> None:
    found: list[str] = []
    with pytest.raises(InsufficientDiskError, match="lower"):
        found.extend(dataset(origin, small_disk, cache_size=9, max_bytes=20 * SIZE, keep_free_bytes=0))
    found += dataset(origin, small_disk, cache_size=1, max_bytes=2 * SIZE, keep_free_bytes=0)
    assert sorted(found) == NAMES


def test_a_disk_that_fills_in_the_middle_is_told(origin: Any, small_disk: Path) -> None:
    def fill(path: Path, _: Any) -> str:
        with suppress(OSError), (small_disk / "others").open("wb", buffering=0) as out:
            while True:
                out.write(bytes(4096))
        return path.name

    with pytest.raises(InsufficientDiskError, match="lower"):
        list(dataset(origin, small_disk, cache_size=1, decode=fill, keep_free_bytes=0))


def test_a_folder_of_another_source_or_seed_is_refused(origin: Any, tmp_path: Path) -> None:
    list(dataset(origin, tmp_path / "cache"))
    with pytest.raises(InvalidParamsError, match="was used for"):
        list(dataset(origin, tmp_path / "cache", seed=1))


def test_what_a_decode_function_raises_leaves_its_file_to_be_given_again(origin: Any, tmp_path: Path) -> None:
    seen: list[str] = []

    def decode(path: Path, _: Any) -> str:
        if len(seen) == 4:
            raise ValueError("not a video")
        seen.append(path.name)
        return path.name

    with pytest.raises(ValueError, match="not a video"):
        list(dataset(origin, tmp_path / "cache", decode=decode))
    assert sorted(seen + list(dataset(origin, tmp_path / "cache"))) == NAMES


def test_a_child_that_inherits_an_iteration_leaves_it_alone(origin: Any, tmp_path: Path) -> None:
    files = dataset(origin, tmp_path / "cache")
    steps = iter(files)
    found = [next(steps)]
    other = dataset(origin, tmp_path / "other")
    assert sorted(in_fork(lambda: list(other))) == NAMES
    assert sorted(DataLoader(dataset(origin, tmp_path / "third"), batch_size=None, num_workers=1)) == NAMES
    assert sorted(found + list(steps)) == NAMES
    assert bytes_here(tmp_path / "cache") == (0, 0)


def test_a_line_of_the_log_for_each_batch_says_what_limits(
    origin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = OriginFiles.fetch

    def slowly(*args: Any, **more: Any) -> Path:
        time.sleep(0.05)
        return really(*args, **more)

    monkeypatch.setattr(OriginFiles, "fetch", slowly)
    files = dataset(origin, tmp_path / "cache")
    with caplog.at_level(logging.INFO, "torch_bridge.batches"):
        list(files)
    lines = [record.message for record in caplog.records if "limited by" in record.message]
    assert len(lines) == 3
    assert "batch 3 of 3: 1 files" in lines[-1]
    assert files.report().limit == "download"
