"""How an encrypted object lies at its store: AES-256-GCM in frames, so that ranges of it can still be read.

An object of n plain bytes is stored as a header of 40 bytes and ceil(n / 65536) frames, at least one, each 65,536 plain
bytes (the last one what is left) and a tag of 16:

    header   b"SHOALE01", 32 random bytes: the salt
    key      HKDF-SHA256(the store's key, salt, info = b"shoal object v1"), for this object alone
    nonce    12 bytes: the frame's number in 11, big-endian, then 1 for the last frame and 0 for the others
    data     authenticated beside each frame: the header, then the object's key as UTF-8

The construction is STREAM (Hoang, Reyhanitabar, Rogaway, Vizar: 2015); with a key for each object a counter is a safe
nonce. So frames cannot be changed, left out, put in another order, or taken from another object or from another writing
of the same; an object cannot be cut short or made longer, and none can be put in the place of another. What stays
visible: names, sizes, times, and that an object was written anew. An old object in the place of a newer one of the same
name is not noticed, since nothing here remembers: manifests are signed, and shards are named by their content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from node.origin.encryption.keys import SALT_BYTES, object_key

FRAME_BYTES = 65_536
TAG_BYTES = 16
MAGIC = b"SHOALE01"
HEADER_BYTES = len(MAGIC) + SALT_BYTES

STORED_FRAME = FRAME_BYTES + TAG_BYTES


def stored_size(size: int) -> int:
    """Bytes that an object of `size` plain bytes has at the store."""
    return HEADER_BYTES + size + TAG_BYTES * frames_of(size)


def plain_size(stored: int) -> int:
    """Plain bytes of an object that has `stored` bytes at the store. ValueError where none of ours has as many."""
    inner = stored - HEADER_BYTES
    size = inner - TAG_BYTES * max(1, -(-inner // STORED_FRAME))
    if size < 0 or stored_size(size) != stored:
        raise ValueError(f"no encrypted object has {stored} bytes")
    return size


def frames_of(size: int) -> int:
    return max(1, -(-size // FRAME_BYTES))


@dataclass(frozen=True, slots=True)
class ObjectCipher:
    """The frames of one object."""

    cipher: AESGCM
    beside: bytes
    size: int
    """Plain bytes of the whole object: they say which frame is the last."""

    @classmethod
    def of(cls, key: bytes, header: bytes, name: str, size: int) -> ObjectCipher:
        """`header` has been checked."""
        return cls(AESGCM(object_key(key, header[len(MAGIC) :])), header + name.encode(), size)

    def seal(self, index: int, plain: bytes) -> bytes:
        return self.cipher.encrypt(self._nonce(index), plain, self.beside)

    def open_frames(self, first: int, stored: bytes) -> bytes:
        """The plain bytes of whole frames, from the one with the number `first` on. InvalidTag if one is not it."""
        parts = []
        for at in range(0, len(stored), STORED_FRAME):
            frame = stored[at : at + STORED_FRAME]
            parts.append(self.cipher.decrypt(self._nonce(first), frame, self.beside))
            first += 1
        return b"".join(parts)

    def stored_span(self, start: int, end: int) -> tuple[int, int]:
        """Where the frames are that have the plain bytes [start, end)."""
        first, last = start // FRAME_BYTES, frames_of(end)
        return HEADER_BYTES + first * STORED_FRAME, min(HEADER_BYTES + last * STORED_FRAME, stored_size(self.size))

    def _nonce(self, index: int) -> bytes:
        return index.to_bytes(11, "big") + bytes([index == frames_of(self.size) - 1])


def open_all(cipher: ObjectCipher, ranges: Sequence[tuple[int, int]], stored: Sequence[bytes]) -> list[bytes]:
    """The plain bytes of ranges, none of them empty, out of the frames around each. InvalidTag."""
    plain = []
    for (start, end), frames in zip(ranges, stored, strict=True):
        first = start // FRAME_BYTES
        whole = cipher.open_frames(first, frames)
        plain.append(whole[start - first * FRAME_BYTES : end - first * FRAME_BYTES])
    return plain
