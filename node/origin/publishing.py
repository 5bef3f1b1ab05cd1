"""Puts a model or data set where others fetch it from: shards and torrent files first, the manifest last.

A reader goes by manifests, so it never sees half a model. What is there already, by content id and size, is left
alone; that is also how a publication that was interrupted goes on: begun again, it skips what came to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from node.origin.interface import ObjectStore
from node.origin.layout import (
    ManifestKey,
    encode_manifest,
    layer_bytes,
    manifest_folder,
    manifest_key,
    max_torrent_bytes,
    parse_manifest_key,
    shard_key,
    torrent_key,
)
from node.origin.policy import refusal
from protocol.errors import InvalidShardError, OriginError, OriginExistsError, OriginNotFoundError
from protocol.ids import ContentId
from protocol.manifest import Manifest, ShardEntry, SignedManifest

log = logging.getLogger(__name__)

AT_ONCE = 4
"""Objects that are looked for or sent at a time; a large one goes in several parts at once besides."""


def refusal_by_others(url: str) -> str | None:
    """Why other nodes do not ask an origin that a manifest names, as the end of a sentence; None if they do."""
    return refusal(url)


class SourceFile(NamedTuple):
    """A shard's file as it was when its content id was computed."""

    path: Path
    size: int
    """Bytes."""
    mtime_ns: int


@dataclass(frozen=True)
class MissingObjects:
    """What a shard still needs at an origin."""

    entry: ShardEntry
    shard: bool
    torrent: bool

    @property
    def bytes(self) -> int:
        return self.entry.size if self.shard else 0


@dataclass(frozen=True)
class OriginPublication:
    """What came of a publication at one origin."""

    origin: str
    manifest_url: str
    """Names this version for ever; without its last component, the newest version of the name."""
    uploaded_bytes: int
    """Of shards; what was there is not in it."""
    skipped_bytes: int


async def missing_at(store: ObjectStore, manifest: Manifest) -> list[MissingObjects]:
    """The shards of which something is not at the origin yet.

    Raises InvalidShardError where an object of a shard's name has another size, and OriginError.
    """
    slots = asyncio.Semaphore(AT_ONCE)

    async def look(entry: ShardEntry) -> MissingObjects:
        async with slots:
            size = await _size_of(store, shard_key(entry.content_id))
            if size is not None:
                _check_shard_size(store, entry, size)
            torrent = bool(layer_bytes(entry.size)) and await _size_of(store, torrent_key(entry.content_id)) is None
            return MissingObjects(entry, size is None, torrent)

    contents = {entry.content_id: entry for entry in manifest.shards}
    async with _one_error(), asyncio.TaskGroup() as tasks:
        looks = [tasks.create_task(look(entry)) for entry in contents.values()]
    return [found for look_ in looks if (found := look_.result()).shard or found.torrent]


