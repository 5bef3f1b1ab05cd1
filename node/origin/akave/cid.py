"""The root CID that the akavesdk gives a file, computed from the file's plain bytes.

A CIDv1, codec dag-pb, hash sha2-256, over the DAG that the SDK builds itself: blocks of 1,000,000 bytes, each a dag-pb
node without links whose data is `08 02 22 <length> <bytes>` (type file; the bytes in field 4, where UnixFS has them in
field 2, so nothing else on IPFS, and no other SDK, gives the same CID); chunks of 32 blocks, each a node with a link
to every block, or the block itself if there is only one; a root with a link to every chunk and the file's size in
field 3, or the chunk itself if there is only one. A link's size is that of the encoded blocks below it.

Source: read off the public akavesdk (sdk/dag.py, sdk/sdk_ipc.py) and compared with it by the tests of the marker
`akavesdk`. It holds if nothing is encrypted and nothing is erasure-coded, as this package uses the SDK. The CID that
O3's S3 gateway reports is that of the bytes after both, and cannot be computed here.
"""

from __future__ import annotations

import base64
import hashlib

BLOCK_BYTES = 1_000_000
BLOCKS_PER_CHUNK = 32
CHUNK_BYTES = BLOCK_BYTES * BLOCKS_PER_CHUNK

_CID_PREFIX = b"\x01\x70\x12\x20"
"""Version 1, dag-pb, sha2-256, 32 bytes (multiformats)."""
_FILE = b"\x08\x02"
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
"""Bitcoin's alphabet."""


class RootCid:
    """Computes a file's root CID from its bytes, which come in parts; keeps one block at a time."""

    def __init__(self) -> None:
        self._block = bytearray()
        self._blocks: list[tuple[bytes, int]] = []
        self._chunks: list[tuple[bytes, int]] = []
        self.size = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next bytes."""
        view = memoryview(data)
        self.size += len(view)
        while view:
            taken = view[: BLOCK_BYTES - len(self._block)]
            self._block += taken
            view = view[len(taken) :]
            if len(self._block) == BLOCK_BYTES:
                self._end_block()

    def text(self) -> str:
        """The CID as text, `bafybei...`. Raises ValueError for a file without bytes, which the SDK refuses."""
        if not self.size:
            raise ValueError("a file without bytes has no root CID: the akavesdk refuses it")
        if self._block:
            self._end_block()
        if self._blocks:
            self._end_chunk()
        if len(self._chunks) == 1:
            cid = self._chunks[0][0]
        else:
            cid = _cid(*_node(_FILE + b"\x18" + _varint(self.size), self._chunks))
        return "b" + base64.b32encode(cid).decode().lower().rstrip("=")

    def _end_block(self) -> None:
        head = _FILE + b"\x22" + _varint(len(self._block))
        head = b"\x0a" + _varint(len(head) + len(self._block)) + head
        self._blocks.append((_cid(head, self._block), len(head) + len(self._block)))
        self._block.clear()
        if len(self._blocks) == BLOCKS_PER_CHUNK:
            self._end_chunk()

    def _end_chunk(self) -> None:
        if len(self._blocks) == 1:
            self._chunks.append(self._blocks[0])
        else:
            self._chunks.append((_cid(*_node(_FILE, self._blocks)), sum(size for _, size in self._blocks)))
        self._blocks = []


def same_cid(one: str, other: str) -> bool:
    """Whether two texts are the same CID; each is in base32 or base58btc (multibase), as nodes write them."""
    return one == other or (bool(one) and _decoded(one) == _decoded(other))


def _decoded(text: str) -> int | str:
    try:
        if text.startswith("b"):
            return int.from_bytes(base64.b32decode(text[1:].upper() + "=" * (-(len(text) - 1) % 8)))
        if text.startswith("z"):
            value = 0
            for letter in text[1:]:
                value = value * 58 + _BASE58.index(letter)
            return value
    except ValueError:
        pass
    return text


def _node(data: bytes, links: list[tuple[bytes, int]]) -> tuple[bytes, ...]:
    """A dag-pb node in its canonical form: the links, each with an empty name, then the data."""
    parts = []
    for cid, size in links:
        link = b"\x0a" + _varint(len(cid)) + cid + b"\x12\x00\x18" + _varint(size)
        parts.append(b"\x12" + _varint(len(link)) + link)
    return (*parts, b"\x0a" + _varint(len(data)) + data)


def _cid(*parts: bytes | bytearray) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return _CID_PREFIX + digest.digest()


def _varint(value: int) -> bytes:
    """A number as protobuf encodes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
