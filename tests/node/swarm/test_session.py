"""The session is closed, and torrents are taken out, also where somebody is cancelled or fails in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from pathlib import Path

import pytest

from node.swarm import SwarmSettings, Torrent
from node.swarm.session import TorrentSession
from protocol.content import hash_file


def sockets() -> set[str]:
    """Open in this process; those of other tests' libraries come and go."""
    links: set[str] = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread's, closed just now
            links.add(os.readlink(f"/proc/self/fd/{number}"))
    return {link for link in links if link.startswith("socket:")}


async def test_an_error_inside_leaves_nothing_open(tmp_path: Path) -> None:
    before, its = sockets(), set[str]()

    async def fail() -> None:
        async with TorrentSession.open(SwarmSettings(tmp_path)):
            its.update(sockets() - before)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert its
    assert not sockets() & its


async def test_a_close_that_is_cancelled_is_carried_to_its_end(tmp_path: Path) -> None:
    before, its, inside = sockets(), set[str](), asyncio.Event()

    async def serve() -> None:
        async with TorrentSession.open(SwarmSettings(tmp_path)):
            its.update(sockets() - before)
            inside.set()
            await asyncio.Event().wait()

    serving = asyncio.create_task(serve())
    await inside.wait()
    serving.cancel()
    await asyncio.sleep(0.001)  # it closes
    serving.cancel()
    await asyncio.wait([serving])
    assert serving.cancelled()
    assert its
    assert not sockets() & its


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
async def test_a_torrent_whose_adding_is_cancelled_does_not_stay(tmp_path: Path, turns: int) -> None:
    path = tmp_path / "shard.bin"
    path.write_bytes(random.Random(turns).randbytes(1 << 20))
    hashed = hash_file(path)
    torrent = Torrent.of("shard.bin", hashed.size, hashed.content_id)
    async with TorrentSession.open(SwarmSettings(tmp_path / "state")) as session:
        adding = asyncio.create_task(session.add(torrent, path, lambda _: None, piece_layer=hashed.piece_layer))
        for _ in range(turns):
            await asyncio.sleep(0)
        adding.cancel()
        await asyncio.wait([adding])
        assert session._raw.get_torrents() == []
        handle = await session.add(torrent, path, lambda _: None, piece_layer=hashed.piece_layer)
        await session.remove(handle)
