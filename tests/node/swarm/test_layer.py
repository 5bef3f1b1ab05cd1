"""A piece layer that comes late, and which pieces peers have."""

from __future__ import annotations

import asyncio
import filecmp
from pathlib import Path

import pytest

from protocol.errors import InvalidShardError
from tests.node.swarm.test_download import MIB, at, node, seeding, source_of, until


async def test_a_layer_handed_over_late_lets_pieces_be_checked_alone(tmp_path: Path) -> None:
    source = source_of(tmp_path, 3 * MIB + 7)
    async with node(tmp_path) as swarm:
        download = await swarm.download(source.torrent, tmp_path / "got.bin")
        await download.ready()
        assert download.piece_layer == b""
        with pytest.raises(InvalidShardError):
            await download.take_layer(bytes(len(source.hashed.piece_layer)))
        await download.take_layer(source.hashed.piece_layer)
        assert download.piece_layer == source.hashed.piece_layer
        async with asyncio.timeout(10):
            assert await download.add_piece(1, source.piece(1))
            assert not await download.add_piece(0, b"x" * len(source.piece(0)))
        assert {piece.index for piece in download.missing_pieces()} == set(range(source.torrent.pieces)) - {1}
        await download.take_layer(source.hashed.piece_layer)
        for piece in download.missing_pieces():
            assert await download.add_piece(piece.index, source.piece(piece.index))
        assert filecmp.cmp(source.path, await download.verified(), shallow=False)


async def test_what_peers_gave_before_a_late_layer_is_kept(tmp_path: Path) -> None:
    source = source_of(tmp_path, 8 * MIB)
    async with node(tmp_path) as swarm:
        async with seeding(tmp_path, source, upload_limit=8 * MIB) as seed:
            download = await swarm.download(source.torrent, tmp_path / "got.bin")
            download._layer._due = 1e12  # Peers' layer is not noticed.
            download.add_peers(at(seed))
            await until(download, 3 * MIB)
            await download.take_layer(source.hashed.piece_layer)
        before = {piece.index for piece in download.missing_pieces()}
        assert len(before) < source.torrent.pieces * 3 // 4
        for index in sorted(before):
            assert await download.add_piece(index, source.piece(index))
        assert filecmp.cmp(source.path, await download.verified(), shallow=False)


async def test_which_pieces_peers_have(tmp_path: Path) -> None:
    source = source_of(tmp_path, 4 * MIB)
    half = range(source.torrent.pieces // 2)
    async with node(tmp_path, "a") as a, node(tmp_path, "b") as b:
        layer = source.hashed.piece_layer
        first = await a.download(source.torrent, tmp_path / "a.bin", layer)
        second = await b.download(source.torrent, tmp_path / "b.bin", layer)
        assert await second.available_pieces() == frozenset()
        for index in half:
            await first.add_piece(index, source.piece(index))
        second.add_peers(at(a))
        async with asyncio.timeout(10):
            while await second.available_pieces() != frozenset(half):  # noqa: ASYNC110 - it happens on the network
                await asyncio.sleep(0.02)
            while len(second.missing_pieces()) > len(half):  # noqa: ASYNC110 - it happens on the network
                await asyncio.sleep(0.02)
            while await first.available_pieces() != frozenset(half):  # noqa: ASYNC110 - it happens on the network
                await asyncio.sleep(0.02)
