"""The identifiers that cross the wire, each a type of its own.

At run time each is a string of lowercase hex, so it reads the same in MessagePack, in JSON and in a log; the
pattern is checked wherever msgspec decodes one. `bytes.fromhex` and `.hex()` turn it into the raw form that
compact records use.
"""

from __future__ import annotations

from typing import Annotated, NewType

import msgspec

ContentId = NewType("ContentId", Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")])
"""BitTorrent v2 Merkle root (BEP 52, SHA-256 over 16 KiB leaves) of a shard's bytes: 64 hex digits."""

InfoHash = NewType("InfoHash", Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})\Z")])
"""SHA-256 of a v2 torrent's info dictionary (64 hex digits), or SHA-1 of a v1 one (40)."""

ManifestDigest = NewType("ManifestDigest", Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")])
"""SHA-256 of a manifest's canonical body: 64 hex digits."""

NodeId = NewType("NodeId", Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")])
"""A node's ed25519 public key: 64 hex digits."""

ShardId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]
"""A shard's number in its manifest, from 0."""

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
