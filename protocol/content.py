"""Content ids and piece lengths: what makes two nodes' torrents of one file the same torrent.

Source: BEP 52 (BitTorrent v2). The content id is the root of a binary SHA-256 tree over leaves of 16 KiB,
padded with zero hashes to a power of two; it is the same whatever the piece length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from protocol.ids import ContentId

LEAF_BYTES = 16 * 1024
MIN_PIECE_BYTES = 256 * 1024
MAX_PIECE_BYTES = 4 * 1024 * 1024
TARGET_PIECES = 1024


class ContentHash(NamedTuple):
    """What hashing a file once gives."""

    size: int
    """Bytes."""
    content_id: ContentId
    piece_layer: bytes
    """32 bytes a piece of `piece_length(size)`; empty where the file is no longer than one piece (BEP 52)."""


def piece_length(size: int) -> int:
    """Piece length in bytes for a file of `size` bytes: the power of two nearest above size / 1024, in bounds.

    A fixed rule, since an info hash follows from it: never change it for files that are already shared.
    """
    length = MIN_PIECE_BYTES
    while length < MAX_PIECE_BYTES and length * TARGET_PIECES < size:
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


def _zero_subtree(leaves: int) -> bytes:
    pad = bytes(32)
    while leaves > 1:
        pad = hashlib.sha256(pad + pad).digest()
        leaves //= 2
    return pad


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> ContentHash:
    """Read a file once and hash it. Holds the GIL for most of it: run it in a process of its own.

    Raises OSError as reading does, and ValueError for an empty file (BEP 52 gives it no root).
    """
    size = path.stat().st_size
    leaves_per_piece = piece_length(size) // LEAF_BYTES
    pieces: list[bytes] = []
    leaves: list[bytes] = []
    seen = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            view = memoryview(block)
            for start in range(0, len(block), LEAF_BYTES):
                leaves.append(hashlib.sha256(view[start : start + LEAF_BYTES]).digest())
                if len(leaves) == leaves_per_piece:
                    pieces.append(merkle_root(leaves))
                    leaves = []
            seen += len(block)
            if progress:
                progress(seen)
    if seen == 0:
        raise ValueError(f"{path.name} is empty: there is nothing to share")
    if not pieces:
        return ContentHash(seen, ContentId(merkle_root(leaves).hex()), b"")
    if leaves:
        leaves += [bytes(32)] * (leaves_per_piece - len(leaves))
        pieces.append(merkle_root(leaves))
    if len(pieces) == 1:
        return ContentHash(seen, ContentId(pieces[0].hex()), b"")
    root = merkle_root(pieces, pad=_zero_subtree(leaves_per_piece))
    return ContentHash(seen, ContentId(root.hex()), b"".join(pieces))
