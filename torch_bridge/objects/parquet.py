"""Rows of parquet files: footers first, then only the row groups and columns that are asked for."""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from protocol.errors import InsufficientMemoryError, InvalidParamsError, InvalidShardError, ShoalError
from torch_bridge.objects.formats import Decode, SampleIndex, Samples
from torch_bridge.objects.listing import ListedObject
from torch_bridge.objects.range_reader import ObjectRange, RangeReader

TAIL_BYTES = 64 << 10
"""Read first of every file: most footers are shorter."""
FILES_AT_ONCE = 64
"""Files whose footers are fetched together."""


@dataclass(frozen=True)
class ParquetFormat:
    """A sample is a row, as a dict. Of a row group only `columns` are read; None: all of them."""

    columns: tuple[str, ...] | None = None
    row_groups_in_memory: int = 4
    """Decoded row groups that each process keeps; a batch of rows far apart decodes all of its row groups."""
    pattern: str = "*.parquet"

    def open(self, objects: Sequence[ListedObject], reader: RangeReader) -> Samples:
        rows = ParquetRows(self, objects)
        for at in range(0, len(objects), FILES_AT_ONCE):
            rows.count(reader, range(at, min(at + FILES_AT_ONCE, len(objects))))
        return rows


class ParquetRows:
    """Made by ParquetFormat.open."""

    def __init__(self, form: ParquetFormat, objects: Sequence[ListedObject]) -> None:
        self.counts: list[int] = []
        self._form = form
        self._objects = objects
        self._ends: list[list[int]] = []
        """Of each object's row groups, in rows."""
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self._tables: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def count(self, reader: RangeReader, items: Sequence[int]) -> None:
        """Read the footers of these objects, which follow those read before."""
        tails = [
            ObjectRange(one, max(0, one.size - TAIL_BYTES), one.size) for one in (self._objects[at] for at in items)
        ]
        for item, wanted, tail in zip(items, tails, reader.read(tails), strict=True):
            meta = self._footer(reader, item, [(wanted.start, tail)])
            self._ends.append(list(accumulate(meta.row_group(group).num_rows for group in range(meta.num_row_groups))))
            self.counts.append(meta.num_rows)

    def read(self, reader: RangeReader, indices: Sequence[SampleIndex], decode: Decode | None) -> list[Any]:
        """Rows in the order asked for, each row group decoded once."""
        groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for at, (item, row) in enumerate(indices):
            number = bisect_right(self._ends[item], row)
            first = self._ends[item][number - 1] if number else 0
            groups[item, number].append((at, row - first))
        found: list[Any] = [None] * len(indices)
        order = sorted(
            groups, key=lambda group: group not in self._tables
        )  # groups in memory first: others may push them out
        step = max(1, self._form.row_groups_in_memory)
        for begin in range(0, len(order), step):
            here = order[begin : begin + step]
            for group, table in zip(here, self._decoded(reader, here), strict=True):
                rows = groups[group]
                taken = table.take([row for _, row in rows]).to_pylist()
                for (at, _), row in zip(rows, taken, strict=True):
                    found[at] = row if decode is None else decode(row)
        return found

    def _decoded(self, reader: RangeReader, groups: Sequence[tuple[int, int]]) -> list[pa.Table]:
        known = {group: table for group in groups if (table := self._tables.get(group)) is not None}
        needed = {group: self._ranges(reader, *group) for group in groups if group not in known}
        parts = iter(reader.read([one for ranges in needed.values() for one in ranges]))
        for (item, number), ranges in needed.items():
            held = [(wanted.start, next(parts)) for wanted in ranges]
            source = ObjectFile(reader, self._objects[item], held)
            try:
                file = pq.ParquetFile(source, metadata=self._footer(reader, item), pre_buffer=False)
                known[item, number] = file.read_row_group(number, columns=self._columns())
            except (pa.ArrowException, OSError) as error:
                raise self._unreadable(item, number, error) from error
        for group in groups:
            self._tables[group] = known[group]
            self._tables.move_to_end(group)
        while len(self._tables) > self._form.row_groups_in_memory:
            self._tables.popitem(last=False)
        return [known[group] for group in groups]

    def _ranges(self, reader: RangeReader, item: int, group: int) -> list[ObjectRange]:
        """Byte ranges of the column chunks that are asked for: of each, what pyarrow begins to read.

        Asked for a chunk's offsets, pyarrow aborts the process if the footer describes it wrongly (ColumnMetaData of
        parquet.thrift); when it reads one, that is an error.
        """
        meta, found = self._footer(reader, item), []
        for at in range(meta.num_columns):
            if self._form.columns is None or meta.schema.column(at).path.split(".")[0] in self._form.columns:
                asked = AskedRange(self._objects[item].size)
                try:
                    file = pq.ParquetFile(asked, metadata=meta, pre_buffer=False)
                    file.reader.read_row_group(group, column_indices=[at], use_threads=False)
                except RangeAskedError:
                    if not 0 <= asked.start < asked.end:
                        raise self._unreadable(item, group, f"column {at} begins at byte {asked.start}") from None
                    found.append(ObjectRange(self._objects[item], asked.start, asked.end))
                except (pa.ArrowException, OSError) as error:
                    raise self._unreadable(item, group, error) from error
        return found

    def _unreadable(self, item: int, group: int, error: Exception | str) -> ShoalError:
        where = f"row group {group} of {self._objects[item].key}"
        if isinstance(error, MemoryError):
            return InsufficientMemoryError(
                f"{where} cannot be decoded, memory ran out ({error}): name fewer columns=, lower "
                "row_groups_in_memory=, use fewer workers, or upload smaller row groups"
            )
        return InvalidShardError(
            f"{where} cannot be read ({error}): upload the file again, whole and as this pyarrow reads it, or leave it "
            "out by `match`"
        )

    def _footer(self, reader: RangeReader, item: int, held: Sequence[tuple[int, bytes]] = ()) -> pq.FileMetaData:
        if (known := self._footers.get(item)) is not None:
            return known
        key = self._objects[item].key
        try:
            meta = pq.read_metadata(ObjectFile(reader, self._objects[item], held))
        except (pa.ArrowException, OSError, ValueError, struct.error) as error:
            raise InvalidShardError(
                f"{key} is not a parquet file ({error}): leave it out by `match`, or upload it again"
            ) from error
        names = meta.schema.to_arrow_schema().names
        if lacking := [name for name in self._form.columns or () if name not in names]:
            raise InvalidParamsError(f"{key} has no column {', '.join(lacking)}: it has {', '.join(names)}")
        self._footers[item] = meta
        if len(self._footers) > FILES_AT_ONCE:
            self._footers.popitem(last=False)
        return meta

    def _columns(self) -> list[str] | None:
        return None if self._form.columns is None else list(self._form.columns)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_footers": OrderedDict(), "_tables": OrderedDict()}


