"""Rows of a parquet file by their number, reading only the columns and row groups that have them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute  # `take` needs it, and would otherwise import it between an epoch's first rows
import pyarrow.parquet as pq

from protocol.errors import InvalidParamsError, InvalidShardError
from torch_bridge.streaming.order import Indices


class DecodedGroups:
    """Row groups that stay decoded in memory, of all files together; the least recently used are dropped first.

    The one that was decoded last stays even if it alone is above `limit_bytes`.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise InvalidParamsError(f"the memory for row groups must not be negative: {limit_bytes} bytes")
        self._limit_bytes = limit_bytes
        self._tables: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self.size_bytes = 0

    def get(self, path: Path, group: int) -> pa.Table | None:
        table = self._tables.get((path, group))
        if table is not None:
            self._tables.move_to_end((path, group))
        return table

    def keep(self, path: Path, group: int, table: pa.Table) -> None:
        self._tables[path, group] = table
        self.size_bytes += table.nbytes
        while self.size_bytes > self._limit_bytes and len(self._tables) > 1:
            self.size_bytes -= self._tables.popitem(last=False)[1].nbytes

    def drop(self, path: Path) -> None:
        for key in [key for key in self._tables if key[0] == path]:
            self.size_bytes -= self._tables.pop(key).nbytes


class RowReader:
    """One open file. `groups` keeps its decoded row groups. `rows`: the row count of its manifest."""

    def __init__(
        self, path: Path, columns: Sequence[str] | None = None, *, groups: DecodedGroups, rows: int | None = None
    ) -> None:
        """Raises InvalidShardError if the file is damaged or has another row count, InvalidParamsError for a column."""
        self._path, self._groups = path, groups
        self._columns = None if columns is None else list(columns)
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        absent = set(self._columns or ()) - set(self._file.schema_arrow.names)
        if absent:
            self._file.close()
            raise InvalidParamsError(
                f"{path.name} has no column {sorted(absent)}; it has {self._file.schema_arrow.names}"
            )
        meta = self._file.metadata
        self._starts = np.cumsum([0, *(meta.row_group(group).num_rows for group in range(meta.num_row_groups))])
        if rows is not None and rows != int(self._starts[-1]):
            self._file.close()
            raise InvalidShardError(
                f"{path.name} has {self._starts[-1]} rows by its footer, and its manifest says {rows}: "
                "publish the data set again with its real row counts"
            )

    def take(self, rows: Indices) -> pa.Table:
        """The rows in the order asked for. Raises InvalidShardError if the file is damaged."""
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        parts, positions = [], []
        for group in sorted(set(groups.tolist())):
            mine = np.flatnonzero(groups == group)
            parts.append(_chosen(self._group(group), rows[mine] - self._starts[group]))
            positions.append(mine)
        return assembled(parts, positions)

    def close(self) -> None:
        self._groups.drop(self._path)
        self._file.close()

    def _group(self, group: int) -> pa.Table:
        table = self._groups.get(self._path, group)
        if table is None:
            try:
                table = self._file.read_row_group(group, columns=self._columns, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(self._path, error) from error
            self._groups.keep(self._path, group, table)
        return table


def assembled(parts: Sequence[pa.Table], positions: Sequence[Indices]) -> pa.Table:
    """One table of several; `positions` says where each row of each goes."""
    if len(parts) == 1:
        return parts[0]
    return _chosen(pa.concat_tables(parts), np.argsort(np.concatenate(positions)))


def _chosen(table: pa.Table, rows: Indices) -> pa.Table:
    """Rows that follow each other, as all do without a shuffle, are not copied."""
    first, count = int(rows[0]), len(rows)
    if np.array_equal(rows, np.arange(first, first + count)):
        return table.slice(first, count)
    return table.take(pa.array(rows))


def as_arrays(table: pa.Table) -> dict[str, object]:
    """Columns of numbers as numpy arrays [rows], fixed-size binary of W bytes as uint8 [rows, W], those with nulls and
    all others as lists. Arrays are writeable: a DataLoader makes tensors of them.

    Fixed-size binary of one row group is not copied: a write to it changes the table.
    """
    return {name: _column(table.column(name)) for name in table.column_names}


def _column(column: pa.ChunkedArray) -> object:
    kind = column.type
    if column.null_count:
        return column.to_pylist()
    if pa.types.is_fixed_size_binary(kind):
        return _fixed_size(column)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        array = column.to_numpy()
        return array if array.flags.writeable else array.copy()
    return column.to_pylist()


def _fixed_size(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """[rows, width], in the column's own memory if it is one writeable chunk."""
    width, arrays = column.type.byte_width, []
    for chunk in column.chunks:
        values = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        arrays.append(values.reshape(len(chunk), width))
    return arrays[0] if len(arrays) == 1 and arrays[0].flags.writeable else np.concatenate(arrays)


def _damaged(path: Path, error: Exception) -> InvalidShardError:
    return InvalidShardError(f"{path.name} cannot be read: {error}; fetch it again")
