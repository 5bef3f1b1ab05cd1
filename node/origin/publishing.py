"""Uploads a model or data set to an origin: shards and torrent files first, the manifest last.

Readers begin with a manifest, so none sees half a model. Objects that the origin has already, by content id and size,
are not sent again; so a publication that was interrupted continues when it is repeated.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from node.background import FirstErrorGroup
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
"""Objects that are looked for, or sent, at a time; each large one in several parts at once."""


def refusal_by_others(url: str) -> str | None:
    """Why other nodes do not ask an origin that a manifest names, as the end of a sentence; None if they do."""
    return refusal(url)


class SourceFile(NamedTuple):
    """A shard's file, as it was when its content id was computed."""

    path: Path
    size: int
    """Bytes."""
    mtime_ns: int


@dataclass(frozen=True)
class MissingObjects:
    """Which objects of a shard an origin lacks."""

    entry: ShardEntry
    shard: bool
    torrent: bool

    @property
    def bytes(self) -> int:
        """Bytes of the shard that must be sent."""
        return self.entry.size if self.shard else 0


@dataclass(frozen=True)
class OriginPublication:
    """A publication at one origin."""

    origin: str
    manifest_url: str
    """Names this version for ever; without its last component, it names the newest version."""
    uploaded_bytes: int
    """Bytes of shards that were sent."""
    skipped_bytes: int
    """Bytes of shards that the origin had already."""


async def missing_at(store: ObjectStore, manifest: Manifest) -> list[MissingObjects]:
    """The shards of which the origin lacks an object.

    Raises InvalidShardError if an object with a shard's key has another size, and OriginError.
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
    async with FirstErrorGroup() as tasks:
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

    `files` and `torrents` have the shards' files and torrent files by content id; `on_bytes` is called with the
    bytes of shards that were sent since the call before. Raises InvalidShardError if a file changed since it was hashed
    or while it is sent, or if another object has a shard's key; and OriginError.
    """
    slots = asyncio.Semaphore(AT_ONCE)
    newest = await _newest(store, signed.manifest.name)

    async def send(one: MissingObjects) -> None:
        async with slots:
            if one.torrent:
                await _put_torrent(store, one.entry, torrents[one.entry.content_id])
            if one.shard:
                await _put_shard(store, one.entry, files[one.entry.content_id], on_bytes)

    async with FirstErrorGroup() as tasks:
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
        raise InvalidShardError(f"{path} was changed since it was hashed; publish it again when it is complete")
    padded: bytes | Path = path
    if entry.size < store.min_object_bytes:
        padded = (await asyncio.to_thread(path.read_bytes)).ljust(store.min_object_bytes, b"\0")
    try:
        if isinstance(padded, bytes):
            await store.put(key, padded, if_absent=store.writes_once)
            on_bytes(entry.size)
        else:
            await store.put(key, padded, if_absent=store.writes_once, on_bytes=on_bytes)
    except OriginExistsError:  # another publisher of the same content was faster
        size = await _size_of(store, key)
        if size is None:
            raise  # the key is taken, and has no object
        _check_shard_size(store, entry, size)
        return
    if await asyncio.to_thread(_stamp, path) != hashed:
        # A key with a content id has that content or no object.
        await store.delete(key)
        raise InvalidShardError(f"{path} was changed while it was sent; publish it again when it is complete")


async def _put_torrent(store: ObjectStore, entry: ShardEntry, torrent: bytes) -> None:
    key = torrent_key(entry.content_id)
    try:
        await store.put(key, torrent, if_absent=store.writes_once)
    except OriginExistsError:
        size = await _size_of(store, key)
        if size is None:
            raise
        if (
            not layer_bytes(entry.size) < size <= max_torrent_bytes(entry.size)
        ):  # a torrent file of another file name has another size
            raise _other_object(store, key, f"has {size} bytes, which no torrent of {entry.filename} has") from None


async def _newest(store: ObjectStore, name: str) -> ManifestKey | None:
    """The key of the newest manifest of a name; None if there is none, or if the origin does not list."""
    newest: ManifestKey | None = None
    try:
        async for item in store.list(manifest_folder(name)):
            stamped = parse_manifest_key(item.key)
            if stamped and item.key == manifest_key(name, stamped.digest, stamped.written_ms):
                newest = max(newest or stamped, stamped)
    except OriginError as err:
        if err.retryable:
            raise
        log.info("%s; the manifest gets the time of this machine's clock", err)
    return newest


async def _put_manifest(store: ObjectStore, signed: SignedManifest, newest: ManifestKey | None) -> str:
    """Write the manifest with a new key, later than all others of its name, unless the newest is the same. Its key."""
    name, digest = signed.manifest.name, signed.digest
    body = encode_manifest(signed, store.min_object_bytes)
    if newest and newest.digest == digest and await _holds(store, newest.key, body):
        return newest.key
    key = manifest_key(name, digest, max(int(time.time() * 1000), newest.written_ms + 1 if newest else 0))
    await store.put(key, body)
    return key


async def _holds(store: ObjectStore, key: str, body: bytes) -> bool:
    """Whether an object has these bytes."""
    return await _size_of(store, key) == len(body) and await store.get_range(key, 0, len(body)) == body


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
