"""Whether what lies at an origin is what a manifest says: read whole, hashed as it comes, kept nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from node.origin.layout import shard_key
from node.origin.location import Place
from protocol.content import ContentHasher
from protocol.errors import OriginError
from protocol.ids import ContentId
from protocol.manifest import ShardEntry

HASHED_AT_ONCE = 1 << 20
"""Bytes that go to another thread together."""


async def content_at(place: Place, entry: ShardEntry, on_bytes: Callable[[int], None] = lambda _: None) -> ContentId:
    """The content id of what a place gives for a shard. Raises OriginError and its children."""
    hasher, pending = ContentHasher(entry.size), bytearray()
    async with aclosing(place.stream(entry, 0, entry.size)) as chunks:
        async for chunk in chunks:
            pending += chunk
            on_bytes(len(chunk))
            if len(pending) >= HASHED_AT_ONCE:
                await asyncio.to_thread(hasher.update, bytes(pending))
                pending.clear()
    await asyncio.to_thread(hasher.update, bytes(pending))
    return hasher.result().content_id


async def network_state_at(place: Place, entry: ShardEntry) -> str:
    """What Akave's gateway says of an object on its network, for people to read; empty where it says nothing.

    It comes some time after the upload, and proves nothing: the CID is of what was encrypted and coded.
    """
    try:
        async with place.in_use() as store:
            info = await store.head(shard_key(entry.content_id))
    except OriginError:
        return ""
    said = [f"root CID {info.root_cid}" if info.root_cid else "", info.network_state or ""]
    return ", ".join(filter(None, said))
