"""Columns of a data set's shards: what writers choose differently is one type, anything else is refused by shard name.

pandas, polars and DuckDB write the same values as string, large_string, string_view or a dictionary, and in other
orders of columns. Here each of these becomes one type, so a batch may hold rows of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from protocol.errors import InvalidParamsError


def plain(kind: pa.DataType) -> pa.DataType:
    """The one type for all encodings of the same values. Its offsets have 64 bits: no table is too long for it."""
    types = pa.types
    if types.is_dictionary(kind):
        return plain(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.large_list(plain(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type), kind.list_size)
    if types.is_struct(kind):
        return pa.struct([pa.field(field.name, plain(field.type)) for field in kind])
    if types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)  # what Python's datetime holds
    if types.is_duration(kind):
        return pa.duration("us")
    return kind


class DataColumns:
    """The columns of one data set, as the shards that were opened so far have them."""

    def __init__(self, wanted: Sequence[str] | None, nulls: Mapping[str, Any] | None = None) -> None:
        """`wanted`: None for all. `nulls`: what stands for a missing value, by column."""
        self._wanted = None if wanted is None else list(wanted)
        self._nulls = dict(nulls or {})
        self._types: dict[str, pa.DataType] = {}
        self._first = ""

    def adopt(self, schema: pa.Schema, shard: str) -> list[str]:
        """The columns to read of a shard. Raises InvalidParamsError, which names shard and column, if its schema is not
        that of the shards before it.
        """
        names = schema.names if self._wanted is None else self._wanted
        for name in names:
            count = schema.names.count(name)
            if count == 0:
                raise InvalidParamsError(f"{shard} has no column {name!r}; it has {', '.join(schema.names)}")
            if count > 1:
                raise InvalidParamsError(
                    f"{shard} has {count} columns of the name {name!r}: write each under a name of its own, or name "
                    "others by columns="
                )
        if not self._types:
            self._first = shard
            self._types = {name: plain(schema.field(name).type) for name in names}
            return list(self._types)
        if differing := sorted(self._types.keys() ^ set(names)):
            has, lacks = (shard, self._first) if differing[0] in names else (self._first, shard)
            raise InvalidParamsError(
                f"{has} has the column {differing[0]!r}, {lacks} has not: write all shards with the same columns, or "
                "name those that all have by columns="
            )
        for name, known in self._types.items():
            kind = plain(schema.field(name).type)
            if pa.types.is_null(known):
                self._types[name] = kind
            elif kind != known and not pa.types.is_null(kind):
                raise InvalidParamsError(
                    f"column {name!r} is {kind} in {shard} and {known} in {self._first}: write all shards with one "
                    "type, or leave it out by columns="
                )
        return list(self._types)

    def table(self, batch: pa.RecordBatch, shard: str) -> pa.Table:
        """Rows of an adopted shard in the data set's types. Raises InvalidParamsError for a value that has none."""
        columns = []
        for name, kind in self._types.items():
            column = batch.column(name)
            try:
                columns.append(self._filled(name, column if column.type == kind else column.cast(kind), shard))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise InvalidParamsError(
                    f"column {name!r} of {shard} is {column.type}, and a value of it is no {kind}: write it as another "
                    f"type (nanoseconds as int64), or leave it out by columns= ({error})"
                ) from error
        return pa.Table.from_arrays(columns, names=list(self._types))

    def _filled(self, name: str, column: pa.Array, shard: str) -> pa.Array:
        """Without missing values, where arrays have no place for them: a column is an array in all batches or none."""
        if not column.null_count:
            return column
        if name in self._nulls:
            return column.fill_null(pa.scalar(self._nulls[name], column.type))
        if pa.types.is_floating(column.type):
            return column.fill_null(float("nan"))
        if _is_array(column.type):
            raise InvalidParamsError(
                f"column {name!r} of {shard} is {column.type} and lacks {column.null_count} of {len(column)} values: "
                f"say what stands for them, nulls={{{name!r}: ...}}, or leave it out by columns="
            )
        return column


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of several of one data set. A column that is all null in one of them takes the type of the others."""
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="default")


def as_arrays(table: pa.Table) -> dict[str, object]:
    """Columns of numbers as numpy arrays [rows], fixed-size binary of W bytes as uint8 [rows, W], lists of N numbers as
    arrays [rows, N], lists of any length as a list of arrays, all others as lists of Python values.

    Arrays are writeable: a DataLoader makes tensors of them. Fixed-size binary of one chunk is not copied: a write to
    it changes the table. Of missing values see `DataColumns`.
    """
    return {name: _column(table.column(name)) for name in table.column_names}


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_array(kind: pa.DataType) -> bool:
    """Whether `as_arrays` makes one array of a column of it."""
    if pa.types.is_fixed_size_list(kind):
        return _is_array(kind.value_type)
    return _is_number(kind) or bool(pa.types.is_fixed_size_binary(kind))


def _column(column: pa.ChunkedArray) -> object:
    kind = column.type
    if column.null_count:
        return (
            [_of_list(value) for chunk in column.chunks for value in chunk] if _is_ragged(kind) else column.to_pylist()
        )
    if pa.types.is_fixed_size_binary(kind):
        return _fixed_size(column)
    if _is_number(kind):
        array = column.to_numpy()
        return array if array.flags.writeable else array.copy()
    if pa.types.is_fixed_size_list(kind) and _is_array(kind):
        return _rows_of(column)
    if _is_ragged(kind):
        return [_of_list(value) for chunk in column.chunks for value in chunk]
    return column.to_pylist()


def _is_ragged(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_list(kind)) and _is_number(kind.value_type)


def _of_list(value: pa.Scalar) -> npt.NDArray[Any] | None:
    return None if not value.is_valid else np.array(value.values.to_numpy(zero_copy_only=False))


def _rows_of(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """[rows, N, ...] of lists of N numbers, or of lists of them."""
    inner, shape, kind = column.combine_chunks(), [len(column)], column.type
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        inner, kind = inner.flatten(), kind.value_type
    if pa.types.is_fixed_size_binary(kind):
        return _fixed_size(pa.chunked_array([inner])).reshape([*shape, kind.byte_width])
    return np.array(inner.to_numpy(zero_copy_only=False)).reshape(shape)


def _fixed_size(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """[rows, width], in the column's own memory if it is one writeable chunk."""
    width, arrays = column.type.byte_width, []
    for chunk in column.chunks:
        values = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        arrays.append(values.reshape(len(chunk), width))
    return arrays[0] if len(arrays) == 1 and arrays[0].flags.writeable else np.concatenate(arrays)
