"""Which origin is asked next, which is backed off, and what is checked of what they give."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node.shards.fetch.origin_selector import CORRUPT_TRIES, LONGEST_BACKOFF_S, OriginSelector
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
from tests.support.clocks import MovedClock

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
def clock() -> MovedClock:
    clock = MovedClock()
    clock.set(0.0)
    return clock


@pytest.fixture
def torrent(entry: ShardEntry) -> Torrent:
    return Torrent.of(entry.filename, entry.size, entry.content_id)


class SpokenOrigin:
    """An origin that answers what it is told to."""

    def __init__(self, url: str, layer: bytes | OriginError = b"") -> None:
        self.url = url
        self.layer = layer
        self.asked = 0
        self.pause_s = 0.0
        self.clock: MovedClock | None = None

    def key_of(self, entry: ShardEntry) -> str:
        return f"shards/{entry.content_id}"

    async def range_unit_bytes(self) -> int:
        return 1

    async def piece_layer(self, entry: ShardEntry) -> bytes:
        self.asked += 1
        if self.clock:
            self.clock.set(self.clock.now() + self.pause_s)
        if isinstance(self.layer, OriginError):
            raise self.layer
        return self.layer

    async def stream(self, entry: ShardEntry, start: int, end: int) -> AsyncIterator[bytes]:
        yield b""


def test_a_place_that_fails_rests_and_the_next_is_asked(entry: ShardEntry, torrent: Torrent, clock: MovedClock) -> None:
    a, b = SpokenOrigin("o3://a"), SpokenOrigin("o3://b")
    selector = OriginSelector([a, b], entry, torrent, clock)
    clock.set(0.0)
    assert selector.next_origin() is a
    clock.set(0.0)
    selector.failed(a, OriginUnavailableError("busy"))
    clock.set(0.01)
    assert selector.next_origin() is b
    clock.set(0.6)
    assert selector.next_origin() is a
    for again in range(1, 40):
        clock.set(again * 20.0)
        selector.failed(a, OriginUnavailableError("busy"))
    clock.set(39 * 20.0 + LONGEST_BACKOFF_S / 2 - 0.1)
    assert selector.next_origin() is b
    clock.set(39 * 20.0 + LONGEST_BACKOFF_S)
    assert selector.next_origin() is a
    assert not selector.exhausted
    assert selector.errors == {"o3://a": selector.errors["o3://a"]}


def test_streams_that_break_together_count_once(entry: ShardEntry, torrent: Torrent, clock: MovedClock) -> None:
    a = SpokenOrigin("o3://a")
    selector = OriginSelector([a], entry, torrent, clock)
    for _ in range(8):
        clock.set(1.0)
        selector.failed(a, OriginUnavailableError("reset"))
    clock.set(1.5)
    assert selector.next_origin() is a


def test_what_an_origin_said_is_not_forgotten_for_a_silence_after_it(
    entry: ShardEntry, torrent: Torrent, clock: MovedClock
) -> None:
    a = SpokenOrigin("o3://a")
    selector = OriginSelector([a], entry, torrent, clock)
    silent = OriginUnavailableError("sent nothing for 30 s", {"status": ""})
    clock.set(0.0)
    selector.failed(a, silent)
    assert selector.errors["o3://a"] is silent
    told = OriginUnavailableError("the answer was 503", {"status": "503"})
    clock.set(100.0)
    selector.failed(a, told)
    clock.set(200.0)
    selector.failed(a, silent)
    assert selector.errors["o3://a"] is told


@pytest.mark.parametrize("error", [OriginNotFoundError("no"), OriginDeniedError("no"), OriginError("no")])
def test_a_place_that_will_not_give_it_is_left_out(
    entry: ShardEntry, torrent: Torrent, clock: MovedClock, error: OriginError
) -> None:
    a = SpokenOrigin("o3://a")
    selector = OriginSelector([a], entry, torrent, clock)
    clock.set(0.0)
    selector.failed(a, error)
    assert selector.exhausted
    clock.set(1e9)
    assert selector.next_origin() is None


def test_wrong_bytes_are_enough_once_and_short_answers_a_few_times(
    entry: ShardEntry, torrent: Torrent, clock: MovedClock
) -> None:
    a, b = SpokenOrigin("o3://a"), SpokenOrigin("o3://b")
    selector = OriginSelector([a, b], entry, torrent, clock)
    selector.gave_wrong(a, "a piece 3")
    clock.set(1e9)
    assert selector.next_origin() is b
    error = selector.errors["o3://a"]
    assert isinstance(error, OriginCorruptError)
    assert error.details["origin"] == "o3://a"
    for n in range(CORRUPT_TRIES):
        assert not selector.exhausted
        clock.set(n * 100.0)
        selector.failed(b, OriginCorruptError("cut short"))
    assert selector.exhausted


async def test_the_piece_layer_is_checked_and_asked_for_once(
    entry: ShardEntry, torrent: Torrent, clock: MovedClock, tmp_path: Path
) -> None:
    layer = hash_file(tmp_path / "x").piece_layer
    busy, wrong, right = (
        SpokenOrigin("a", OriginUnavailableError("busy")),
        SpokenOrigin("b", b"x" * len(layer)),
        SpokenOrigin("c", layer),
    )
    selector = OriginSelector([busy, wrong, right], entry, torrent, clock)
    assert await selector.piece_layer() == layer
    assert (busy.asked, wrong.asked, right.asked) == (1, 1, 1)
    none = OriginSelector([SpokenOrigin("a", OriginDeniedError("no")), wrong], entry, torrent, clock)
    assert await none.piece_layer() == b""
    clock.set(1.0)
    assert await none.piece_layer() == b""
    assert wrong.asked == 2
    assert not none.exhausted, "it may have the shard all the same"
    assert await OriginSelector([busy], entry, torrent, clock).piece_layer() is None


async def test_a_place_that_failed_after_a_long_time_rests_from_then_on(
    entry: ShardEntry, torrent: Torrent, clock: MovedClock
) -> None:
    place = SpokenOrigin("o3://a", OriginUnavailableError("busy"))
    place.pause_s, place.clock = 0.6, clock
    selector = OriginSelector([place], entry, torrent, clock)
    assert await selector.piece_layer() is None
    clock.set(0.6)
    assert selector.next_origin() is None
    clock.set(2.0)
    assert selector.next_origin() is place


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
