"""One reader's window on its shards: which are here, on their way, failed, behind it, next. No I/O, one thread."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from protocol.errors import CancelledRequestError, InsufficientDiskError, ShoalError
from torch_bridge.shards.readers import ReaderState
from torch_bridge.shards.sources.interface import FetchedFile

HEAD_START_S = 0.5
"""For so long nothing is fetched beside the first shard: an epoch's first batch waits for it alone."""
FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
"""Between two tries of a shard; doubled each time."""


class ShardWindow:
    """Shards by their file names."""

    def __init__(
        self,
        order: list[str],
        pinned: tuple[str, ...],
        keep_behind: int,
        expected: int,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.order, self.pinned = order, pinned
        self.epoch = 0
        self.consumed: list[str] = []
        self.here: dict[str, FetchedFile] = {}
        self.on_the_way: set[str] = set()
        self.failed: dict[str, ShardFailure] = {}
        self.wanted: list[str] = []
        """A caller waits for these."""
        self.undeleted: list[str] = []
        """The reader is past these, and their files may still be there."""
        self.alone_until = 0.0
        """Until then, on the monotonic clock, nothing is fetched beside the first shard."""
        self._handed: set[str] = set()
        """A caller got the files of these, and may be reading them."""
        self._given_way: set[str] = set()
        """Needed later, and deleted for now."""
        self._distrusted: set[str] = set()
        self._keep_behind, self._expected, self._first_pause_s = keep_behind, expected, first_pause_s

    def next(self, now_s: float, ahead: int) -> str | None:
        """What to fetch now, on the monotonic clock."""
        if self.on_the_way and not self.here and now_s < self.alone_until:
            return None
        return next_to_fetch(
            self.order,
            pinned=self.pinned,
            here=self.here,
            on_the_way=self.on_the_way,
            consumed=set(self.consumed),
            wanted=self.wanted,
            ahead=0 if self._wants_room() else ahead,
            not_now=[name for name, failure in self.failed.items() if failure.for_good or now_s < failure.again_at],
        )

    def hand_out(self, name: str) -> FetchedFile:
        """The file, for a caller that waited for it. It stays until the reader is past it."""
        self._handed.add(name)
        return self.here[name]

    def _wants_room(self) -> bool:
        """Whether the disk was too full for a shard that a caller waits for."""
        errors = [failure.error for name, failure in self.failed.items() if name in self.wanted]
        return any(isinstance(error, InsufficientDiskError) for error in errors)

    def last_ahead(self) -> str | None:
        """Of the shards that are here and were not handed out, the one that is read last."""
        kept = {*self._handed, *self.pinned, *self.wanted}
        return next((name for name in reversed(self.order) if name in self.here and name not in kept), None)

    def give_way(self) -> bool:
        """Drop `last_ahead`: it makes room. Returns whether there was one."""
        name = self.last_ahead()
        if name is not None:
            del self.here[name]
            self._given_way.add(name)
            self.undeleted.append(name)
        return name is not None

    def came(self, name: str, found: FetchedFile) -> None:
        """The shard is here. If the order changed while it was on its way, it is only to be deleted."""
        self.failed.pop(name, None)
        self._given_way.discard(name)
        self.undeleted = [other for other in self.undeleted if other != name]
        if self._is_needed(name):
            self.here[name] = found
        else:
            self.undeleted.append(name)

    def did_not_come(self, name: str, error: ShoalError, total_s: float) -> ShardFailure | None:
        """When the shard is tried again; None if this reader itself cancelled the fetch."""
        if isinstance(error, CancelledRequestError):
            return None
        self.failed[name] = failure = ShardFailure(error, self.failed.get(name), total_s, self._first_pause_s)
        if self._wants_room():
            self.give_way()
        return failure

    def distrust(self, name: str) -> bool:
        """Hand the shard out no more; it counts as on its way until the caller says otherwise.

        Returns whether this is the second time.
        """
        self.here.pop(name, None)
        self._handed.discard(name)
        self.on_the_way.add(name)
        known = name in self._distrusted
        self._distrusted.add(name)
        return known

    def past(self, name: str) -> None:
        """The reader is past the shard."""
        if name not in self.consumed:
            self.consumed.append(name)
        self.here.pop(name, None)
        self._handed.discard(name)
        self.undeleted = [*(other for other in self.undeleted if other != name), name]

    def read_on(self, order: list[str], epoch: int, consumed: Sequence[str]) -> None:
        """Continue with another order, or at another position in it. Shards that it does not need are dropped."""
        self.order, self.epoch, self.consumed = order, epoch, list(consumed)
        self.failed.clear()
        self._given_way.clear()
        dropped = [name for name in self.here if not self._is_needed(name)]
        for name in dropped:
            del self.here[name]
        self._handed.intersection_update(self.here)
        self.undeleted = list(dict.fromkeys([*self.undeleted, *dropped, *consumed]))

    @property
    def behind(self) -> list[str]:
        """What the reader is past and keeps."""
        return self.consumed[-self._keep_behind :] if self._keep_behind else []

    def reader(self) -> ReaderState:
        """What the ledger gets to know of this reader."""
        past = set(self.consumed)
        return ReaderState(
            expected=self._expected,
            epoch=self.epoch,
            remaining=tuple(name for name in self.order if name not in past and name not in self._given_way),
            held=tuple(sorted({*self.here, *self.on_the_way, *self.behind, *self.pinned})),
        )

    def errors(self) -> Mapping[str, str]:
        """The last error of each shard that did not come."""
        return {name: str(failure.error) for name, failure in self.failed.items()}

    def state(self) -> dict[str, Any]:
        """JSON-able: what `read_on` takes."""
        return {"version": 1, "epoch": self.epoch, "order": list(self.order), "consumed": list(self.consumed)}

    def explanation(self, name: str, rate_bytes_s: float) -> str:
        """Why a shard is not here, for the caller that waits for it."""
        if name in self.on_the_way:
            return f"it is being downloaded, at {rate_bytes_s / 1e6:.1f} MB/s lately"
        if failure := self.failed.get(name):
            return f"the last try failed: {failure.error}"
        return f"others are downloaded first: {sorted(self.on_the_way)}"

    def _is_needed(self, name: str) -> bool:
        return name in self.pinned or name in self.wanted or (name in self.order and name not in self.consumed)


class ShardFailure:
    """The last failure of a shard, and when it is tried again."""

    def __init__(self, error: ShoalError, before: ShardFailure | None, total_s: float, first_pause_s: float) -> None:
        now = time.monotonic()
        self.error = error
        self.began_at: float = before.began_at if before else now
        self.pause_s: float = min(before.pause_s * 2, _LONGEST_PAUSE_S) if before else first_pause_s
        self.again_at = now + self.pause_s
        self.for_good = not error.retryable or now - self.began_at > total_s


def next_to_fetch(
    order: Sequence[str],
    *,
    pinned: Sequence[str],
    here: Collection[str],
    on_the_way: Collection[str],
    consumed: Collection[str],
    not_now: Collection[str],
    wanted: Collection[str],
    ahead: int,
) -> str | None:
    """A file name, or None if no fetch is to begin now. Pure.

    Pinned shards come first, then those that a caller waits for, then the order, as long as fewer than `ahead` shards
    of it are here or on their way and not consumed. `not_now` failed: they are tried later, or never.
    """
    taken = {*here, *on_the_way, *not_now}
    for name in (*pinned, *wanted):
        if name not in taken:
            return name
    window = 0
    for name in order:
        if name in consumed:
            continue
        if window >= ahead:
            return None
        if name not in taken:
            return name
        window += name not in not_now
    return None
