"""A full disk: a clear error, and nothing that was there is lost."""

import filecmp
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from node.swarm import PeerAddress, Swarm, SwarmSettings, Torrent
from protocol.errors import InsufficientDiskError
from tests.faults.test_swarm_crash import lines, make_file, start

MIB = 1024 * 1024


@pytest.fixture
def small_disk(tmpfs: Callable[[str], Path]) -> Path:
    """A file system of 8 MiB."""
    return tmpfs("8m")


async def test_a_full_disk_is_told_before_a_byte_moves_and_keeps_what_was_there(tmp_path: Path, small_disk: Path):
    kept = small_disk / "kept.bin"
    kept.write_bytes(random.Random(1).randbytes(5 * MIB))
    before = kept.read_bytes()
    source = tmp_path / "source.bin"
    hashed = make_file(source, 6 * MIB)
    torrent = Torrent.of("shard.bin", hashed.size, hashed.content_id)
    async with (
        Swarm.open(SwarmSettings(tmp_path / "a")) as seed,
        Swarm.open(SwarmSettings(tmp_path / "b")) as node,
    ):
        await seed.seed(torrent, source, hashed.piece_layer)
        download = await node.download(torrent, small_disk / "got.bin")
        download.add_peers([PeerAddress("127.0.0.1", seed.port)])
        with pytest.raises(InsufficientDiskError, match="full"):
            await download.verified()
        assert sorted(path.name for path in small_disk.iterdir()) == ["kept.bin"]
        assert kept.read_bytes() == before
        assert node.stats().downloaded_bytes == 0

        # Room is made, and the same node is asked again.
        kept.unlink()
        download = await node.download(torrent, small_disk / "got.bin")
        download.add_peers([PeerAddress("127.0.0.1", seed.port)])
        path = await download.verified()
        assert filecmp.cmp(source, path, shallow=False)


async def test_a_write_that_fails_on_the_way_is_told_too(tmp_path: Path):
    source = tmp_path / "source.bin"
    hashed = make_file(source, 16 * MIB)
    torrent = Torrent.of("shard.bin", hashed.size, hashed.content_id)
    async with Swarm.open(SwarmSettings(tmp_path / "a")) as seed:
        await seed.seed(torrent, source, hashed.piece_layer)
        process = await start(tmp_path, seed.port, torrent, limit=8 * MIB, file_limit=MIB)
        said = [line async for line in lines(process)]
        assert await process.wait() == 0
        assert said[-1] == "insufficient_disk"
        assert not (tmp_path / "got.bin").exists()

        process = await start(tmp_path, seed.port, torrent)
        assert [line async for line in lines(process)][-1] == "verified"
        await process.wait()
    assert filecmp.cmp(source, tmp_path / "got.bin", shallow=False)
