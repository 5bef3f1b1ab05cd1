"""When the origin is needed, and its part of a download: over downloads, origins and a DHT in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.clock import Clock
from node.discovery.values import WantInfo
from node.shards.fetch import origin_feeder as feeder_module
from node.shards.fetch.block_assignment import Block, BlockAssignment, blocks_of
from node.shards.fetch.origin_feeder import OriginFeeder, PeerRate, TransferTimes, WholeFileNeededError
from node.shards.fetch.origin_selector import OriginSelector
from node.shards.fetch.want_announcer import WantAnnouncer
from node.shards.settings import ShardsSettings
from node.swarm.torrent import DownloadProgress, PeerAddress, Piece, Torrent
from protocol.content import hash_file
from protocol.errors import OriginDeniedError
from protocol.ids import ContentId, NodeId
from protocol.manifest import ShardEntry
from tests.support.clocks import MovedClock
from tests.support.shards.parts import MemoryDiscovery

SIZE = 12_000_000
OWN, OTHER = NodeId("aa" * 32), NodeId("cd" * 32)


class MemoryOrigin:
    """Gives everything after a pause, or nothing to whom it denies."""

    url = "o3://memory"

    def __init__(self, data: bytes, layer: bytes, clock: Clock, *, denies: bool = False, pause_s: float = 0.0) -> None:
        self.data, self.layer, self.clock, self.denies, self.pause_s = data, layer, clock, denies, pause_s
        self.asked: list[int] = []

    def key_of(self, entry: ShardEntry) -> str:
        return "k"

    async def range_unit_bytes(self) -> int:
        return 1

    async def piece_layer(self, entry: ShardEntry) -> bytes:
        return self.layer

    async def stream(self, entry: ShardEntry, start: int, end: int) -> AsyncIterator[bytes]:
        if self.denies:
            raise OriginDeniedError("no", {})
        self.asked.append(start)
        await self.clock.sleep(self.pause_s)
        for at in range(start, end, 65_536):
            yield self.data[at : min(at + 65_536, end)]


class MemoryDownload:
    """Keeps what it is given; no peer is connected."""

    def __init__(self, torrent: Torrent, layer: bytes) -> None:
        self.torrent, self.piece_layer = torrent, layer
        self.have: set[int] = set()
        self.whole = asyncio.Event()
        self.peers: list[PeerAddress] = []

    def progress(self) -> DownloadProgress:
        done = sum(self.torrent.piece(index).size for index in self.have)
        return DownloadProgress(done, self.torrent.size, peers=1)

    async def ready(self) -> None:
        pass

    def missing_pieces(self) -> list[Piece]:
        return [self.torrent.piece(index) for index in range(self.torrent.pieces) if index not in self.have]

    async def available_pieces(self) -> frozenset[int]:
        return frozenset()

    async def take_layer(self, layer: bytes) -> None:
        self.piece_layer = layer

    async def add_piece(self, index: int, data: bytes) -> bool:
        self.have.add(index)
        if not self.missing_pieces():
            self.whole.set()
        return True

    def add_peers(self, peers: Iterable[PeerAddress]) -> None:
        self.peers += peers

    async def verified(self) -> Path:
        await self.whole.wait()
        return Path(self.torrent.name)

    async def cancel(self, delete: bool = False) -> None:
        pass


def wanted_by(*others: NodeId, block_pieces: int = 4) -> MemoryDiscovery:
    """A DHT in which these nodes want the shard too."""
    return MemoryDiscovery(node_id=OWN, wants=[WantInfo(other, "127.0.0.1", 1, block_pieces) for other in others])


class MemoryProviders:
    """Discovery names a provider that has the shard; no node is there."""

    def __init__(self) -> None:
        self.any_complete = True
        self.lookups = 0

    async def look_up(self) -> list[PeerAddress]:
        self.lookups += 1
        return [PeerAddress("127.0.0.1", 9)]

    def no_source_or_origin(self, why: str, errors: Mapping[str, Exception]) -> Exception:
        return OriginDeniedError(why, {})


class Bench:
    """One feeder over all of these, on a clock that the test moves."""

    def __init__(
        self,
        tmp_path: Path,
        tasks: asyncio.TaskGroup,
        wants: MemoryDiscovery,
        *,
        unit_bytes: int = 1,
        stall_timeout_s: float = 60.0,
        **origin: Any,
    ) -> None:
        data = random.Random(1).randbytes(SIZE)
        (tmp_path / "x").write_bytes(data)
        content = hash_file(tmp_path / "x")
        entry = ShardEntry(shard_id=0, filename="x", size=SIZE, content_id=content.content_id, kind="file")
        torrent = Torrent.of("x", SIZE, content.content_id)
        settings = ShardsSettings(
            tmp_path, tmp_path, relookup_s=0.5, origin_after_s=0.05, stall_timeout_s=stall_timeout_s
        )
        self.clock = MovedClock()
        self.wants = wants
        self.origin = MemoryOrigin(data, origin.pop("layer", content.piece_layer), self.clock, **origin)
        self.providers = MemoryProviders()
        self.assignment = BlockAssignment(OWN, content.content_id, blocks_of(torrent, unit_bytes))
        want_announcer = WantAnnouncer(
            wants,  # type: ignore[arg-type]
            content.content_id,
            self.assignment,
            1,
            _no_address,
            self.clock,
        )
        self.feeder = OriginFeeder(
            settings,
            self.providers,  # type: ignore[arg-type]
            OriginSelector([self.origin], entry, torrent, self.clock),
            want_announcer,
            tasks,
            self.clock,
            unit_bytes=unit_bytes,
        )
        self.download = MemoryDownload(torrent, self.origin.layer)


async def _no_address(_: object) -> list[PeerAddress]:
    return []


async def until_all_is_here(bench: Bench, within_s: float) -> None:
    bench.feeder.begin()
    feeding = asyncio.create_task(bench.feeder.feed(bench.download))
    await bench.clock.move_until(bench.download.whole.is_set, within_s)
    feeding.cancel()
    await asyncio.wait([feeding])
    bench.feeder.close()


def peer_rate(now: float = 0.0) -> PeerRate:
    return PeerRate(now, gone_after_s=2.0, slow_bytes_s=1000.0, slow_after_s=5.0)


def test_peers_are_gone_when_none_was_connected_for_a_while() -> None:
    peers = peer_rate()
    assert not peers.is_gone(1.9)
    assert peers.is_gone(2.0)
    peers.observe(2.5, 0, 1)
    assert not peers.is_gone(4.0)
    assert peers.is_gone(4.5)


@given(st.lists(st.integers(0, 100), min_size=30, max_size=30))
def test_peers_are_slow_by_what_came_in_the_last_seconds(steps: list[int]) -> None:
    peers, total, came = peer_rate(), 0, [0]
    for tick, step in enumerate(steps):
        total += step * 10
        came.append(total)
        peers.observe(tick / 2, total, 1)
        if tick < 10:
            assert not peers.is_slow(tick / 2), "they are given time"
        else:
            assert peers.is_slow(tick / 2) == (came[tick + 1] - came[tick - 9] < 5000)


def test_what_is_being_given_is_not_taken_for_what_peers_gave() -> None:
    times = TransferTimes(0.0)
    times.observe(1.0, 100)
    times.given_bytes += 50
    times.observe(2.0, 100)
    times.observe(3.0, 150)
    times.chunk_came(4.0, shared=False)
    assert (times.peer_bytes, times.shared_at, times.moved_at) == (100, 1.0, 4.0)
    times.observe(5.0, 170)
    assert (times.peer_bytes, times.shared_at, times.moved_at) == (120, 5.0, 5.0)
    times.chunk_came(6.0, shared=True)
    assert times.shared_at == 6.0


async def test_once_nothing_comes_of_others_their_blocks_are_taken_without_a_pause(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tmp_path, tasks, wanted_by(OTHER))
        await until_all_is_here(bench, feeder_module.STUCK_S + 3.0)
    foreign = [block for block in bench.assignment.order if not bench.assignment.owns(block)]
    assert len(foreign) >= 3
    assert len(bench.origin.asked) == len(bench.assignment.order)


async def test_a_node_that_no_origin_gives_anything_leaves_its_blocks_to_others(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tmp_path, tasks, wanted_by(OTHER), denies=True)
        bench.feeder.begin()
        feeding = tasks.create_task(bench.feeder.feed(bench.download))
        await bench.clock.move(0.1)
        assert bench.wants.wanted
        await bench.clock.move(2.4)
        assert bench.feeder.selector.exhausted
        assert not bench.wants.wanted
        assert not feeding.done()
        feeding.cancel()
        bench.feeder.close()


async def test_a_provider_that_the_dht_names_but_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tmp_path, tasks, wanted_by(), layer=b"")
        bench.feeder.begin()
        feeding = asyncio.create_task(bench.feeder.feed(bench.download))
        await bench.clock.move_until(feeding.done, feeder_module.UNSTICK_S + 4.0)
        with pytest.raises(WholeFileNeededError):
            await feeding
        bench.feeder.close()
    assert bench.download.peers, "what discovery names is tried meanwhile"
    assert 1 <= bench.providers.lookups <= (feeder_module.UNSTICK_S + 1.0) / 0.5


async def test_an_origin_that_reads_in_long_units_may_be_silent_for_one(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tmp_path, tasks, wanted_by(), unit_bytes=1 << 20, stall_timeout_s=1.0, pause_s=1.5)
        assert bench.feeder.lull_s == 4.0
        assert len(bench.assignment.blocks[0].pieces) == 16
        await until_all_is_here(bench, 20.0)
    assert len(bench.origin.asked) == len(bench.assignment.blocks) == 3, "no request broke off"


async def test_who_shares_it_out_in_other_blocks_is_a_peer_and_no_more(tmp_path: Path) -> None:
    wants = wanted_by(OTHER, block_pieces=488)
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tmp_path, tasks, wants)
        await until_all_is_here(bench, 5.0)
    assert bench.assignment.others == frozenset()


@pytest.mark.parametrize("broken", [False, True])
async def test_names_that_do_not_resolve_hold_nothing_up(broken: bool) -> None:
    tried: list[NodeId] = []
    clock = MovedClock()

    async def resolve(want: Any) -> list[PeerAddress]:
        tried.append(want.node_id)
        await clock.sleep(0.2)
        if broken:
            raise ValueError("a defect")
        await clock.sleep(60)
        return []

    others = [NodeId(f"{number:064x}") for number in range(6)]
    assignment = BlockAssignment(OWN, ContentId("ab" * 32), [Block(at, at + 4) for at in range(0, 32, 4)])
    wants = wanted_by(*others)
    announcer = WantAnnouncer(wants, ContentId("ab" * 32), assignment, 1, resolve, clock)  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(announcer.run())
        await clock.move_until(announcer._settled.is_set, 1.0)
        assert assignment.others == set(others)
        await clock.move(1.3)
        assert sorted(tried) == others, "each once, and all at the same time"
        assert assignment.others == (set() if broken else set(others)), "an assignment without look-ups binds nobody"
        running.cancel()
