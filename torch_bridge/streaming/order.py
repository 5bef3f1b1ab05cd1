"""The one order of an epoch's samples, and who reads which batch: pure arithmetic, the same for any workers and ranks.

Shards are shuffled, cut into blocks, dealt to lanes; each lane is shuffled in windows, and in each round every lane
that still has samples gives one batch. Ranks and workers take turns over that sequence of batches.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.errors import InvalidParamsError

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """All that the order depends on beside the shards. Another value of any of them gives another order."""

    batch_size: int
    """Samples of a batch."""
    seed: int = 0
    epoch: int = 0
    shuffle: bool = True
    lanes: int = 8
    block_rows: int = 1024
    window: int = 8192
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "lanes", "block_rows", "window"):
            if getattr(self, name) < 1:
                raise InvalidParamsError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0 or self.epoch < 0:
            raise InvalidParamsError(f"seed {self.seed} and epoch {self.epoch} must not be negative")


@dataclass(frozen=True)
class Lane:
    """Blocks of rows, one after the other."""

    shards: Indices
    """The shard of each block, by its index among the given shards."""
    first_rows: Indices
    starts: Indices
    """Where in the lane each block starts, in samples."""
    rows: int


@dataclass(frozen=True)
class LaneRounds:
    """Rounds in which the same lanes give a batch each."""

    first: int
    """The number of the first batch of the first round."""
    turn: int
    """That round's number: how many batches each of the lanes has given before."""
    lanes: tuple[int, ...]


class WindowPart(NamedTuple):
    """Samples [start, stop) of a lane's window, in the order in which batches take them."""

    lane: int
    window: int
    start: int
    stop: int


@dataclass(frozen=True, order=True)
class RowSpan:
    """Rows of a shard, next to each other, that one window takes."""

    first_row: int
    rows: int
    lane: int
    window: int


