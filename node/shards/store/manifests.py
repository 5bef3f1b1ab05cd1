"""The manifests of folders on this machine: read, signed, written; the names of folders and shards that they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from node.files import UNFINISHED_SUFFIXES, Fingerprint, atomic_write
from protocol.errors import InvalidManifestError
from protocol.ids import ManifestDigest
from protocol.manifest import (
    MANIFEST_FILENAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    Shard,
    ShardEntry,
    SignedManifest,
    is_letter_or_digit,
    manifest_from_wire,
    safe_filename,
    sign_manifest,
)
from protocol.signing import SigningKey
from protocol.structs import prepared


@dataclass(frozen=True)
class LocalManifest:
    """The manifest of a folder on this machine."""

    folder: Path
    signed: SignedManifest
    fingerprint: Fingerprint
    """Of the manifest file."""

    @property
    def digest(self) -> ManifestDigest:
        return self.signed.digest

    @cached_property
    def fetched(self) -> bool:
        """Whether the folder was made for a download, and goes when its last shard is evicted."""
        return self.folder.name in folder_names(self.signed.manifest.name, self.digest)

    @cached_property
    def entries(self) -> Mapping[str, ShardEntry]:
        """By file name."""
        return {entry.filename: entry for entry in self.signed.manifest.shards}


def sign_loose(entry: ShardEntry, key: SigningKey) -> Shard:
    """Make the manifest of a loose file. Raises InvalidManifestError for a name that peers would refuse."""
    return sign_manifest(Manifest(name=entry.filename, kind="file", shards=(entry,)), key).shard(0)


def read_manifest(path: Path, key: SigningKey) -> SignedManifest | None:
    """Read `manifest.json`: unsigned as `split` writes it, then signed with `key`, or signed by whoever published it.

    None for JSON that is about something else: other tools call their files so too. Raises InvalidManifestError for
    what claims to be ours and is not in order, and for what is not JSON.
    """
    try:
        with path.open("rb") as file:
            text = file.read(2 * MAX_MANIFEST_BYTES + 1)
    except OSError as err:
        raise InvalidManifestError(f"cannot read {path.name}: {err.strerror}") from None
    if len(text) > 2 * MAX_MANIFEST_BYTES:
        raise InvalidManifestError(f"{path.name} is above {2 * MAX_MANIFEST_BYTES} bytes")
    try:
        value: Any = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as err:
        raise InvalidManifestError(f"{path.name} is not JSON: {err}") from None
    if not isinstance(value, dict) or "manifest" not in value:
        return None
    if "signature" in value:
        signed = manifest_from_wire(value)
    else:
        signed = _sign(value["manifest"], path, key)
    for entry in signed.manifest.shards:
        shard_path(path.parent, entry)
    return signed


def _sign(value: Any, path: Path, key: SigningKey) -> SignedManifest:
    try:
        manifest = msgspec.convert(value, prepared(Manifest))
    except msgspec.ValidationError as err:
        raise InvalidManifestError(f"{path.name} is not a manifest: {err}") from None
    return sign_manifest(manifest, key)


def write_manifest(folder: Path, signed: SignedManifest) -> None:
    """Write the signed manifest into `folder`, whole or not at all. Raises OSError."""
    atomic_write(folder / MANIFEST_FILENAME, msgspec.json.encode(signed), "contents")


def shard_path(folder: Path, entry: ShardEntry) -> Path:
    """The path of a shard. Raises InvalidManifestError for a name that leads out, hides it, or hits our own files."""
    name = safe_filename(entry.filename)
    if name.casefold() == MANIFEST_FILENAME or name.lower().endswith(UNFINISHED_SUFFIXES):
        raise InvalidManifestError(f"a shard cannot be called {name!r} on a node's disk: rename it and publish again")
    return folder / name


def folder_names(name: str, digest: ManifestDigest) -> tuple[str, str]:
    """Names of the folder for a fetched manifest: the usual one, and the one to take if that is another's.

    The name comes from a peer: what could lead out of the folder, or hide it, is replaced.
    """
    plain = name.replace("/", "--")
    safe = "".join(one if one in "._+ -" or is_letter_or_digit(one) else "_" for one in plain)
    safe = safe.strip(" .").encode()[:100].decode(errors="ignore") or "unnamed"
    return safe_filename(f"{safe}@{digest[:12]}"), safe_filename(f"{safe}@{digest}")
