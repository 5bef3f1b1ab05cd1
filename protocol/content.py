"""Content ids and piece lengths: what makes two nodes' torrents of one file the same torrent.

Source: BEP 52 (BitTorrent v2). The content id is the root of a binary SHA-256 tree over leaves of 16 KiB,
padded with zero hashes to a power of two; it is the same whatever the piece length.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from protocol.ids import ContentId

LEAF_BYTES = 16 * 1024
MIN_PIECE_BYTES = 256 * 1024
MAX_PIECE_BYTES = 4 * 1024 * 1024
TARGET_PIECES = 1024
HASH_RUN = 512


class ContentHash(NamedTuple):
    """What hashing a file once gives."""

    size: int
    """Bytes."""
    content_id: ContentId
    piece_layer: bytes
    """32 bytes a piece of `piece_length(size)`; empty if the file has one piece (BEP 52)."""


def piece_length(size: int) -> int:
    """Piece length in bytes for a file of `size` bytes: the smallest power of two that is at least size / 1024, in
    bounds; longer, above MAX_PIECE_BYTES if need be, if the file would end in a lone piece of a run of hashes.

    A fixed rule, since an info hash follows from it: never change it for files that are already shared.
    """
    length = MIN_PIECE_BYTES
    while length < MAX_PIECE_BYTES and length * TARGET_PIECES < size:
        length *= 2
    # libtorrent 2.1 asks peers for piece hashes in runs of 512, and drops the peer over a last run of a single hash.
    while (pieces := -(-size // length)) > HASH_RUN and pieces % HASH_RUN == 1:
        length *= 2
    return length


def merkle_root(hashes: Sequence[bytes], pad: bytes = bytes(32)) -> bytes:
    """Root of a row of 32-byte hashes, padded on the right with `pad` to a power of two. Not empty."""
    row = list(hashes)
    while len(row) > 1:
        if len(row) % 2:
            row.append(pad)
        row = [hashlib.sha256(row[i] + row[i + 1]).digest() for i in range(0, len(row), 2)]
        pad = hashlib.sha256(pad + pad).digest()
    return row[0]


def is_piece_layer(layer: bytes, size: int, content_id: str) -> bool:
    """Whether `layer` is the piece layer of the file with this size and content id (BEP 52).

    The piece layer has 32 bytes a piece of `piece_length(size)`; that of a file of one piece is empty. Computes for
    milliseconds if the file is large: call it off the event loop.
    """
    length = piece_length(size)
    pieces = -(-size // length)
    if pieces == 1:
        return not layer
    if len(layer) != 32 * pieces:
        return False
    hashes = [layer[start : start + 32] for start in range(0, len(layer), 32)]
    return merkle_root(hashes, pad=merkle_root([bytes(32)] * (length // LEAF_BYTES))).hex() == content_id


class ContentHasher:
    """Hashes a file of `size` bytes, at least 1, as its bytes come."""

    def __init__(self, size: int) -> None:
        self.seen = 0
        """Bytes so far."""
        self._size = size
        self._leaves_a_piece = piece_length(size) // LEAF_BYTES
        self._begun = b""
        self._leaves: list[bytes] = []
        self._pieces: list[bytes] = []

    def update(self, data: bytes | bytearray) -> None:
        self.seen += len(data)
        view = memoryview(self._begun + data if self._begun else data)
        end = len(view) if self.seen == self._size else len(view) // LEAF_BYTES * LEAF_BYTES
        for start in range(0, end, LEAF_BYTES):
            self._leaves.append(hashlib.sha256(view[start : min(start + LEAF_BYTES, end)]).digest())
            if len(self._leaves) == self._leaves_a_piece:
                self._pieces.append(merkle_root(self._leaves))
                self._leaves = []
        self._begun = bytes(view[end:])

    def result(self) -> ContentHash:
        """What the bytes hash to. Raises ValueError unless all of them have come."""
        if self.seen != self._size:
            raise ValueError(f"{self.seen} of {self._size} bytes were hashed")
        if not self._pieces:
            return ContentHash(self._size, ContentId(merkle_root(self._leaves).hex()), b"")
        if self._leaves:
            padding = [bytes(32)] * (self._leaves_a_piece - len(self._leaves))
            self._pieces.append(merkle_root(self._leaves + padding))
            self._leaves = []
        if len(self._pieces) == 1:
            return ContentHash(self._size, ContentId(self._pieces[0].hex()), b"")
        pad = merkle_root([bytes(32)] * self._leaves_a_piece)
        return ContentHash(self._size, ContentId(merkle_root(self._pieces, pad=pad).hex()), b"".join(self._pieces))


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> ContentHash:
    """Read a file once and hash it. Holds the GIL for most of it: run it in a process of its own.

    What is appended while it is read is left out. Raises OSError from reading, and if the file is shortened
    meanwhile; ValueError for an empty file (BEP 52 gives it no root).
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError(f"{path.name} is empty: there is nothing to share")
        hasher = ContentHasher(size)
        while block := file.read(min(1 << 20, size - hasher.seen)):
            hasher.update(block)
            if progress:
                progress(hasher.seen)
    if hasher.seen < size:
        raise OSError(errno.EIO, f"it was shortened from {size} bytes to {hasher.seen} while it was read", str(path))
    return hasher.result()
