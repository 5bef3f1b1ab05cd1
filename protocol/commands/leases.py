"""RENEW and RELEASE, and what a lease is: a client's hold on shards that it still reads.

A lease begins by FETCH_SHARD with its name. A node keeps leases in memory alone: after its restart RENEW says that
nothing is held, and FETCH_SHARD of a shard that is still there takes the lease again and moves no byte.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from protocol.commands.common import Result, ShardSelector
from protocol.ids import ContentId, ManifestDigest

MIN_TTL_S = 1.0
MAX_TTL_S = 86_400.0
DEFAULT_TTL_S = 600.0
LeaseName = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
"""Chosen by the client: any number of shards may be in one lease, and one shard in any number of leases."""
LeaseTtl = Annotated[float, msgspec.Meta(ge=MIN_TTL_S, le=MAX_TTL_S)]
"""Seconds from now."""


class RenewParams(ShardSelector, frozen=True, kw_only=True):
    """RENEW: the shard, or without one all shards of the lease, are held for at least `ttl_s` from now on.

    What the lease does not hold any more is not taken again: that is FETCH_SHARD's.
    """

    lease: LeaseName
    ttl_s: LeaseTtl = DEFAULT_TTL_S
    """Seconds; a longer time that was given before stands."""


class LeasedShard(Result, frozen=True, kw_only=True):
    """One shard that a lease holds."""

    digest: ManifestDigest
    shard_id: int
    content_id: ContentId
    path: str
    """On the node's machine; empty unless the file is there and checked."""
    expires_in_s: float


class RenewResult(Result, frozen=True, kw_only=True):
    """Answer of RENEW."""

    lease: str
    shards: list[LeasedShard]
    """What it holds, of what was asked for; empty for a lease that has expired or that the node never knew."""


class ReleaseParams(ShardSelector, frozen=True, kw_only=True):
    """RELEASE: the lease holds the shard, or without one any shard, no longer."""

    lease: LeaseName
    evict: bool = False
    """Delete the file as EVICT_SHARD does, unless another lease holds it, a stage has it loaded, it is being fetched,
    or it is pinned; of a shard that is named also if the lease had expired."""


class ReleasedShard(Result, frozen=True, kw_only=True):
    """One shard that was released, or that was named."""

    digest: ManifestDigest
    shard_id: int
    content_id: ContentId
    held: bool
    """Whether the lease held it until now."""
    gone: bool
    """Whether its file is not on this node any more."""
    leases: int
    """How many other leases hold it."""
    kept_because: str = ""
    """Why it was not deleted, if it should have been."""
    published: bool = False
    """Whether the file was put here by who publishes it, and not fetched."""
    pinned: bool = False
    """Whether the file is pinned here, so that no client's reading of it deletes it."""


class ReleaseResult(Result, frozen=True, kw_only=True):
    """Answer of RELEASE."""

    lease: str
    shards: list[ReleasedShard]