@dataclass(frozen=True)
class ShardSpan:
    """The batches of the epoch between which a shard is read."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch over shards of `shard_rows` rows, which are given in the order of their names."""

    shard_rows: tuple[int, ...]
    settings: OrderSettings
    lanes: tuple[Lane, ...] = field(init=False)
    lane_batches: tuple[int, ...] = field(init=False)
    rounds: tuple[LaneRounds, ...] = field(init=False)
    _firsts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        lanes = _deal(self.shard_rows, self.settings)
        size, short = self.settings.batch_size, 0 if self.settings.drop_last else self.settings.batch_size - 1
        object.__setattr__(self, "lanes", lanes)
        object.__setattr__(self, "lane_batches", tuple((lane.rows + short) // size for lane in lanes))
        object.__setattr__(self, "rounds", _rounds(self.lane_batches))
        object.__setattr__(self, "_firsts", tuple(rounds.first for rounds in self.rounds))

    @property
    def batches(self) -> int:
        """Batches of the epoch, of all ranks."""
        return sum(self.lane_batches)

    def lane_of(self, number: int) -> tuple[int, int]:
        """The lane of a batch, and which of the lane's batches it is."""
        rounds = self.rounds[bisect_right(self._firsts, number) - 1]
        turn, index = divmod(number - rounds.first, len(rounds.lanes))
        return rounds.lanes[index], rounds.turn + turn

    def number(self, lane: int, turn: int) -> int:
        """The inverse of `lane_of`."""
        rounds = self.rounds[bisect_right(self.rounds, turn, key=lambda rounds: rounds.turn) - 1]
        return rounds.first + (turn - rounds.turn) * len(rounds.lanes) + bisect_left(rounds.lanes, lane)

    def numbers(self, base: int, *, rank: int, ranks: int, worker: int, workers: int, skip: int = 0) -> range:
        """The batches from `base` on that a rank's worker reads, after the first `skip` of them."""
        first = base + rank + ranks * (worker + workers * skip)
        return range(first, self.end(base, ranks), ranks * workers)

    @property
    def window_rows(self) -> int:
        """Samples of a window; without a shuffle a batch is one."""
        return self.settings.window if self.settings.shuffle else self.settings.batch_size

    def parts(self, number: int) -> list[WindowPart]:
        """The samples of a batch, window after window."""
        lane, turn = self.lane_of(number)
        size, rows = self.settings.batch_size, self.window_rows
        start, end = turn * size, min((turn + 1) * size, self.lanes[lane].rows)
        return [
            WindowPart(lane, window, max(start - window * rows, 0), min(end - window * rows, rows))
            for window in range(start // rows, -(-end // rows))
        ]

    def mixed(self, lane: int, window: int) -> Indices | None:
        """The order in which batches take a window's samples, of those that `pieces` gives; None: as they are."""
        return self._window(lane, window) - window * self.window_rows if self.settings.shuffle else None

    def pieces(self, lane: int, window: int) -> list[tuple[int, RowSpan]]:
        """The rows of a window, by shard, in the lane's order."""
        blocks, rows = self.lanes[lane], self.window_rows
        start, end = window * rows, min((window + 1) * rows, blocks.rows)
        first = int(np.searchsorted(blocks.starts, start, side="right")) - 1
        found = []
        for block in range(first, int(np.searchsorted(blocks.starts, end, side="left"))):
            at = int(blocks.starts[block])
            begin, stop = max(at, start), min(self._block_end(lane, block), end)
            row = int(blocks.first_rows[block]) + begin - at
            found.append((int(blocks.shards[block]), RowSpan(row, stop - begin, lane, window)))
        return found

    def pieces_of(self, shard: int, numbers: range) -> list[RowSpan]:
        """The rows of a shard that the windows of a reader of these batches take, ascending."""
        found: list[RowSpan] = []
        rows, size = self.window_rows, self.settings.batch_size
        for index, lane in enumerate(self.lanes):
            for block in np.flatnonzero(lane.shards == shard).tolist():
                start, end = int(lane.starts[block]), self._block_end(index, block)
                for window in range(start // rows, -(-end // rows)):
                    first = window * rows // size
                    last = min((min((window + 1) * rows, lane.rows) - 1) // size, self.lane_batches[index] - 1)
                    if self._among(numbers, index, first, last):
                        begin, stop = max(start, window * rows), min(end, (window + 1) * rows)
                        row = int(lane.first_rows[block]) + begin - start
                        found.append(RowSpan(row, stop - begin, index, window))
        return sorted(found)

    def _block_end(self, lane: int, block: int) -> int:
        starts = self.lanes[lane].starts
        return int(starts[block + 1]) if block + 1 < len(starts) else self.lanes[lane].rows

    def end(self, base: int, ranks: int) -> int:
        """One past the last batch that ranks read that began at `base`."""
        left_out = (self.batches - base) % ranks if self.settings.drop_last and base < self.batches else 0
        return self.batches - left_out

    def spans(self, numbers: range | None = None) -> list[ShardSpan]:
        """When each shard is read, in the order of first use. With `numbers`, ascending: by a reader of these batches
        only; shards that none of them needs have no span.
        """
        numbers = range(self.batches) if numbers is None else numbers
        size, window = self.settings.batch_size, self.settings.window if self.settings.shuffle else 1
        spans: dict[int, list[int]] = {}
        for index, lane in enumerate(self.lanes):
            ends = np.append(lane.starts, lane.rows)[1:]
            for shard, start, end in zip(lane.shards.tolist(), lane.starts.tolist(), ends.tolist(), strict=True):
                first = start // window * window // size
                final = min(-(-end // window) * window, lane.rows) - 1
                last = min(final // size, self.lane_batches[index] - 1)
                if found := self._among(numbers, index, first, last):
                    spans.setdefault(shard, []).extend(found)
        listed = [ShardSpan(shard, min(found), max(found)) for shard, found in spans.items()]
        return sorted(listed, key=lambda span: (span.first, span.last, span.shard))

    def decoded(self, numbers: range, readers: int = 1) -> list[ShardSpan]:
        """When the file of each shard is read, in the order of first use: from the batch whose window first takes rows
        of it to the one whose window is the last to. A window is decoded whole with a reader's first batch of it.

        `numbers`, ascending: those of one reader, or of `readers` readers that take turns over them, the last of which
        decodes a window no later than the span says.
        """
        size, window = self.settings.batch_size, self.window_rows
        spans: dict[int, tuple[int, int]] = {}
        for index, lane in enumerate(self.lanes):
            ends = np.append(lane.starts, lane.rows)[1:]
            for shard, start, end in zip(lane.shards.tolist(), lane.starts.tolist(), ends.tolist(), strict=True):
                for one in range(start // window, -(-end // window)):
                    first = one * window // size
                    last = min((min((one + 1) * window, lane.rows) - 1) // size, self.lane_batches[index] - 1)
                    found = self._among(numbers, index, first, last)
                    if not found:
                        continue
                    begin = stop = found[0]
                    if readers > 1:
                        stop = self._all_begun(index, first, last, begin, readers)
                    before = spans.get(shard, (begin, stop))
                    spans[shard] = min(before[0], begin), max(before[1], stop)
        listed = [ShardSpan(shard, first, last) for shard, (first, last) in spans.items()]
        return sorted(listed, key=lambda span: (span.first, span.last, span.shard))

    def _all_begun(self, lane: int, first: int, last: int, begins: int, readers: int) -> int:
        """The batch by which each of the readers that give batches [first, last] of a lane, from batch `begins` of the
        epoch on, has given one of them.
        """
        lanes = sum(count > first for count in self.lane_batches)
        if lanes > sum(count > last for count in self.lane_batches):  # the readers change places in between
            return self.number(lane, last)
        turn = first if begins == self.number(lane, first) else self.lane_of(begins)[1]
        return self.number(lane, min(turn + readers // gcd(readers, lanes) - 1, last))

    def _among(self, numbers: range, lane: int, first: int, last: int) -> list[int]:
        """The first and the last of `numbers` among the batches [first, last] of a lane; empty if there is none."""
        if first > last:
            return []
        found: list[int] = []
        begins = sorted({first, *(count for count in self.lane_batches if first < count <= last)})
        for begin, end in pairwise(
            [*begins, last + 1]
        ):  # while the same lanes give batches, the numbers have a fixed step
            step = sum(count > begin for count in self.lane_batches)
            start = self.number(lane, begin)
            found += _common(numbers, range(start, start + step * (end - begin), step))
        return [found[0], found[-1]] if found else []

    def _window(self, lane: int, window: int) -> Indices:
        start = window * self.settings.window
        positions = np.arange(start, min(start + self.settings.window, self.lanes[lane].rows))
        return _generator(self.settings, 1, lane, window).permutation(positions)


def _rounds(lane_batches: Sequence[int]) -> tuple[LaneRounds, ...]:
    found, first, turn = [], 0, 0
    for until in sorted({count for count in lane_batches if count}):
        lanes = tuple(lane for lane, count in enumerate(lane_batches) if count > turn)
        found.append(LaneRounds(first, turn, lanes))
        first, turn = first + (until - turn) * len(lanes), until
    return tuple(found)


def _common(some: range, others: range) -> list[int]:
    """The first and the last number that two ascending ranges share; empty if there is none."""
    apart = gcd(some.step, others.step)
    if not some or not others or (some.start - others.start) % apart:
        return []
    every = some.step // apart  # every so many of the others are shared
    turn = (some.start - others.start) // apart * pow(others.step // apart, -1, every) % every
    least, most = max(some[0], others[0]), min(some[-1], others[-1])
    first = others.start + others.step * turn
    together = others.step * every
    first += max(0, -((first - least) // together)) * together
    return [first, most - (most - first) % together] if first <= most else []


def open_at_once(spans: Sequence[ShardSpan], costs: Sequence[int] | None = None) -> int:
    """The most shards that one batch is in the spans of; with the `costs` of all shards, the most that they cost."""
    costed = [(span, 1 if costs is None else costs[span.shard]) for span in spans]
    turns = sorted([(span.first, cost) for span, cost in costed] + [(span.last + 1, -cost) for span, cost in costed])
    return max(accumulate((turn for _, turn in turns), initial=0))


def _deal(shard_rows: Sequence[int], settings: OrderSettings) -> tuple[Lane, ...]:
    order = range(len(shard_rows))
    if settings.shuffle:
        order = _generator(settings, 0).permutation(len(shard_rows)).tolist()
    fewest = [(0, lane) for lane in range(settings.lanes)]
    dealt: list[list[tuple[int, int, int]]] = [[] for _ in range(settings.lanes)]
    for shard in order:
        for row in range(0, shard_rows[shard], settings.block_rows):
            start, lane = fewest[0]
            dealt[lane].append((shard, row, start))
            heapq.heapreplace(fewest, (start + min(settings.block_rows, shard_rows[shard] - row), lane))
    rows = {lane: count for count, lane in fewest}
    tables = [np.array(blocks, dtype=np.int64).reshape(-1, 3) for blocks in dealt]
    return tuple(Lane(table[:, 0], table[:, 1], table[:, 2], rows[lane]) for lane, table in enumerate(tables))


def _generator(settings: OrderSettings, *what: int) -> np.random.Generator:
    """PCG64 seeded by SeedSequence: numpy promises the stream of both, on every platform (NEP 19)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([settings.seed, settings.epoch, *what])))
