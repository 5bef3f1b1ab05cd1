"""What the name of a shard's file says."""

from __future__ import annotations

import re

_OF = re.compile(r"(\d+)-of-\d+(?=\D|\Z)")
_NUMBER = re.compile(r"\d+")


def extract_shard_id(filename: str) -> int:
    """The number in a shard's file name: 42 of shard_00042.parquet, 3 of train-00003-of-00010.parquet.

    The last number before the suffix counts. Raises ValueError where there is none.
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
