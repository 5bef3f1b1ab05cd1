"""From files in the folder to seeds and announcements, and back."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from node.files import Fingerprint
from node.handlers.leases import LeaseHandlers
from node.handlers.shards import ShardHandlers
from node.shards.store import scanner as scanner_module
from node.shards.store.hasher import Hasher
from node.shards.store.manifests import write_manifest
from node.shards.store.scanner import Debounce
from protocol.commands.leases import ReleaseParams
from protocol.commands.shards import EvictShardParams
from protocol.errors import BusyError, InvalidShardError
from protocol.manifest import Shard, sign_manifest
from tests.support.clocks import MovedClock
from tests.support.shards.parts import (
    KEY,
    OTHER_KEY,
    MemoryDiscovery,
    age,
    manifest_of,
    open_room,
    write_shard,
    write_unsigned,
)
from tests.support.waiting import eventually


async def test_a_folder_is_seeded_and_announced(tmp_path: Path) -> None:
    tiny = tmp_path / "shards" / "tiny"
    for name in ("shard-0.gguf", "shard-1.gguf"):
        write_shard(tiny / name, 300 if "0" in name else 400)
    manifest = manifest_of(tiny, "shard-0.gguf", "shard-1.gguf", kind="model")
    write_unsigned(tiny, manifest)
    write_shard(tmp_path / "shards" / "rows.parquet")
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        infos = {info.filename: info for info in room.shards.files()}
        assert set(infos) == {"tiny/shard-0.gguf", "tiny/shard-1.gguf", "rows.parquet"}
        assert {info.state for info in infos.values()} == {"seeding"}
        slice_1, rows = infos["tiny/shard-1.gguf"], infos["rows.parquet"]
        assert (slice_1.model, slice_1.shard_id, slice_1.kind) == ("tiny", 1, "gguf")
        assert slice_1.content_id == manifest.shards[1].content_id
        assert (rows.model, rows.dataset, rows.shard_id, rows.kind) == (None, None, 0, "parquet")
        assert room.swarm.seeded == {"shard-0.gguf", "shard-1.gguf", "rows.parquet"}
        assert set(room.swarm.seeds) == {info.info_hash for info in infos.values()}
        assert room.discovery.announced[manifest.digest] == (frozenset({0, 1}), frozenset())
        assert len(room.discovery.announced) == 2
        signed = room.shards.manifest(manifest.digest)
        assert signed is not None
        assert signed.publisher == KEY.node_id
        assert room.shards.path_of(signed.shard(1).ref) == room.folder / "tiny" / "shard-1.gguf"
        before = room.discovery.announcements
        await room.shards.set_loaded(manifest.digest, frozenset({1}))
        await room.shards.settled()
        assert room.discovery.announced[manifest.digest] == (frozenset({0, 1}), frozenset({1}))
        assert room.states()["tiny/shard-1.gguf"] == "loaded"
        assert room.discovery.announcements == before + 1


async def test_after_a_restart_nothing_is_hashed_again_but_what_changed(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for name in ("a.gguf", "b.parquet"):
        write_shard(shards / name)
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        assert room.shards.hashed_bytes == sum(path.stat().st_size for path in shards.iterdir())
        seeds = dict(room.swarm.seeds)
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        assert room.shards.hashed_bytes == 0
        assert room.swarm.seeds == seeds
    os.utime(shards / "a.gguf", (1, 1))
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        assert room.shards.hashed_bytes == (shards / "a.gguf").stat().st_size
        assert room.swarm.seeds == seeds
    (tmp_path / "data" / "index.sqlite").write_bytes(b"damaged" * 1000)
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        assert room.shards.hashed_bytes == sum(path.stat().st_size for path in shards.iterdir())
        assert room.swarm.seeds == seeds


async def test_a_loose_parquet_file_has_one_digest_however_its_hash_is_known(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shards" / "b.parquet", rows=123)
    digests = set()
    for before in ("hashed now", "remembered", "remembered without rows"):
        if before == "remembered without rows":
            with sqlite3.connect(tmp_path / "data" / "index.sqlite") as db:
                db.execute("UPDATE hashed SET rows = NULL")
            db.close()
        async with open_room(tmp_path) as room:
            await room.shards.settled()
            assert room.shards.hashed_bytes == (0 if before == "remembered" else path.stat().st_size)
            (signed,) = room.shards.manifests()
            assert signed.manifest.shards[0].rows == 123
            digests.add(signed.digest)
    assert len(digests) == 1


async def test_what_is_not_whole_or_not_what_its_manifest_says_is_invalid_and_the_rest_goes_on(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    cut = write_shard(shards / "cut.gguf")
    cut.write_bytes(cut.read_bytes()[:-100])
    (shards / "noise.parquet").write_bytes(os.urandom(1000))
    (shards / "empty.gguf").touch()
    write_shard(shards / "good.gguf")
    names = ("right.bin", "short.bin", "other.bin", "missing.bin")
    for name in names:
        write_shard(shards / "set" / name, 1000 + len(name))
    manifest = manifest_of(shards / "set", *names)
    write_unsigned(shards / "set", manifest)
    (shards / "set" / "short.bin").write_bytes(b"too short")
    (shards / "set" / "other.bin").write_bytes(b"x" * manifest.shards[2].size)
    (shards / "set" / "missing.bin").unlink()
    (shards / "bad").mkdir()
    (shards / "bad" / "manifest.json").write_bytes(b'{"manifest": "none"}')
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        infos = {info.filename: info for info in room.shards.files()}
        assert {name: info.state for name, info in infos.items()} == {
            "cut.gguf": "invalid",
            "noise.parquet": "invalid",
            "empty.gguf": "invalid",
            "good.gguf": "seeding",
            "set/right.bin": "seeding",
            "set/short.bin": "invalid",
            "set/other.bin": "invalid",
            "bad/manifest.json": "invalid",
        }
        assert room.swarm.seeded == {"good.gguf", "right.bin"}
        assert room.discovery.announced[manifest.digest][0] == {0}
        for name, info in infos.items():
            assert bool(info.error) == (info.state == "invalid"), name
        assert "9 bytes" in (infos["set/short.bin"].error or "")
        assert manifest.shards[2].content_id in (infos["set/other.bin"].error or "")
        # Mended, it is taken up like any other.
        write_shard(shards / "set" / "short.bin", 1009)
        await eventually(lambda: room.states()["set/short.bin"] == "seeding")


async def test_files_come_change_and_go_without_a_restart(tmp_path: Path) -> None:
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        path = write_shard(room.folder / "sub" / "late.parquet")
        await eventually(lambda: room.states() == {"sub/late.parquet": "seeding"})
        await room.shards.settled()
        (first,) = room.discovery.announced
        write_shard(path, 200)
        await eventually(lambda: room.discovery.announced != {} and first not in room.discovery.announced)
        assert len(room.swarm.seeds) == len(room.discovery.announced) == 1
        shutil.rmtree(room.folder / "sub")
        await eventually(lambda: not room.states() and not room.swarm.seeds and not room.discovery.announced)


async def test_a_file_that_is_still_written_to_waits(tmp_path: Path) -> None:
    whole, clock = write_shard(tmp_path / "made.gguf", 1000).read_bytes(), MovedClock()
    async with open_room(tmp_path, clock=clock, settle_s=1.0, incomplete_s=5.0) as room:
        path = room.folder / "slow.gguf"
        states = set()
        for n_bytes in range(0, len(whole), len(whole) // 5 + 1):
            with path.open("ab") as file:
                file.write(whole[n_bytes : n_bytes + len(whole) // 5 + 1])
            # Quiet for longer than settle_s, and not whole: not called invalid while someone may be writing.
            room.shards._scanner.poke()
            began = clock.now()
            await clock.move_until(lambda began=began: clock.now() - began > 1.5, within_s=2.0)  # type: ignore[misc]
            states |= set(room.states().values())
        await clock.move_until(lambda: room.states() == {"slow.gguf": "seeding"}, within_s=10.0)
        assert "invalid" not in states


async def test_a_file_is_hashed_once_when_it_is_quiet_not_at_every_write(tmp_path: Path) -> None:
    clock = MovedClock()
    async with open_room(tmp_path, clock=clock, settle_s=1.0) as room:
        path = room.folder / "rewritten.gguf"
        for _ in range(10):
            write_shard(path, 500)
            room.shards._scanner.poke()
            await clock.move(0.5)
        assert room.shards.hashed_bytes == 0
        await clock.move_until(lambda: room.states() == {"rewritten.gguf": "seeding"}, within_s=10.0)
        assert room.shards.hashed_bytes == path.stat().st_size


def test_a_file_is_as_old_as_it_was_seen_or_as_its_time_says(tmp_path: Path) -> None:
    clock, path = MovedClock(), tmp_path / "a.bin"
    debounce, began = Debounce(clock), clock.now()
    path.write_bytes(b"new")
    new = Fingerprint.of(path)
    assert new
    assert began - 1 < debounce.since(path, new) <= began
    clock.set(began + 50)
    assert began - 1 < debounce.since(path, new) <= began  # its own time is as young as ever, but it was seen then
    os.utime(path, (1_000_000_000, 1_000_000_000))
    old = Fingerprint.of(path)
    assert old
    assert debounce.since(path, old) < began - 1_000_000
    path.write_bytes(b"newer")
    newer = Fingerprint.of(path)
    assert newer
    assert began + 49 < debounce.since(path, newer) <= began + 50
    debounce.keep_only(set())
    clock.set(began + 90)
    assert began + 89 < debounce.since(path, newer) <= began + 90


async def test_a_folder_that_comes_manifest_first_is_taken_up_file_by_file(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for name in ("a.bin", "b.bin"):
        write_shard(made / name, 1000)
    manifest = manifest_of(made, "a.bin", "b.bin")
    async with open_room(tmp_path, incomplete_s=30.0) as room:
        folder = room.folder / "set"
        folder.mkdir()
        write_unsigned(folder, manifest)
        await eventually(lambda: bool(room.shards.manifests()))
        shutil.copy(made / "a.bin", folder)
        (folder / "b.bin").write_bytes((made / "b.bin").read_bytes()[:500])
        await eventually(lambda: room.states().get("set/a.bin") == "seeding")
        # Too short for its manifest, but perhaps only not written to its end yet.
        assert room.states()["set/b.bin"] == "hashing"
        shutil.copy(made / "b.bin", folder)
        await eventually(lambda: room.discovery.announced == {manifest.digest: (frozenset({0, 1}), frozenset())})


async def test_a_listing_that_is_out_of_date_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "shards" / "a.gguf")
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        looks = 0

        def empty(root: Path) -> dict[Path, dict[str, Fingerprint]]:
            nonlocal looks
            looks += 1
            return {}

        monkeypatch.setattr(scanner_module, "list_files", empty)
        (room.folder / "poke").touch()
        await eventually(lambda: looks > 0)
        await room.shards.settled()
        assert room.states() == {"a.gguf": "seeding"}
        assert room.discovery.announcements == 1


async def test_before_the_first_look_nothing_is_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards" / "set"
    path = write_shard(folder / "a.parquet")
    signed = sign_manifest(manifest_of(folder, "a.parquet"), OTHER_KEY)
    write_manifest(folder, signed)
    age(folder)
    go_on, really = threading.Event(), scanner_module.list_files

    def late(root: Path) -> Any:
        go_on.wait(20)
        return really(root)

    monkeypatch.setattr(scanner_module, "list_files", late)
    cluster = MemoryDiscovery()
    cluster.publish(signed.manifest)
    async with open_room(tmp_path, cluster, name_timeout_s=20.0) as room:
        leases, shards = LeaseHandlers(room.shards), ShardHandlers(room.shards, None, None)  # type: ignore[arg-type]
        chosen: dict[str, Any] = {"dataset": "tiny", "shard_id": 0}
        released = await leases.release(ReleaseParams(lease="run", **chosen))
        assert not released.shards[0].gone
        with pytest.raises(BusyError, match="ask again"):
            await leases.release(ReleaseParams(lease="run", evict=True, **chosen))
        evicting = asyncio.create_task(shards.evict(EvictShardParams(**chosen)))
        await asyncio.sleep(0.1)
        assert not evicting.done()
        go_on.set()
        assert (await evicting).status == "evicted"
        assert not path.exists()
        released = await leases.release(ReleaseParams(lease="run", evict=True, **chosen))
        assert released.shards[0].gone


async def test_a_manifest_that_comes_after_its_files_takes_them_over(tmp_path: Path) -> None:
    made = tmp_path / "made"
    for name in ("a.parquet", "b.bin"):
        write_shard(made / name)
    manifest = manifest_of(made, "a.parquet", "b.bin")
    async with open_room(tmp_path) as room:
        folder = room.folder / "set"
        folder.mkdir()
        shutil.copy(made / "a.parquet", folder)
        await eventually(lambda: room.states() == {"set/a.parquet": "seeding"})
        hashed = room.shards.hashed_bytes
        write_manifest(folder, sign_manifest(manifest, OTHER_KEY))
        await eventually(lambda: [info.dataset for info in room.shards.files()] == ["tiny"])
        await room.shards.settled()
        assert room.shards.hashed_bytes == hashed
        assert room.discovery.announced == {manifest.digest: (frozenset({0}), frozenset())}
        shutil.copy(made / "b.bin", folder)
        await eventually(lambda: room.discovery.announced == {manifest.digest: (frozenset({0, 1}), frozenset())})
        (folder / "manifest.json").unlink()
        await eventually(lambda: [info.dataset for info in room.shards.files()] == [None])
        await room.shards.settled()
        assert manifest.digest not in room.discovery.announced
        assert room.swarm.seeded == {"a.parquet"}


async def test_two_copies_are_one_seed_and_the_second_takes_over(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_shard(tmp_path / "shards" / folder / "same.parquet")
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        assert len(room.swarm.seeds) == len(room.discovery.announced) == 1
        ((_, seeded, _),) = room.swarm.seeds.values()
        seeded.unlink()
        await eventually(lambda: len(room.states()) == 1)
        await room.shards.settled()
        ((_, other, _),) = room.swarm.seeds.values()
        assert other != seeded
        assert len(room.discovery.announced) == 1


async def test_a_copy_that_cannot_take_over_as_a_seed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        write_shard(tmp_path / "shards" / folder / "same.parquet")
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        ((torrent, seeded, _),) = room.swarm.seeds.values()
        with monkeypatch.context() as patched:

            async def refuse(*_: Any) -> None:
                raise InvalidShardError("same.parquet has 0 bytes")

            patched.setattr(room.swarm, "seed", refuse)
            assert room.swarm.report_invalid is not None
            room.swarm.report_invalid(torrent, "a piece on disk is not what was hashed")
            await room.shards.settled()
        assert room.swarm.seeds == {}
        assert room.states()[f"{seeded.parent.name}/same.parquet"] == "invalid"
        write_shard(room.folder / "another.parquet", 600)
        await eventually(lambda: room.swarm.seeded == {"another.parquet"})


async def test_a_seed_that_the_swarm_found_changed_is_invalid_and_withdrawn(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shards" / "a.bin.parquet", 500)
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        ((torrent, _, _),) = room.swarm.seeds.values()
        assert room.swarm.report_invalid is not None
        room.swarm.report_invalid(torrent, "piece 0 is not what was hashed")
        await room.shards.settled()
        (info,) = room.shards.files()
        assert (info.state, room.swarm.seeds, room.discovery.announced) == ("invalid", {}, {})
        assert "piece 0" in (info.error or "")
    # Nor is it believed after a restart, though size and time are the same.
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        assert room.shards.hashed_bytes == path.stat().st_size


async def test_verify_reads_the_disk_and_finds_what_a_time_stamp_hides(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shards" / "a.parquet", 500)
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        (signed,) = room.shards.manifests()
        entry = signed.manifest.shards[0]
        assert await room.shards.verify(Shard(signed, entry)) == entry.content_id
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"changed")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert await room.shards.verify(Shard(signed, entry)) not in (None, entry.content_id)
        await room.shards.settled()
        assert (room.states(), room.swarm.seeds, room.discovery.announced) == ({"a.parquet": "invalid"}, {}, {})
        assert room.shards.path_of(Shard(signed, entry).ref) is None


async def test_opening_does_not_wait_for_hashing(tmp_path: Path) -> None:
    large = tmp_path / "shards" / "set" / "large.bin"
    large.parent.mkdir(parents=True)
    with large.open("wb") as file:
        file.truncate(60 << 20)
    manifest = manifest_of(large.parent, "large.bin")
    write_unsigned(large.parent, manifest)
    os.utime(large.parent / "manifest.json", (1, 1))
    os.utime(large, (1, 1))
    async with open_room(tmp_path, new_hasher=Hasher) as room:
        assert room.states() == {}
        await eventually(lambda: room.states() == {"set/large.bin": "hashing"})
        assert room.swarm.seeds == {}
