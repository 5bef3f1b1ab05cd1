"""Seeds and downloads between real nodes on loopback."""

import asyncio
import contextlib
import errno
import filecmp
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from node.swarm import Download, PeerAddress, Swarm, SwarmSettings, Torrent
from node.swarm.alerts import FileFailed
from node.swarm.handle import Handle
from protocol.content import ContentHash, hash_file
from protocol.errors import (
    CancelledRequestError,
    InsufficientDiskError,
    InvalidParamsError,
    InvalidShardError,
    UnreachableError,
)
from protocol.ids import ContentId
from tests.support.waiting import eventually

MIB = 1024 * 1024
HURRIED = SwarmSettings(Path(), refresh_s=0.05, ask_every_s=0.1, stop_timeout_s=20.0)
"""Figures come soon, and a slow disk has its time."""
SETTLE_S = 4 * HURRIED.refresh_s
"""After this long the figures are those of now."""


@dataclass(frozen=True)
class Source:
    path: Path
    hashed: ContentHash
    torrent: Torrent

    def piece(self, index: int) -> bytes:
        piece = self.torrent.piece(index)
        return self.path.read_bytes()[piece.offset : piece.offset + piece.size]


def source_of(folder: Path, size: int) -> Source:
    path = folder / "on disk.bin"
    path.write_bytes(random.Random(size).randbytes(size))
    hashed = hash_file(path)
    return Source(path, hashed, Torrent.of("shard.bin", size, hashed.content_id))


@contextlib.asynccontextmanager
async def seeding(tmp_path: Path, source: Source, upload_limit: int = 0) -> AsyncIterator[Swarm]:
    settings = replace(HURRIED, state_dir=tmp_path / "seed-state", upload_limit_bytes_s=upload_limit)
    async with Swarm.open(settings) as swarm:
        await swarm.seed(source.torrent, source.path, source.hashed.piece_layer)
        yield swarm


def node(tmp_path: Path, name: str = "node", download_limit: int = 0) -> contextlib.AbstractAsyncContextManager[Swarm]:
    return Swarm.open(replace(HURRIED, state_dir=tmp_path / name, download_limit_bytes_s=download_limit))


def at(swarm: Swarm) -> list[PeerAddress]:
    return [PeerAddress("127.0.0.1", swarm.port)]


async def until(download: Download, done: int) -> None:
    while download.progress().bytes_done < done:  # noqa: ASYNC110 - progress is polled, as callers do
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("size", [1, 256 * 1024 + 1, 20 * MIB + 7])
async def test_a_file_arrives_and_is_seeded_on(tmp_path: Path, size: int):
    source = source_of(tmp_path, size)
    async with seeding(tmp_path, source) as seed, node(tmp_path) as first, node(tmp_path, "second") as second:
        download = await first.download(source.torrent, tmp_path / "out" / "first.bin")
        assert await first.download(source.torrent, tmp_path / "out" / "first.bin") is download
        download.add_peers(at(seed))
        path = await download.verified()
        assert path == tmp_path / "out" / "first.bin"
        assert filecmp.cmp(source.path, path, shallow=False)
        assert [each.name for each in path.parent.iterdir()] == ["first.bin"]
        assert download.missing_pieces() == ()
        assert download.progress().bytes_done == size

        await seed.remove(source.torrent.info_hash)
        download = await second.download(source.torrent, tmp_path / "second.bin")
        download.add_peers(at(first))
        assert filecmp.cmp(source.path, await download.verified(), shallow=False)
        await eventually(lambda: first.stats().uploaded_bytes >= size)  # statistics are at most a second old
        await eventually(lambda: second.stats().downloaded_bytes >= size)
        assert (seed.stats().torrents, first.stats().torrents) == (0, 1)

        again = await second.download(source.torrent, tmp_path / "elsewhere.bin")
        assert await again.verified() == tmp_path / "second.bin"


