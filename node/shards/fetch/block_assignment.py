"""Which blocks of a shard this node takes from the origin, while other nodes want the same shard.

No node asks another for leave: each node that wants a shard says so in the DHT, and who takes which block follows from
the set of those nodes by rendezvous hashing (Thaler and Ravishankar 1998): of all scores of a block the highest wins. A
node goes through the blocks in the order of its own scores, best first, so that nodes that do not know each other yet
begin with what they would take anyway. If views differ, two nodes take the same block: correct, but it leaves the
origin twice.

Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from node.swarm.torrent import Torrent
from protocol.ids import ContentId, NodeId

MAX_BLOCK_BYTES = 4 * 1024 * 1024
"""Of one request to the origin, unless a single piece is longer."""
MIN_BLOCK_BYTES = 1024 * 1024
BLOCKS = 64
"""At least so many, if that leaves them `MIN_BLOCK_BYTES`: fewer are shared out too unevenly."""
UNITS_A_BLOCK = 4
"""If an origin gives nothing shorter than a unit: the units at both ends of a block are read twice."""
MISSES = 3
"""A node whose want so many look-ups in a row did not find wants nothing more: one or two may miss it."""


class Block(NamedTuple):
    """Adjacent pieces, as they are shared out."""

    first: int
    end: int
    """Exclusive."""

    @property
    def pieces(self) -> range:
        return range(self.first, self.end)


def blocks_of(torrent: Torrent, unit_bytes: int = 1) -> tuple[Block, ...]:
    """The blocks of a shard, the same on every node whose origin reads in the same units."""
    if unit_bytes > 1:
        size = UNITS_A_BLOCK * unit_bytes
    else:
        size = max(MIN_BLOCK_BYTES, min(MAX_BLOCK_BYTES, torrent.size // BLOCKS))
    step = max(1, size // torrent.piece_length)
    return tuple(Block(first, min(first + step, torrent.pieces)) for first in range(0, torrent.pieces, step))


def score(node_id: NodeId, content_id: ContentId, block: int) -> bytes:
    """32 bytes; the highest of a block wins it."""
    return hashlib.sha256(f"{node_id}\0{content_id}\0{block}".encode()).digest()


def owner(nodes: Iterable[NodeId], content_id: ContentId, block: int) -> NodeId:
    """Which of these nodes, at least one, takes a block."""
    return max(nodes, key=lambda node_id: (score(node_id, content_id, block), node_id))


class BlockAssignment:
    """This node's blocks of one shard."""

    def __init__(self, own_id: NodeId, content_id: ContentId, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._own_id = own_id
        self._content_id = content_id
        self._misses: dict[NodeId, int] = {}
        """Node that wants the shard too -> look-ups since then that did not find it."""
        self._owns: dict[int, bool] = {}
        self.order: Sequence[int] = sorted(
            range(len(blocks)), key=lambda block: score(own_id, content_id, block), reverse=True
        )
        """Every block, those first that this node would win of most others."""

    @property
    def block_pieces(self) -> int:
        """How many pieces a block has; the last one may have fewer."""
        return len(self.blocks[0].pieces)

    def update_others(self, found: Iterable[NodeId]) -> None:
        """These nodes want the shard too, as a look-up found just now."""
        before = self.others
        missed = {node_id: misses + 1 for node_id, misses in self._misses.items() if misses + 1 < MISSES}
        self._misses = missed | {node_id: 0 for node_id in found if node_id != self._own_id}
        if self.others != before:
            self._owns.clear()

    def forget_others(self) -> None:
        """No look-up works any more: every block is this node's."""
        self._misses.clear()
        self._owns.clear()

    @property
    def others(self) -> frozenset[NodeId]:
        """The other nodes that want the shard."""
        return frozenset(self._misses)

    def owns(self, block: int) -> bool:
        """Whether the block is this node's, as far as the others are known."""
        if block not in self._owns:
            self._owns[block] = owner((self._own_id, *self._misses), self._content_id, block) == self._own_id
        return self._owns[block]

    def own_blocks(self) -> list[int]:
        """This node's blocks, in the order in which it takes them."""
        return [block for block in self.order if self.owns(block)]

    def next_block(
        self,
        *,
        missing: Collection[int],
        available: Collection[int],
        busy: Collection[int],
        peers_fail: bool,
        stuck: bool,
    ) -> int | None:
        """The block to take from the origin next, or None.

        `missing` are the pieces that are not here, `available` those that a connected peer has, `busy` the blocks that
        are taken at the moment. A piece that a peer has is left to it, unless `peers_fail`: they are too slow. `stuck`:
        nothing has moved for so long that a block of another node may be taken too, if none of this node's is left.
        """
        wanted = missing if peers_fail else frozenset(missing).difference(available)
        if not wanted:
            return None
        open_blocks = [
            block
            for block in self.order
            if block not in busy and any(piece in wanted for piece in self.blocks[block].pieces)
        ]
        own = next((block for block in open_blocks if self.owns(block)), None)
        if own is None and stuck:
            return next(iter(open_blocks), None)
        return own
