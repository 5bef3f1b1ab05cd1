"""Ed25519 keys (RFC 8032): a node's identity, and its signature under manifests and records."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.ids import NodeId

SIGNATURE_BYTES = 64


class SigningKey:
    """A private key. Its public half is the node id."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.node_id = NodeId(self._key.public_key().public_bytes_raw().hex())

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(os.urandom(32))

    @classmethod
    def load_or_create(cls, path: Path) -> SigningKey:
        """Read the 32-byte seed at `path`, or make one there, readable by its owner alone (0600).

        Raises ValueError for a file of another length: a damaged key must not become a new identity.
        """
        try:
            seed = path.read_bytes()
        except FileNotFoundError:
            seed = os.urandom(32)
            # Whole or not there: a crash in between must not leave an empty file that no start can use.
            partial = path.with_name(f"{path.name}.{os.getpid()}.new")
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(seed)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        if len(seed) != 32:
            raise ValueError(
                f"{path} holds {len(seed)} bytes, a node key has 32; restore it, or delete it for a new identity"
            )
        return cls(seed)

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


def is_signed_by(node_id: NodeId, message: bytes, signature: bytes) -> bool:
    """Whether `signature` over `message` is the one of `node_id`."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(node_id)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