async def test_pieces_from_elsewhere_make_a_file_without_any_peer(tmp_path: Path):
    source = source_of(tmp_path, 3 * MIB + 7)
    async with node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin", source.hashed.piece_layer)
        assert not await download.add_piece(3, b"x" * len(source.piece(3)))
        assert [piece.index for piece in download.missing_pieces()] == list(range(source.torrent.pieces))
        for piece in download.missing_pieces():
            assert await download.add_piece(piece.index, source.piece(piece.index))
            assert piece.index not in {missing.index for missing in download.missing_pieces()}
        assert filecmp.cmp(source.path, await download.verified(), shallow=False)
        assert await download.add_piece(0, source.piece(0))
        with pytest.raises(InvalidParamsError):
            await download.add_piece(0, b"too short")
        with pytest.raises(InvalidParamsError):
            await download.add_piece(source.torrent.pieces, b"")


async def test_pieces_from_elsewhere_without_the_piece_layer_are_checked_together(tmp_path: Path):
    source = source_of(tmp_path, 2 * MIB + 7)
    async with node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin")
        pieces = download.missing_pieces()
        kept = await asyncio.gather(*(download.add_piece(piece.index, source.piece(piece.index)) for piece in pieces))
        assert all(kept)
        assert filecmp.cmp(source.path, await download.verified(), shallow=False)


