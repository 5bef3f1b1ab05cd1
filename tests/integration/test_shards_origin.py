"""Shards that peers do not have, or no longer: from an origin, over the real swarm and the real DHT.

The origin is a local file behind the port of the loader; it counts every byte that leaves it.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from node.shards.fetch.block_assignment import blocks_of
from node.shards.fetch.job import FetchedShard
from node.shards.store.catalog import torrent_of
from node.shards.store.manifests import folder_names
from node.swarm.torrent import DownloadProgress
from protocol.content import hash_file
from protocol.errors import OriginCorruptError, OriginDeniedError, OriginNotFoundError, OriginUnavailableError
from protocol.manifest import Manifest, ModelInfo, Shard, ShardEntry, SignedManifest, sign_manifest
from protocol.signing import SigningKey
from tests.support.origins.file_origin import FileOrigin, GivenOrigins, not_found
from tests.support.shards.rooms import Network, Node, open_node, write_gguf
from tests.support.waiting import eventually

MB = 1_000_000


@dataclass(frozen=True)
class Published:
    """A shard that lies nowhere but at the origin."""

    path: Path
    signed: SignedManifest
    entry: ShardEntry
    layer: bytes

    def place(self, **options: object) -> FileOrigin:
        return FileOrigin(self.path, **{"layer": self.layer, **options})  # type: ignore[arg-type]


def publish(folder: Path, size: int = 6 * MB) -> Published:
    folder.mkdir()
    path = write_gguf(folder / "shard-0.gguf", size)
    content = hash_file(path)
    entry = ShardEntry(
        shard_id=0,
        filename=path.name,
        size=content.size,
        content_id=content.content_id,
        kind="gguf",
        start_layer=0,
        end_layer=1,
    )
    model = ModelInfo(architecture="llama", n_layers=1, n_embd=8, context_length=64)
    manifest = Manifest(name="tiny", kind="model", shards=(entry,), model=model)
    return Published(path, sign_manifest(manifest, SigningKey.generate()), entry, content.piece_layer)


@pytest.fixture
def shard(tmp_path: Path) -> Published:
    return publish(tmp_path / "origin")


async def fetch(node: Node, shard: Published, seen: list[DownloadProgress] | None = None) -> FetchedShard:
    fetched = await node.shards.fetch(Shard(shard.signed, shard.entry), seen.append if seen is not None else None)
    assert fetched.path.read_bytes() == shard.path.read_bytes()
    return fetched


async def test_one_node_without_peers_takes_a_shard_from_the_origin_and_seeds_it(
    tmp_path: Path, shard: Published
) -> None:
    place, network = shard.place(rate_bytes_s=5 * MB), Network()
    seen: list[DownloadProgress] = []
    async with open_node(tmp_path / "a", network, origin=GivenOrigins(place)) as a:
        fetched = await fetch(a, shard, seen)
        assert (fetched.source, fetched.bytes_by_source) == ("origin", {"origin": shard.entry.size})
        assert place.out_bytes == shard.entry.size
        done = [progress.bytes_done for progress in seen if progress.phase == "downloading"]
        assert done == sorted(done)
        assert len(set(done)) >= 4
        assert max(progress.rate_bytes_s for progress in seen) > MB / 10
        assert await a.discovery.find_wants(shard.entry.content_id) == []
        async with open_node(tmp_path / "b", network, bootstrap=(a,)) as b:
            assert (await fetch(b, shard)).source == "peers"
    assert place.out_bytes == shard.entry.size


@pytest.mark.parametrize("size", [1000, pytest.param(3 * MB, marks=pytest.mark.slow)])
async def test_streams_that_break_go_on_at_the_byte_where_they_broke(tmp_path: Path, size: int) -> None:
    shard = publish(tmp_path / "origin", size)
    given: list[tuple[int, int]] = []
    first, second = (shard.place(url=f"o3://{name}", break_after=100_000, given=given) for name in "ab")
    async with open_node(tmp_path / "a", Network(), origin=GivenOrigins(first, second)) as a:
        assert (await fetch(a, shard)).source == "origin"
    assert first.out_bytes + second.out_bytes == shard.entry.size
    assert first.twice_bytes == 0
    assert size < MB or min(first.streams, second.streams) > 1


async def test_three_cold_nodes_take_one_copy_from_the_origin(tmp_path: Path) -> None:
    shard = publish(tmp_path / "origin", 24 * MB)  # of fewer blocks a node has none by chance in one of forty runs
    place, network = shard.place(rate_bytes_s=16 * MB), Network()
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        for name in "abc":
            node = open_node(tmp_path / name, network, bootstrap=tuple(nodes[:1]), origin=GivenOrigins(place))
            nodes.append(await stack.enter_async_context(node))
        fetched = await asyncio.gather(*(fetch(node, shard) for node in nodes))
        from_origin = [each.bytes_by_source["origin"] for each in fetched]
        assert sum(from_origin) == place.out_bytes
        assert place.out_bytes <= 1.15 * shard.entry.size, from_origin
        assert all(0 < each < 0.7 * shard.entry.size for each in from_origin), from_origin
        assert sum(node.swarm.stats().uploaded_bytes for node in nodes) > MB


@pytest.mark.slow
async def test_the_origin_gives_the_rest_when_all_peers_are_killed_in_the_middle(tmp_path: Path) -> None:
    shard = publish(tmp_path / "origin", 8 * MB)
    place, network = shard.place(), Network()
    seen: list[DownloadProgress] = []
    # Whether a peer is connected is known late: the default of `origin_after_s` allows for it.
    b_node = open_node(tmp_path / "b", network, origin_after_s=1.0, origin=GivenOrigins(place))
    async with b_node as b, AsyncExitStack() as stack:
        a = await stack.enter_async_context(
            open_node(tmp_path / "a", network, bootstrap=(b,), upload_limit=2 * MB, origin=GivenOrigins(shard.place()))
        )
        await fetch(a, shard)
        await a.shards.settled()
        fetching = asyncio.create_task(fetch(b, shard, seen))
        await eventually(lambda: bool(seen) and seen[-1].bytes_done > shard.entry.size // 2)
        assert place.streams == 0, "a peer that gives is not helped"
        await stack.aclose()
        fetched = await fetching
    assert place.twice_bytes == 0
    assert place.out_bytes < 0.6 * shard.entry.size
    assert fetched.bytes_by_source["origin"] == place.out_bytes
    assert sum(fetched.bytes_by_source.values()) == shard.entry.size
    assert fetched.source == "peers"


@pytest.mark.slow
async def test_what_a_slow_peer_does_not_give_comes_from_the_origin(tmp_path: Path) -> None:
    shard = publish(tmp_path / "origin", 4 * MB)
    place, network = shard.place(), Network()
    async with (
        open_node(tmp_path / "a", network, upload_limit=20_000, origin=GivenOrigins(shard.place())) as a,
        open_node(tmp_path / "b", network, bootstrap=(a,), slow_after_s=2.0, origin=GivenOrigins(place)) as b,
    ):
        await fetch(a, shard)
        await a.shards.settled()
        fetched = await fetch(b, shard)
        assert fetched.source == "origin"
    assert place.twice_bytes == 0


@pytest.mark.slow
async def test_the_origin_may_be_gone_for_a_while(
    tmp_path: Path, shard: Published, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "node.shards")
    place = shard.place(rate_bytes_s=2 * MB)
    seen: list[DownloadProgress] = []
    async with open_node(tmp_path / "a", Network(), restart_s=1.0, origin=GivenOrigins(place)) as a:
        fetching = asyncio.create_task(fetch(a, shard, seen))
        await eventually(lambda: place.out_bytes > 2 * MB)
        place.gone = True
        await asyncio.sleep(4.0)
        assert not fetching.done()
        place.gone = False
        assert (await fetching).bytes_by_source["origin"] == shard.entry.size
    assert "is restarted" not in caplog.text, "a download that the origin feeds is left alone"
    assert place.out_bytes == shard.entry.size


@pytest.mark.slow
async def test_after_an_error_the_next_try_goes_on_from_there(tmp_path: Path, shard: Published) -> None:
    place = shard.place(rate_bytes_s=4 * MB)
    async with open_node(tmp_path / "a", Network(), stall_timeout_s=3.0, origin=GivenOrigins(place)) as a:
        fetching = asyncio.create_task(fetch(a, shard))
        await eventually(lambda: place.out_bytes > 3 * MB)
        place.gone = True
        with pytest.raises(
            OriginUnavailableError, match=r"o3://shards refuses connections.*discovery was asked"
        ) as failed:
            await fetching
        assert failed.value.details["origin"] == "o3://shards"
        assert {"key", "status", "tried", "providers"} <= failed.value.details.keys()
        place.gone = False
        fetched = await fetch(a, shard)
        assert fetched.bytes_by_source["origin"] < 0.6 * shard.entry.size


@pytest.mark.parametrize("layer", [True, False])
async def test_wrong_bytes_are_not_kept_and_the_next_place_is_asked(
    tmp_path: Path, shard: Published, layer: bool
) -> None:
    given = shard.layer if layer else b""
    wrong = shard.place(url="o3://wrong", wrong_at=3_000_000, layer=given)
    right = shard.place(url="o3://right", layer=given)
    async with open_node(tmp_path / "a", Network(), origin=GivenOrigins(wrong, right)) as a:
        await fetch(a, shard)
        assert (wrong.out_bytes > 0, right.out_bytes > 0) == (True, True)
        assert {info.state for info in a.shards.files()} == {"seeding"}


@pytest.mark.parametrize("layer", [True, False])
async def test_where_every_place_is_wrong_the_error_names_it(tmp_path: Path, shard: Published, layer: bool) -> None:
    place = shard.place(wrong_at=3_000_000, layer=shard.layer if layer else b"")
    async with open_node(tmp_path / "a", Network(), find_timeout_s=1.0, origin=GivenOrigins(place)) as a:
        with pytest.raises(OriginCorruptError, match=r"o3://shards gave .*shard-0\.gguf") as failed:
            await fetch(a, shard)
        assert failed.value.details["origin"] == "o3://shards"
        assert failed.value.details["key"] == f"shards/{shard.entry.content_id}"
        assert a.shards.files() == []
        assert await a.discovery.find_wants(shard.entry.content_id) == []


async def test_a_place_that_has_nothing_is_named(tmp_path: Path, shard: Published) -> None:
    place = shard.place(error=not_found(), layer=b"")
    async with open_node(tmp_path / "a", Network(), find_timeout_s=1.0, origin=GivenOrigins(place)) as a:
        with pytest.raises(OriginNotFoundError, match=r"o3://shards has no such object.*no provider"):
            await fetch(a, shard)


@pytest.mark.slow
async def test_without_a_torrent_anywhere_one_of_three_takes_it_whole(tmp_path: Path, shard: Published) -> None:
    place, network = shard.place(layer=b"", rate_bytes_s=4 * MB, break_after=MB), Network()
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        for name in "abc":
            node = open_node(tmp_path / name, network, bootstrap=tuple(nodes[:1]), origin=GivenOrigins(place))
            nodes.append(await stack.enter_async_context(node))
        fetched = await asyncio.gather(*(fetch(node, shard) for node in nodes))
        assert sorted(each.source for each in fetched) == ["origin", "peers", "peers"]
        assert place.out_bytes == shard.entry.size
        for node in nodes:
            assert [path.name for path in node.shards_dir.rglob("*.part")] == []


@pytest.mark.slow
async def test_a_whole_shard_that_broke_off_goes_on_at_the_next_try(tmp_path: Path, shard: Published) -> None:
    place = shard.place(layer=b"", rate_bytes_s=4 * MB)
    async with open_node(tmp_path / "a", Network(), stall_timeout_s=3.0, origin=GivenOrigins(place)) as a:
        fetching = asyncio.create_task(fetch(a, shard))
        await eventually(lambda: place.out_bytes > 3 * MB)
        place.gone = True
        with pytest.raises(OriginUnavailableError):
            await fetching
        place.gone = False
        await fetch(a, shard)
        assert place.out_bytes == shard.entry.size


async def test_a_part_in_which_nothing_counts_gives_its_room_to_the_whole_shard(
    tmp_path: Path, shard: Published
) -> None:
    place = shard.place(layer=b"", rate_bytes_s=8 * MB)
    folder = tmp_path / "a" / "shards" / folder_names(shard.signed.manifest.name, shard.signed.digest)[0]
    folder.mkdir(parents=True)
    part = folder / f"{shard.entry.filename}.part"
    part.write_bytes(bytes(shard.entry.size))
    async with open_node(tmp_path / "a", Network(), origin=GivenOrigins(place)) as a:
        fetching = asyncio.create_task(fetch(a, shard))
        await eventually(lambda: place.out_bytes > 0)
        assert not part.exists()
        assert (await fetching).source == "origin"


@pytest.mark.slow
async def test_the_blocks_of_a_fetcher_that_died_are_taken_over_when_its_lease_ends(tmp_path: Path) -> None:
    shard = publish(tmp_path / "origin", 24 * MB)  # of so many blocks, each of the two owns some
    place, network = shard.place(), Network()
    async with (
        open_node(tmp_path / "a", network, origin=GivenOrigins(place)) as a,
        open_node(tmp_path / "dead", network, bootstrap=(a,)) as dead,
    ):
        block_pieces = len(blocks_of(torrent_of(shard.entry))[0].pieces)
        await dead.discovery.announce_want(shard.entry.content_id, dead.swarm.port, block_pieces=block_pieces, ttl_s=8)
        dead.discovery._protocol.transport.abort()  # No goodbye, and no refresh that would arrive.
        fetching = asyncio.create_task(fetch(a, shard))
        await eventually(lambda: place.out_bytes > 0)
        await asyncio.sleep(1.0)
        assert 0 < place.out_bytes < shard.entry.size, "the blocks of the other are left to it"
        assert not fetching.done()
        await fetching
    assert place.out_bytes == shard.entry.size


@pytest.mark.slow
async def test_a_fetcher_that_the_origin_denies_does_not_hold_blocks(tmp_path: Path) -> None:
    shard = publish(tmp_path / "origin", 8 * MB)
    place, network = shard.place(), Network()
    denied = shard.place(error=OriginDeniedError("no", {"origin": "o3://shards"}))
    async with (
        open_node(tmp_path / "a", network, origin=GivenOrigins(place)) as a,
        open_node(tmp_path / "b", network, bootstrap=(a,), origin=GivenOrigins(denied)) as b,
        asyncio.timeout(30.0),
    ):
        fetched = await asyncio.gather(fetch(a, shard), fetch(b, shard))
    assert [each.source for each in fetched] == ["origin", "peers"]
    assert place.out_bytes == shard.entry.size
