"""kill -9 of a downloader: after a restart little moves twice."""

import asyncio
import filecmp
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from node.swarm import Swarm, SwarmSettings, Torrent
from protocol.content import ContentHash, hash_file
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
CHILD = ROOT / "tests" / "support" / "shards" / "swarm_child.py"
MIB = 1024 * 1024


def make_file(path: Path, size: int) -> ContentHash:
    path.write_bytes(random.Random(size).randbytes(size))
    return hash_file(path)


async def start(folder: Path, port: int, torrent: Torrent, *, limit: int = 0, file_limit: int = 0):
    args = (folder, port, torrent.size, torrent.content_id, limit, file_limit)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return await asyncio.create_subprocess_exec(
        sys.executable, CHILD, *map(str, args), stdout=asyncio.subprocess.PIPE, env=environment
    )


async def lines(process):
    while line := await process.stdout.readline():
        yield line.decode().strip()


async def killed_at_half(tmp_path: Path, size: int, limit: int) -> int:
    """Bytes that moved twice."""
    source = tmp_path / "source.bin"
    hashed = make_file(source, size)
    torrent = Torrent.of("shard.bin", hashed.size, hashed.content_id)
    async with Swarm.open(SwarmSettings(tmp_path / "seed-state")) as swarm:
        await swarm.seed(torrent, source, hashed.piece_layer)
        process = await start(tmp_path, swarm.port, torrent, limit=limit)
        try:
            async for line in lines(process):
                if int(line) >= size // 2:
                    break
        finally:
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL
        assert (tmp_path / "got.bin.part").exists()
        assert not (tmp_path / "got.bin").exists()

        process = await start(tmp_path, swarm.port, torrent)
        said = [line async for line in lines(process)]
        assert await process.wait() == 0
        assert said[-1] == "verified"
        await eventually(lambda: swarm.stats().uploaded_bytes >= size)  # statistics are at most a second old
        await asyncio.sleep(0.8)
        moved = swarm.stats().uploaded_bytes
    assert filecmp.cmp(source, tmp_path / "got.bin", shallow=False)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == []
    return moved - size


async def test_after_kill_9_at_half_at_most_16_mib_move_twice(tmp_path: Path):
    assert await killed_at_half(tmp_path, 48 * MIB + 5, 24 * MIB) <= 16 * MIB


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("limit", [40 * MIB, 120 * MIB])
async def test_after_kill_9_of_a_large_download(tmp_path: Path, limit: int):
    assert await killed_at_half(tmp_path, 240 * MIB, limit) <= 16 * MIB
