"""Which kind a shard's file is, and the check that goes with it."""

from __future__ import annotations

from pathlib import Path

from node.formats.cursor import regular_size
from node.formats.gguf import read_gguf
from node.formats.parquet import check_parquet
from node.formats.slices import slice_info
from protocol.errors import InvalidShardError
from protocol.manifest import ShardKind


def kind_of(path: Path) -> ShardKind:
    """The kind that a file's name claims: by the name, since a damaged GGUF is invalid and no loose file."""
    match path.suffix.lower():
        case ".gguf":
            return "gguf"
        case ".parquet":
            return "parquet"
        case _:
            return "file"


def check_shard(path: Path, kind: ShardKind | None = None) -> int | None:
    """Raise InvalidShardError, naming the file and what is wrong, unless it is whole as its kind asks.

    Returns the rows of a parquet file, None for other kinds. `kind` is what a manifest says, the file name's claim
    without it. Reads headers and footers alone. OSError as opening and reading do.
    """
    match kind or kind_of(path):
        case "gguf":
            slice_info(read_gguf(path))
        case "parquet":
            return check_parquet(path)
        case "file":
            if regular_size(path) == 0:
                raise InvalidShardError(f"{path.name} is empty: there is nothing to share")
    return None