class RangeAskedError(Exception):
    """Raised in place of a read."""


class AskedRange(io.RawIOBase):
    """A file of `size` bytes that says which of them are read first, and gives none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.start = self.end = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.start = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.start, io.SEEK_END: self._size}[whence]
        return self.start

    def read(self, size: int | None = -1) -> Any:
        self.end = min(self._size, self.start + (self._size if size is None or size < 0 else size))
        raise RangeAskedError


class ObjectFile(io.RawIOBase):
    """An object as a file that is read through the cache; `held` are parts of it that are in memory."""

    def __init__(self, reader: RangeReader, item: ListedObject, held: Sequence[tuple[int, bytes]] = ()) -> None:
        self._reader = reader
        self._item = item
        self._held = held
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._item.size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> Any:
        """Without the copies that RawIOBase makes; ranges in memory are not copied at all."""
        end = self._item.size if size is None or size < 0 else min(self._item.size, self._at + size)
        if end <= self._at:
            return b""
        begin, self._at = self._at, end
        return self._part(begin, end)

    def readinto(self, buffer: Any) -> int:
        end = min(self._item.size, self._at + len(buffer))
        if end <= self._at:
            return 0
        data = self._part(self._at, end)
        buffer[: len(data)] = data
        self._at = end
        return len(data)

    def _part(self, start: int, end: int) -> bytes | memoryview:
        for first, held in self._held:
            if first <= start and end <= first + len(held):
                return memoryview(held)[start - first : end - first]
        data: bytes = self._reader.read([ObjectRange(self._item, start, end)])[0]
        return data
