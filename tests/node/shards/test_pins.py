"""What stays until a person ends that: all but what came for a lease alone, also after a restart."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from node.files import Fingerprint
from node.handlers.leases import LeaseHandlers
from node.handlers.shards import ShardHandlers
from node.shards.leases import Term
from node.shards.pins import UNPINNED_FILENAME, Pins
from node.shards.publish.manifest_builder import publication_of
from node.shards.store.catalog import ShardFile
from node.shards.store.hasher import Hasher
from node.shards.store.manifests import write_manifest
from protocol.commands.leases import ReleasedShard, ReleaseParams
from protocol.commands.shards import UnpinParams, UnpinResult
from protocol.errors import InsufficientDiskError, ShardInUseError, ShardNotFoundError
from protocol.manifest import SignedManifest
from tests.support.shards.parts import (
    MemoryDiscovery,
    Room,
    ThreadHasher,
    age,
    manifest_of,
    open_room,
)
from tests.support.waiting import eventually

NAMES = ("a.parquet", "b.bin")
TERM = Term("run", 100)


async def fetch(room: Room, signed: SignedManifest, made: Path, shard_id: int, *terms: Term | None) -> Path:
    """One fetch by several callers: with a lease, or (None) as `pull` asks."""
    before, entry = len(room.swarm.downloads), signed.manifest.shards[shard_id]
    tasks = [asyncio.create_task(room.shards.fetch(signed.shard(shard_id), term=term)) for term in terms]
    await eventually(lambda: len(room.swarm.downloads) > before and bool(room.swarm.downloads[-1].peers))
    room.swarm.downloads[-1].finish((made / entry.filename).read_bytes())
    return (await asyncio.gather(*tasks))[0].path


async def release(room: Room, signed: SignedManifest, shard_id: int) -> ReleasedShard:
    """As a reader does that is past the shard."""
    params = ReleaseParams(lease="run", evict=True, dataset=signed.digest, shard_id=shard_id)
    (released,) = (await LeaseHandlers(room.shards).release(params)).shards
    return released


async def unpin(room: Room, **which: Any) -> UnpinResult:
    return await ShardHandlers(room.shards, None, None).unpin(UnpinParams(**which))  # type: ignore[arg-type]


def pinned(room: Room) -> dict[str, bool]:
    return {info.filename.rpartition("/")[2]: info.pinned for info in room.shards.files()}


async def test_a_reader_that_is_past_them_deletes_what_came_for_it_and_not_what_was_pulled(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    async with open_room(tmp_path, cluster) as room:
        pulled = await fetch(room, signed, made, 0, None)
        leased = await fetch(room, signed, made, 1, TERM)
        await room.shards.fetch(signed.shard(0), term=TERM)
        assert pinned(room) == {"a.parquet": True, "b.bin": False}
        kept, gone = await release(room, signed, 0), await release(room, signed, 1)
        assert (kept.held, kept.gone, kept.pinned, kept.published) == (True, False, True, False)
        assert "it was pulled" in kept.kept_because
        assert (gone.held, gone.gone, gone.pinned, gone.kept_because) == (True, True, False, "")
        assert pulled.exists()
        assert room.swarm.seeded == {"a.parquet"}
        assert not leased.exists()
        await room.shards.evict(signed.shard(0))
        assert not pulled.exists(), "who says evict means it"


async def test_after_a_restart_the_same_stays_and_the_same_goes(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    async with open_room(tmp_path, cluster) as room:
        await fetch(room, signed, made, 0, None)
        await fetch(room, signed, made, 1, TERM)
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        assert pinned(room) == {"a.parquet": True, "b.bin": False}
        await room.shards.fetch(signed.shard(1), term=TERM)
        assert (await release(room, signed, 0)).gone is False
        assert (await release(room, signed, 1)).gone is True
    assert (tmp_path / "data" / UNPINNED_FILENAME).read_bytes() == b'{"version":1,"files":[]}'


async def test_a_node_that_is_killed_when_a_shard_has_just_come_still_knows_for_whom(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(self: Pins, path: Path, fingerprint: Fingerprint) -> None:
        """Nothing more is written."""

    with monkeypatch.context() as patched:
        patched.setattr(Pins, "came", killed)
        async with open_room(tmp_path, cluster) as room:
            await fetch(room, signed, made, 1, TERM)
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        assert pinned(room) == {"b.bin": False}


@pytest.mark.parametrize("terms", [(TERM, None), (None, TERM)])
async def test_of_two_who_share_a_download_one_pulls(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest, terms: tuple[Term | None, ...]
) -> None:
    async with open_room(tmp_path, cluster) as room:
        path = await fetch(room, signed, made, 1, *terms)
        assert (await release(room, signed, 1)).pinned
        assert path.exists()
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        assert pinned(room) == {"b.bin": True}


async def test_pulled_after_training_fetched_it_a_shard_stays(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    async with open_room(tmp_path, cluster) as room:
        path = await fetch(room, signed, made, 1, TERM)
        assert (await room.shards.fetch(signed.shard(1))).source == "local"
        assert (await release(room, signed, 1)).pinned
        assert path.exists()


async def test_what_is_being_pulled_is_not_deleted_meanwhile(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = asyncio.Event(), asyncio.Event()
    really = Pins.pin

    async def slowly(self: Pins, paths: Any) -> None:
        writing.set()
        await go_on.wait()
        await really(self, paths)

    monkeypatch.setattr(Pins, "pin", slowly)
    async with open_room(tmp_path, cluster) as room:
        path = await fetch(room, signed, made, 1, TERM)
        pulling = asyncio.create_task(room.shards.fetch(signed.shard(1)))
        await writing.wait()
        assert not (await release(room, signed, 1)).gone
        go_on.set()
        assert (await pulling).path == path
        assert path.exists()


async def test_what_lay_there_before_stays_published_put_there_or_damaged(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    folder = tmp_path / "shards" / f"owner--set@{signed.digest[:12]}"
    folder.mkdir(parents=True)
    shutil.copy(made / "a.parquet", folder)  # by hand, where a fetch would put it
    (folder / "b.bin").write_bytes(b"?" * (made / "b.bin").stat().st_size)
    write_manifest(folder, signed)
    age(folder)
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        assert (await room.shards.fetch(signed.shard(0), term=TERM)).source == "local"
        path = await fetch(room, signed, made, 1, TERM)
        for shard_id in (0, 1):
            assert (await release(room, signed, shard_id)).pinned
        assert path.read_bytes() == (made / "b.bin").read_bytes()
        assert path.with_name("b.bin.invalid").read_bytes()[:1] == b"?", "it may be somebody's"


async def test_what_was_in_the_way_stays_if_the_shard_does_not_come(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    folder = tmp_path / "shards" / f"owner--set@{signed.digest[:12]}"
    folder.mkdir(parents=True)
    (folder / "b.bin").write_bytes(b"?")
    write_manifest(folder, signed)
    age(folder)
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        task = asyncio.create_task(room.shards.fetch(signed.shard(1), term=TERM))
        await eventually(lambda: bool(room.swarm.downloads and room.swarm.downloads[0].peers))
        room.swarm.downloads[0].bytes_done = 10
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await room.shards.settled()
        part = room.swarm.downloads[0].part
        assert part.exists()
        await eventually(lambda: not room.shards.downloads())
        assert (await release(room, signed, 1)).gone
        assert not part.exists()
        assert (folder / "b.bin.invalid").read_bytes() == b"?"
        await room.shards.evict(signed.shard(1))
        assert not (folder / "b.bin.invalid").exists()


async def test_a_file_that_takes_the_place_of_one_that_came_for_a_lease_stays(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    async with open_room(tmp_path, cluster) as room:
        path = await fetch(room, signed, made, 1, TERM)
        await room.shards.settled()
        path.unlink()
        await eventually(lambda: room.states() == {})
        shutil.copy(made / "b.bin", path)
        os.utime(path, (1e9, 1e9))
        await eventually(lambda: room.states() == {f"{path.parent.name}/b.bin": "seeding"})
        assert (await release(room, signed, 1)).pinned
        assert path.exists()


async def test_a_fetch_that_fails_leaves_no_mark_on_what_comes_there_later(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    async with open_room(tmp_path, cluster) as room:
        task = asyncio.create_task(room.shards.fetch(signed.shard(1), term=TERM))
        await eventually(lambda: bool(room.swarm.downloads))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await room.shards.settled()
        folder = room.folder / f"owner--set@{signed.digest[:12]}"
        folder.mkdir(exist_ok=True)
        write_manifest(folder, signed)
        shutil.copy(made / "b.bin", folder)
        age(folder)
        room.shards._scanner.poke()
        await eventually(lambda: "seeding" in room.states().values())
        assert pinned(room) == {"b.bin": True}


async def test_what_is_published_is_pinned_until_that_is_ended(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    async with open_room(tmp_path, cluster, name_timeout_s=5.0) as room:
        hasher: Hasher = ThreadHasher()
        folder, _ = await room.shards.publisher.publish(publication_of(made, signed.manifest), signed, hasher)
        assert pinned(room) == {"a.parquet": True, "b.bin": True}
        kept = await release(room, signed, 0)
        assert (kept.published, kept.pinned) == (True, True)
        await unpin(room, dataset="owner/set", shard_id=0)
        assert (await release(room, signed, 0)).gone
        assert [path.name for path in folder.iterdir() if path.suffix != ".json"] == ["b.bin"]
        await unpin(room, dataset="owner/set")
        await room.shards.publisher.publish(publication_of(made, signed.manifest), signed, hasher)
        assert pinned(room) == {"a.parquet": True, "b.bin": True}


async def test_unpin_says_what_may_be_evicted_and_pull_pins_again(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    first, second = (entry.size for entry in signed.manifest.shards)
    async with open_room(tmp_path, cluster) as room:
        with pytest.raises(ShardNotFoundError, match=r"all 2 shards of owner/set: not on this node"):
            await unpin(room, dataset="owner/set")
        await fetch(room, signed, made, 0, None)
        await fetch(room, signed, made, 1, None)
        room.shards.leases.begin("other", signed.shard(1), 0.0)
        found = await unpin(room, dataset="owner/set")
        assert (found.shard_ids, found.bytes, found.evictable_bytes) == ([0, 1], first + second, first)
        again = await unpin(room, dataset=signed.digest, shard_id=0)
        assert (again.shard_ids, again.bytes, again.evictable_bytes) == ([], 0, first)
    async with open_room(tmp_path, cluster) as room:
        await room.shards.settled()
        assert pinned(room) == {"a.parquet": False, "b.bin": False}
        await room.shards.fetch(signed.shard(0))
        assert (await release(room, signed, 0)).pinned
        assert (await release(room, signed, 1)).gone


async def test_a_disk_that_is_too_full_names_what_is_pinned_and_what_to_type(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = cluster.publish(manifest_of(made, "b.bin", name="other"))
    size = signed.manifest.shards[0].size
    async with open_room(tmp_path, cluster) as room:
        await fetch(room, signed, made, 0, None)
        monkeypatch.setattr(room.shards._fetcher._store.space, "_free", lambda _: 0)
        with pytest.raises(InsufficientDiskError) as refused:
            await room.shards.fetch(other.shard(0), term=TERM)
        assert f"{size} bytes here are pinned, they stay until somebody evicts them: owner/set ({size})" in str(
            refused.value
        )
        assert f"`shoal evict owner/set` frees {size}" in str(refused.value)
        assert refused.value.details["pinned"] == size
        await unpin(room, dataset="owner/set")
        with pytest.raises(InsufficientDiskError) as refused:
            await room.shards.fetch(other.shard(0), term=TERM)
        assert "pinned" not in str(refused.value)


async def test_a_list_that_is_damaged_keeps_everything_with_one_warning(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_room(tmp_path, cluster) as room:
        await fetch(room, signed, made, 1, TERM)
    path = tmp_path / "data" / UNPINNED_FILENAME
    path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING, "node.shards.pins"):
        async with open_room(tmp_path, cluster) as room:
            await room.shards.settled()
            assert pinned(room) == {"b.bin": True}
    (record,) = caplog.records
    assert "shoal unpin" in record.getMessage()
    assert path.with_name(path.name + ".damaged").exists()


async def test_a_list_that_cannot_be_written_is_said_to_who_pulls_and_once_to_the_log(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_room(tmp_path, cluster) as room:
        (tmp_path / "data" / UNPINNED_FILENAME).mkdir()
        with caplog.at_level(logging.WARNING, "node.shards.pins"):
            await fetch(room, signed, made, 0, TERM)
            await fetch(room, signed, made, 1, TERM)
        assert len(caplog.records) == 1
        with pytest.raises(InsufficientDiskError, match="its pin cannot be written"):
            await room.shards.fetch(signed.shard(1))
        assert (await release(room, signed, 0)).gone


async def test_a_name_that_is_not_utf8_is_listed_as_it_is(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path / "shards") + b"/\xff 100%.gguf"))
    path.parent.mkdir()
    path.write_bytes(b"x")
    mark = Fingerprint.of(path)
    file = ShardFile(path, "seeding", "gguf", mark)
    pins = Pins(tmp_path, tmp_path / "shards")
    pins.load()
    assert pins.is_pinned(file)
    assert await pins.unpin([file]) == [file]
    again = Pins(tmp_path, tmp_path / "shards")
    again.load()
    assert not again.is_pinned(file)
    assert again.is_pinned(ShardFile(path, "seeding", "gguf", Fingerprint(2, 3)))


async def test_changes_at_one_time_are_all_in_the_list(tmp_path: Path) -> None:
    pins = Pins(tmp_path, tmp_path)
    files = [ShardFile(tmp_path / f"{number}.bin", "seeding", "file", Fingerprint(number, 1)) for number in range(50)]
    await asyncio.gather(*(pins.came(file.path, Fingerprint(0, 0)) for file in files))  # nothing: none was coming
    await asyncio.gather(*(pins.unpin([file]) for file in files))
    await asyncio.gather(*(pins.pin([file.path]) for file in files[::2]))
    again = Pins(tmp_path, tmp_path)
    again.load()
    assert [again.is_pinned(file) for file in files] == [True, False] * 25


async def test_a_leased_shard_stays_pinned_or_not(
    tmp_path: Path, made: Path, cluster: MemoryDiscovery, signed: SignedManifest
) -> None:
    async with open_room(tmp_path, cluster) as room:
        await fetch(room, signed, made, 1, TERM)
        with pytest.raises(ShardInUseError, match="held by 1 lease"):
            await room.shards.evict(signed.shard(1), unless_pinned=True)
