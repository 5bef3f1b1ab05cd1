"""The origin's part of a download as it goes on, over downloads, origins and a DHT in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from node.shards.fetch import origin_feeder as feeder_module
from node.shards.fetch.block_assignment import Lease, blocks_of
from node.shards.fetch.origin_feeder import Feeder, WholeNeededError
from node.shards.fetch.origin_selector import Supply
from node.shards.fetch.want_announcer import Wanting
from node.shards.settings import ShardsSettings
from node.swarm.torrent import PeerAddress, Piece, Torrent
from protocol.content import hash_file
from protocol.errors import OriginDeniedError
from protocol.ids import ContentId, NodeId
from protocol.manifest import ShardEntry

SIZE = 12_000_000
OWN, OTHER = NodeId("aa" * 32), NodeId("cd" * 32)


class MemoryPlace:
    """Gives everything at once, or nothing to whom it denies."""

    url = "o3://memory"

    def __init__(self, data: bytes, layer: bytes, *, denies: bool = False, pause_s: float = 0.0) -> None:
        self.data, self.layer, self.denies, self.pause_s = data, layer, denies, pause_s
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
        await asyncio.sleep(self.pause_s)
        for at in range(start, end, 65_536):
            yield self.data[at : min(at + 65_536, end)]


class MemoryDownload:
    """Keeps what it is given; no peer is connected."""

    def __init__(self, torrent: Torrent, layer: bytes) -> None:
        self.torrent, self.piece_layer = torrent, layer
        self.have: set[int] = set()
        self.whole = asyncio.Event()
        self.peers: list[PeerAddress] = []

    def progress(self) -> Any:
        done = sum(self.torrent.piece(index).size for index in self.have)
        return SimpleNamespace(bytes_done=done, bytes_total=self.torrent.size, rate_bytes_s=0.0, peers=1)

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


class MemoryWants:
    """The DHT's wants, seen by one node."""

    def __init__(self, *others: NodeId) -> None:
        self.node_id = OWN
        self.others = others
        self.block_pieces = 4
        """Of the others' blocks."""
        self.wanted = False

    async def announce_want(self, *_: Any, **__: Any) -> None:
        self.wanted = True

    async def withdraw_want(self, *_: Any) -> None:
        self.wanted = False

    async def find_wants(self, *_: Any) -> list[Any]:
        return [
            SimpleNamespace(node_id=other, host="127.0.0.1", bt_port=1, block_pieces=self.block_pieces)
            for other in self.others
        ]


class MemorySources:
    """Discovery names a provider that has the shard; nobody is there."""

    def __init__(self) -> None:
        self.whole = True
        self.lookups = 0

    async def look_up(self) -> list[PeerAddress]:
        self.lookups += 1
        return [PeerAddress("127.0.0.1", 9)]

    def failed(self, why: str, supply: Supply) -> Exception:
        return OriginDeniedError(why, {})


class Bench:
    """One feeder over all of these."""

    def __init__(
        self,
        tmp_path: Path,
        tasks: asyncio.TaskGroup,
        wants: MemoryWants,
        *,
        unit_bytes: int = 1,
        stall_timeout_s: float = 60.0,
        **place: Any,
    ) -> None:
        data = random.Random(1).randbytes(SIZE)
        (tmp_path / "x").write_bytes(data)
        content = hash_file(tmp_path / "x")
        entry = ShardEntry(shard_id=0, filename="x", size=SIZE, content_id=content.content_id, kind="file")
        torrent = Torrent.of("x", SIZE, content.content_id)
        settings = ShardsSettings(
            tmp_path, tmp_path, relookup_s=0.5, origin_after_s=0.05, stall_timeout_s=stall_timeout_s
        )
        self.wants = wants
        self.place = MemoryPlace(data, place.pop("layer", content.piece_layer), **place)
        self.sources = MemorySources()
        self.blocks = blocks = blocks_of(torrent, unit_bytes)
        self.lease = Lease(OWN, content.content_id, len(blocks))
        own = len(blocks[0].pieces)
        wanting = Wanting(wants, content.content_id, self.lease, own, 1, _no_address)  # type: ignore[arg-type]
        supply = Supply([self.place], entry, torrent)
        self.feeder = Feeder(
            settings,
            torrent,
            blocks,
            unit_bytes,
            self.sources,  # type: ignore[arg-type]
            supply,
            wanting,
            tasks,
        )
        self.download = MemoryDownload(torrent, self.place.layer)


