"""ShardSubset: some shards of a source, for a run that needs fewer tokens than the data set has."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from protocol.errors import InvalidParamsError
from protocol.manifest import Manifest, ShardEntry
from torch_bridge.shards.sources.interface import DiskUse, FetchedFile, OnProgress, ShardSource


class ShardSubset:
    """The shards with these file names. Raises InvalidParamsError for a name that the data set does not have."""

    def __init__(self, source: ShardSource, names: Sequence[str]) -> None:
        self._source = source
        whole = source.manifest()
        absent = sorted(set(names) - {entry.filename for entry in whole.shards})
        if absent or not names:
            raise InvalidParamsError(
                f"{whole.name} has no shard {absent[0] if absent else ''!r}: name some of its {len(whole.shards)}"
            )
        self._manifest = msgspec.structs.replace(
            whole, shards=tuple(entry for entry in whole.shards if entry.filename in set(names))
        )

    @property
    def folder(self) -> Path:
        return self._source.folder

    @property
    def ledger_folder(self) -> Path | None:
        return self._source.ledger_folder

    def manifest(self) -> Manifest:
        """With the chosen shards only, under the ids that they have in the whole manifest."""
        return self._manifest

    def fetch(
        self, entry: ShardEntry, *, stop: threading.Event | None = None, on_progress: OnProgress | None = None
    ) -> FetchedFile:
        return self._source.fetch(entry, stop=stop, on_progress=on_progress)

    def distrust(self, entry: ShardEntry, why: str) -> bool:
        return self._source.distrust(entry, why)

    def on_disk(self, entries: Sequence[ShardEntry]) -> list[ShardEntry]:
        return self._source.on_disk(entries)

    def cost_bytes(self, size_bytes: int) -> int:
        return self._source.cost_bytes(size_bytes)

    def disk_use(self) -> DiskUse | None:
        return self._source.disk_use()

    def discard(self, entry: ShardEntry) -> bool:
        return self._source.discard(entry)

    def release(self, entry: ShardEntry) -> None:
        self._source.release(entry)

    def close(self) -> None:
        self._source.close()
