"""What the origin's part of a fetch decides without a network: when it is needed, whom it asks, what it checks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.shards.fetch.flow import Flow
from node.shards.fetch.need import Need
from node.shards.fetch.origin_selector import CORRUPT_TRIES, LONGEST_REST_S, Supply
from node.swarm.piece_layer import piece_fits
from node.swarm.torrent import Torrent
from protocol.content import hash_file
from protocol.errors import (
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginNotFoundError,
    OriginUnavailableError,
)
from protocol.manifest import ShardEntry

SIZE = 700_000


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def entry(tmp_path: Path, data: bytes) -> ShardEntry:
    (tmp_path / "x").write_bytes(data)
    content = hash_file(tmp_path / "x")
    return ShardEntry(shard_id=0, filename="x", size=content.size, content_id=content.content_id, kind="file")


@pytest.fixture
def torrent(entry: ShardEntry) -> Torrent:
    return Torrent.of(entry.filename, entry.size, entry.content_id)


class Said:
    """A place that answers what it is told to."""

    def __init__(self, url: str, layer: bytes | OriginError = b"") -> None:
        self.url = url
        self.layer = layer
        self.asked = 0
        self.pause_s = 0.0

    def key_of(self, entry: ShardEntry) -> str:
        return f"shards/{entry.content_id}"

    async def range_unit_bytes(self) -> int:
        return 1

    async def piece_layer(self, entry: ShardEntry) -> bytes:
        self.asked += 1
        await asyncio.sleep(self.pause_s)
        if isinstance(self.layer, OriginError):
            raise self.layer
        return self.layer

    async def stream(self, entry: ShardEntry, start: int, end: int) -> AsyncIterator[bytes]:
        yield b""


def need(now: float = 0.0) -> Need:
    return Need(now, gone_after_s=2.0, slow_bytes_s=1000.0, slow_after_s=5.0)


def test_peers_are_gone_when_none_was_connected_for_a_while() -> None:
    peers = need()
    assert not peers.gone(1.9)
    assert peers.gone(2.0)
    peers.saw(2.5, 0, 1)
    assert not peers.gone(4.0)
    assert peers.gone(4.5)


@given(st.lists(st.integers(0, 100), min_size=30, max_size=30))
def test_peers_are_slow_by_what_came_in_the_last_seconds(steps: list[int]) -> None:
    peers, total, came = need(), 0, [0]
    for tick, step in enumerate(steps):
        total += step * 10
        came.append(total)
        peers.saw(tick / 2, total, 1)
        if tick < 10:
            assert not peers.slow(tick / 2), "they are given time"
        else:
            assert peers.slow(tick / 2) == (came[tick + 1] - came[tick - 9] < 5000)


def test_a_place_that_fails_rests_and_the_next_is_asked(entry: ShardEntry, torrent: Torrent) -> None:
    a, b = Said("o3://a"), Said("o3://b")
    supply = Supply([a, b], entry, torrent)
    assert supply.next_place(0.0) is a
    supply.failed(a, OriginUnavailableError("busy"), 0.0)
    assert supply.next_place(0.01) is b
    assert supply.next_place(0.6) is a
    for again in range(1, 40):
        supply.failed(a, OriginUnavailableError("busy"), again * 20.0)
    assert supply.next_place(39 * 20.0 + LONGEST_REST_S / 2 - 0.1) is b
    assert supply.next_place(39 * 20.0 + LONGEST_REST_S) is a
    assert not supply.exhausted
    assert supply.errors == {"o3://a": supply.errors["o3://a"]}


def test_streams_that_break_together_count_once(entry: ShardEntry, torrent: Torrent) -> None:
    a = Said("o3://a")
    supply = Supply([a], entry, torrent)
    for _ in range(8):
        supply.failed(a, OriginUnavailableError("reset"), 1.0)
    assert supply.next_place(1.5) is a


def test_what_an_origin_said_is_not_forgotten_for_a_silence_after_it(entry: ShardEntry, torrent: Torrent) -> None:
    a = Said("o3://a")
    supply = Supply([a], entry, torrent)
    silent = OriginUnavailableError("sent nothing for 30 s", {"status": ""})
    supply.failed(a, silent, 0.0)
    assert supply.errors["o3://a"] is silent
    told = OriginUnavailableError("the answer was 503", {"status": "503"})
    supply.failed(a, told, 100.0)
    supply.failed(a, silent, 200.0)
    assert supply.errors["o3://a"] is told


@pytest.mark.parametrize("error", [OriginNotFoundError("no"), OriginDeniedError("no"), OriginError("no")])
def test_a_place_that_will_not_give_it_is_left_out(entry: ShardEntry, torrent: Torrent, error: OriginError) -> None:
    a = Said("o3://a")
    supply = Supply([a], entry, torrent)
    supply.failed(a, error, 0.0)
    assert supply.exhausted
    assert supply.next_place(1e9) is None


def test_wrong_bytes_are_enough_once_and_short_answers_a_few_times(entry: ShardEntry, torrent: Torrent) -> None:
    a, b = Said("o3://a"), Said("o3://b")
    supply = Supply([a, b], entry, torrent)
    supply.gave_wrong(a, "a piece 3")
    assert supply.next_place(1e9) is b
    error = supply.errors["o3://a"]
    assert isinstance(error, OriginCorruptError)
    assert error.details["origin"] == "o3://a"
    for n in range(CORRUPT_TRIES):
        assert not supply.exhausted
        supply.failed(b, OriginCorruptError("cut short"), n * 100.0)
    assert supply.exhausted


async def test_the_piece_layer_is_checked_and_asked_for_once(
    entry: ShardEntry, torrent: Torrent, tmp_path: Path
) -> None:
    layer = hash_file(tmp_path / "x").piece_layer
    busy, wrong, right = Said("a", OriginUnavailableError("busy")), Said("b", b"x" * len(layer)), Said("c", layer)
    supply = Supply([busy, wrong, right], entry, torrent)
    assert await supply.piece_layer(0.0) == layer
    assert (busy.asked, wrong.asked, right.asked) == (1, 1, 1)
    none = Supply([Said("a", OriginDeniedError("no")), wrong], entry, torrent)
    assert await none.piece_layer(0.0) == b""
    assert await none.piece_layer(1.0) == b""
    assert wrong.asked == 2
    assert not none.exhausted, "it may have the shard all the same"
    assert await Supply([busy], entry, torrent).piece_layer(0.0) is None


async def test_a_place_that_failed_after_a_long_time_rests_from_then_on(entry: ShardEntry, torrent: Torrent) -> None:
    place = Said("o3://a", OriginUnavailableError("busy"))
    place.pause_s = 0.6
    supply = Supply([place], entry, torrent)
    assert await supply.piece_layer(0.0) is None
    assert supply.next_place(0.6) is None
    assert supply.next_place(2.0) is place


def test_what_is_being_given_is_not_taken_for_what_peers_gave() -> None:
    flow = Flow(0.0)
    flow.saw(1.0, 100)
    flow.given_bytes += 50
    flow.saw(2.0, 100)
    flow.saw(3.0, 150)
    flow.came(4.0, shared=False)
    assert (flow.peer_bytes, flow.shared_at, flow.moved_at) == (100, 1.0, 4.0)
    flow.saw(5.0, 170)
    assert (flow.peer_bytes, flow.shared_at, flow.moved_at) == (120, 5.0, 5.0)
    flow.came(6.0, shared=True)
    assert flow.shared_at == 6.0


def test_a_piece_is_checked_alone(data: bytes, torrent: Torrent, tmp_path: Path, entry: ShardEntry) -> None:
    layer = hash_file(tmp_path / "x").piece_layer
    for index in range(torrent.pieces):
        piece = torrent.piece(index)
        body = data[piece.offset : piece.offset + piece.size]
        assert piece_fits(torrent, layer, index, body)
        assert not piece_fits(torrent, layer, index, b"\0" + body[1:])
        assert not piece_fits(torrent, layer, (index + 1) % torrent.pieces, body)
    (tmp_path / "small").write_bytes(data[:20_000])
    small = Torrent.of("small", 20_000, hash_file(tmp_path / "small").content_id)
    assert piece_fits(small, b"", 0, data[:20_000])
    assert not piece_fits(small, b"", 0, data[1:20_001])
