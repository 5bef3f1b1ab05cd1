"""Whether what lies at an origin is what a manifest says: read whole, hashed as it comes, kept nowhere."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import aclosing

from node.origin.layout import layer_bytes, shard_key
from node.origin.places import Place
from protocol.content import LEAF_BYTES, merkle_root, piece_length
from protocol.errors import OriginError
from protocol.ids import ContentId
from protocol.manifest import ShardEntry

HASHED_AT_ONCE = 1 << 20
"""Bytes that go to another thread together."""


class RunningContentId:
    """The content id of bytes as they come (BEP 52), in memory that does not grow with them."""

    def __init__(self) -> None:
        self._rest = b""
        self._subtrees: list[tuple[int, bytes]] = []
        """(height, root) of full subtrees, each lower than the one before."""

    def update(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) - len(data) % LEAF_BYTES
        view = memoryview(data)
        for start in range(0, whole, LEAF_BYTES):
            self._add(hashlib.sha256(view[start : start + LEAF_BYTES]).digest())
        self._rest = data[whole:]

    def content_id(self) -> ContentId | None:
        """Of all bytes so far; None where there were none. Nothing may come after."""
        if self._rest:
            self._add(hashlib.sha256(self._rest).digest())
            self._rest = b""
        if not self._subtrees:
            return None
        zeros = [bytes(32)]
        for height in range(self._subtrees[0][0]):
            zeros.append(hashlib.sha256(zeros[height] * 2).digest())
        height, root = self._subtrees.pop()
        while self._subtrees:
            above, left = self._subtrees.pop()
            for missing in range(height, above):
                root = hashlib.sha256(root + zeros[missing]).digest()
            height, root = above + 1, hashlib.sha256(left + root).digest()
        return ContentId(root.hex())

    def _add(self, leaf: bytes) -> None:
        height, root = 0, leaf
        while self._subtrees and self._subtrees[-1][0] == height:
            root = hashlib.sha256(self._subtrees.pop()[1] + root).digest()
            height += 1
        self._subtrees.append((height, root))


async def content_at(
    place: Place, entry: ShardEntry, on_bytes: Callable[[int], None] = lambda _: None
) -> ContentId | None:
    """The content id of what a place gives for a shard. Raises OriginError and its children."""
    running, pending = RunningContentId(), bytearray()
    async with aclosing(place.stream(entry, 0, entry.size)) as chunks:
        async for chunk in chunks:
            pending += chunk
            on_bytes(len(chunk))
            if len(pending) >= HASHED_AT_ONCE:
                await asyncio.to_thread(running.update, bytes(pending))
                pending.clear()
    await asyncio.to_thread(running.update, bytes(pending))
    return running.content_id()


async def network_state_at(place: Place, entry: ShardEntry) -> str:
    """What Akave's gateway says of an object on its network, for people to read; empty where it says nothing.

    It comes some time after the upload, and proves nothing: the CID is of what was encrypted and coded.
    """
    try:
        info = await (await place.store()).head(shard_key(entry.content_id))
    except OriginError:
        return ""
    said = [f"root CID {info.root_cid}" if info.root_cid else "", info.network_state or ""]
    return ", ".join(filter(None, said))


def is_piece_layer(layer: bytes, entry: ShardEntry) -> bool:
    """Whether these are the hashes of the shard's pieces: they lead to its content id."""
    if len(layer) != layer_bytes(entry.size):
        return False
    if not layer:
        return True
    hashes = [layer[start : start + 32] for start in range(0, len(layer), 32)]
    pad = merkle_root([bytes(32)] * (piece_length(entry.size) // LEAF_BYTES))
    return merkle_root(hashes, pad=pad).hex() == entry.content_id
