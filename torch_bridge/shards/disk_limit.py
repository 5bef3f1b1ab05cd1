"""One limit in bytes for all readers of a folder: which shard may be fetched now, and what is deleted to make room.

The readers of a run know one order of all shards that any of them reads. A shard is fetched as soon as it fits beside
all shards before it that a reader still needs, so that what is needed first always has room: nobody ahead can have
taken it, nothing is fetched twice, and readers ahead wait for those behind. Readers that do not know such an order
divide the limit among themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from protocol.errors import InvalidParamsError
from protocol.manifest import ShardEntry
from torch_bridge.shards.disk_space import BLOCK_BYTES, blocks
from torch_bridge.shards.readers import REGISTERING_S, LedgerView, ReaderLedger, ReaderState
from torch_bridge.shards.sources.interface import DiskUse, ShardSource

OUT_OF_STEP_S = 5.0
"""After so long without any change, a reader that waits takes room that the others can spare, in no order."""
STALLED_S = 1800.0
"""So long may nothing change while a reader waits for room: training may pause to evaluate or to save."""
Costs = Callable[[str], int]
"""Bytes of a shard on the disk, by its file name."""


@dataclass(frozen=True)
class SharedOrder:
    """What all readers of a run on this machine know beforehand; each has the same `names` and `together_bytes`."""

    names: Sequence[str]
    """The shards that any of them reads, in the order of first use."""
    together_bytes: int
    """The most that must be on the disk at once, if the readers are in step."""
    own_bytes: int
    """The most that this reader has open at once."""
    advice: Callable[[int], str]
    """Which settings would need at most so many bytes."""


@dataclass(frozen=True)
class NoRoom:
    """Why a shard cannot be fetched now."""

    text: str
    gives_way: bool
    """Whether it helps if this reader gives up what it fetched ahead."""
    is_final: bool
    """Whether no other reader can change it."""
    unchanged_s: float
    """For how long nothing has changed."""


def used_bytes(use: DiskUse, held: Collection[str], cost: Costs) -> int:
    """What is on the disk or promised to downloads. `held`: what readers have or are fetching, each once."""
    coming = sum(max(cost(name), use.parts.get(name, 0)) for name in held if name not in use.shards)
    left = sum(size for name, size in use.parts.items() if name not in held)
    return use.other_bytes + sum(use.shards.values()) + coming + left


def bytes_through(name: str, order: Iterable[str], needed: Collection[str], cost: Costs) -> int:
    """Of the shards up to `name` in the order that a reader needs, `name` with them."""
    total = 0
    for one in order:
        if one == name:
            break
        if one in needed:
            total += cost(one)
    return total + cost(name)


def evictions(
    missing_bytes: int, use: DiskUse, held: Collection[str], needed: Collection[str] | None, rank: Mapping[str, int]
) -> list[str]:
    """What to delete so that `missing_bytes` become free, or as much as can: of what no reader holds, first what none
    needs (`needed`; None if that is not known yet), then what is needed last.
    """
    sizes = {name: use.shards.get(name, 0) + use.parts.get(name, 0) for name in {*use.shards, *use.parts} - {*held}}

    def turn(name: str) -> tuple[bool, int]:
        return needed is None or name in needed, -rank.get(name, len(rank))

    going: list[str] = []
    for name in sorted(sizes, key=turn):
        if missing_bytes <= 0:
            break
        going.append(name)
        missing_bytes -= sizes[name]
    return going


class DiskLimit:
    """The limit as one reader sees it. Its methods are called with the lock of the ledger held."""

    def __init__(
        self,
        source: ShardSource,
        entries: Mapping[str, ShardEntry],
        limit_bytes: int,
        shared: SharedOrder | None,
        pinned: Sequence[str],
        *,
        out_of_step_s: float = OUT_OF_STEP_S,
        stalled_s: float = STALLED_S,
    ) -> None:
        """Raises InvalidParamsError if the limit is not above 0."""
        if limit_bytes < 1:
            raise InvalidParamsError(f'disk_limit must be above 0, such as "10gb", not {limit_bytes}')
        self.limit_bytes = limit_bytes
        self._source, self._entries, self._shared = source, entries, shared
        self._pinned = frozenset(pinned)
        self._out_of_step_s, self._stalled_s = out_of_step_s, stalled_s
        self._ledger_bytes = 0
        """What the ledger may grow by."""
        self._began_at = self._same_since = time.monotonic()
        self._seen: Mapping[str, ReaderState] | None = None
        self._waiting_s = 0.0
        self._kept: tuple[str, ...] = ()
        """Shards in the folder that no reader holds and that could not be deleted."""

    def stated(self, mine: ReaderState) -> ReaderState:
        """With what others of the folder have to leave to this reader."""
        if self._shared is None:
            return mine
        together, own = self._shared.together_bytes, self._shared.own_bytes
        return msgspec.structs.replace(mine, together_bytes=together + self._cost_of(self._pinned), own_bytes=own)

    def require(self, mine: ReaderState, ledger: ReaderLedger, order: Sequence[str]) -> None:
        """Raises InvalidParamsError, with what would fit, if the limit can never hold what must be there at once."""
        self._began_at = time.monotonic()
        view, use, expected = ledger.view(), self._source.disk_use(), mine.expected
        written = 0 if use is None else (expected + 1) * blocks(len(msgspec.json.encode(mine)) + BLOCK_BYTES)
        self._ledger_bytes = max(written - ledger.size_bytes(), 0)
        beside = self._overhead(use) + self._foreign(view)
        if self._shared is None:
            together = expected * max((self._cost(name) for name in order), default=0)
            what = f"the largest shard, for each of {expected} readers of this machine"
            help_ = "read smaller shards by fewer readers"
        else:
            together, room = self._shared.together_bytes, self.limit_bytes - beside - self._cost_of(self._pinned)
            what = f"the shards that the {expected} readers of this machine have open at once"
            help_ = self._shared.advice(room) if together > room else ""
        least = together + beside + self._cost_of(self._pinned)
        if least <= self.limit_bytes:
            return
        parts = [f"{together} for {what}"]
        parts += [f"{self._cost_of(self._pinned)} for {', '.join(sorted(self._pinned))}"] if self._pinned else []
        parts += [f"{self._overhead(use)} for the ledger, the manifest and other files there"] if use else []
        parts += [f"{self._foreign(view)} for other runs over it"] if self._foreign(view) else []
        raise InvalidParamsError(
            f"disk_limit={self.limit_bytes} is too little for the shards in {self._source.folder}: at least {least} "
            f"bytes are needed ({'; '.join(parts)}). Give disk_limit={least} or more (a saved state "
            f"continues with it), or {help_}"
        )

    def take(
        self,
        name: str,
        mine: ReaderState,
        ledger: ReaderLedger,
        discard: Callable[[str], bool],
        waiting_s: float | None,
    ) -> NoRoom | None:
        """Make room for a shard that is fetched next; None if there is room.

        `discard` deletes a shard that no reader holds, and says whether it is gone. `waiting_s`: for so long the
        reader's caller has waited for room; None: it does not wait for this shard.
        """
        self._waiting_s, wanted = waiting_s or 0.0, waiting_s is not None
        view, use = ledger.view(), self._source.disk_use()
        self._watch(view)
        others = view.others()
        fits = self._fits(name, mine, view, use)
        self._kept = ()
        if not fits and not (wanted and self._may_go_ahead(name, mine, view, use)):
            return self._no_room(name, mine, view, use, wanted=wanted)
        held = {name, *mine.held, *(one for state in others.values() for one in _holds(state, use))}
        missing = self._make_room(mine, view, use, held, discard)
        return self._no_room(name, mine, view, use, wanted=wanted, missing=missing) if missing > 0 else None

    def shrink(self, mine: ReaderState, ledger: ReaderLedger, discard: Callable[[str], bool]) -> None:
        """Delete what an earlier run left above the limit, of what no reader holds."""
        view, use = ledger.view(), self._source.disk_use()
        held = {*mine.held, *(one for state in view.others().values() for one in _holds(state, use))}
        self._make_room(mine, view, use, held, discard)

    def may_need_less(self, name: str, view: LedgerView) -> bool:
        """Whether another reader waits for room for a shard that comes before `name`, which this one fetched ahead."""
        waited = [state.waits for state in view.others().values() if state.waits]
        if self._shared is None or not waited:
            return False
        place = {one: number for number, one in enumerate(self._shared.names)}
        return any(place.get(one, -1) < place.get(name, -1) for one in waited)

    def _make_room(
        self,
        mine: ReaderState,
        view: LedgerView,
        use: DiskUse | None,
        held: Collection[str],
        discard: Callable[[str], bool],
    ) -> int:
        """Returns the bytes that are still missing. What a source keeps (a person's own file) is found by looking."""
        kept: set[str] = set()
        rank = {one: place for place, one in enumerate(self._shared.names if self._shared else mine.remaining)}
        while (missing := self._used(use, held) - self.limit_bytes) > 0 and use is not None:
            going = evictions(missing, use, {*held, *kept}, view.needed(), rank)
            if not going:
                break
            for one in going:
                discard(one)
            use = self._source.disk_use() or DiskUse()
            kept.update(one for one in going if one in use.shards or one in use.parts)
        self._kept = tuple(sorted(kept))
        return missing

    def used_bytes(self, mine: ReaderState, view: LedgerView | None) -> int:
        """Bytes that are on the disk or promised to downloads."""
        use = self._source.disk_use()
        others = view.others().values() if view else ()
        held = {*_holds(mine, use), *(one for state in others for one in _holds(state, use))}
        return used_bytes(use or DiskUse(), held, self._cost)

    def _fits(self, name: str, mine: ReaderState, view: LedgerView, use: DiskUse | None) -> bool:
        """Whether everything that comes first has room beside it."""
        budget = self.limit_bytes - self._overhead(use) - self._foreign(view)
        if self._shared is None:
            return self._cost_of({name, *mine.held, *self._pinned}) <= budget // mine.expected
        if name in self._pinned:
            return True
        same = [mine, *view.others(everywhere=False).values()]
        earlier = {one for state in same if state.epoch < mine.epoch for one in (*state.remaining, *state.held)}
        budget -= self._cost_of(earlier | self._pinned)
        needs: set[str] = set(self._shared.names)
        if self._begun(mine, view):
            needs = {one for state in same if state.epoch == mine.epoch for one in (*state.remaining, *state.held)}
        return bytes_through(name, self._shared.names, needs - earlier - self._pinned, self._cost) <= budget

    def _may_go_ahead(self, name: str, mine: ReaderState, view: LedgerView, use: DiskUse | None) -> bool:
        """Whether a reader may leave the order: nothing has changed for a while, as if the others waited for it, and
        each of them keeps the room that it can ever need.
        """
        if self._shared is None or self._unchanged_s() < self._out_of_step_s or not self._begun(mine, view):
            return False
        others = view.others(everywhere=False).values()
        theirs = sum(max(state.own_bytes, self._cost_of(set(state.held) - self._pinned)) for state in others)
        rest = self._overhead(use) + self._foreign(view) + self._cost_of({*mine.held, name, *self._pinned})
        return theirs + rest <= self.limit_bytes

    def _no_room(
        self, name: str, mine: ReaderState, view: LedgerView, use: DiskUse | None, *, wanted: bool, missing: int = 0
    ) -> NoRoom:
        begun, others = view.begun(mine), view.others()
        own = set(mine.held) - {name}
        waiting = [state for state in others.values() if state.waits]
        alone = self._overhead(use) + self._cost_of({name, *own, *self._pinned, *self._kept}) > self.limit_bytes
        if self._shared is None:
            alone = alone or not missing
        stuck = 0 < len(waiting) == len(others)
        final = self._unchanged_s() > self._stalled_s or (
            (alone or stuck) and (self._begun(mine, view) or not self._shared)
        )
        lines = [f"this reader holds {', '.join(sorted(own)) or 'none'}"]
        lines += [f"{who} holds {', '.join(state.held) or 'none'}" for who, state in sorted(others.items())]
        if begun < mine.expected:
            lines.append(f"{begun} of {mine.expected} readers have begun epoch {mine.epoch}")
        if self._kept:
            lines.append(f"no reader holds {', '.join(self._kept)}, and the source keeps them")
        if self._overhead(use):
            lines.append(f"{self._overhead(use)} bytes there are not shards")
        text = (
            f"{name} needs {self._cost(name)} bytes, and disk_limit={self.limit_bytes} has no room for them in "
            f"{self._source.folder}: {'; '.join(lines)}. Raise disk_limit, or have readers go past shards before they "
            "ask for others"
        )
        patient = self._shared is not None and not missing and self._unchanged_s() < self._out_of_step_s
        return NoRoom(text, wanted and not patient, wanted and final, self._unchanged_s())

    def _watch(self, view: LedgerView) -> None:
        """Notice whether anything has changed."""
        if (states := view.others()) != self._seen:
            self._seen, self._same_since = states, time.monotonic()

    def _unchanged_s(self) -> float:
        """For how long nothing has changed while the caller waited."""
        return min(time.monotonic() - self._same_since, self._waiting_s)

    def _begun(self, mine: ReaderState, view: LedgerView) -> bool:
        """Whether all readers have begun the epoch, or were waited for long enough."""
        return view.begun(mine) >= mine.expected or time.monotonic() - self._began_at > REGISTERING_S

    def _used(self, use: DiskUse | None, held: Collection[str]) -> int:
        return used_bytes(use or DiskUse(), held, self._cost) + (self._ledger_bytes if use else 0)

    def _overhead(self, use: DiskUse | None) -> int:
        return 0 if use is None else use.other_bytes + self._ledger_bytes

    def _foreign(self, view: LedgerView) -> int:
        """What other runs over the folder have, or may need."""
        total = 0
        for run, readers in view.runs.items():
            states = [state for state in readers.values() if state is not None and run != view.run]
            least = max((state.together_bytes for state in states), default=0)
            total += max(least, self._cost_of({one for state in states for one in state.held}))
        return total

    def _cost(self, name: str) -> int:
        entry = self._entries.get(name)
        return 0 if entry is None else self._source.cost_bytes(entry.size)

    def _cost_of(self, names: Iterable[str]) -> int:
        return sum(map(self._cost, names))


def _holds(state: ReaderState, use: DiskUse | None) -> Iterable[str]:
    """What takes disk because of a reader: at a node its lease holds also what it is past and has not released."""
    return state.held if use is not None else (*state.held, *state.kept)
