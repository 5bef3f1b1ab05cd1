"""Two data sets in one folder at the same time, and one data set twice in one process."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ShardInUseError
from tests.support.bridge.streaming import numbered_files, numbers, publish_numbered
from torch_bridge import O3Client
from torch_bridge.shards.sources.factory import open_source
from torch_bridge.shards.sources.local import LocalSource

ROWS = {"me/train": [60, 35, 52], "me/val": [45, 70]}
"""Both have a file shard_00000.parquet."""


def all_of(name: str) -> list[int]:
    return [shard * 1000 + row for shard, rows in enumerate(ROWS[name]) for row in range(rows)]


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Any]:
    """Two data sets at one origin, which go to one folder."""
    url = f"file://{tmp_path}/origin"
    for name, rows in ROWS.items():
        publish_numbered(O3Client().at(url), numbered_files(tmp_path / name, rows), name)
    return {name: numbers(open_source(url, name, folder=tmp_path / "shards")) for name in ROWS}


def test_validation_in_the_middle_of_an_epoch(sets: dict[str, Any], tmp_path: Path) -> None:
    found: dict[str, list[int]] = {name: [] for name in sets}
    for step, batch in enumerate(sets["me/train"]):
        found["me/train"] += batch["id"].tolist()
        if step in (3, 9):
            found["me/val"] += [sample for other in sets["me/val"] for sample in other["id"].tolist()]
    assert sorted(found["me/train"]) == all_of("me/train")
    assert sorted(found["me/val"]) == sorted(2 * all_of("me/val"))
    left = [path.name for path in (tmp_path / "shards").rglob("*.parquet*") if path.suffix != ".lock"]
    assert not left, "each deletes its own, and takes no other's for a wrong one"


def test_both_at_once_and_in_another_order_the_next_time(sets: dict[str, Any], tmp_path: Path) -> None:
    """The folder stays with the data set that was first: what an earlier run left is used by the same one."""
    url = f"file://{tmp_path}/origin"
    for pair in (sets, {name: numbers(open_source(url, name, folder=tmp_path / "shards")) for name in reversed(ROWS)}):
        found: dict[str, list[int]] = {name: [] for name in pair}
        for batches in zip_longest(*pair.values()):
            for name, batch in zip(pair, batches, strict=True):
                found[name] += [] if batch is None else batch["id"].tolist()
        assert {name: sorted(ids) for name, ids in found.items()} == {name: all_of(name) for name in ROWS}


def test_one_data_set_twice_is_refused_at_once_and_works_as_another_run(
    sets: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(f"file://{tmp_path}/origin", "me/train", folder=tmp_path / "shards")
    first, second = sets["me/train"], numbers(source, seed=5)
    batches = iter(first)
    found = [*next(batches)["id"].tolist()]
    with pytest.raises(ShardInUseError, match=r"give the second data set a run= of its own \(this process reads as"):
        next(iter(second))
    assert "waiting for" not in caplog.text
    other = [sample for batch in numbers(source, seed=5, run="second") for sample in batch["id"].tolist()]
    found += [sample for batch in batches for sample in batch["id"].tolist()]
    assert sorted(found) == sorted(other) == all_of("me/train")


def test_an_iteration_that_is_garbage_is_not_in_the_way(sets: dict[str, Any], tmp_path: Path) -> None:
    batches = iter(sets["me/train"])
    next(batches)
    cycle: list[Any] = [batches]
    cycle.append(cycle)
    del batches, cycle
    again = numbers(open_source(f"file://{tmp_path}/origin", "me/train", folder=tmp_path / "shards"))
    assert sorted(sample for batch in again for sample in batch["id"].tolist()) == all_of("me/train")


def test_a_folder_that_nothing_is_deleted_from_is_read_by_any_number(tmp_path: Path) -> None:
    numbered_files(tmp_path, ROWS["me/train"])
    pair = [numbers(LocalSource(tmp_path)) for _ in range(2)]
    for one, other in zip(*pair, strict=True):
        assert one["id"].tolist() == other["id"].tolist()
