"""Which client still reads which shard, and until when: decides what may be evicted, does nothing.

Times are seconds on any one clock that does not go back, and always an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

from protocol.errors import BusyError
from protocol.ids import ContentId, ManifestDigest

MAX_LEASES = 1024
MAX_HOLDS = 65_536
"""Over all leases: one for each shard that each of them holds."""


class LeasedId(NamedTuple):
    """A shard, as leases know it."""

    digest: ManifestDigest
    shard_id: int
    content_id: ContentId


class Term(NamedTuple):
    """Under whose name a shard is to be held, and for how long once it is here."""

    lease: str
    ttl_s: float


class Holders(NamedTuple):
    """Who holds a shard at a moment."""

    leases: int
    expires_in_s: float
    """Until the last of them lets go, where nothing renews it; 0 where only a fetch holds it."""


class LeaseSummary(NamedTuple):
    """What one lease holds at a moment."""

    lease: str
    shards: int
    expires_in_s: float
    """Until the first of its shards is free; 0 where one of them is only held by a fetch."""


@dataclass(frozen=True, slots=True)
class Hold:
    """One lease on one shard."""

    expires_at: float
    """Seconds on the caller's clock."""
    fetches: frozenset[int] = frozenset()
    """Fetches in progress: while there is one, the hold lasts."""

    def lasts(self, now: float) -> bool:
        return bool(self.fetches) or self.expires_at > now

    def left_s(self, now: float) -> float:
        return max(0.0, self.expires_at - now)


class Leases:
    """Holds by shard and by lease. An expired one is as good as none, and is dropped when it is met."""

    def __init__(self) -> None:
        self._by_shard: dict[LeasedId, dict[str, Hold]] = {}
        self._by_lease: dict[str, set[LeasedId]] = {}
        self._numbers = count()
        self._holds = 0

    def begin(self, lease: str, shard: LeasedId, now: float) -> int:
        """Hold a shard for the length of a fetch; returns the fetch's number, for `end`.

        Raises BusyError where there would be more leases or holds than a node keeps.
        """
        hold = self._get(lease, shard)
        if hold is None:
            self._make_room(lease, now)
            hold = Hold(expires_at=now)
        number = next(self._numbers)
        self._put(lease, shard, replace(hold, fetches=hold.fetches | {number}))
        return number

    def end(self, number: int, lease: str, shard: LeasedId, now: float, ttl_s: float | None) -> None:
        """The fetch is over: the shard is here and held for `ttl_s` more, or, with None, held as it was before.

        Nothing happens where the lease let go of it meanwhile.
        """
        hold = self._get(lease, shard)
        if hold is None or number not in hold.fetches:
            return
        expires_at = hold.expires_at if ttl_s is None else max(hold.expires_at, now + ttl_s)
        hold = Hold(expires_at, hold.fetches - {number})
        if hold.lasts(now):
            self._put(lease, shard, hold)
        else:
            self._drop(lease, shard)

    def renew(self, lease: str, shards: Iterable[LeasedId], now: float, ttl_s: float) -> list[tuple[LeasedId, float]]:
        """Hold those of the shards that the lease holds for at least `ttl_s` from now; returns them, each with the
        seconds that are left to it.
        """
        renewed: list[tuple[LeasedId, float]] = []
        for shard in shards:
            hold = self._get(lease, shard)
            if hold is None or not hold.lasts(now):
                continue
            hold = replace(hold, expires_at=max(hold.expires_at, now + ttl_s))
            self._put(lease, shard, hold)
            renewed.append((shard, hold.left_s(now)))
        return renewed

    def release(self, lease: str, shard: LeasedId, now: float) -> bool:
        """Let go of a shard, also while it is fetched. Returns whether the lease held it."""
        hold = self._get(lease, shard)
        if hold is None:
            return False
        self._drop(lease, shard)
        return hold.lasts(now)

    def of_lease(self, lease: str, now: float) -> list[LeasedId]:
        """The shards that a lease holds, in their order."""
        self._drop_expired(self._by_lease.get(lease, ()), now)
        return sorted(self._by_lease.get(lease, ()))

    def holders(self, shard: LeasedId, now: float) -> Holders:
        holds = [hold for hold in self._by_shard.get(shard, {}).values() if hold.lasts(now)]
        return Holders(len(holds), max((hold.left_s(now) for hold in holds), default=0.0))

    def summaries(self, now: float) -> list[LeaseSummary]:
        """All leases, by name."""
        self._drop_expired(list(self._by_shard), now)
        return [
            LeaseSummary(lease, len(shards), min(self._by_shard[shard][lease].left_s(now) for shard in shards))
            for lease, shards in sorted(self._by_lease.items())
        ]

    def _make_room(self, lease: str, now: float) -> None:
        if self._is_full(lease):
            self._drop_expired(list(self._by_shard), now)
        if self._is_full(lease):
            raise BusyError(
                f"this node keeps {len(self._by_lease)} leases that hold {self._holds} shards, and at most "
                f"{MAX_LEASES} and {MAX_HOLDS}: release some, or wait until they expire"
            )

    def _is_full(self, lease: str) -> bool:
        return self._holds >= MAX_HOLDS or (lease not in self._by_lease and len(self._by_lease) >= MAX_LEASES)

    def _get(self, lease: str, shard: LeasedId) -> Hold | None:
        return self._by_shard.get(shard, {}).get(lease)

    def _put(self, lease: str, shard: LeasedId, hold: Hold) -> None:
        holds = self._by_shard.setdefault(shard, {})
        self._holds += lease not in holds
        holds[lease] = hold
        self._by_lease.setdefault(lease, set()).add(shard)

    def _drop(self, lease: str, shard: LeasedId) -> None:
        holds, shards = self._by_shard[shard], self._by_lease[lease]
        del holds[lease]
        shards.discard(shard)
        self._holds -= 1
        if not holds:
            del self._by_shard[shard]
        if not shards:
            del self._by_lease[lease]

    def _drop_expired(self, shards: Iterable[LeasedId], now: float) -> None:
        for shard in list(shards):
            for lease, hold in list(self._by_shard.get(shard, {}).items()):
                if not hold.lasts(now):
                    self._drop(lease, shard)