async def test_pieces_from_elsewhere_come_beside_those_of_peers(tmp_path: Path):
    source = source_of(tmp_path, 8 * MIB)
    async with seeding(tmp_path, source, upload_limit=4 * MIB) as seed, node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin")
        download.add_peers(at(seed))
        await until(download, 1)
        for index in reversed(range(source.torrent.pieces // 2, source.torrent.pieces)):
            await download.add_piece(index, source.piece(index))
        assert filecmp.cmp(source.path, await download.verified(), shallow=False)
        await eventually(lambda: seed.stats().uploaded_bytes)
        await asyncio.sleep(SETTLE_S)  # nor does it become more
        assert seed.stats().uploaded_bytes < 7 * MIB


@pytest.mark.parametrize(
    ("upload_limit", "download_limit"), [(2 * MIB, 0), pytest.param(0, 2 * MIB, marks=pytest.mark.slow)]
)
async def test_a_limit_holds_on_loopback(tmp_path: Path, upload_limit: int, download_limit: int):
    source = source_of(tmp_path, 5 * MIB)
    async with (
        seeding(tmp_path, source, upload_limit) as seed,
        node(tmp_path, download_limit=download_limit) as swarm,
    ):
        began = time.monotonic()
        download = await swarm.download(source.torrent, tmp_path / "got.bin")
        download.add_peers(at(seed))
        await download.verified()
        # A limit is a floor of the time, whatever the machine's speed; a second's burst is let through.
        assert time.monotonic() - began > source.torrent.size / (upload_limit or download_limit) - 1.0


async def test_after_a_clean_stop_nothing_moves_twice(tmp_path: Path):
    source = source_of(tmp_path, 12 * MIB)
    async with seeding(tmp_path, source, upload_limit=8 * MIB) as seed:
        async with node(tmp_path) as swarm:
            download = await swarm.download(source.torrent, tmp_path / "got.bin")
            download.add_peers(at(seed))
            await until(download, 6 * MIB)
        with pytest.raises(CancelledRequestError):
            await download.verified()
        assert not (tmp_path / "got.bin").exists()
        suffixes = {path.suffix for path in (tmp_path / "node").iterdir()}
        assert ".resume" in suffixes
        async with node(tmp_path) as swarm:
            download = await swarm.download(source.torrent, tmp_path / "got.bin")
            await until(download, 4 * MIB)  # no peer yet: what was kept
            download.add_peers(at(seed))
            assert filecmp.cmp(source.path, await download.verified(), shallow=False)
        assert not any((tmp_path / "node").iterdir())
        await asyncio.sleep(SETTLE_S)
        assert seed.stats().uploaded_bytes < source.torrent.size + 4 * MIB


async def test_a_part_file_that_changed_after_a_clean_stop_is_checked_again(tmp_path: Path):
    source = source_of(tmp_path, 4 * MIB)
    async with node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin", source.hashed.piece_layer)
        for index in range(8):
            await download.add_piece(index, source.piece(index))
    part = tmp_path / "got.bin.part"
    data = bytearray(part.read_bytes())
    data[5] ^= 1
    part.write_bytes(data)
    async with seeding(tmp_path, source) as seed, node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin")
        await until(download, MIB)
        assert 0 in {piece.index for piece in download.missing_pieces()}
        download.add_peers(at(seed))
        assert filecmp.cmp(source.path, await download.verified(), shallow=False)


async def test_cancel_with_delete_leaves_nothing(tmp_path: Path):
    source = source_of(tmp_path, 4 * MIB)
    async with seeding(tmp_path, source, upload_limit=MIB) as seed, node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "out" / "got.bin")
        download.add_peers(at(seed))
        waiting = asyncio.ensure_future(download.verified())
        await until(download, 1)
        await download.cancel(delete=True)
        with pytest.raises(CancelledRequestError):
            await waiting
        assert not any((tmp_path / "out").iterdir())
        assert not any((tmp_path / "node").iterdir())
        assert swarm.stats().torrents == 0


async def test_a_waiter_that_gives_up_does_not_stop_the_download(tmp_path: Path):
    source = source_of(tmp_path, 2 * MIB)
    async with seeding(tmp_path, source) as seed, node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await download.verified()
        download.add_peers(at(seed))
        assert filecmp.cmp(source.path, await download.verified(), shallow=False)


async def test_what_cannot_be_seeded_is_refused(tmp_path: Path):
    source = source_of(tmp_path, 2 * MIB)
    async with node(tmp_path) as swarm:
        other = Torrent.of("other", 3 * MIB, ContentId("ab" * 32))
        with pytest.raises(InvalidShardError, match="bytes"):
            await swarm.seed(other, source.path, source.hashed.piece_layer)
        with pytest.raises(InvalidShardError, match="missing"):
            await swarm.seed(other, tmp_path / "nowhere", source.hashed.piece_layer)
        with pytest.raises(InvalidShardError, match="piece layer"):
            await swarm.seed(source.torrent, source.path, bytes(len(source.hashed.piece_layer)))
        assert swarm.stats().torrents == 0
        await swarm.seed(source.torrent, source.path, source.hashed.piece_layer)
        await swarm.seed(source.torrent, source.path, source.hashed.piece_layer)
        assert swarm.stats().torrents == 1
        with pytest.raises(UnreachableError, match="taken"):
            async with Swarm.open(SwarmSettings(tmp_path / "x", port=swarm.port)):
                pass


async def test_a_seed_that_was_found_changed_is_downloaded_anew_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = source_of(tmp_path, MIB)
    copy = tmp_path / "copy.bin"
    copy.write_bytes(source.path.read_bytes())
    async with seeding(tmp_path, source) as seed, node(tmp_path) as good, node(tmp_path, "other") as other:
        await good.seed(source.torrent, copy, source.hashed.piece_layer)
        found: asyncio.Future[asyncio.Task[Download]] = asyncio.get_running_loop().create_future()

        def again(torrent: Torrent, _: str) -> None:
            found.set_result(asyncio.create_task(seed.download(torrent, tmp_path / "again.bin")))

        really = seed._session.remove

        async def remove(handle: Handle) -> None:
            await asyncio.sleep(0.3)  # as a busy session takes it out
            await really(handle)

        monkeypatch.setattr(seed._session, "remove", remove)
        with seed.on_invalid(again):
            with source.path.open("r+b") as file:
                file.write(bytes(MIB))
            (await other.download(source.torrent, tmp_path / "got.bin")).add_peers(at(seed))
            async with asyncio.timeout(20):
                download = await (await found)
                download.add_peers(at(good))
                assert filecmp.cmp(copy, await download.verified(), shallow=False)


@pytest.mark.slow
async def test_four_nodes_that_know_each_other_share(tmp_path: Path):
    source = source_of(tmp_path, 6 * MIB)
    async with seeding(tmp_path, source, upload_limit=8 * MIB) as seed, contextlib.AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(node(tmp_path, f"node-{i}")) for i in range(4)]
        everyone = [address for each in [seed, *nodes] for address in at(each)]
        downloads = [await each.download(source.torrent, tmp_path / f"{i}.bin") for i, each in enumerate(nodes)]
        for download in downloads:
            download.add_peers(everyone)
        for path in await asyncio.gather(*(download.verified() for download in downloads)):
            assert filecmp.cmp(source.path, path, shallow=False)
        await asyncio.sleep(SETTLE_S)
        assert seed.stats().uploaded_bytes < 3 * source.torrent.size


