"""Who takes which block of a shard from the origin: pure, so tested over every set of nodes."""

from __future__ import annotations

import hashlib
import itertools

from hypothesis import given
from hypothesis import strategies as st

from node.shards.fetch.block_assignment import MISSES, UNITS_A_BLOCK, Block, BlockAssignment, blocks_of, owner
from node.swarm.torrent import Torrent
from protocol.content import MAX_PIECE_BYTES
from protocol.ids import ContentId, NodeId

CONTENT = ContentId("ab" * 32)
MIB = 1024 * 1024


def node(number: int) -> NodeId:
    return NodeId(hashlib.sha256(f"node {number}".encode()).hexdigest())


nodes = st.sets(st.integers(0, 10_000), min_size=1, max_size=12).map(lambda found: {node(n) for n in found})


def assignment_of(own: NodeId, blocks: int) -> BlockAssignment:
    return BlockAssignment(own, CONTENT, [Block(first, first + 4) for first in range(0, 4 * blocks, 4)])


def assignments(of: set[NodeId], blocks: int) -> dict[NodeId, BlockAssignment]:
    """Every node's, after a look-up that found all the others."""
    found = {own: assignment_of(own, blocks) for own in of}
    for assignment in found.values():
        assignment.update_others(of)
    return found


@given(nodes, st.integers(1, 80))
def test_every_block_has_exactly_one_owner(of: set[NodeId], blocks: int) -> None:
    taken = [block for assignment in assignments(of, blocks).values() for block in assignment.own_blocks()]
    assert sorted(taken) == list(range(blocks))


@given(nodes.filter(lambda found: len(found) > 1), st.data())
def test_only_the_blocks_of_a_lost_node_change_hands(of: set[NodeId], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(sorted(of)))
    before = [owner(of, CONTENT, block) for block in range(64)]
    after = [owner(of - {lost}, CONTENT, block) for block in range(64)]
    assert all(was in (lost, now) for was, now in zip(before, after, strict=True))
    assert lost not in after


def test_the_blocks_of_a_lost_node_spread_over_the_others() -> None:
    of = {node(n) for n in range(5)}
    held = [block for block in range(400) if owner(of, CONTENT, block) == node(0)]
    heirs = [owner(of - {node(0)}, CONTENT, block) for block in held]
    assert 40 < len(held) < 130
    assert all(heirs.count(node(n)) > 5 for n in range(1, 5))


@given(nodes, st.integers(1, 80))
def test_a_node_begins_with_what_it_wins_of_most_others(of: set[NodeId], blocks: int) -> None:
    for own, assignment in assignments(of, blocks).items():
        alone = assignment_of(own, blocks)
        assert alone.own_blocks() == list(alone.order)
        assert sorted(alone.order) == list(range(blocks))
        assert [block for block in alone.order if block in set(assignment.own_blocks())] == assignment.own_blocks()


def test_what_nodes_begin_with_before_they_know_each_other_is_mostly_theirs() -> None:
    of = {node(n) for n in range(4)}
    whole = assignments(of, 64)
    first = [(own, block) for own in of for block in assignment_of(own, 64).order[:4]]
    assert sum(whole[own].owns(block) for own, block in first) >= 14


def test_a_wish_that_is_found_no_more_is_over_soon() -> None:
    assignment = assignment_of(node(0), 64)
    assignment.update_others([node(0), node(1)])
    assert assignment.others == {node(1)}
    shared = len(assignment.own_blocks())
    for _ in range(2):
        for _ in range(MISSES - 1):
            assignment.update_others([])
            assert len(assignment.own_blocks()) == shared
        assignment.update_others([node(1)])
    for _ in range(MISSES):
        assignment.update_others([])
    assert (assignment.others, len(assignment.own_blocks())) == (frozenset(), 64)
    assert shared < 64
    assignment.update_others([node(1)])
    assignment.forget_others()
    assert len(assignment.own_blocks()) == 64


@given(st.integers(1, 20_000_000_000))
def test_blocks_are_all_pieces_in_order_and_of_a_bounded_size(size: int) -> None:
    torrent = Torrent.of("x", size, CONTENT)
    blocks = blocks_of(torrent)
    assert (blocks[0].first, blocks[-1].end) == (0, torrent.pieces)
    assert all(a.end == b.first for a, b in itertools.pairwise(blocks))
    longest = max(len(block.pieces) for block in blocks) * torrent.piece_length
    assert longest <= max(MAX_PIECE_BYTES, torrent.piece_length)


@given(st.integers(1, 20_000_000_000))
def test_an_origin_that_reads_in_long_units_is_asked_for_some_at_a_time(size: int) -> None:
    torrent, unit = Torrent.of("x", size, CONTENT), 32_000_000
    blocks = blocks_of(torrent, unit)
    assert (blocks[0].first, blocks[-1].end) == (0, torrent.pieces)
    assert all(a.end == b.first for a, b in itertools.pairwise(blocks))
    assert all(
        (UNITS_A_BLOCK - 1) * unit < len(block.pieces) * torrent.piece_length <= UNITS_A_BLOCK * unit
        for block in blocks[:-1]
    )


BLOCKS = [Block(first, first + 4) for first in range(0, 64, 4)]
ALL = frozenset(range(64))


def pick(assignment: BlockAssignment, **options: object) -> int | None:
    given: dict[str, object] = {"missing": ALL, "available": (), "busy": (), "peers_fail": False, "stuck": False}
    return assignment.next_block(**(given | options))  # type: ignore[arg-type]


def shared() -> BlockAssignment:
    assignment = assignment_of(node(0), len(BLOCKS))
    assignment.update_others([node(1), node(2)])
    return assignment


def test_own_blocks_are_chosen_one_after_the_other_and_no_others() -> None:
    assignment = shared()
    taken: list[int] = []
    while (block := pick(assignment, busy=taken)) is not None:
        taken.append(block)
    assert taken == assignment.own_blocks()
    assert 0 < len(taken) < len(BLOCKS)


def test_what_a_peer_has_is_left_to_it_while_peers_give() -> None:
    assignment = shared()
    assert pick(assignment, available=ALL) is None
    assert pick(assignment, available=ALL, peers_fail=True) == assignment.own_blocks()[0]
    first = BLOCKS[assignment.own_blocks()[0]]
    assert pick(assignment, available=ALL - {first.first}) == assignment.own_blocks()[0]
    assert pick(assignment, available=frozenset(first.pieces)) == assignment.own_blocks()[1]


def test_blocks_of_others_are_taken_only_where_nothing_moves_and_none_of_ones_own_is_left() -> None:
    assignment = shared()
    own = {piece for block in assignment.own_blocks() for piece in BLOCKS[block].pieces}
    assert pick(assignment, missing=ALL - own) is None
    foreign = pick(assignment, missing=ALL - own, stuck=True)
    assert foreign is not None
    assert not assignment.owns(foreign)
    assert pick(assignment, stuck=True) == assignment.own_blocks()[0]
    assert pick(assignment, missing=frozenset(), stuck=True, peers_fail=True) is None
