"""Decoded row groups are kept within a bound in bytes, over all open files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torch_bridge.streaming.rows import DecodedGroups, RowReader


def test_row_groups_are_kept_within_bytes_and_go_with_their_file(tmp_path: Path) -> None:
    groups = DecodedGroups(2_000)
    readers = []
    for number in range(2):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"id": range(500)}), path, row_group_size=100)  # 800 bytes a group
        readers.append(RowReader(path, groups=groups, rows=500))
    for group in range(5):
        for reader in readers:
            assert reader.take(np.arange(group * 100, group * 100 + 3))["id"].to_pylist()[0] == group * 100
            assert 0 < groups.size_bytes <= 2_000
    for reader in readers:
        reader.close()
    assert groups.size_bytes == 0


def test_one_group_above_the_bound_is_still_read(tmp_path: Path) -> None:
    groups = DecodedGroups(0)
    pq.write_table(pa.table({"id": range(10)}), tmp_path / "a.parquet", row_group_size=5)
    reader = RowReader(tmp_path / "a.parquet", groups=groups)
    assert reader.take(np.array([7, 1, 9]))["id"].to_pylist() == [7, 1, 9]
    assert 40 <= groups.size_bytes < 80, "of one group"
