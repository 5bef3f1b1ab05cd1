"""The keys of a model's or data set's objects under an origin's URL, and what is read out of keys and objects.

    shards/<content id>                               a shard's bytes, padded with zeros to the store's least size
    torrents/<content id>.torrent                     the hashes of a shard of several pieces (BEP 52)
    manifests/<name>/<13 digits>-<digest>.json        a signed manifest, by the milliseconds since 1970

No key is written twice with other bytes: some stores forbid that. A manifest gets a new key each time it is published,
and the newest valid one counts.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple
from urllib.parse import unquote

import msgspec

from protocol.content import piece_length
from protocol.errors import InvalidManifestError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import MAX_MANIFEST_BYTES, SignedManifest, manifest_from_wire

MANIFESTS = "manifests/"
MAX_MANIFEST_JSON = 2 * MAX_MANIFEST_BYTES
"""The most bytes of a manifest's object; JSON is longer than the canonical body."""
_TORRENT_HEAD_BYTES = 4096
"""A torrent file without its piece layer: twice a name of at most 200 bytes, and some numbers."""
_MAX_COMPONENT = 180
"""Bytes of one component of a name; file systems take 255."""
_MAX_NESTING = 16
_STAMPED = re.compile(r"(\d{13})-([0-9a-f]{64})\.json")
_ADDRESS = re.compile(r"[a-z][a-z0-9+-]*://\S+")


class ManifestKey(NamedTuple):
    """What the key of a manifest's object says. Keys compare by their time."""

    written_ms: int
    """Milliseconds since 1970, by the publisher's clock."""
    digest: ManifestDigest
    key: str


def shard_key(content_id: ContentId) -> str:
    """The key of a shard's bytes."""
    return f"shards/{content_id}"


def torrent_key(content_id: ContentId) -> str:
    """The key of a shard's torrent file."""
    return f"torrents/{content_id}.torrent"


def manifest_folder(name: str) -> str:
    """The prefix of the keys of all manifests of this name."""
    return MANIFESTS + "".join(f"{_component(part)}/" for part in name.split("/"))


def manifest_key(name: str, digest: ManifestDigest, written_ms: int) -> str:
    """The key of a manifest that was written at `written_ms`, milliseconds since 1970."""
    return f"{manifest_folder(name)}{written_ms:013d}-{digest}.json"


def parse_manifest_key(key: str) -> ManifestKey | None:
    """Read the key of a manifest's object; None for any other key."""
    found = _STAMPED.fullmatch(key.rpartition("/")[2])
    return ManifestKey(int(found[1]), ManifestDigest(found[2]), key) if found else None


def _component(text: str) -> str:
    """A component that every store takes: a byte other than letters, digits, `.`, `_` and `-` becomes `~` and hex."""
    safe = re.sub(rb"[^A-Za-z0-9._-]", lambda found: b"~%02X" % ord(found[0]), text.encode()).decode()
    if safe.strip(".") and len(safe) <= _MAX_COMPONENT:
        return safe
    return f"{safe.replace('.', '~2E')[:100]}~~{hashlib.sha256(text.encode()).hexdigest()[:40]}"


def is_address(name: str) -> bool:
    """Whether a text in the place of a name is the URL of a manifest."""
    return _ADDRESS.fullmatch(name) is not None


def split_address(url: str) -> tuple[str, str]:
    """The URL of a manifest, or of a folder of manifests, as (URL of the origin, key under it, percent signs decoded).

    The origin is what comes before `/manifests/NAME/` or `/manifests/OWNER/NAME/`; in any other URL, the folder of the
    object. If a URL can be read in two ways, the origin is the longer one.
    """
    scheme, _, path = url.partition("://")
    steps = path.split("/")
    last = len(steps) - 1
    starts = [at for at, step in enumerate(steps) if step == MANIFESTS[:-1] and 0 < at < last]
    objects = int(steps[last].endswith(".json"))
    named = [at for at in starts if 1 <= sum(map(bool, steps[at + 1 :])) - objects <= 2]
    begin = max(named or starts or [last])
    return f"{scheme}://{'/'.join(steps[:begin])}", unquote("/".join(steps[begin:]))


def encode_manifest(signed: SignedManifest, min_bytes: int) -> bytes:
    """The manifest's object: JSON, padded with spaces to `min_bytes`."""
    return msgspec.json.encode(signed).ljust(min_bytes)


def decode_manifest(body: bytes) -> SignedManifest:
    """Read and check a manifest's object. Raises InvalidManifestError."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as err:
        raise InvalidManifestError(f"it is not JSON: {err}") from None
    if isinstance(value, dict) and "manifest" in value and "signature" not in value:
        raise InvalidManifestError("it is not signed; publish with --origin writes a signed one")
    return manifest_from_wire(value)


def layer_bytes(size: int) -> int:
    """Bytes of the piece layer of a file of `size` bytes; 0 if the file is no longer than one piece (BEP 52)."""
    pieces = -(-size // piece_length(size))
    return 32 * pieces if pieces > 1 else 0


def max_torrent_bytes(size: int) -> int:
    """The most that the torrent file of a shard of `size` bytes may have."""
    return layer_bytes(size) + _TORRENT_HEAD_BYTES


def layer_in_torrent(torrent: bytes, content_id: ContentId) -> bytes:
    """The piece layer of a file in a torrent file, unchecked; empty if it has none (BEP 3, BEP 52)."""
    try:
        layers = _entry(torrent, 0, b"piece layers")
        found = _entry(torrent, layers, bytes.fromhex(content_id)) if layers is not None else None
        return _text(torrent, found)[0] if found is not None else b""
    except (ValueError, IndexError):
        return b""


def _entry(data: bytes, start: int, key: bytes) -> int | None:
    """Where the value of `key` begins in the bencoded dictionary at `start`. Raises ValueError, IndexError."""
    if data[start : start + 1] != b"d":
        raise ValueError("not a dictionary")
    at = start + 1
    while data[at] != ord("e"):
        name, at = _text(data, at)
        if name == key:
            return at
        at = _behind(data, at)
    return None


def _behind(data: bytes, at: int, depth: int = 0) -> int:
    """Where the bencoded value at `at` ends."""
    if depth > _MAX_NESTING:
        raise ValueError("nested too deep")
    match data[at : at + 1]:
        case b"i":
            return data.index(b"e", at) + 1
        case b"l" | b"d":
            at += 1
            while data[at] != ord("e"):
                at = _behind(data, at, depth + 1)
            return at + 1
        case _:
            return _text(data, at)[1]


def _text(data: bytes, at: int) -> tuple[bytes, int]:
    """The bencoded text at `at`, and where it ends. Raises ValueError."""
    colon = data.index(b":", at, at + 12)
    length = int(data[at:colon])
    end = colon + 1 + length
    if length < 0 or end > len(data):
        raise ValueError("a text is cut off")
    return data[colon + 1 : end], end
