"""What the readers of one machine must have on the disk at once, in bytes, and which settings need less. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch_bridge.core.ranks import Ranks
from torch_bridge.streaming.order import EpochOrder, ShardSpan, open_at_once

Costs = Callable[[int], int]
"""Bytes on the disk of a shard of so many bytes."""


_MOST_EPOCHS, _MOST_BLOCKS = 32, 20_000


@dataclass(frozen=True)
class LocalReaders:
    """The readers of this machine, which share its disk; ranks of one machine follow each other."""

    ranks: Ranks
    workers: int
    """Of each rank, 1 without a DataLoader's."""

    def spans(self, order: EpochOrder, base: int) -> list[ShardSpan]:
        """When the file of each shard is read by any of them, from batch `base` on, in the order of first use."""
        world, local = self.ranks.world_size, self.ranks.local_world_size
        end, readers = order.end(base, world), world * self.workers
        if world == local:
            return order.decoded(range(base, end), readers)
        first = self.ranks.rank - self.ranks.local_rank
        ranks = (range(base + rank, end, world) for rank in range(first, min(first + local, world)))
        return merged(span for numbers in ranks for span in order.decoded(numbers, readers))


def merged(spans: Iterable[ShardSpan]) -> list[ShardSpan]:
    """One span of each shard, over all of its spans, in the order of first use."""
    found: dict[int, ShardSpan] = {}
    for span in spans:
        before = found.get(span.shard, span)
        found[span.shard] = ShardSpan(span.shard, min(before.first, span.first), max(before.last, span.last))
    return sorted(found.values(), key=lambda span: (span.first, span.last, span.shard))


@dataclass(frozen=True)
class DiskNeeds:
    """The least that the disk must hold, for an epoch that is read from batch `base` on."""

    order: EpochOrder
    sizes: Sequence[int]
    """Bytes of each shard."""
    cost: Costs
    readers: LocalReaders
    base: int = 0
    epochs: range = range(0)
    """Others that count too: each has another order."""

    def spans(self) -> list[ShardSpan]:
        return self.readers.spans(self.order, self.base)

    def together_bytes(self) -> int:
        """With all readers in step, and a file that several of them read counted once; the most of all epochs."""
        costs = [self.cost(size) for size in self.sizes]
        most = open_at_once(self.spans(), costs)
        for epoch in self.epochs:
            order = EpochOrder(self.order.shard_rows, replace(self.order.settings, epoch=epoch))
            most = max(most, open_at_once(self.readers.spans(order, 0), costs))
        return most

    def advice(self, room_bytes: int) -> str:
        """Which single change of a setting would fit into so many bytes, with what it needs."""
        found = []
        lanes = self.order.settings.lanes
        while (lanes := lanes // 2) > 0:
            settings = replace(self.order.settings, lanes=lanes)
            other = replace(self, order=EpochOrder(self.order.shard_rows, settings), base=0)
            if (needs := other.together_bytes()) <= room_bytes:
                found.append(f"lanes={lanes} ({needs} bytes of shards; it is another order)")
                break
        for workers in range(self.readers.workers - 1, 0, -1):
            other = replace(self, readers=replace(self.readers, workers=workers))
            if (needs := other.together_bytes()) <= room_bytes:
                found.append(f"num_workers={workers} ({needs})")
                break
        for parts in (2, 4, 8, 16, 32):
            rows = [count for all_rows in self.order.shard_rows for count in _split(all_rows, parts)]
            sizes = [size for all_bytes in self.sizes for size in _split(all_bytes, parts)]
            other = replace(self, order=EpochOrder(tuple(rows), self.order.settings), sizes=sizes, base=0)
            if (needs := other.together_bytes()) <= room_bytes:
                found.append(f"shards of at most {max(sizes)} bytes ({needs})")
                break
        if not found:
            return "publish smaller shards, with fewer lanes and a smaller window: no one change of these is enough"
        return " or ".join(found)


def epochs_ahead(order: EpochOrder) -> range:
    """Epochs that are looked at before they are read, so that none of them is refused later; fewer of a large one."""
    blocks = sum(len(lane.shards) for lane in order.lanes)
    return range(order.settings.epoch + 1, min(_MOST_EPOCHS, 1 + _MOST_BLOCKS // max(1, blocks)))


def _split(count: int, parts: int) -> list[int]:
    whole, left = divmod(count, parts)
    return [whole + (part < left) for part in range(parts)]
