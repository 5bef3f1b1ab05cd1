"""Fetching: shared, continued, refused, and never more than was asked for."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import msgspec
import pytest

from node.shards.store import disk_space as space_module
from node.shards.store.disk_space import DiskSpace
from node.shards.store.manifests import write_manifest
from node.swarm.torrent import DownloadProgress
from protocol.errors import (
    CancelledRequestError,
    InsufficientDiskError,
    InvalidManifestError,
    InvalidShardError,
    NoSourceError,
    ShardInUseError,
    ShardNotFoundError,
)
from protocol.manifest import Shard, SignedManifest
from tests.support.clocks import MovedClock
from tests.support.shards.parts import MemoryDiscovery, Room, manifest_of, open_room, write_shard
from tests.support.waiting import eventually


async def downloading(room: Room, n_downloads: int = 1) -> None:
    await eventually(lambda: len(room.swarm.downloads) == n_downloads)
    await eventually(lambda: bool(room.swarm.downloads[-1].peers))


async def test_a_fetched_shard_lies_in_a_folder_of_its_own_and_is_known_after_a_restart(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    entry = signed.manifest.shards[0]
    seen: list[DownloadProgress] = []
    async with open_room(tmp_path, cluster) as room:
        task = asyncio.create_task(room.shards.fetch(Shard(signed, entry), seen.append))
        await downloading(room)
        assert [info.state for info in room.shards.files()] == ["downloading"]
        assert [status.filename for status in room.shards.downloads()] == ["a.parquet"]
        assert {(peer.host, peer.port) for peer in room.swarm.downloads[0].peers} == {("127.0.0.1", 7402)}
        room.swarm.downloads[0].finish((made / "a.parquet").read_bytes())
        fetched = await task
        assert fetched.path == room.folder / f"owner--set@{signed.digest[:12]}" / "a.parquet"
        assert (fetched.source, fetched.bytes_by_source) == ("peers", {"peers": entry.size})
        await room.shards.settled()
        assert cluster.announced == {signed.digest: (frozenset({0}), frozenset())}
        assert [progress.phase for progress in seen][:1] == ["finding"]
        assert {"downloading", "verifying"} <= {progress.phase for progress in seen}
        assert not room.shards.downloads()
        again = await room.shards.fetch(Shard(signed, entry))
        assert (again.path, again.source, again.bytes_by_source) == (fetched.path, "local", {})
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        assert room.shards.hashed_bytes == 0
        assert room.swarm.seeded == {"a.parquet"}
        held = room.shards.manifest(signed.digest)
        assert held == signed


async def test_two_callers_share_a_download_and_one_may_leave(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    entry = signed.manifest.shards[1]
    async with open_room(tmp_path, cluster) as room:
        first = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        second = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await downloading(room)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        with pytest.raises(ShardInUseError):
            await room.shards.evict(Shard(signed, entry))
        room.swarm.downloads[0].finish((made / "b.bin").read_bytes())
        assert (await second).source == "peers"
        assert len(room.swarm.downloads) == 1


async def test_the_last_caller_takes_the_download_along_and_the_next_begins_anew(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    entry = signed.manifest.shards[1]
    async with open_room(tmp_path, cluster) as room:
        task = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await downloading(room)
        room.swarm.downloads[0].bytes_done = 10
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # Asked for again while the old one is still being ended.
        again = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await downloading(room, 2)
        assert room.swarm.downloads[0].ended.done()
        assert room.swarm.downloads[0].part.exists()
        room.swarm.downloads[1].finish((made / "b.bin").read_bytes())
        await again
        assert room.states() == {f"{(await again).path.parent.name}/b.bin": "seeding"}


async def test_what_a_crash_left_is_no_shard_and_counts_as_begun(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    entry = signed.manifest.shards[1]
    async with open_room(tmp_path, cluster) as room:
        task = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await downloading(room)
        room.swarm.downloads[0].bytes_done = 10
    with pytest.raises(CancelledRequestError):
        await task
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        assert room.states() == {}
        # Begun again and left at once, before anybody knew how much is there: it is kept.
        task = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await eventually(lambda: len(room.swarm.downloads) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(room.swarm.downloads[0].ended.done)
        assert room.swarm.downloads[0].part.exists()
        task = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await eventually(lambda: len(room.swarm.downloads) == 2)
        room.swarm.downloads[1].bytes_done = 40
        await downloading(room, 2)
        room.swarm.downloads[1].finish((made / "b.bin").read_bytes())
        assert (await task).bytes_by_source == {"peers": entry.size - 40}


async def test_evicting_deletes_withdraws_and_leaves_no_folder_behind(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    entry = signed.manifest.shards[0]
    async with open_room(tmp_path, cluster) as room:
        with pytest.raises(ShardNotFoundError):
            await room.shards.evict(Shard(signed, entry))
        task = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await downloading(room)
        room.swarm.downloads[0].finish((made / "a.parquet").read_bytes())
        path = (await task).path
        await room.shards.set_loaded(signed.digest, frozenset({0}))
        with pytest.raises(ShardInUseError, match="unload"):
            await room.shards.evict(Shard(signed, entry))
        await room.shards.set_loaded(signed.digest, frozenset())
        assert await room.shards.evict(Shard(signed, entry)) == path
        await room.shards.settled()
        assert (room.states(), cluster.announced, list(room.folder.iterdir())) == ({}, {}, [])
        assert room.shards.manifests() == []


async def test_a_fetch_that_follows_the_last_eviction_at_once_finds_its_folder_made_anew(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = signed.manifest.shards
    async with open_room(tmp_path, cluster) as room:
        task = asyncio.create_task(room.shards.fetch(Shard(signed, first)))
        await downloading(room)
        room.swarm.downloads[0].finish((made / "a.parquet").read_bytes())
        folder = (await task).path.parent
        await room.shards.settled()
        monkeypatch.setattr(room.shards._scanner, "_scan", asyncio.Event().wait)  # as one that is late
        await room.shards.evict(Shard(signed, first))
        assert not folder.exists()
        task = asyncio.create_task(room.shards.fetch(Shard(signed, second)))
        await downloading(room, 2)
        assert (folder / "manifest.json").exists()
        room.swarm.downloads[1].finish((made / "b.bin").read_bytes())
        assert (await task).path == folder / "b.bin"


async def test_a_file_found_wrong_is_out_of_the_swarm_before_it_is_fetched_anew(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = signed.manifest.shards[1]
    folder = tmp_path / "shards" / "set"
    folder.mkdir(parents=True)
    write_manifest(folder, signed)
    shutil.copy(made / "b.bin", folder)
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        ((torrent, _, _),) = room.swarm.seeds.values()
        monkeypatch.setattr(room.shards._quarantine._cache, "forget", lambda path: time.sleep(0.3))
        assert room.swarm.report_invalid is not None
        room.swarm.report_invalid(torrent, "piece 0 is not what was hashed")
        task = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await downloading(room)
        room.swarm.downloads[0].finish((made / "b.bin").read_bytes())
        assert (await task).source == "peers"
        await room.shards.settled()
        await asyncio.sleep(0.5)  # the one that was found wrong has been looked after
        assert room.swarm.seeded == {"b.bin"}, "the new one stays"


async def test_the_same_content_under_another_manifest_moves_no_bytes(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    write_shard(tmp_path / "shards" / "loose" / "a.parquet")
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        fetched = await room.shards.fetch(signed.shard(0))
        assert (fetched.source, fetched.bytes_by_source) == ("local", {})
        await room.shards.settled()
        assert len(room.swarm.seeds) == 1
        assert cluster.announced[signed.digest][0] == {0}
        await room.shards.evict(signed.shard(0))
        assert room.states() == {"loose/a.parquet": "seeding"}
        assert room.swarm.seeded == {"a.parquet"}


async def test_a_damaged_file_is_set_aside_and_fetched(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    async with open_room(tmp_path, cluster) as room:
        task = asyncio.create_task(room.shards.fetch(signed.shard(1)))
        await downloading(room)
        room.swarm.downloads[0].finish((made / "b.bin").read_bytes())
        path = (await task).path
        path.write_bytes(b"?" * path.stat().st_size)
        await eventually(lambda: set(room.states().values()) == {"invalid"})
        task = asyncio.create_task(room.shards.fetch(signed.shard(1)))
        await downloading(room, 2)
        room.swarm.downloads[1].finish((made / "b.bin").read_bytes())
        assert (await task).source == "peers"
        assert path.with_name("b.bin.invalid").read_bytes()[:1] == b"?"
        await room.shards.settled()
        assert set(room.states().values()) == {"seeding"}


async def test_nobody_has_it_names_what_was_tried(
    tmp_path: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    cluster.providers[signed.digest] = frozenset({1})
    async with open_room(tmp_path, cluster) as room:
        with pytest.raises(NoSourceError, match=r"127\.0\.0\.1:7402 \(lacks it\)"):
            await room.shards.fetch(signed.shard(0))
        assert (room.states(), list(room.folder.iterdir())) == ({}, [])


async def test_a_provider_that_comes_late_is_found_and_a_stall_ends(
    tmp_path: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    providers = cluster.providers.pop(signed.digest)
    clock = MovedClock()
    patience = {"find_timeout_s": 5.0, "restart_s": 3.0, "stall_timeout_s": 3.0}
    async with open_room(tmp_path, cluster, clock=clock, **patience) as room:
        task = asyncio.create_task(room.shards.fetch(signed.shard(0)))
        await clock.move(0.3)
        cluster.providers[signed.digest] = providers
        cluster.host = "localhost"
        await clock.move_until(lambda: room.swarm.downloads and room.swarm.downloads[-1].peers, 5.0)
        assert {peer.host for peer in room.swarm.downloads[0].peers} <= {"127.0.0.1", "::1"}
        cluster.host = "127.0.0.2"
        await clock.move_until(lambda: "127.0.0.2" in {peer.host for peer in room.swarm.downloads[0].peers}, 1.0)
        await clock.move_until(task.done, 4.0)
        with pytest.raises(NoSourceError, match=r"0 of \d+ bytes came, then none for"):
            await task
        assert (room.states(), list(room.folder.iterdir())) == ({}, [])


async def test_a_download_that_got_stuck_is_begun_anew(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    entry = signed.manifest.shards[0]
    clock = MovedClock()
    async with open_room(tmp_path, cluster, clock=clock, restart_s=1.5, stall_timeout_s=20.0) as room:
        task = asyncio.create_task(room.shards.fetch(Shard(signed, entry)))
        await clock.move_until(lambda: room.swarm.downloads and room.swarm.downloads[0].peers, 5.0)
        room.swarm.downloads[0].bytes_done = 10
        await clock.move_until(lambda: len(room.swarm.downloads) == 2 and room.swarm.downloads[1].peers, 5.0)
        assert room.swarm.downloads[0].ended.done()
        assert room.swarm.downloads[1].part.exists()
        room.swarm.downloads[1].finish((made / "a.parquet").read_bytes())
        assert (await task).bytes_by_source == {"peers": entry.size}


async def test_a_shard_that_is_no_parquet_though_its_manifest_vouches_for_it_is_invalid(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery
) -> None:
    (made / "a.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    signed = cluster.publish(manifest_of(made, "a.parquet"))
    async with open_room(tmp_path, cluster) as room:
        task = asyncio.create_task(room.shards.fetch(signed.shard(0)))
        await downloading(room)
        room.swarm.downloads[0].finish((made / "a.parquet").read_bytes())
        with pytest.raises(InvalidShardError, match=r"a\.parquet"):
            await task
        await room.shards.settled()
        assert set(room.states().values()) == {"invalid"}
        assert cluster.announced == {}


async def test_downloaders_of_one_shard_find_each_other(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    cluster.fetchers[signed.digest] = frozenset({0})
    async with open_room(tmp_path, cluster) as room:
        task = asyncio.create_task(room.shards.fetch(signed.shard(0)))
        await downloading(room)
        assert {peer.port for peer in room.swarm.downloads[0].peers} == {7402, 7502}
        await eventually(lambda: cluster.fetching.get(signed.digest) == frozenset({0}))
        assert cluster.announced[signed.digest] == (frozenset(), frozenset())
        room.swarm.downloads[0].finish((made / "a.parquet").read_bytes())
        await task
        await room.shards.settled()
        assert cluster.announced[signed.digest] == (frozenset({0}), frozenset())
        assert cluster.fetching[signed.digest] == frozenset()


async def test_who_is_only_fetching_a_shard_is_no_source_of_it(
    tmp_path: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    cluster.fetchers[signed.digest] = frozenset({0})
    del cluster.providers[signed.digest]
    async with open_room(tmp_path, cluster, find_timeout_s=0.5) as room:
        with pytest.raises(NoSourceError, match="lacks it"):
            await room.shards.fetch(signed.shard(0))
        assert not room.swarm.downloads


@pytest.mark.parametrize("name", ["../a.parquet", "manifest.json", "a.parquet.part", ".a.parquet"])
async def test_a_name_that_a_peer_supplies_never_leads_out(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, name: str
) -> None:
    manifest = manifest_of(made, "a.parquet")
    entry = msgspec.structs.replace(manifest.shards[0], filename=name)
    manifest = msgspec.structs.replace(manifest, shards=(entry,))
    forged = SignedManifest(manifest=manifest, publisher="00" * 32, signature="00" * 64)  # type: ignore[arg-type]
    cluster.providers[forged.digest] = frozenset({0})
    async with open_room(tmp_path, cluster) as room:
        with pytest.raises(InvalidManifestError):
            await room.shards.fetch(Shard(forged, entry))
        assert not room.swarm.downloads
        assert list(room.folder.iterdir()) == []


async def test_without_room_nothing_is_begun(tmp_path: Path, cluster: MemoryDiscovery, signed: SignedManifest) -> None:
    async with open_room(tmp_path, cluster, min_free_disk=1 << 60) as room:
        with pytest.raises(InsufficientDiskError) as caught:
            await room.shards.fetch(signed.shard(0))
        details = caught.value.details
        assert details["needed"] == signed.manifest.shards[0].size
        assert details["kept"] == 1 << 60
        assert details["free"] > 0
        assert (room.states(), room.swarm.downloads, list(room.folder.iterdir())) == ({}, [], [])


async def test_space_is_promised_once_and_given_back(tmp_path: Path) -> None:
    space = DiskSpace(tmp_path, 100, free=lambda _: 1000)
    async with space.reserved(tmp_path / "a", 600):
        with pytest.raises(InsufficientDiskError, match="600 of them promised"):
            async with space.reserved(tmp_path / "b", 301):
                pass
        async with space.reserved(tmp_path / "c", 300):
            pass
        async with space.reserved(tmp_path / "c", 300):
            pass
    async with space.reserved(tmp_path / "b", 900):
        pass


async def test_what_is_on_the_disk_already_is_not_promised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {"a.part": 500, "b.part": 250}
    monkeypatch.setattr(space_module, "allocated_bytes", lambda path: written.get(path.name, 0))
    space = DiskSpace(tmp_path, 0, free=lambda _: 400)
    # 100 bytes of one and 300 of the other are still to come.
    async with space.reserved(tmp_path / "a", 600), space.reserved(tmp_path / "b", 550):
        with pytest.raises(InsufficientDiskError):
            async with space.reserved(tmp_path / "c", 1):
                pass
        written["b.part"] = 350
        with pytest.raises(InsufficientDiskError, match="300 of them promised"):
            async with space.reserved(tmp_path / "c", 101 + 100):
                pass


async def test_a_whole_part_beside_a_part_that_counts_has_room_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {"a.part": 600, "a.whole.part": 200}
    monkeypatch.setattr(space_module, "allocated_bytes", lambda path: written.get(path.name, 0))
    space = DiskSpace(tmp_path, 0, free=lambda _: 400)
    async with space.reserved(tmp_path / "a", 600), space.reserved(tmp_path / "a.whole.part", 600):
        with pytest.raises(InsufficientDiskError, match="400 of them promised"):
            async with space.reserved(tmp_path / "b", 1):
                pass
