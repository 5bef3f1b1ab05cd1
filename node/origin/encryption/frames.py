"""The format of an encrypted object: AES-256-GCM in frames, so that ranges of it can be read.

An object of n plain bytes is stored as a header of 40 bytes and ceil(n / 65536) frames, at least one, each 65,536 plain
bytes (the last one: the rest) and a tag of 16:

    header   b"SHOALE01", 32 random bytes: the salt
    key      HKDF-SHA256(the operator's key, salt, info = b"shoal object v1"), for this object only
    nonce    12 bytes: the frame's number in 11, big-endian, then 1 for the last frame and 0 for the others
    data     authenticated with each frame: the header, then the object's key as UTF-8

The construction is STREAM (Hoang, Reyhanitabar, Rogaway, Vizar: 2015); with a key for each object a counter is a safe
nonce. So frames cannot be changed, left out, reordered, or taken from another object or an earlier version of the same;
an object cannot be cut short or made longer, and none can replace another. Visible are names, sizes, times, and that an
object was written again. An old version in place of a newer one of the same name is not noticed, since nothing here
remembers versions: manifests are signed, and shards are named by their content.
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
    """Bytes of an encrypted object of `size` plain bytes."""
    return HEADER_BYTES + size + TAG_BYTES * frames_of(size)


def plain_size(stored: int) -> int:
    """Plain bytes of an encrypted object of `stored` bytes. Raises ValueError if none has so many."""
    inner = stored - HEADER_BYTES
    size = inner - TAG_BYTES * max(1, -(-inner // STORED_FRAME))
    if size < 0 or stored_size(size) != stored:
        raise ValueError(f"no encrypted object has {stored} bytes")
    return size


def frames_of(size: int) -> int:
    """The number of frames of `size` plain bytes."""
    return max(1, -(-size // FRAME_BYTES))


@dataclass(frozen=True, slots=True)
class ObjectCipher:
    """Encrypts and decrypts the frames of one object."""

    cipher: AESGCM
    associated: bytes
    """Authenticated with each frame: header and name."""
    size: int
    """Plain bytes of the whole object: they say which frame is the last."""

    @classmethod
    def of(cls, key: bytes, header: bytes, name: str, size: int) -> ObjectCipher:
        """`key` is the operator's, `header` the object's, checked before, and `name` its key in the store."""
        return cls(AESGCM(object_key(key, header[len(MAGIC) :])), header + name.encode(), size)

    def seal(self, index: int, plain: bytes) -> bytes:
        """The frame of this number."""
        return self.cipher.encrypt(self._nonce(index), plain, self.associated)

    def open_frames(self, first: int, stored: bytes) -> bytes:
        """The plain bytes of whole frames, the first of which has the number `first`. Raises InvalidTag."""
        parts = []
        for at in range(0, len(stored), STORED_FRAME):
            frame = stored[at : at + STORED_FRAME]
            parts.append(self.cipher.decrypt(self._nonce(first), frame, self.associated))
            first += 1
        return b"".join(parts)

    def stored_span(self, start: int, end: int) -> tuple[int, int]:
        """The stored bytes [start, end) of the frames that have the plain bytes [start, end)."""
        first, last = start // FRAME_BYTES, frames_of(end)
        return HEADER_BYTES + first * STORED_FRAME, min(HEADER_BYTES + last * STORED_FRAME, stored_size(self.size))

    def _nonce(self, index: int) -> bytes:
        return index.to_bytes(11, "big") + bytes([index == frames_of(self.size) - 1])


def open_all(cipher: ObjectCipher, ranges: Sequence[tuple[int, int]], stored: Sequence[bytes]) -> list[bytes]:
    """The plain bytes of ranges that are not empty, from the stored frames around each. Raises InvalidTag."""
    plain = []
    for (start, end), frames in zip(ranges, stored, strict=True):
        first = start // FRAME_BYTES
        whole = cipher.open_frames(first, frames)
        plain.append(whole[start - first * FRAME_BYTES : end - first * FRAME_BYTES])
    return plain