async def test_a_wrong_piece_without_the_piece_layer_is_not_kept(tmp_path: Path):
    source = source_of(tmp_path, 2 * MIB + 7)
    async with node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin")
        pieces = download.missing_pieces()
        wrong = [asyncio.ensure_future(download.add_piece(3, b"x" * pieces[3].size))]
        others = [piece.index for piece in pieces if piece.index != 3]
        rest = [asyncio.ensure_future(download.add_piece(index, source.piece(index))) for index in others]
        await asyncio.wait(wrong + rest, timeout=2)
        assert not (tmp_path / "got.bin").exists()
        assert not any(each.done() and each.result() for each in wrong)
        for each in wrong + rest:
            each.cancel()
        async with seeding(tmp_path, source) as seed:
            download.add_peers(at(seed))
            assert filecmp.cmp(source.path, await download.verified(), shallow=False)


async def test_a_download_that_is_cancelled_at_once_is_gone(tmp_path: Path):
    source = source_of(tmp_path, MIB)
    async with node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin")
        await download.cancel()
        with pytest.raises(CancelledRequestError):
            await download.verified()
        assert swarm.stats().torrents == 0
        again = await swarm.download(source.torrent, tmp_path / "got.bin", source.hashed.piece_layer)
        for piece in again.missing_pieces():
            assert await again.add_piece(piece.index, source.piece(piece.index))
        await again.verified()


@pytest.mark.parametrize("step", ["status", "resume_data"])
async def test_a_download_that_is_cancelled_at_any_step_leaves_no_torrent_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    """`status` is asked for when the torrent was just added, `resume_data` when the download is restarted."""
    source = source_of(tmp_path, 1_000_000)
    reached = asyncio.Event()
    real = getattr(Handle, step)

    async def held_open(handle: Handle, *args: float) -> object:
        if not reached.is_set():
            reached.set()
            await asyncio.sleep(30)
        return await real(handle, *args)

    async with node(tmp_path) as swarm:
        monkeypatch.setattr(Handle, step, held_open)
        path = tmp_path / "here" / source.path.name
        path.parent.mkdir()
        download = await swarm.download(source.torrent, path)
        if step == "resume_data":
            await download.ready()
            assert download._handle is not None
            restarting = asyncio.create_task(download._restart(download._handle))
            await reached.wait()
            restarting.cancel()
        await asyncio.wait_for(reached.wait(), 10)
        await download.cancel(delete=True)
        assert swarm.stats().torrents == 0
        again = await swarm.download(source.torrent, path, source.hashed.piece_layer)
        for piece in again.missing_pieces():
            assert await again.add_piece(piece.index, source.piece(piece.index))
        await again.verified()


async def test_who_gives_a_piece_while_a_failed_download_is_taken_out_hears_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = source_of(tmp_path, MIB)
    async with node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin", source.hashed.piece_layer)
        await download.ready()
        remove, removing = download._session.remove, asyncio.Event()

        async def slowly(handle: Handle) -> None:
            removing.set()
            await asyncio.sleep(0.2)
            await remove(handle)

        monkeypatch.setattr(download._session, "remove", slowly)
        download._on_event(FileFailed(source.torrent.info_hash, errno.ENOSPC, "no space"))
        await removing.wait()
        with pytest.raises(InsufficientDiskError):
            await download.add_piece(0, source.piece(0))


@pytest.mark.slow
async def test_a_slow_node_does_not_hold_up_a_fast_one(tmp_path: Path):
    source = source_of(tmp_path, 16 * MIB)
    async with (
        seeding(tmp_path, source, upload_limit=4 * MIB) as seed,
        node(tmp_path, "slow", download_limit=100_000) as slow,
        node(tmp_path, "fast") as fast,
    ):
        (await slow.download(source.torrent, tmp_path / "slow.bin")).add_peers(at(seed))
        await asyncio.sleep(1)
        download = await fast.download(source.torrent, tmp_path / "fast.bin")
        download.add_peers([*at(seed), *at(slow)])
        # At its limit the seed needs 4 s; the slow node alone would take two minutes and a half.
        async with asyncio.timeout(30):
            assert filecmp.cmp(source.path, await download.verified(), shallow=False)
