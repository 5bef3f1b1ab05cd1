"""A shard as a torrent: the torrent that follows from a shard, and plain values for its peers and pieces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

from protocol.content import is_piece_layer, piece_length
from protocol.errors import InvalidShardError
from protocol.ids import ContentId, InfoHash


class PeerAddress(NamedTuple):
    """Where a peer listens for BitTorrent connections."""

    host: str
    """IP address, not a name."""
    port: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a file: the range of bytes to fetch."""

    index: int
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes; only the last piece is shorter than the piece length."""


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a download is, at most a second old; `phase` says what the node does for it."""

    bytes_done: int
    bytes_total: int
    rate_bytes_s: float = 0.0
    """Payload that arrives."""
    peers: int = 0
    """Connected now."""
    phase: Literal["finding", "downloading", "verifying"] = "downloading"


@dataclass(frozen=True, slots=True)
class Torrent:
    """A v2-only torrent of one file (BEP 52). Made by `of`, so that nodes that never met agree on the info hash."""

    name: str
    """The file's name in the swarm; the file on disk may have another."""
    size: int
    """Bytes."""
    content_id: ContentId
    piece_length: int
    """Bytes."""
    info_hash: InfoHash
    """SHA-256 of `info_dict()`."""

    @classmethod
    def of(cls, name: str, size: int, content_id: ContentId) -> Torrent:
        """The torrent of a shard. Raises InvalidShardError for an empty file, which BEP 52 gives no root."""
        if size < 1:
            raise InvalidShardError(f"{name!r} has {size} bytes: an empty file cannot be shared")
        length = piece_length(size)
        info = _info_dict(name, size, content_id, length)
        return cls(name, size, content_id, length, InfoHash(hashlib.sha256(info).hexdigest()))

    @property
    def pieces(self) -> int:
        """How many pieces the file has."""
        return -(-self.size // self.piece_length)

    def piece(self, index: int) -> Piece:
        """Raises IndexError if the file has no such piece."""
        if not 0 <= index < self.pieces:
            raise IndexError(f"{self.name!r} has pieces 0 to {self.pieces - 1}, not {index}")
        offset = index * self.piece_length
        return Piece(index, offset, min(self.piece_length, self.size - offset))

    def has_layer(self, layer: bytes) -> bool:
        """Whether `layer` is the piece layer of this content id; that of a file of one piece is empty."""
        return is_piece_layer(layer, self.size, self.content_id)

    def info_dict(self) -> bytes:
        """The bencoded info dictionary, the same bytes on every node."""
        return _info_dict(self.name, self.size, self.content_id, self.piece_length)

    def metainfo(self, piece_layer: bytes = b"") -> bytes:
        """The bencoded torrent file; without a piece layer (32 bytes a piece) a downloader asks peers for it."""
        layers = b""
        if piece_layer:
            layers = b"12:piece layersd" + _text(bytes.fromhex(self.content_id)) + _text(piece_layer) + b"e"
        return b"d4:info" + self.info_dict() + layers + b"e"


def _info_dict(name: str, size: int, content_id: ContentId, length: int) -> bytes:
    # Keys in bencoding's order, by raw bytes.
    label = _text(name.encode())
    root = _text(bytes.fromhex(content_id))
    file = b"d6:lengthi%de11:pieces root" % size + root + b"e"
    tree = b"d" + label + b"d0:" + file + b"ee"
    return b"d9:file tree" + tree + b"12:meta versioni2e4:name" + label + b"12:piece lengthi%dee" % length


def _text(value: bytes) -> bytes:
    return b"%d:" % len(value) + value
