"""StreamingBatchDataset over the shards of a data set, as any ShardSource brings them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from protocol.content import hash_file
from protocol.errors import InvalidShardError, ShardNotFoundError
from protocol.manifest import Manifest, ShardEntry
from tests.torch_bridge.batches_parts import bodies, dataset, folder_of, name_and_body
from torch_bridge.batches.sources import SwarmFiles
from torch_bridge.shards.source import FetchedFile, OnProgress

FILES = {key.rpartition("/")[2]: body for key, body in bodies(9).items()}


class FolderShards:
    """A source of shards that copies them out of a folder, and checks them as every source does."""

    def __init__(self, origin: Path, folder: Path) -> None:
        self.origin, self.folder = origin, folder
        self.fetched: list[str] = []
        self.most = 0
        self._lock = threading.Lock()
        folder.mkdir()
        entries = (
            ShardEntry(
                shard_id=number, filename=name, size=len(body), kind="file",
                content_id=hash_file(origin / name).content_id,
            )
            for number, (name, body) in enumerate(sorted(FILES.items()))
        )  # fmt: skip
        self._manifest = Manifest(name="clips", kind="dataset", shards=tuple(entries))

    def manifest(self) -> Manifest:
        return self._manifest

    def fetch(
        self, entry: ShardEntry, *, stop: threading.Event | None = None, on_progress: OnProgress | None = None
    ) -> FetchedFile:
        path = self.folder / entry.filename
        shutil.copy(self.origin / entry.filename, path)
        if hash_file(path).content_id != entry.content_id:
            raise InvalidShardError(f"{entry.filename} is not what the manifest says")
        if on_progress is not None:
            on_progress(entry.size // 2, entry.size)
            on_progress(entry.size, entry.size)
        with self._lock:
            self.fetched.append(entry.filename)
            self.most = max(self.most, len(list(self.folder.iterdir())))
        return FetchedFile(path, "local", 0.0)

    def distrust(self, entry: ShardEntry, why: str) -> None:
        self.discard(entry)

    def discard(self, entry: ShardEntry) -> bool:
        (self.folder / entry.filename).unlink(missing_ok=True)
        return True

    def close(self) -> None:
        pass


def test_shards_are_fetched_once_used_and_discarded(tmp_path: Path) -> None:
    folder_of(tmp_path / "origin", FILES)
    shards = FolderShards(tmp_path / "origin", tmp_path / "here")
    files = dataset(SwarmFiles(shards), tmp_path / "cache", decode=name_and_body, cache_size=2)
    assert {name: body for name, body, _ in files} == FILES
    assert sorted(shards.fetched) == sorted(FILES)
    assert 0 < shards.most <= 4
    assert list((tmp_path / "here").iterdir()) == []
    assert files.report().downloaded_bytes == sum(map(len, FILES.values()))


def test_a_shard_that_is_wrong_or_unknown_is_an_error(tmp_path: Path) -> None:
    folder_of(tmp_path / "origin", FILES)
    shards = FolderShards(tmp_path / "origin", tmp_path / "here")
    (tmp_path / "origin/004.bin").write_bytes(FILES["004.bin"][::-1])
    with pytest.raises(InvalidShardError, match=r"004\.bin"):
        list(dataset(SwarmFiles(shards), tmp_path / "cache"))
    with pytest.raises(ShardNotFoundError, match="no shard"):
        SwarmFiles(shards).read("captions.json")
