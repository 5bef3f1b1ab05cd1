"""RENEW and RELEASE. A lease is taken by FETCH_SHARD."""

from __future__ import annotations

from dataclasses import dataclass

from node.shards.service import Shards
from protocol.commands.leases import (
    LeasedShard,
    ReleasedShard,
    ReleaseParams,
    ReleaseResult,
    RenewParams,
    RenewResult,
)
from protocol.errors import BusyError, ShardInUseError, ShardNotFoundError
from protocol.manifest import Shard


@dataclass(frozen=True)
class LeaseHandlers:
    """Lease commands of one node."""

    shards: Shards

    async def renew(self, params: RenewParams) -> RenewResult:
        """RENEW."""
        leases = self.shards.leases
        chosen = [shard.ref for shard in await self._chosen(params)]
        renewed = leases.renew(params.lease, chosen, self.shards.clock.now(), params.ttl_s)
        return RenewResult(lease=params.lease, shards=[self._leased(shard, left_s) for shard, left_s in renewed])

    async def release(self, params: ReleaseParams) -> ReleaseResult:
        """RELEASE."""
        chosen = await self._chosen(params)
        now = self.shards.clock.now()
        # All of them first: what is deleted takes time, and the client has said that it reads none of them.
        held = [self.shards.leases.release(params.lease, shard.ref, now) for shard in chosen]
        if params.evict and not self.shards.is_scanned:
            raise BusyError(
                f"lease {params.lease} is released, but nothing is deleted yet: this node has not scanned its shards "
                "folder since its start; ask again"
            )
        released = [
            await self._released(shard, was_held, evict=params.evict)
            for shard, was_held in zip(chosen, held, strict=True)
        ]
        return ReleaseResult(lease=params.lease, shards=released)

    async def _chosen(self, params: RenewParams | ReleaseParams) -> list[Shard]:
        """The shard that is named, or all of the lease."""
        fields = (params.model, params.dataset, params.shard_id, params.content_id, params.filename)
        if all(field is None for field in fields):
            return self.shards.leases.of_lease(params.lease, self.shards.clock.now())
        return [await self.shards.select(params)]

    def _leased(self, shard: Shard, expires_in_s: float) -> LeasedShard:
        return LeasedShard(
            digest=shard.digest,
            shard_id=shard.entry.shard_id,
            content_id=shard.entry.content_id,
            path=str(self.shards.path_of(shard.ref) or ""),
            expires_in_s=expires_in_s,
        )

    async def _released(self, shard: Shard, was_held: bool, *, evict: bool) -> ReleasedShard:
        kept_because = ""
        published = self.shards.is_published_here(shard.ref)
        if evict and published and self.shards.is_pinned(shard.ref):
            kept_because = "it was published here, not fetched, and is pinned: UNPIN ends that, EVICT_SHARD deletes it"
        elif evict:
            try:
                await self.shards.evict(shard, unless_pinned=True)
            except ShardInUseError as err:
                kept_because = err.message
            except ShardNotFoundError:
                pass
            except OSError as err:
                kept_because = f"its file cannot be deleted: {err.strerror}"
        return ReleasedShard(
            digest=shard.digest,
            shard_id=shard.entry.shard_id,
            content_id=shard.entry.content_id,
            held=was_held,
            gone=self.shards.is_scanned and not self.shards.has_file(shard.ref),
            leases=self.shards.leases.holders(shard.ref, self.shards.clock.now()).leases,
            kept_because=kept_because,
            published=published,
            pinned=self.shards.is_pinned(shard.ref),
        )
