"""RENEW and RELEASE. A lease is taken by FETCH_SHARD."""

from __future__ import annotations

import time
from dataclasses import dataclass

from node.shards.leases import LeasedId
from node.shards.service import Shards, leased_id
from protocol.commands.common import ShardSelector
from protocol.commands.leases import (
    LeasedShard,
    ReleasedShard,
    ReleaseParams,
    ReleaseResult,
    RenewParams,
    RenewResult,
)
from protocol.errors import BusyError, ShardInUseError, ShardNotFoundError


@dataclass(frozen=True)
class LeaseHandlers:
    """Lease commands of one node."""

    shards: Shards

    async def renew(self, params: RenewParams) -> RenewResult:
        """RENEW."""
        leases, now = self.shards.leases, time.monotonic()
        named = await self._named(params)
        chosen = leases.of_lease(params.lease, now) if named is None else [named]
        renewed = leases.renew(params.lease, chosen, time.monotonic(), params.ttl_s)
        return RenewResult(lease=params.lease, shards=[self._leased(shard, left_s) for shard, left_s in renewed])

    async def release(self, params: ReleaseParams) -> ReleaseResult:
        """RELEASE."""
        named = await self._named(params)
        chosen = self.shards.leases.of_lease(params.lease, time.monotonic()) if named is None else [named]
        # All of them first: what is deleted takes time, and the client has said that it reads none of them.
        held = [self.shards.leases.release(params.lease, shard, time.monotonic()) for shard in chosen]
        if params.evict and not self.shards.is_surveyed:
            raise BusyError(
                f"lease {params.lease} is released, but nothing is deleted yet: this node has not scanned its shards "
                "folder since its start; ask again"
            )
        released = [
            await self._released(shard, was_held, evict=params.evict)
            for shard, was_held in zip(chosen, held, strict=True)
        ]
        return ReleaseResult(lease=params.lease, shards=released)

    async def _named(self, selector: ShardSelector) -> LeasedId | None:
        """The shard that is meant; None if all of the lease are."""
        fields = (selector.model, selector.dataset, selector.shard_id, selector.content_id, selector.filename)
        if all(field is None for field in fields):
            return None
        return leased_id(*await self.shards.select(selector))

    def _leased(self, shard: LeasedId, expires_in_s: float) -> LeasedShard:
        signed = self.shards.manifest(shard.digest)
        path = self.shards.path_of(signed, signed.manifest.shard(shard.shard_id)) if signed else None
        return LeasedShard(
            digest=shard.digest,
            shard_id=shard.shard_id,
            content_id=shard.content_id,
            path=str(path or ""),
            expires_in_s=expires_in_s,
        )

    async def _released(self, shard: LeasedId, was_held: bool, *, evict: bool) -> ReleasedShard:
        kept_because = ""
        published = self.shards.is_published_here(shard.digest, shard.shard_id)
        if evict and published:
            kept_because = "it was published here, not fetched: EVICT_SHARD deletes it"
        elif evict and (signed := self.shards.manifest(shard.digest)):
            try:
                await self.shards.evict(signed, signed.manifest.shard(shard.shard_id))
            except ShardInUseError as err:
                kept_because = err.message
            except ShardNotFoundError:
                pass
            except OSError as err:
                kept_because = f"its file cannot be deleted: {err.strerror}"
        return ReleasedShard(
            digest=shard.digest,
            shard_id=shard.shard_id,
            content_id=shard.content_id,
            held=was_held,
            gone=self.shards.is_surveyed and not self.shards.has_file(shard.digest, shard.shard_id),
            leases=self.shards.leases.holders(shard, time.monotonic()).leases,
            kept_because=kept_because,
            published=published,
        )
