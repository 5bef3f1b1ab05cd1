"""Which client still reads which shard, and until when. It decides what may be evicted, and deletes nothing.

Times are seconds on any one clock that does not go back, and always an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

from protocol.errors import BusyError
from protocol.manifest import Shard, ShardRef

MAX_LEASES = 1024
MAX_HOLDS = 65_536
"""Over all leases: one for each shard that each of them holds."""


class Term(NamedTuple):
    """Under whose name a shard is to be held, and for how long once it is here."""

    lease: str
    ttl_s: float


class Holders(NamedTuple):
    """Who holds a shard at a moment."""

    leases: int
    expires_in_s: float
    """Until the last of them expires if it is not renewed; 0 if only a fetch holds it."""


class LeaseSummary(NamedTuple):
    """What one lease holds at a moment."""

    lease: str
    shards: int
    expires_in_s: float
    """Until the first of its shards is free; 0 if one of them is only held by a fetch."""


@dataclass(frozen=True, slots=True)
class Hold:
    """One lease on one shard."""

    shard: Shard
    expires_at: float
    """Seconds on the caller's clock."""
    fetches: frozenset[int] = frozenset()
    """Fetches in progress: while there is one, the hold lasts."""

    def lasts(self, now: float) -> bool:
        return bool(self.fetches) or self.expires_at > now

    def left_s(self, now: float) -> float:
        return max(0.0, self.expires_at - now)


class Leases:
    """Holds by shard and by lease. An expired one counts as none, and is dropped when it is met."""

    def __init__(self) -> None:
        self._by_shard: dict[ShardRef, dict[str, Hold]] = {}
        self._by_lease: dict[str, set[ShardRef]] = {}
        self._numbers = count()
        self._holds = 0

    def begin(self, lease: str, shard: Shard, now: float) -> int:
        """Hold a shard for the length of a fetch; returns the fetch's number, for `end`.

        Raises BusyError if there would be more leases or holds than a node keeps.
        """
        hold = self._get(lease, shard.ref)
        if hold is None:
            self._make_room(lease, now)
            hold = Hold(shard, expires_at=now)
        number = next(self._numbers)
        self._put(lease, replace(hold, fetches=hold.fetches | {number}))
        return number

    def end(self, number: int, lease: str, ref: ShardRef, now: float, ttl_s: float | None) -> None:
        """The fetch is over: the shard is here and held for `ttl_s` more, or, with None, held as it was before.

        Nothing happens if the lease released it meanwhile.
        """
        hold = self._get(lease, ref)
        if hold is None or number not in hold.fetches:
            return
        expires_at = hold.expires_at if ttl_s is None else max(hold.expires_at, now + ttl_s)
        hold = replace(hold, expires_at=expires_at, fetches=hold.fetches - {number})
        if hold.lasts(now):
            self._put(lease, hold)
        else:
            self._drop(lease, ref)

    def renew(self, lease: str, refs: Iterable[ShardRef], now: float, ttl_s: float) -> list[tuple[Shard, float]]:
        """Hold those of the shards that the lease holds for at least `ttl_s` from now; returns them, each with the
        seconds that are left to it.
        """
        renewed: list[tuple[Shard, float]] = []
        for ref in refs:
            hold = self._get(lease, ref)
            if hold is None or not hold.lasts(now):
                continue
            hold = replace(hold, expires_at=max(hold.expires_at, now + ttl_s))
            self._put(lease, hold)
            renewed.append((hold.shard, hold.left_s(now)))
        return renewed

    def release(self, lease: str, ref: ShardRef, now: float) -> bool:
        """End a lease's hold on a shard, also while it is fetched. Returns whether the lease held it."""
        hold = self._get(lease, ref)
        if hold is None:
            return False
        self._drop(lease, ref)
        return hold.lasts(now)

    def of_lease(self, lease: str, now: float) -> list[Shard]:
        """The shards that a lease holds, in their order."""
        self._drop_expired(self._by_lease.get(lease, ()), now)
        return [self._by_shard[ref][lease].shard for ref in sorted(self._by_lease.get(lease, ()))]

    def holders(self, ref: ShardRef, now: float) -> Holders:
        holds = [hold for hold in self._by_shard.get(ref, {}).values() if hold.lasts(now)]
        return Holders(len(holds), max((hold.left_s(now) for hold in holds), default=0.0))

    def summaries(self, now: float) -> list[LeaseSummary]:
        """All leases, by name."""
        self._drop_expired(list(self._by_shard), now)
        return [
            LeaseSummary(lease, len(refs), min(self._by_shard[ref][lease].left_s(now) for ref in refs))
            for lease, refs in sorted(self._by_lease.items())
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

    def _get(self, lease: str, ref: ShardRef) -> Hold | None:
        return self._by_shard.get(ref, {}).get(lease)

    def _put(self, lease: str, hold: Hold) -> None:
        holds = self._by_shard.setdefault(hold.shard.ref, {})
        self._holds += lease not in holds
        holds[lease] = hold
        self._by_lease.setdefault(lease, set()).add(hold.shard.ref)

    def _drop(self, lease: str, ref: ShardRef) -> None:
        holds, refs = self._by_shard[ref], self._by_lease[lease]
        del holds[lease]
        refs.discard(ref)
        self._holds -= 1
        if not holds:
            del self._by_shard[ref]
        if not refs:
            del self._by_lease[lease]

    def _drop_expired(self, refs: Iterable[ShardRef], now: float) -> None:
        for ref in list(refs):
            for lease, hold in list(self._by_shard.get(ref, {}).items()):
                if not hold.lasts(now):
                    self._drop(lease, ref)
