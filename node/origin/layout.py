"""Where the objects of a model or data set lie under an origin's URL, and how their names are read back.

    shards/<content id>                               a shard's bytes, zeros behind them up to the store's least size
    torrents/<content id>.torrent                     of a shard of several pieces: their hashes (BEP 52)
    manifests/<name>/<13 digits>-<digest>.json        a signed manifest, by the milliseconds since 1970

No name is ever written twice with other bytes: some stores forbid it. A manifest gets a new name each time, and the
newest valid one is the latest.
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
"""Bytes of a manifest's object at most; JSON takes more than the canonical body."""
_TORRENT_HEAD_BYTES = 4096
"""A torrent file without its piece layer: names of at most 200 bytes, twice, and some numbers."""
_MAX_COMPONENT = 180
"""Bytes of a name's component; file systems take 255."""
_MAX_NESTING = 16
_STAMPED = re.compile(r"(\d{13})-([0-9a-f]{64})\.json")
_ADDRESS = re.compile(r"[a-z][a-z0-9+-]*://\S+")


class ManifestKey(NamedTuple):
    """What the name of a manifest's object says; in the order of time."""

    written_ms: int
    """Since 1970, by the publisher's clock."""
    digest: ManifestDigest
    key: str


def shard_key(content_id: ContentId) -> str:
    return f"shards/{content_id}"


def torrent_key(content_id: ContentId) -> str:
    return f"torrents/{content_id}.torrent"


def manifest_folder(name: str) -> str:
    """The prefix under which the manifests of a model, data set or file of this name lie."""
    return MANIFESTS + "".join(f"{_component(part)}/" for part in name.split("/"))


def manifest_key(name: str, digest: ManifestDigest, written_ms: int) -> str:
    return f"{manifest_folder(name)}{written_ms:013d}-{digest}.json"


def parse_manifest_key(key: str) -> ManifestKey | None:
    """Read the name of a manifest's object; None for anything else."""
    found = _STAMPED.fullmatch(key.rpartition("/")[2])
    return ManifestKey(int(found[1]), ManifestDigest(found[2]), key) if found else None


def _component(text: str) -> str:
    """A component as every store takes it: other than letters, digits, `.`, `_` and `-`, each byte is `~` and hex."""
    safe = re.sub(rb"[^A-Za-z0-9._-]", lambda found: b"~%02X" % ord(found[0]), text.encode()).decode()
    if safe.strip(".") and len(safe) <= _MAX_COMPONENT:
        return safe
    return f"{safe.replace('.', '~2E')[:100]}~~{hashlib.sha256(text.encode()).hexdigest()[:40]}"


def is_address(name: str) -> bool:
    """Whether what stands where a name may stand is the URL of a manifest."""
    return _ADDRESS.fullmatch(name) is not None


def split_address(url: str) -> tuple[str, str]:
    """The URL of a manifest, or of a folder of them, as (the origin's URL, the key under it, percent signs decoded).

    Of `.../manifests/NAME/...`, where the name may be `OWNER/NAME`, the origin is what stands before; of any other
    address, the folder of the object. Where either could be meant, the origin is the longer one.
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
    """As it is stored: JSON, and spaces up to the least size of an object."""
    return msgspec.json.encode(signed).ljust(min_bytes)


def decode_manifest(body: bytes) -> SignedManifest:
    """Read and check a stored manifest. Raises InvalidManifestError."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as err:
        raise InvalidManifestError(f"it is not JSON: {err}") from None
    if isinstance(value, dict) and "manifest" in value and "signature" not in value:
        raise InvalidManifestError("it is not signed; publish with --origin writes a signed one")
    return manifest_from_wire(value)


def layer_bytes(size: int) -> int:
    """Length of the piece layer of a file of `size` bytes; 0 where it is no longer than one piece (BEP 52)."""
    pieces = -(-size // piece_length(size))
    return 32 * pieces if pieces > 1 else 0


def max_torrent_bytes(size: int) -> int:
    """The most that the torrent file of a shard of `size` bytes may have."""
    return layer_bytes(size) + _TORRENT_HEAD_BYTES


def layer_in_torrent(torrent: bytes, content_id: ContentId) -> bytes:
    """The piece layer of a file in a torrent file, unchecked; empty where it is not there (BEP 3, BEP 52)."""
    try:
        layers = _entry(torrent, 0, b"piece layers")
        found = _entry(torrent, layers, bytes.fromhex(content_id)) if layers is not None else None
        return _text(torrent, found)[0] if found is not None else b""
    except (ValueError, IndexError):
        return b""


def _entry(data: bytes, start: int, key: bytes) -> int | None:
    """Where in the bencoded dictionary at `start` the value of `key` begins. Raises ValueError, IndexError."""
    if data[start : start + 1] != b"d":
        raise ValueError("no dictionary")
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
    """The bencoded text at `at`, and where it ends."""
    colon = data.index(b":", at, at + 12)
    length = int(data[at:colon])
    end = colon + 1 + length
    if length < 0 or end > len(data):
        raise ValueError("a text is cut off")
    return data[colon + 1 : end], end
