"""Decoded row groups are kept within a bound in bytes, over all open files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torch_bridge.streaming.rows import DecodedGroups, RowReader, as_arrays


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


def test_rows_come_in_the_order_asked_for_contiguous_or_not_within_a_group_and_across_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": range(100, 130)}), tmp_path / "a.parquet", row_group_size=10)
    reader = RowReader(tmp_path / "a.parquet", groups=DecodedGroups(1_000_000))
    for rows in ([3, 4, 5], [5, 4, 3], [3, 5, 6], [8, 9, 10, 11], [11, 2, 25, 10], [7]):
        assert reader.take(np.array(rows))["id"].to_pylist() == [100 + row for row in rows]


def test_fixed_size_binary_is_an_array_of_bytes_that_can_be_written_to(tmp_path: Path) -> None:
    values = [bytes([row, row + 1, row + 2]) for row in range(30)]
    pq.write_table(pa.table({"x": pa.array(values, pa.binary(3))}), tmp_path / "a.parquet", row_group_size=10)
    reader = RowReader(tmp_path / "a.parquet", groups=DecodedGroups(1_000_000))
    for rows in ([3, 4, 5], [8, 9, 10, 11], [21, 2, 13], [7], [16, 15], [29]):
        array = as_arrays(reader.take(np.array(rows)))["x"]
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.uint8
        assert array.tolist() == [list(values[row]) for row in rows]
        array[:] = 0  # a row is handed out once


def test_fixed_size_binary_with_a_missing_value_is_a_list() -> None:
    table = pa.table({"x": pa.array([b"ab", None], pa.binary(2))})
    assert as_arrays(table) == {"x": [b"ab", None]}
