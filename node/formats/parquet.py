"""Checks that a parquet file is whole: its magic numbers, its footer, and that all it points at is there.

Source: the Parquet format specification (file layout: `PAR1`, column chunks, footer in Thrift, its length in four
bytes, `PAR1`). The bounds are checked before pyarrow reads the footer, and pyarrow gets bounds for what the footer
announces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from node.formats.cursor import regular_size
from protocol.errors import InvalidShardError

MAGIC = b"PAR1"
ENCRYPTED_MAGIC = b"PARE"
MAX_FOOTER_BYTES = 64 << 20
"""The footers of files with 100,000 column chunks stay below a quarter of this."""
_TAIL_BYTES = 8
_MAX_ITEMS = 4 << 20
MAX_ROWS = 1 << 50
"""The most that a manifest can state."""


def check_parquet(path: Path) -> int:
    """Return the rows of a complete parquet file, the sum over its row groups.

    Raises InvalidShardError for any other file, OSError from opening or reading. Reads the footer alone: the content id
    covers the pages. A damaged footer may end
    the process: for some (of size statistics) pyarrow 26 lets a C++ exception through. So a node calls this in the
    process that hashes.
    """
    size = regular_size(path)
    footer_start = _check_layout(path, size)
    # Imported here: a node without data sets does not load pyarrow's hundred megabytes.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            metadata = pq.ParquetFile(
                file, thrift_string_size_limit=MAX_FOOTER_BYTES, thrift_container_size_limit=_MAX_ITEMS
            ).metadata
            _check_chunks(path, metadata, footer_start)
            return _rows(path, metadata)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as err:
        if isinstance(err, OSError) and err.errno is not None:
            raise
        reason = str(err).partition("\n")[0][:200]
        raise InvalidShardError(f"{path.name} is malformed: its footer cannot be read ({reason})") from None


def _check_layout(path: Path, size: int) -> int:
    """Check both ends; returns the offset of the footer."""
    if size < len(MAGIC) + _TAIL_BYTES:
        raise InvalidShardError(f"{path.name} is truncated: {size} bytes are too few for a parquet file")
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
        file.seek(size - _TAIL_BYTES)
        tail = file.read(_TAIL_BYTES)
    if tail[4:] == ENCRYPTED_MAGIC or head == ENCRYPTED_MAGIC:
        raise InvalidShardError(
            f"{path.name} has an encrypted footer, which cannot be checked: share it as a plain file"
        )
    if head != MAGIC:
        raise InvalidShardError(f"{path.name} is not a parquet file: it does not begin with {MAGIC.decode()}")
    if tail[4:] != MAGIC:
        raise InvalidShardError(
            f"{path.name} is truncated: it begins as a parquet file and does not end with {MAGIC.decode()}; "
            f"get the file again"
        )
    length = int.from_bytes(tail[:4], "little")
    footer_start = size - _TAIL_BYTES - length
    if not 0 < length <= MAX_FOOTER_BYTES or footer_start < len(MAGIC):
        raise InvalidShardError(
            f"{path.name} is malformed: its footer is said to have {length} bytes, the file has {size} "
            f"and at most {MAX_FOOTER_BYTES} are read"
        )
    return footer_start


def _rows(path: Path, metadata: Any) -> int:
    """By row group, as readers take them: the file's own count is a claim beside these."""
    counts = [int(metadata.row_group(index).num_rows) for index in range(metadata.num_row_groups)]
    total = sum(counts)
    if min(counts, default=0) < 0 or total > MAX_ROWS:
        raise InvalidShardError(f"{path.name} is malformed: its row groups are said to have {total} rows")
    return total


def _check_chunks(path: Path, metadata: Any, footer_start: int) -> None:
    for group_index in range(metadata.num_row_groups):
        group = metadata.row_group(group_index)
        for column_index in range(group.num_columns):
            chunk = group.column(column_index)
            # Writers put 0 where there is no such page: a dictionary, or any page of a column without rows.
            pages = [offset for offset in (chunk.data_page_offset, chunk.dictionary_page_offset) if offset]
            if not pages and chunk.num_values == 0:
                continue
            start = min(pages, default=0)
            length = chunk.total_compressed_size
            if start < len(MAGIC) or length < 0 or start + length > footer_start:
                raise InvalidShardError(
                    f"{path.name} is truncated or malformed: column {column_index} of row group {group_index} "
                    f"lies at bytes {start} to {start + length}, the data ends at {footer_start}"
                )