async def publish(
    store: ObjectStore,
    signed: SignedManifest,
    missing: list[MissingObjects],
    files: Mapping[ContentId, SourceFile],
    torrents: Mapping[ContentId, bytes],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> OriginPublication:
    """Upload what is missing, then the manifest.

    `files` and `torrents` are the shards' files and their torrent files, by content id; `on_bytes` is told how many
    bytes of shards more have gone. Raises InvalidShardError where a file is not what it was when it was hashed, changes
    while it is sent, or where something else has a shard's name, and OriginError.
    """
    slots = asyncio.Semaphore(AT_ONCE)
    newest = await _newest(store, signed.manifest.name)

    async def send(one: MissingObjects) -> None:
        async with slots:
            if one.torrent:
                await _put_torrent(store, one.entry, torrents[one.entry.content_id])
            if one.shard:
                await _put_shard(store, one.entry, files[one.entry.content_id], on_bytes)

    async with _one_error(), asyncio.TaskGroup() as tasks:
        for one in missing:
            tasks.create_task(send(one), name=f"upload {one.entry.filename}")
    key = await _put_manifest(store, signed, newest)
    uploaded = sum(one.bytes for one in missing)
    return OriginPublication(
        store.url, f"{store.url.rstrip('/')}/{key}", uploaded, signed.manifest.total_bytes - uploaded
    )


async def _size_of(store: ObjectStore, key: str) -> int | None:
    try:
        return (await store.head(key)).size
    except OriginNotFoundError:
        return None


def _check_shard_size(store: ObjectStore, entry: ShardEntry, size: int) -> None:
    if size not in (entry.size, max(entry.size, store.min_object_bytes)):
        raise _other_object(
            store, shard_key(entry.content_id), f"has {size} bytes, the shard {entry.filename} has {entry.size}"
        )


def _other_object(store: ObjectStore, key: str, found: str) -> InvalidShardError:
    advice = "delete that object, and publish again"
    return InvalidShardError(f"{key} at {store.url} {found}: {advice}", {"origin": store.url, "key": key})


async def _put_shard(
    store: ObjectStore, entry: ShardEntry, source: SourceFile, on_bytes: Callable[[int], None]
) -> None:
    key, path, hashed = shard_key(entry.content_id), source.path, (source.size, source.mtime_ns)
    if source.size != entry.size or await asyncio.to_thread(_stamp, path) != hashed:
        raise InvalidShardError(f"{path} is not the shard any more that it was; publish it again when it is whole")
    padded: bytes | Path = path
    if entry.size < store.min_object_bytes:
        padded = (await asyncio.to_thread(path.read_bytes)).ljust(store.min_object_bytes, b"\0")
    try:
        if isinstance(padded, bytes):
            await store.put(key, padded, if_absent=store.writes_once)
            on_bytes(entry.size)
        else:
            await store.put(key, padded, if_absent=store.writes_once, on_bytes=on_bytes)
    except OriginExistsError:  # by another publisher of the same content, a moment ago
        size = await _size_of(store, key)
        if size is None:
            raise  # a name that is taken, and nothing behind it
        _check_shard_size(store, entry, size)
        return
    if await asyncio.to_thread(_stamp, path) != hashed:
        # Under a content id lies that content or nothing.
        await store.delete(key)
        raise InvalidShardError(f"{path} was changed while it was sent; publish it again when it is whole")


async def _put_torrent(store: ObjectStore, entry: ShardEntry, torrent: bytes) -> None:
    key = torrent_key(entry.content_id)
    try:
        await store.put(key, torrent, if_absent=store.writes_once)
    except OriginExistsError:
        size = await _size_of(store, key)
        if size is None:
            raise
        if not layer_bytes(entry.size) < size <= max_torrent_bytes(entry.size):  # another file name is in another one
            raise _other_object(store, key, f"has {size} bytes, and is no torrent of {entry.filename}") from None


async def _newest(store: ObjectStore, name: str) -> ManifestKey | None:
    """The newest manifest of a name that is there; none where the origin does not list: time orders well enough."""
    newest: ManifestKey | None = None
    try:
        async for item in store.list(manifest_folder(name)):
            stamped = parse_manifest_key(item.key)
            if stamped and item.key == manifest_key(name, stamped.digest, stamped.written_ms):
                newest = max(newest or stamped, stamped)
    except OriginError as err:
        if err.retryable:
            raise
        log.info("%s; what is published gets the time of this machine", err)
    return newest


async def _put_manifest(store: ObjectStore, signed: SignedManifest, newest: ManifestKey | None) -> str:
    """Write the manifest under a new name that comes after all others of it, unless the newest is the same."""
    name, digest = signed.manifest.name, signed.digest
    body = encode_manifest(signed, store.min_object_bytes)
    if newest and newest.digest == digest and await _size_of(store, newest.key) == len(body):
        held = await store.get_range(newest.key, 0, len(body))
        if held == body:
            return newest.key
    key = manifest_key(name, digest, max(int(time.time() * 1000), newest.written_ms + 1 if newest else 0))
    await store.put(key, body)
    return key


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


@contextlib.asynccontextmanager
async def _one_error() -> AsyncIterator[None]:
    """The first error of a task group itself: one request that failed ends the others."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
