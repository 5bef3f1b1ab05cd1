"""The key that an operator gives, and the keys of objects that are derived from it."""

from __future__ import annotations

import re
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocol.errors import InvalidParamsError

KEY_BYTES = 32
SALT_BYTES = 32


def read_key_file(path: Path) -> bytes:
    """The 32 bytes of a key file: 64 hexadecimal digits, with white space around them or not.

    Raises InvalidParamsError if the file cannot be read or holds anything else; the message does not show its content.
    """
    try:
        raw = path.read_bytes().strip()
    except OSError as error:
        raise InvalidParamsError(f"the encryption key file {path} cannot be read: {error.strerror}") from None
    if not re.fullmatch(rb"[0-9a-fA-F]{64}", raw):
        raise InvalidParamsError(
            f"the encryption key file {path} must hold 64 hexadecimal digits, and has {len(raw)} other bytes "
            "(openssl rand -hex 32 makes a key)"
        )
    return bytes.fromhex(raw.decode())


def check_key_length(key: bytes) -> bytes:
    """The key itself. Raises InvalidParamsError if it does not have KEY_BYTES bytes."""
    if len(key) != KEY_BYTES:
        raise InvalidParamsError(f"the encryption key has {len(key)} bytes; it must have {KEY_BYTES}")
    return key


def object_key(key: bytes, salt: bytes) -> bytes:
    """The AES-256 key of one object: HKDF-SHA256 (RFC 5869) of the operator's key and the object's random salt."""
    return HKDF(SHA256(), KEY_BYTES, salt, b"shoal object v1").derive(key)
