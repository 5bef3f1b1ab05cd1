"""What a shard's file shows by itself: whether it can be the parquet file that it is named as, and its number."""

from __future__ import annotations

import re
from pathlib import Path

from protocol.errors import InvalidShardError
from protocol.manifest import ShardEntry

_MAGIC = b"PAR1"
_TAIL_BYTES = 8
"""Length of the footer (4, little endian) and the magic, at the end of the file (parquet-format, README)."""


def check_parquet(path: Path) -> None:
    """Check both ends of a parquet file, without a parser that a damaged file could crash.

    Raises InvalidShardError that says what is wrong, OSError as reading does.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_MAGIC))
        if size < len(_MAGIC) + _TAIL_BYTES or head != _MAGIC:
            raise InvalidShardError(f"{path.name} does not begin as a parquet file does ({size} bytes)")
        file.seek(size - _TAIL_BYTES)
        tail = file.read(_TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC:
        raise InvalidShardError(f"{path.name} does not end as a parquet file does: it is truncated, or another file")
    if not 0 < length <= size - _TAIL_BYTES - len(_MAGIC):
        raise InvalidShardError(f"{path.name} says its footer has {length} bytes; the file has {size}")


def as_published(entry: ShardEntry, why: str) -> InvalidShardError:
    """The error for a damaged file whose content id is right: no peer has other bytes under it."""
    return InvalidShardError(
        f"{entry.filename} has the bytes that were published (content id {entry.content_id}), so no other copy is "
        f"better: {why}; write it again, whole and as this pyarrow reads it, and publish that with its real row count, "
        "or leave this shard out",
        {"content_id": entry.content_id, "shard_id": entry.shard_id},
    )


_OF = re.compile(r"(\d+)-of-\d+(?=\D|\Z)")
_NUMBER = re.compile(r"\d+")


def extract_shard_id(filename: str) -> int:
    """The number in a shard's file name: 42 of shard_00042.parquet, 3 of train-00003-of-00010.parquet.

    The last number before the suffix counts. Raises ValueError if there is none.
    """
    stem = filename.rpartition("/")[2].split(".", 1)[0]
    if found := _OF.search(stem):
        return int(found[1])
    numbers = _NUMBER.findall(stem)
    if not numbers:
        raise ValueError(
            f"no shard number in {filename!r}: names like shard_00042.parquet or train-00003-of-00010.parquet have one"
        )
    return int(numbers[-1])
