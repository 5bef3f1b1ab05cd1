"""LOAD_SHARD, FETCH_SHARD, UNLOAD_SHARD, EVICT_SHARD, UNPIN, LIST_FILES, GET_MANIFEST."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocol.commands.common import NameOrDigest, Params, Result, ShardSelector
from protocol.commands.leases import DEFAULT_TTL_S, LeaseName, LeaseTtl
from protocol.ids import ContentId, InfoHash, ManifestDigest, ShardId
from protocol.manifest import SignedManifest


class LoadShardParams(Params, frozen=True, kw_only=True):
    """LOAD_SHARD: have the shard here, checked, and loaded by a stage."""

    model: NameOrDigest | None = None
    """Without it, the only model of the cluster."""
    shard_id: ShardId
    wait: bool = True
    """False: answer at once, with status "loading" unless it is loaded already, and go on in the background; `source`
    then says nothing yet."""


class FetchShardParams(ShardSelector, frozen=True, kw_only=True):
    """FETCH_SHARD: have the shard on disk, checked; without a lease also pinned."""

    wait: bool = True
    """As for LOAD_SHARD, with status "fetching"."""
    lease: LeaseName | None = None
    """Hold the shard by this lease from now on: it is not evicted before the lease expires or is released. What comes
    for a lease gets no pin."""
    ttl_s: LeaseTtl = DEFAULT_TTL_S
    """Seconds from when the shard is here until the lease expires; while it is fetched it does not."""


class UnloadShardParams(ShardSelector, frozen=True, kw_only=True):
    """UNLOAD_SHARD: free the memory, keep the file."""


class EvictShardParams(ShardSelector, frozen=True, kw_only=True):
    """EVICT_SHARD: stop seeding and delete the file, a pinned one too, unless a lease holds it."""


class UnpinParams(ShardSelector, frozen=True, kw_only=True):
    """UNPIN: the shard, or without `shard_id` all shards of the model or data set that are here, stay no longer than
    leases hold them: RELEASE with `evict` deletes them.
    """


class UnpinResult(Result, frozen=True, kw_only=True):
    """Answer of UNPIN."""

    digest: ManifestDigest
    shard_ids: list[int]
    """Those whose pin ended; others that were named had none."""
    bytes: int
    """Their size."""
    evictable_bytes: int
    """Size of all shards that were named and are here, less those that a lease holds or a stage has loaded."""


ShardSource = Literal["local", "peers", "origin"]


class ShardResult(Result, frozen=True, kw_only=True):
    """Answer of LOAD_SHARD, FETCH_SHARD, UNLOAD_SHARD and EVICT_SHARD."""

    shard_id: int
    status: Literal["loaded", "loading", "fetched", "fetching", "unloaded", "evicted"]
    path: str
    """On the node's machine; its former path, for an evicted one."""
    source: ShardSource
    """Where most of the bytes came from in this request; "local" if none moved."""
    bytes: int
    """Size of the shard."""
    seconds: float
    content_id: ContentId
    bytes_by_source: dict[str, int] = msgspec.field(default_factory=dict)
    """Payload bytes that this request moved, by source."""


class Progress(Result, frozen=True, kw_only=True):
    """PROGRESS notification of LOAD_SHARD, FETCH_SHARD and PUBLISH."""

    request_id: str
    shard_id: int
    phase: Literal["finding", "downloading", "verifying", "loading", "uploading"]
    bytes_done: int
    bytes_total: int
    rate_bytes_s: float
    peers: int


class ListFilesParams(Params, frozen=True, kw_only=True):
    """LIST_FILES."""


FileState = Literal["hashing", "seeding", "downloading", "loaded", "invalid"]


class FileInfo(Result, frozen=True, kw_only=True, omit_defaults=True):
    """One shard file of a node."""

    filename: str
    """Relative to the shards folder."""
    size: int
    kind: str
    state: FileState
    info_hash: InfoHash | None = None
    content_id: ContentId | None = None
    model: str | None = None
    dataset: str | None = None
    shard_id: int | None = None
    error: str | None = None
    """Why it is invalid."""
    leases: int = 0
    """How many leases hold it."""
    pinned: bool = False
    """Whether it stays until UNPIN or EVICT_SHARD; False also in the answer of a node that does not know pins."""


class ListFilesResult(Result, frozen=True, kw_only=True):
    """Answer of LIST_FILES."""

    files: list[FileInfo]


class GetManifestParams(Params, frozen=True, kw_only=True):
    """GET_MANIFEST."""

    name: NameOrDigest | None = None
    """Of a model, a data set or a single file; or the URL of a manifest at an origin."""
    model: NameOrDigest | None = None
    dataset: NameOrDigest | None = None
    digest: ManifestDigest | None = None


class GetManifestResult(Result, frozen=True, kw_only=True):
    """Answer of GET_MANIFEST."""

    signed: SignedManifest
    digest: ManifestDigest
