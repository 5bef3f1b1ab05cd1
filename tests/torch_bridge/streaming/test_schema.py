"""One schema for a data set: encodings of the same values are one type, other differences are named by shard."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protocol.errors import InvalidParamsError
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.schema import as_arrays, plain
from torch_bridge.streaming.settings import Ordering

ORDERING = Ordering(lanes=2, block_rows=3, window=8)


def read(folder: Path, *tables: pa.Table, **options: Any) -> list[Any]:
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"shard_{number:05d}.parquet")
    data = StreamingShardDataset(LocalSource(folder), batch_size=4, ordering=ORDERING, **options)
    return list(data)


def values(batches: list[Any], name: str) -> list[Any]:
    return sorted(value for batch in batches for value in batch[name])


def test_what_pandas_polars_and_duckdb_write_is_one_data_set(tmp_path: Path) -> None:
    """Other types of strings, a category, a view, other units of time, other orders of columns."""
    day = datetime.datetime(2026, 1, 1)
    texts = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    units = ["s", "ms", "us", "ns"]
    tables = []
    for number, (text, unit) in enumerate(zip(texts, units, strict=True)):
        columns = {
            "id": pa.array([number * 5 + row for row in range(5)]),
            "text": pa.array([f"t{number * 5 + row:02d}" for row in range(5)]).cast(text),
            "at": pa.array([day] * 5, pa.timestamp(unit)),
            "tags": pa.array([["a"]] * 5, pa.list_(pa.string()) if number % 2 else pa.large_list(pa.large_string())),
        }
        tables.append(pa.table(dict(reversed(columns.items())) if number % 2 else columns))
    batches = read(tmp_path, *tables)
    assert values(batches, "id") == list(range(20))
    assert values(batches, "text") == [f"t{row:02d}" for row in range(20)]
    assert values(batches, "at") == [day] * 20
    assert values(batches, "tags") == [["a"]] * 20


def test_a_column_that_is_all_null_in_one_shard_takes_the_others_type(tmp_path: Path) -> None:
    batches = read(tmp_path, pa.table({"x": pa.nulls(6)}), pa.table({"x": ["a"] * 6}))
    assert sorted(str(value) for batch in batches for value in batch["x"]) == ["None"] * 6 + ["a"] * 6


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"x": pa.array([1])}, {"x": pa.array(["a"])}, r"column 'x' is (string|large_string) in shard_0000"),
        (
            {"x": pa.array([1], pa.int32())},
            {"x": pa.array([1])},
            r"column 'x' is int(32|64) in shard_0000[01].parquet and int",
        ),
        ({"x": pa.array([1])}, {"x": pa.array([1]), "y": pa.array([1])}, r"shard_00001.parquet has the column 'y'"),
    ],
)
def test_another_schema_is_refused_by_shard_and_column(
    tmp_path: Path, first: dict[str, pa.Array], second: dict[str, pa.Array], what: str
) -> None:
    with pytest.raises(InvalidParamsError, match=what):
        read(tmp_path, pa.table(first), pa.table(second))
    if "y" in second:
        assert values(read(tmp_path, columns=["x"]), "x") == [1, 1]


def test_two_columns_of_one_name_are_refused_unless_others_are_wanted(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1, 2]), pa.array([3, 4]), pa.array([5, 6])], names=["x", "x", "y"])
    with pytest.raises(InvalidParamsError, match=r"shard_00000.parquet has 2 columns of the name 'x'"):
        read(tmp_path, table)
    assert values(read(tmp_path, columns=["y"]), "y") == [5, 6]


def test_nanoseconds_that_no_datetime_holds_are_refused_by_column(tmp_path: Path) -> None:
    table = pa.table({"id": [1], "at": pa.array([1], pa.timestamp("ns"))})
    with pytest.raises(InvalidParamsError, match=r"column 'at' of shard_00000.parquet is timestamp\[ns\]"):
        read(tmp_path, table)
    assert values(read(tmp_path, columns=["id"]), "id") == [1]


def test_nested_types_have_one_encoding() -> None:
    kind = pa.struct([("a", pa.list_(pa.dictionary(pa.int8(), pa.string()))), ("b", pa.list_(pa.float32(), 4))])
    assert plain(kind) == pa.struct([("a", pa.large_list(pa.large_string())), ("b", pa.list_(pa.float32(), 4))])


def test_fixed_size_binary_is_an_array_of_bytes_that_can_be_written_to() -> None:
    raw = [bytes([row, row + 1, row + 2]) for row in range(30)]
    table = pa.table({"x": pa.array(raw, pa.binary(3))})
    for rows in ([3, 4, 5], [8, 9, 10, 11], [21, 2, 13], [7], [16, 15], [29]):
        array = as_arrays(table.take(rows))["x"]
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.uint8
        assert array.tolist() == [list(raw[row]) for row in rows]
        array[:] = 0  # a row is handed out once


@pytest.mark.parametrize(
    ("values", "fill"),
    [
        (pa.array([1, None], pa.int64()), -1),
        (pa.array([True, None]), False),
        (pa.array([b"ab", None], pa.binary(2)), b"  "),
        (pa.array([[1, 2], None], pa.list_(pa.int64(), 2)), [0, 0]),
    ],
)
def test_a_missing_value_of_an_array_is_refused_by_column_or_filled(
    tmp_path: Path, values: pa.Array, fill: Any
) -> None:
    with pytest.raises(
        InvalidParamsError, match=r"column 'x' of shard_00000.parquet is .* lacks 1 of 2 values.*nulls="
    ):
        read(tmp_path, pa.table({"x": values}))
    [batch] = read(tmp_path, nulls={"x": fill})
    assert isinstance(batch["x"], np.ndarray)
    assert len(batch["x"]) == 2
    expected = list(fill) if isinstance(fill, bytes) else fill
    assert expected in batch["x"].tolist()


def test_a_column_has_one_type_in_all_batches_whatever_they_lack(tmp_path: Path) -> None:
    """Six rows a shard, in batches of four: some have missing values, others none."""
    floats, texts = [0.5, None, 1.5, 2.5, 3.5, 4.5], ["a", None, "b", "c", "d", "e"]
    ragged = pa.array([[1.0], None, [], [1.0, 2.0], [3.0], [4.0]], pa.list_(pa.float32()))
    table = pa.table({"f": floats, "t": texts, "r": ragged})
    batches = read(tmp_path, table, table.slice(2), table.slice(2))
    assert {type(batch["f"]) for batch in batches} == {np.ndarray}
    assert {batch["f"].dtype.name for batch in batches} == {"float64"}
    assert sum(int(np.isnan(batch["f"]).sum()) for batch in batches) == 1
    assert {type(batch[name]) for batch in batches for name in ("t", "r")} == {list}
    assert {type(value) for batch in batches for value in batch["r"]} == {np.ndarray, type(None)}


def test_embeddings_are_arrays() -> None:
    rows = [[float(row + 10 * column) for column in range(4)] for row in range(6)]
    images = [[[row, 1], [2, 3], [4, 5]] for row in range(6)]
    table = pa.table(
        {
            "fixed": pa.array(rows, pa.list_(pa.float32(), 4)),
            "image": pa.array(images, pa.list_(pa.list_(pa.uint8(), 2), 3)),
            "any": pa.array(rows, pa.large_list(pa.float32())),
        }
    )
    for part in (table, table.slice(2, 3), pa.concat_tables([table.slice(0, 2), table.slice(2)])):
        found: dict[str, Any] = as_arrays(part)
        first = int(found["fixed"][0][0])
        assert found["fixed"].dtype == np.float32
        assert found["fixed"].tolist() == rows[first : first + part.num_rows]
        assert found["image"].shape == (part.num_rows, 3, 2)
        assert found["image"].tolist() == images[first : first + part.num_rows]
        assert [array.tolist() for array in found["any"]] == rows[first : first + part.num_rows]
        assert all(array.flags.writeable for array in (found["fixed"], found["image"], *found["any"]))
