"""What is published under a content id is that content: names that are taken, files that change, listings refused."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from node.origin.interface import ObjectInfo, OnBytes
from node.origin.layout import MANIFESTS, shard_key, torrent_key
from node.origin.local import FileStore
from node.origin.publishing import MissingObjects, OriginPublication, SourceFile, missing_at, publish
from node.origin.url import OriginUrl
from node.swarm.torrent import Torrent
from protocol.content import hash_file
from protocol.errors import (
    InvalidShardError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginUnavailableError,
)
from protocol.ids import ContentId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey

KEY = SigningKey.generate()


class Store(FileStore):
    """A folder whose names are written once, and that does what the test wants before each write."""

    writes_once = True

    def __init__(self, folder: Path) -> None:
        super().__init__(OriginUrl.parse(f"file://{folder}"))
        self.before: Callable[[str], None] = lambda key: None
        self.listing: OriginError | None = None
        self.written: list[str] = []

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        self.before(key)
        info = await super().put(key, body, if_absent=if_absent, metadata=metadata, on_bytes=on_bytes)
        self.written.append(key)
        return info

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        if self.listing:
            raise self.listing
        async for item in super().list(prefix):
            yield item


class Lab:
    """One file of two pieces, hashed, and an origin."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "a.bin"
        self.path.write_bytes(os.urandom(300_000))
        self.content = hash_file(self.path)
        found = self.path.stat()
        self.source = SourceFile(self.path, found.st_size, found.st_mtime_ns)
        self.id: ContentId = self.content.content_id
        self.shard, self.torrent = folder / "o" / shard_key(self.id), folder / "o" / torrent_key(self.id)
        self.entry = ShardEntry(shard_id=0, filename="a.bin", size=self.content.size, content_id=self.id, kind="file")
        self.manifest = Manifest(name="set", kind="dataset", shards=(self.entry,))
        self.signed = sign_manifest(self.manifest, KEY)
        (folder / "o").mkdir()
        self.store = Store(folder / "o")
        self.metainfo = Torrent.of("a.bin", self.content.size, self.id).metainfo(self.content.piece_layer)

    async def publish(self, missing: list[MissingObjects] | None = None) -> OriginPublication:
        missing = await missing_at(self.store, self.manifest) if missing is None else missing
        return await publish(self.store, self.signed, missing, {self.id: self.source}, {self.id: self.metainfo})

    @property
    def manifests(self) -> list[str]:
        return [key for key in self.store.written if key.startswith(MANIFESTS)]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def write(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


async def test_another_publisher_of_the_same_content_was_faster(lab: Lab) -> None:
    def other(key: str) -> None:
        if key == shard_key(lab.id):
            write(lab.shard, lab.path.read_bytes())
        if key == torrent_key(lab.id):
            write(lab.torrent, Torrent.of("other-name.bin", lab.entry.size, lab.id).metainfo(lab.content.piece_layer))

    lab.store.before = other
    await lab.publish()
    assert len(lab.manifests) == 1
    assert lab.shard.stat().st_size == lab.entry.size


async def test_a_taken_name_with_something_else_behind_it_is_not_taken_for_the_shard(lab: Lab) -> None:
    lab.store.before = lambda key: write(lab.shard, b"half") if key == shard_key(lab.id) else None
    with pytest.raises(InvalidShardError, match="has 4 bytes"):
        await lab.publish()
    lab.shard.unlink()
    lab.torrent.unlink()
    lab.store.before = lambda key: write(lab.torrent, b"half") if key == torrent_key(lab.id) else None
    with pytest.raises(InvalidShardError, match="no torrent"):
        await lab.publish()
    assert lab.manifests == []


async def test_a_taken_name_with_nothing_behind_it_is_an_error(lab: Lab) -> None:
    def taken(key: str) -> None:
        if not key.startswith(MANIFESTS):
            raise OriginExistsError("an upload of it was begun and never finished; delete it")

    lab.store.before = taken
    for missing in (MissingObjects(lab.entry, True, False), MissingObjects(lab.entry, False, True)):
        with pytest.raises(OriginExistsError, match="never finished"):
            await lab.publish([missing])
    assert lab.store.written == []


async def test_a_file_that_changed_after_it_was_hashed_is_not_sent(lab: Lab) -> None:
    lab.path.write_bytes(bytes(lab.entry.size))
    os.utime(lab.path, ns=(0, lab.source.mtime_ns + 1))
    with pytest.raises(InvalidShardError, match="was changed since it was hashed"):
        await lab.publish()
    assert not lab.shard.exists()
    assert lab.manifests == []


async def test_a_file_that_changes_while_it_is_sent_leaves_the_object_of_another(lab: Lab) -> None:
    body = lab.path.read_bytes()

    def other(key: str) -> None:
        if key == shard_key(lab.id):
            write(lab.shard, body)
            os.utime(lab.path, ns=(0, lab.source.mtime_ns + 1))

    lab.store.before = other
    await lab.publish()
    assert lab.shard.read_bytes() == body


async def test_an_origin_that_does_not_list_is_known_before_anything_is_sent(lab: Lab) -> None:
    lab.store.listing = OriginUnavailableError("it does not answer")
    with pytest.raises(OriginUnavailableError):
        await lab.publish()
    assert lab.store.written == []
    lab.store.listing = OriginDeniedError("it may not be listed")
    await lab.publish()
    assert len(lab.manifests) == 1
    lab.store.listing = None
    await lab.publish()
    assert len(lab.manifests) == 1, "the newest is the same"