async def _no_address(_: object) -> list[PeerAddress]:
    return []


async def until_all_is_here(bench: Bench) -> None:
    bench.feeder.begin()
    feeding = asyncio.create_task(bench.feeder.feed(bench.download))
    await bench.download.whole.wait()
    feeding.cancel()
    await asyncio.wait([feeding])
    bench.feeder.close()


async def test_once_nothing_comes_of_others_their_blocks_are_taken_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder_module, "STUCK_S", 2.0)
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(5.0):
        bench = Bench(tmp_path, tasks, MemoryWants(OTHER))
        await until_all_is_here(bench)
    foreign = [block for block in bench.lease.order if not bench.lease.owns(block)]
    assert len(foreign) >= 3
    assert len(bench.place.asked) == len(bench.lease.order)


async def test_a_node_that_no_origin_gives_anything_leaves_its_blocks_to_others(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks:
        bench = Bench(tmp_path, tasks, MemoryWants(OTHER), denies=True)
        bench.feeder.begin()
        feeding = tasks.create_task(bench.feeder.feed(bench.download))
        await asyncio.sleep(0.1)
        assert bench.wants.wanted
        await asyncio.sleep(2.4)
        assert bench.feeder.supply.exhausted
        assert not bench.wants.wanted
        assert not feeding.done()
        feeding.cancel()
        bench.feeder.close()


async def test_a_provider_that_the_dht_names_but_that_is_gone_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder_module, "UNSTICK_S", 2.0)
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(6.0):
        bench = Bench(tmp_path, tasks, MemoryWants(), layer=b"")
        bench.feeder.begin()
        with pytest.raises(WholeNeededError):
            await bench.feeder.feed(bench.download)
        bench.feeder.close()
    assert bench.download.peers, "what discovery names is tried meanwhile"
    assert 1 <= bench.sources.lookups <= 6


async def test_an_origin_that_reads_in_long_units_may_be_silent_for_one(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(20.0):
        bench = Bench(tmp_path, tasks, MemoryWants(), unit_bytes=1 << 20, stall_timeout_s=1.0, pause_s=1.5)
        assert bench.feeder.lull_s == 4.0
        assert len(bench.blocks[0].pieces) == 16
        await until_all_is_here(bench)
    assert len(bench.place.asked) == len(bench.blocks) == 3, "no request broke off"


async def test_who_shares_it_out_in_other_blocks_is_a_peer_and_no_more(tmp_path: Path) -> None:
    wants = MemoryWants(OTHER)
    wants.block_pieces = 488
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(5.0):
        bench = Bench(tmp_path, tasks, wants)
        await until_all_is_here(bench)
    assert bench.lease.others == frozenset()


@pytest.mark.parametrize("broken", [False, True])
async def test_names_that_do_not_resolve_hold_nothing_up(broken: bool) -> None:
    tried: list[NodeId] = []

    async def resolve(want: Any) -> list[PeerAddress]:
        tried.append(want.node_id)
        await asyncio.sleep(0.2)
        if broken:
            raise ValueError("a defect")
        await asyncio.sleep(60)
        return []

    others = [NodeId(f"{number:064x}") for number in range(6)]
    lease = Lease(OWN, ContentId("ab" * 32), 8)
    wanting = Wanting(MemoryWants(*others), ContentId("ab" * 32), lease, 4, 1, resolve)  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(wanting.run())
        async with asyncio.timeout(1.0):
            await wanting._settled.wait()
        assert lease.others == set(others)
        await asyncio.sleep(1.3)
        assert sorted(tried) == others, "each once, and all at the same time"
        assert lease.others == (set() if broken else set(others)), "a lease that nobody keeps up binds nobody"
        running.cancel()
