"""Rows of a parquet file by their number, reading only the columns and row groups that they lie in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protocol.errors import InvalidParamsError, InvalidShardError
from torch_bridge.streaming.order import Indices


class RowReader:
    """One open file. `groups_kept`: row groups that stay decoded in memory, the longest unused goes first."""

    def __init__(self, path: Path, columns: Sequence[str] | None = None, *, groups_kept: int = 16) -> None:
        self._path, self._groups_kept = path, groups_kept
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
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def take(self, rows: Indices) -> pa.Table:
        """The rows in the order asked for. Raises InvalidShardError where the file is damaged or has fewer rows."""
        if rows.size and int(rows.max()) >= int(self._starts[-1]):
            raise InvalidShardError(
                f"{self._path.name} has {self._starts[-1]} rows, its manifest promised row {rows.max()}: fetch it again"
            )
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        parts, places = [], []
        for group in np.unique(groups).tolist():
            mine = np.flatnonzero(groups == group)
            parts.append(self._group(group).take(pa.array(rows[mine] - self._starts[group])))
            places.append(mine)
        if len(parts) == 1:
            return parts[0]
        return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))

    def close(self) -> None:
        self._groups.clear()
        self._file.close()

    def _group(self, group: int) -> pa.Table:
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        try:
            table = self._file.read_row_group(group, columns=self._columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self._path, error) from error
        self._groups[group] = table
        if len(self._groups) > self._groups_kept:
            self._groups.popitem(last=False)
        return table


def as_arrays(table: pa.Table) -> dict[str, object]:
    """Columns of numbers as numpy arrays, those with nulls and all others as lists."""
    return {name: _column(table.column(name)) for name in table.column_names}


def _column(column: pa.ChunkedArray) -> object:
    kind = column.type
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not plain or column.null_count:
        return column.to_pylist()
    array = column.to_numpy()
    return array if array.flags.writeable else array.copy()  # a DataLoader makes tensors of it, which can be written


def _damaged(path: Path, error: Exception) -> InvalidShardError:
    return InvalidShardError(f"{path.name} cannot be read: {error}; it has to be fetched again")
