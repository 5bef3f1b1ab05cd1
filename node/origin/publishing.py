"""Puts a model or data set where others fetch it from: shards and torrent files first, the manifest last.

A reader goes by manifests, so it never sees half a model. What is there already, by content id and size, is left
alone; that is also how a publication that was interrupted goes on: begun again, it skips what came to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from node.origin.interface import ObjectStore
from node.origin.layout import (
    ManifestKey,
    encode_manifest,
    layer_bytes,
    manifest_folder,
    manifest_key,
    parse_manifest_key,
    shard_key,
    torrent_key,
)
from protocol.errors import InvalidShardError, OriginExistsError, OriginNotFoundError
from protocol.ids import ContentId
from protocol.manifest import Manifest, ShardEntry, SignedManifest

AT_ONCE = 4
"""Objects that are looked for or sent at a time; a large one goes in several parts at once besides."""


@dataclass(frozen=True)
class Missing:
    """What a shard still needs at an origin."""

    entry: ShardEntry
    shard: bool
    torrent: bool

    @property
    def bytes(self) -> int:
        return self.entry.size if self.shard else 0


@dataclass(frozen=True)
class Published:
    """What came of a publication at one origin."""

    origin: str
    manifest_url: str
    """Names this version for ever; without its last component, the newest version of the name."""
    uploaded_bytes: int
    """Of shards; what was there is not in it."""
    skipped_bytes: int


async def missing_at(store: ObjectStore, manifest: Manifest) -> list[Missing]:
    """The shards of which something is not at the origin yet.

    Raises InvalidShardError where an object of a shard's name has another size, and OriginError.
    """
    slots = asyncio.Semaphore(AT_ONCE)

    async def look(entry: ShardEntry) -> Missing:
        async with slots:
            size = await _size_of(store, shard_key(entry.content_id))
            if size not in (None, entry.size, max(entry.size, store.min_object_bytes)):
                raise InvalidShardError(
                    f"{shard_key(entry.content_id)} at {store.url} has {size} bytes, the shard {entry.filename} has "
                    f"{entry.size}: delete that object, and publish again",
                    {"origin": store.url, "key": shard_key(entry.content_id)},
                )
            torrent = bool(layer_bytes(entry.size)) and await _size_of(store, torrent_key(entry.content_id)) is None
            return Missing(entry, size is None, torrent)

    contents = {entry.content_id: entry for entry in manifest.shards}
    async with _one_error(), asyncio.TaskGroup() as tasks:
        looks = [tasks.create_task(look(entry)) for entry in contents.values()]
    return [found for look_ in looks if (found := look_.result()).shard or found.torrent]


async def publish(
    store: ObjectStore,
    signed: SignedManifest,
    missing: list[Missing],
    files: Mapping[ContentId, Path],
    torrents: Mapping[ContentId, bytes],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Published:
    """Upload what is missing, then the manifest.

    `files` and `torrents` are the shards' paths and their torrent files, by content id; `on_bytes` is told how many
    bytes of shards more have gone. Raises InvalidShardError where a file is not what it was, or changes while it is
    sent, and OriginError.
    """
    slots = asyncio.Semaphore(AT_ONCE)

    async def send(one: Missing) -> None:
        async with slots:
            if one.torrent:
                await _put(store, torrent_key(one.entry.content_id), torrents[one.entry.content_id])
            if one.shard:
                await _put_shard(store, one.entry, files[one.entry.content_id], on_bytes)

    async with _one_error(), asyncio.TaskGroup() as tasks:
        for one in missing:
            tasks.create_task(send(one), name=f"upload {one.entry.filename}")
    key = await _put_manifest(store, signed)
    uploaded = sum(one.bytes for one in missing)
    return Published(store.url, f"{store.url.rstrip('/')}/{key}", uploaded, signed.manifest.total_bytes - uploaded)


async def _size_of(store: ObjectStore, key: str) -> int | None:
    try:
        return (await store.head(key)).size
    except OriginNotFoundError:
        return None


async def _put_shard(store: ObjectStore, entry: ShardEntry, path: Path, on_bytes: Callable[[int], None]) -> None:
    key = shard_key(entry.content_id)
    before = await asyncio.to_thread(_stamp, path)
    if before is None or before[0] != entry.size:
        raise InvalidShardError(f"{path} is not the shard any more that it was; publish it again when it is whole")
    if entry.size < store.min_object_bytes:
        body = (await asyncio.to_thread(path.read_bytes)).ljust(store.min_object_bytes, b"\0")
        await _put(store, key, body)
        on_bytes(entry.size)
    else:
        with contextlib.suppress(OriginExistsError):
            await store.put(key, path, if_absent=store.writes_once, on_bytes=on_bytes)
    if await asyncio.to_thread(_stamp, path) != before:
        # Under a content id lies that content or nothing.
        await store.delete(key)
        raise InvalidShardError(f"{path} was changed while it was sent; publish it again when it is whole")


async def _put(store: ObjectStore, key: str, body: bytes) -> None:
    with contextlib.suppress(OriginExistsError):  # by another publisher of the same content, a moment ago
        await store.put(key, body, if_absent=store.writes_once)


async def _put_manifest(store: ObjectStore, signed: SignedManifest) -> str:
    """Write the manifest under a new name that comes after all others of it, unless the newest is the same."""
    name, digest = signed.manifest.name, signed.digest
    body = encode_manifest(signed, store.min_object_bytes)
    newest = ManifestKey(0, digest, "")
    async for item in store.list(manifest_folder(name)):
        stamped = parse_manifest_key(item.key)
        if stamped and item.key == manifest_key(name, stamped.digest, stamped.written_ms):
            newest = max(newest, stamped)
    if newest.key and newest.digest == digest and (await store.head(newest.key)).size == len(body):
        held = await store.get_range(newest.key, 0, len(body))
        if held == body:
            return newest.key
    key = manifest_key(name, digest, max(int(time.time() * 1000), newest.written_ms + 1))
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
