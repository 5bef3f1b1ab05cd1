"""The kind of a shard's file, and the check for that kind."""

from __future__ import annotations

from pathlib import Path

from node.formats.cursor import regular_size
from node.formats.gguf import read_gguf
from node.formats.parquet import check_parquet
from node.formats.slices import slice_info
from protocol.errors import InvalidShardError
from protocol.manifest import ShardKind


def kind_of(path: Path) -> ShardKind:
    """The kind by the file's name: a damaged GGUF is invalid, rather than a plain file."""
    match path.suffix.lower():
        case ".gguf":
            return "gguf"
        case ".parquet":
            return "parquet"
        case _:
            return "file"


def check_shard(path: Path, kind: ShardKind | None = None) -> int | None:
    """Check that a file is complete for its kind. Returns the rows of a parquet file, None for other kinds.

    `kind` is the manifest's, by default that of the file name. Reads headers and footers alone. Raises
    InvalidShardError, which names the file and what is wrong; OSError from opening or reading.
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
