"""Rows of one parquet file in pieces: each row group is decoded once, from front to back, a few rows at a time.

Windows of several lanes take pieces of one row group at different times. What one of them takes later is kept from when
it is decoded to then, so memory follows from the order's lanes and windows, whatever the size of row groups is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute  # `take` needs it, and would otherwise import it between an epoch's first rows
import pyarrow.parquet as pq

from protocol.errors import InsufficientMemoryError, InvalidParamsError, InvalidShardError, ShoalError
from torch_bridge.streaming.order import RowSpan
from torch_bridge.streaming.schema import DataColumns, joined

_DECODED_AT_ONCE = 4 << 20
"""Bytes of rows, as the footer says; more for one row that is larger."""
_MOST_ROWS = 8192
_READ_AT_ONCE = 1 << 20
"""Bytes of a column chunk of a larger row group."""
_READ_WHOLE = 64 << 20
"""A row group of a file that is no larger, or one that is no larger decoded, is read in one piece, which is faster."""


class ShardDecoder:
    """One open file, and the pieces of it that will be taken, each once. `rows`: the row count of its manifest."""

    def __init__(self, path: Path, columns: DataColumns, pieces: Sequence[RowSpan], *, rows: int | None = None) -> None:
        """Raises InvalidShardError if the file is damaged or has another row count, InvalidParamsError for a column,
        InsufficientMemoryError.
        """
        self._path, self._columns = path, columns
        try:
            self._file = _opened(path)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        try:
            meta = self._file.metadata
            self._starts = np.cumsum([0, *(meta.row_group(group).num_rows for group in range(meta.num_row_groups))])
            if rows is not None and rows != int(self._starts[-1]):
                raise InvalidShardError(
                    f"{path.name} has {self._starts[-1]} rows by its footer, and its manifest says {rows}"
                )
            self._names = columns.adopt(self._file.schema_arrow, path.name)
        except (InvalidShardError, InvalidParamsError):
            self._file.close()
            raise
        self._waiting = deque(sorted(pieces))
        self._begun: list[pa.Table] = []
        """Of the first one that waits."""
        self._whole: dict[RowSpan, pa.Table] = {}
        self._decoding = self._decoded()

    def take(self, piece: RowSpan) -> pa.Table:
        """The rows of a piece. Raises InvalidShardError if the file is damaged, InsufficientMemoryError."""
        while piece not in self._whole:
            try:
                start, table = next(self._decoding)
            except StopIteration:
                raise KeyError(f"{self._path.name} has no such piece, or it was taken already: {piece}") from None
            except (pa.ArrowException, OSError) as error:
                raise _damaged(self._path, error) from error
            self._cut(start, table)
        return self._whole.pop(piece)

    @property
    def size_bytes(self) -> int:
        """Of the rows that are decoded and not taken."""
        return sum(table.nbytes for table in (*self._whole.values(), *self._begun))

    def close(self) -> None:
        self._decoding.close()
        self._whole.clear()
        self._begun.clear()
        self._file.close()

    def _decoded(self) -> Generator[tuple[int, pa.Table], None, None]:
        """Rows from the next piece on, with the number of the first: the row groups that hold pieces, one by one."""
        for group, (start, end) in enumerate(zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True)):
            if not self._waiting or self._waiting[0].first_row >= end:
                continue
            at = start
            batches = self._file.iter_batches(
                batch_size=self._rows_at_once(group), row_groups=[group], columns=self._names, use_threads=False
            )
            for batch in batches:
                if self._waiting[0].first_row < at + batch.num_rows:
                    yield at, self._columns.table(batch, self._path.name)
                at += batch.num_rows
                if not self._waiting or self._waiting[0].first_row >= end:
                    break

    def _rows_at_once(self, group: int) -> int:
        found = self._file.metadata.row_group(group)
        rows, size_bytes = int(found.num_rows), int(found.total_byte_size)
        return min(_MOST_ROWS, max(1, _DECODED_AT_ONCE * rows // max(1, size_bytes)))

    def _cut(self, start: int, table: pa.Table) -> None:
        """Pieces do not overlap, so they become whole one after the other. They are slices, which keep all of
        `table` in memory until the last of them is taken; if they are a small part of it, they are copied.
        """
        end = start + table.num_rows
        parts: list[tuple[RowSpan, int, int]] = []
        for piece in self._waiting:
            if piece.first_row >= end:
                break
            parts.append((piece, max(piece.first_row, start), min(piece.first_row + piece.rows, end)))
        is_mostly_taken = 2 * sum(stop - begin for _, begin, stop in parts) >= table.num_rows
        for piece, begin, stop in parts:
            part = table.slice(begin - start, stop - begin)
            self._begun.append(part if is_mostly_taken else part.take(np.arange(part.num_rows)))
            if stop == piece.first_row + piece.rows:
                self._whole[self._waiting.popleft()] = joined(self._begun)
                self._begun = []


def _opened(path: Path) -> pq.ParquetFile:
    """The footer is not asked where column chunks lie: at some damaged ones pyarrow ends the process."""
    meta = pq.read_metadata(path)
    decoded = max((meta.row_group(number).total_byte_size for number in range(meta.num_row_groups)), default=0)
    if min(decoded, path.stat().st_size) <= _READ_WHOLE:
        return pq.ParquetFile(path, metadata=meta)
    return pq.ParquetFile(path, metadata=meta, buffer_size=_READ_AT_ONCE, pre_buffer=False)


def _damaged(path: Path, error: Exception) -> ShoalError:
    """What to do about a file that cannot be read is said by who knows whether its bytes are right."""
    if isinstance(error, MemoryError):
        return InsufficientMemoryError(
            f"{path} cannot be decoded, memory ran out ({error}): use fewer workers, lower Ordering(lanes=, window=), "
            "or publish shards with smaller row groups"
        )
    return InvalidShardError(f"{path} cannot be read: {error}")
