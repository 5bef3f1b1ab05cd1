"""The manifest: the signed list of a model's or data set's shards.

Its digest is the SHA-256 of its canonical body, which names content and nothing else: two nodes that cut the
same model apart get the same digest, whoever signs. Origins, info hashes and dates are not part of it.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgpack
import msgspec

from protocol.errors import InvalidManifestError, ShardNotFoundError
from protocol.ids import ContentId, ManifestDigest, NodeId, ShardId
from protocol.signing import SigningKey, is_signed_by
from protocol.structs import prepared

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MANIFEST_FILENAME = "manifest.json"

ShardKind = Literal["gguf", "parquet", "file"]
_COMPONENT = r"[^/\\\x00-\x1f\x7f]+"
FileName = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=rf"^{_COMPONENT}\Z")]
"""One path component as a peer may name it; `safe_filename` refuses the rest."""
ManifestName = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=rf"^{_COMPONENT}(/{_COMPONENT})?\Z")]
"""`name` or `owner/name`."""
MAX_ORIGINS = 8
OriginText = Annotated[
    str, msgspec.Meta(min_length=5, max_length=500, pattern=r"^[a-z][a-z0-9+-]*://[^\s\x00-\x1f\x7f?#@]+\Z")
]
"""Where objects are, as a URL: `o3://bucket/prefix`. It carries no credentials."""


class ShardEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One shard of a manifest."""

    shard_id: ShardId
    filename: FileName
    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    """Bytes."""
    content_id: ContentId
    kind: ShardKind
    start_layer: Annotated[int, msgspec.Meta(ge=0, le=100_000)] | None = None
    """First layer of a model shard, in the whole model's numbering."""
    end_layer: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    """One past its last layer."""
    rows: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] | None = None
    """Rows of a parquet shard, as its publisher counted them."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a planner needs to know of a model before any shard is here."""

    architecture: Annotated[str, msgspec.Meta(max_length=64)]
    n_layers: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    n_embd: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    context_length: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    """Tokens the model was trained for."""
    kv_bytes_per_token_layer: Annotated[int, msgspec.Meta(ge=0, le=1 << 32)] = 0
    """Key and value cache of one token in one layer at 16 bits, in bytes."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A model (`kind` "model"), a data set, or a single file (a manifest of one)."""

    version: Literal[1] = 1
    name: ManifestName
    kind: Literal["model", "dataset", "file"]
    shards: Annotated[tuple[ShardEntry, ...], msgspec.Meta(min_length=1, max_length=20_000)]
    model: ModelInfo | None = None

    def canonical_body(self) -> bytes:
        """The bytes that are digested and signed: MessagePack of this struct, keys sorted at every level."""
        return bytes(msgpack.packb(_sorted(msgspec.to_builtins(self))))

    @functools.cached_property
    def digest(self) -> ManifestDigest:
        return ManifestDigest(hashlib.sha256(self.canonical_body()).hexdigest())

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.shards)

    def shard(self, shard_id: int) -> ShardEntry:
        """The shard of that number. Raises ShardNotFoundError if there is none."""
        if not 0 <= shard_id < len(self.shards):
            raise ShardNotFoundError(
                f"{self.name} has no shard {shard_id}: its shards are 0 to {len(self.shards) - 1}",
                {"name": self.name, "digest": self.digest, "shards": len(self.shards)},
            )
        return self.shards[shard_id]


class SignedManifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A manifest with its publisher and their signature."""

    manifest: Manifest
    publisher: NodeId
    signature: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]
    origins: Annotated[tuple[OriginText, ...], msgspec.Meta(max_length=MAX_ORIGINS)] = ()
    """Where the publisher put the shards, best first; signed, but not part of the digest, which names content alone."""

    @property
    def digest(self) -> ManifestDigest:
        return self.manifest.digest

    def shard(self, shard_id: int) -> Shard:
        """Raise ShardNotFoundError if the manifest has no shard of that number."""
        return Shard(self, self.manifest.shard(shard_id))


@dataclass(frozen=True, slots=True, order=True)
class ShardRef:
    """Names one shard: the manifest's digest and the shard's number in it."""

    digest: ManifestDigest
    shard_id: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard with the signed manifest that lists it."""

    signed: SignedManifest
    entry: ShardEntry

    def __hash__(self) -> int:
        return hash(self.ref)

    @property
    def ref(self) -> ShardRef:
        return ShardRef(self.signed.digest, self.entry.shard_id)

    @property
    def digest(self) -> ManifestDigest:
        """Of the manifest."""
        return self.signed.digest

    @property
    def manifest(self) -> Manifest:
        return self.signed.manifest

    @property
    def label(self) -> str:
        """For messages: `shard 0 of 'my-model' (my-model-00000.gguf)`."""
        return f"shard {self.entry.shard_id} of {self.manifest.name!r} ({self.entry.filename})"


