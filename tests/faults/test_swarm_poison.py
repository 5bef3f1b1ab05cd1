"""A seed whose file was changed after it was hashed, alone and beside a good one: never a wrong byte."""

import asyncio
import contextlib
import filecmp
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import libtorrent as lt
import pytest

from node.swarm import PeerAddress, Swarm, SwarmSettings, Torrent
from protocol.content import ContentHash, hash_file

MIB = 1024 * 1024


def make_file(path: Path, size: int) -> ContentHash:
    path.write_bytes(random.Random(size).randbytes(size))
    return hash_file(path)


def poison(source: Path, path: Path, every: int) -> None:
    """A copy in which one byte of every `every` is another."""
    data = bytearray(source.read_bytes())
    for at in range(every // 2, len(data), every):
        data[at] ^= 0xFF
    path.write_bytes(data)


@contextlib.asynccontextmanager
async def liar(torrent: Torrent, path: Path, piece_layer: bytes) -> AsyncIterator[PeerAddress]:
    """A peer that serves the file whatever is in it: it never checks a hash, as a malicious one would not."""
    session = lt.session(
        {
            "listen_interfaces": "127.0.0.1:0",
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "enable_outgoing_utp": False,
            "enable_incoming_utp": False,
            "disable_hash_checks": True,
            "allow_multiple_connections_per_ip": True,
        }
    )
    params = lt.load_torrent_buffer(torrent.metainfo(piece_layer))
    params.save_path = str(path.parent)
    params.renamed_files = {0: path.name}
    params.have_pieces = [True] * torrent.pieces
    params.verified_pieces = [True] * torrent.pieces
    params.flags = int(lt.torrent_flags.seed_mode)
    session.add_torrent(params)
    try:
        yield PeerAddress("127.0.0.1", await asyncio.to_thread(session.listen_port))
    finally:
        held = [session]
        del session
        await asyncio.to_thread(held.clear)


async def beside_a_good_seed(tmp_path: Path, size: int, every: int) -> float:
    source = tmp_path / "source.bin"
    hashed = make_file(source, size)
    poison(source, tmp_path / "bad.bin", every)
    torrent = Torrent.of("shard.bin", hashed.size, hashed.content_id)
    async with (
        Swarm.open(SwarmSettings(tmp_path / "good")) as good,
        liar(torrent, tmp_path / "bad.bin", hashed.piece_layer) as bad,
        Swarm.open(SwarmSettings(tmp_path / "node")) as node,
    ):
        await good.seed(torrent, source, hashed.piece_layer)
        began = time.monotonic()
        download = await node.download(torrent, tmp_path / "got.bin")
        download.add_peers([bad, PeerAddress("127.0.0.1", good.port)])
        async with asyncio.timeout(20):
            path = await download.verified()
        seconds = time.monotonic() - began
    assert filecmp.cmp(source, path, shallow=False)
    return seconds


async def alone(tmp_path: Path, size: int, every: int) -> None:
    source = tmp_path / "source.bin"
    hashed = make_file(source, size)
    poison(source, tmp_path / "bad.bin", every)
    torrent = Torrent.of("shard.bin", hashed.size, hashed.content_id)
    async with (
        liar(torrent, tmp_path / "bad.bin", hashed.piece_layer) as bad,
        Swarm.open(SwarmSettings(tmp_path / "node", stall_s=0.5)) as node,
    ):
        download = await node.download(torrent, tmp_path / "got.bin")
        download.add_peers([bad])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await download.verified()
        assert not (tmp_path / "got.bin").exists()
        missing = {piece.index for piece in download.missing_pieces()}
        # What it claims to have is right, byte by byte.
        await download.cancel()
    right, got = source.read_bytes(), (tmp_path / "got.bin.part").read_bytes()
    for index in set(range(torrent.pieces)) - missing:
        piece = torrent.piece(index)
        where = slice(piece.offset, piece.offset + piece.size)
        assert got[where] == right[where]
    assert missing


async def test_beside_a_good_seed_a_liar_does_not_stop_the_download(tmp_path: Path):
    await beside_a_good_seed(tmp_path, 24 * MIB + 1, every=MIB)


async def test_a_liar_alone_never_gives_a_wrong_byte(tmp_path: Path):
    await alone(tmp_path, 8 * MIB + 1, every=MIB)


async def test_a_seed_notices_at_the_first_upload_that_its_file_changed(tmp_path: Path):
    source = tmp_path / "source.bin"
    hashed = make_file(source, 4 * MIB)
    torrent = Torrent.of("shard.bin", hashed.size, hashed.content_id)
    poison(source, source, every=200_000)  # in each piece
    found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with (
        contextlib.AsyncExitStack() as stack,
        Swarm.open(SwarmSettings(tmp_path / "bad")) as bad,
        Swarm.open(SwarmSettings(tmp_path / "node")) as node,
    ):
        stack.enter_context(bad.on_invalid(lambda torrent, _: found.set_result(torrent.info_hash)))
        await bad.seed(torrent, source, hashed.piece_layer)
        download = await node.download(torrent, tmp_path / "got.bin")
        download.add_peers([PeerAddress("127.0.0.1", bad.port)])
        async with asyncio.timeout(15):
            assert await found == torrent.info_hash
        assert bad.stats().torrents == 0
        assert len(download.missing_pieces()) == torrent.pieces


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("every", [256 * 1024, MIB, 16 * MIB])
async def test_ten_runs_beside_a_good_seed(tmp_path: Path, every: int):
    seconds = []
    for run in range(10):
        folder = tmp_path / str(run)
        folder.mkdir()
        seconds.append(await beside_a_good_seed(folder, 48 * MIB + run, every))
    print(f"finished after {', '.join(f'{each:.1f}' for each in seconds)} s")


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_ten_runs_alone(tmp_path: Path):
    for run in range(10):
        folder = tmp_path / str(run)
        folder.mkdir()
        await alone(folder, 16 * MIB + run, every=MIB)
