"""LocalSource: shards that are in a folder already, for validation sets, tests, comparisons."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from protocol.content import hash_file
from protocol.errors import InvalidShardError, UnknownNameError
from protocol.ids import ShardId
from protocol.manifest import Manifest, ShardEntry
from torch_bridge.shards.sources.interface import FetchedFile, OnProgress


class LocalSource:
    """The parquet files of a folder, in the order of their names. They are hashed once, when the manifest is asked for.

    `deletes`: whether `discard` deletes; otherwise the files stay, and nothing is written into the folder.
    """

    def __init__(self, folder: Path | str, *, deletes: bool = False, pattern: str = "*.parquet") -> None:
        self._folder = Path(folder)
        self._deletes = deletes
        self._pattern = pattern
        self._manifest: Manifest | None = None

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def ledger_folder(self) -> Path | None:
        return self._folder if self._deletes else None

    def manifest(self) -> Manifest:
        """Raises UnknownNameError if there is no such file, InvalidShardError for one that cannot be read."""
        if self._manifest is None:
            paths = sorted(self._folder.glob(self._pattern))
            if not paths:
                raise UnknownNameError(f"no file {self._pattern} in {self._folder}: name the folder of the shards")
            shards = tuple(_entry(number, path) for number, path in enumerate(paths))
            self._manifest = Manifest(name=self._folder.resolve().name or "local", kind="dataset", shards=shards)
        return self._manifest

    def fetch(
        self, entry: ShardEntry, *, stop: threading.Event | None = None, on_progress: OnProgress | None = None
    ) -> FetchedFile:
        path = self._folder / entry.filename
        try:
            size = path.stat().st_size
        except OSError as err:
            raise InvalidShardError(f"{path} cannot be read: {err}") from None
        if size != entry.size:
            raise InvalidShardError(
                f"{path} has {size} bytes, and had {entry.size} when the data set was opened: put the file back, or "
                "start again with it as it is now"
            )
        return FetchedFile(path, "local", 0.0)

    def distrust(self, entry: ShardEntry, why: str) -> bool:
        path = self._folder / entry.filename
        try:
            found = hash_file(path).content_id
        except OSError as err:
            raise InvalidShardError(f"{path} cannot be read: {err}") from None
        if found != entry.content_id:
            raise InvalidShardError(
                f"{path} changed since the data set was opened, and there is no other source of it ({why}): put the "
                "file back, or start again with it as it is now"
            )
        return False

    def on_disk(self, entries: Sequence[ShardEntry]) -> list[ShardEntry]:
        return [entry for entry in entries if (self._folder / entry.filename).exists()]

    def cost_bytes(self, size_bytes: int) -> int:
        """Nothing: the files are not put there by this source."""
        return 0

    def disk_use(self) -> None:
        """Nothing is put there."""

    def discard(self, entry: ShardEntry) -> bool:
        if not self._deletes:
            return False
        (self._folder / entry.filename).unlink(missing_ok=True)
        return True

    def release(self, entry: ShardEntry) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def _entry(number: int, path: Path) -> ShardEntry:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_metadata(path).num_rows if path.suffix == ".parquet" else None
        hashed = hash_file(path)
    except (ArrowException, OSError, ValueError) as err:
        raise InvalidShardError(
            f"{path} is not a readable shard ({err}): write the file again, or leave it out of the folder"
        ) from None
    return ShardEntry(
        shard_id=ShardId(number),
        filename=path.name,
        size=hashed.size,
        content_id=hashed.content_id,
        kind="parquet" if path.suffix == ".parquet" else "file",
        rows=rows,
    )