def sign_manifest(manifest: Manifest, key: SigningKey, origins: Iterable[str] = ()) -> SignedManifest:
    """Sign a manifest. Raises InvalidManifestError for one that `manifest_from_wire` would refuse."""
    unsigned = SignedManifest(manifest=manifest, publisher=key.node_id, signature="0" * 128, origins=tuple(origins))
    try:
        msgspec.convert(msgspec.to_builtins(unsigned), prepared(SignedManifest))
    except msgspec.ValidationError as err:
        raise InvalidManifestError(f"{manifest.name!r} is not a manifest: {err}") from None
    check_manifest(manifest)
    signature = key.sign(_signed_bytes(manifest, unsigned.origins)).hex()
    return msgspec.structs.replace(unsigned, signature=signature)


def manifest_from_wire(value: object, expected: ManifestDigest | None = None) -> SignedManifest:
    """Decode and check a manifest from a peer, an origin or a file.

    Raises InvalidManifestError for wrong types, names that could leave a folder, layers that do not join, a
    signature that is not the publisher's, or another digest than `expected`.
    """
    try:
        signed = msgspec.convert(value, prepared(SignedManifest))
    except msgspec.ValidationError as err:
        raise InvalidManifestError(f"not a signed manifest: {err}") from None
    check_manifest(signed.manifest)
    body = _signed_bytes(signed.manifest, signed.origins)
    if not is_signed_by(signed.publisher, body, bytes.fromhex(signed.signature)):
        raise InvalidManifestError(
            f"the signature of manifest {signed.manifest.name!r} is not that of its publisher {signed.publisher}"
        )
    if expected is not None and signed.digest != expected:
        raise InvalidManifestError(
            f"asked for manifest {expected}, was given {signed.digest}",
            {"expected": expected, "found": signed.digest},
        )
    return signed


def check_manifest(manifest: Manifest) -> None:
    """Raise InvalidManifestError unless ids count from 0, names are safe and unique, layers join, and it is small."""
    for component in manifest.name.split("/"):
        safe_filename(component)
    names: set[str] = set()
    next_layer = 0
    for index, entry in enumerate(manifest.shards):
        if entry.shard_id != index:
            raise InvalidManifestError(f"shard {index} of {manifest.name!r} is numbered {entry.shard_id}")
        safe_filename(entry.filename)
        if entry.filename in names:
            raise InvalidManifestError(f"{manifest.name!r} names {entry.filename!r} twice")
        names.add(entry.filename)
        if manifest.kind == "model":
            start, end = entry.start_layer, entry.end_layer
            if start != next_layer or end is None or end <= next_layer:
                raise InvalidManifestError(
                    f"shard {index} of {manifest.name!r} holds layers [{start}, {end}), expected start {next_layer}"
                )
            next_layer = end
    if manifest.kind == "model" and (manifest.model is None or manifest.model.n_layers != next_layer):
        raise InvalidManifestError(f"the shards of {manifest.name!r} end at layer {next_layer}, the model does not")
    if manifest.kind == "file" and len(manifest.shards) != 1:
        raise InvalidManifestError(f"{manifest.name!r} is a single file but lists {len(manifest.shards)} shards")
    size = len(manifest.canonical_body())
    if size > MAX_MANIFEST_BYTES:
        raise InvalidManifestError(f"{manifest.name!r} takes {size} bytes, a manifest at most {MAX_MANIFEST_BYTES}")


def safe_filename(name: str) -> str:
    """Return a peer's file name unchanged, or raise InvalidManifestError if it could mean another folder."""
    if (
        not name
        or name.startswith(".")
        or re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", name)
        or len(name.encode()) > 200
    ):
        raise InvalidManifestError(f"{name!r} is not a plain file name")
    return name


def is_letter_or_digit(character: str) -> bool:
    """Whether it is one in any script, vowel signs and accents of their own among them."""
    return unicodedata.category(character)[0] in "LMN"


def readable_name(text: str, other: str) -> str:
    """The text as a name that can be typed and be a folder: letters and digits of every script, `.`, `_` and `-`.

    Each run of anything else becomes `other`; at most 100 bytes, cut between characters.
    """
    kept = "".join(one if one in "._-" or is_letter_or_digit(one) else " " for one in text)
    return re.sub(" +", other, kept.strip(" .-")).encode()[:100].decode(errors="ignore").rstrip(" .-")


def split_name(name: str) -> tuple[str, str]:
    """Split `name@digest` into both; the digest is empty if there is none. A bare digest is both."""
    plain, at, digest = name.rpartition("@")
    if at and plain and re.fullmatch(r"[0-9a-f]{8,64}", digest):
        return plain, digest
    return name, name if re.fullmatch(r"[0-9a-f]{64}", name) else ""


def _signed_bytes(manifest: Manifest, origins: tuple[str, ...]) -> bytes:
    if not origins:
        return b"shoal-manifest-v1\0" + manifest.canonical_body()
    return b"shoal-manifest-origins-v1\0" + bytes(msgpack.packb([manifest.canonical_body(), list(origins)]))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value
