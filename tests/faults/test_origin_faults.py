"""What an origin can do wrong, each thing once, with the real S3 server behind a proxy that does it and counts.

Every time the shard arrives, verified, and no piece leaves the origin twice; or one error says origin, key, status and
what was tried, and the next try goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from node.shards.fetch.job import FetchedShard
from protocol.errors import OriginError, ShoalError
from protocol.manifest import Shard
from tests.support.origins.faults import Fault
from tests.support.origins.lab import ONE, TWO, Stock, open_node, payload_reaches, stocked
from tests.support.origins.proxy import OriginProxy

CUT_BYTES = 16 * 1024
"""Of a body that ends or stands still, at most so much had come and is thrown away: a chunk that was not whole."""
RESET_BYTES = 128 * 1024
"""Of a connection that is reset, at most so much had left: what the proxy's kernel and its library held."""
MAX_STREAMS = 4
"""Of one download at once."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stock(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stock]:
    async with stocked(tmp_path_factory.mktemp("stock")) as stock:
        yield stock


def arrived(fetched: FetchedShard, stock: Stock, proxy: OriginProxy, *, lost_bytes: int = 0) -> None:
    """The shard is here, from the origin, and nothing left it twice but what a broken connection lost."""
    assert fetched.path.read_bytes() == stock.path.read_bytes()
    assert fetched.source == "origin"
    assert proxy.ledger.pieces_sent_twice(stock.key, stock.torrent.piece_length) == []
    assert proxy.ledger.repeated(stock.key) <= lost_bytes


def says(error: ShoalError, stock: Stock, status: int | None = None) -> None:
    """It names the origin, the object, the status, and what was tried, in its details and for a person."""
    assert isinstance(error, OriginError), repr(error)
    assert error.details["origin"] == ONE
    assert error.details["key"] in (stock.key, stock.entry.filename)
    assert error.details["tried"]
    assert ONE in error.message
    if status is not None:
        assert str(error.details["status"]) == str(status)
        assert (str(status) if status != 404 else "has neither") in error.message
    assert stock.s3.secret_key not in f"{error.message} {error.details}"
    assert "X-Amz-" not in f"{error.message} {error.details}"


STORMS = [
    pytest.param([Fault(kind="status", status=503, times=6)], id="503"),
    pytest.param([Fault(kind="status", status=429, retry_after_s=1, times=4)], id="429"),
    pytest.param(
        [Fault(kind="status", status=429, share=0.4), Fault(kind="status", status=503, share=0.4)],
        id="429 and 503",
        marks=pytest.mark.slow,
    ),
    pytest.param([Fault(kind="status", status=500, times=3)], id="500", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("storm", STORMS)
async def test_a_storm_of_refusals_costs_time_and_nothing_else(
    storm: list[Fault], stock: Stock, tmp_path: Path
) -> None:
    async with stock.proxy() as proxy, open_node(tmp_path / "a", stock, proxy) as a:
        for fault in storm:
            proxy.rules.add(fault)
        arrived(await a.shards.fetch(Shard(stock.signed, stock.entry)), stock, proxy)
        assert proxy.rules.applied["status"] >= 2


REFUSALS = [
    pytest.param(Fault(kind="status", status=403), "origin_denied", id="403"),
    pytest.param(Fault(kind="status", status=404), "origin_not_found", id="404", marks=pytest.mark.slow),
    pytest.param(Fault(kind="expired", status=400), "origin_denied", id="expired token", marks=pytest.mark.slow),
    pytest.param(Fault(kind="expired", status=403), "origin_denied", id="expired signature", marks=pytest.mark.slow),
    pytest.param(Fault(kind="status", status=503), "origin_unavailable", id="503 without end", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("fault", "code"), REFUSALS)
async def test_refused_in_the_middle_the_error_says_what_and_the_next_try_goes_on(
    fault: Fault, code: str, stock: Stock, tmp_path: Path
) -> None:
    cut = Fault(kind="truncate", after_bytes=500_001, times=2, key=stock.key)
    patience = {"stall_timeout_s": 3.0}
    async with stock.proxy() as proxy, open_node(tmp_path / "a", stock, proxy, **patience) as a:
        proxy.rules.add(cut)
        proxy.rules.add(msgspec.structs.replace(fault, key=stock.key))
        with pytest.raises(ShoalError) as caught:
            await a.shards.fetch(Shard(stock.signed, stock.entry))
        says(caught.value, stock, fault.status)
        assert caught.value.code == code
        assert proxy.ledger.payload_bytes(stock.key) == 2 * cut.after_bytes
        proxy.rules.clear()
        # What came of the pieces that were cut is gone with the first try.
        lost = 2 * stock.torrent.piece_length
        arrived(await a.shards.fetch(Shard(stock.signed, stock.entry)), stock, proxy, lost_bytes=lost)


async def test_denied_from_the_start_nothing_is_left_behind_and_the_next_origin_gives_it(
    stock: Stock, tmp_path: Path
) -> None:
    async with stock.proxy() as proxy, open_node(tmp_path / "a", stock, proxy, origins=(ONE, TWO)) as a:
        proxy.rules.add(Fault(kind="status", status=403, key="shards/one/"))
        arrived(await a.shards.fetch(Shard(stock.signed, stock.entry)), stock, proxy)
        assert proxy.ledger.payload_bytes("shards/one/") == 0


@pytest.mark.parametrize("kind", [pytest.param("hang", marks=pytest.mark.slow), "stall"])
async def test_an_origin_that_falls_silent_is_asked_again_where_it_stopped(
    kind: str, stock: Stock, tmp_path: Path
) -> None:
    async with stock.proxy() as proxy, open_node(tmp_path / "a", stock, proxy) as a:
        proxy.rules.add(Fault(kind=kind, after_bytes=600_001, times=3, key=stock.key))
        arrived(await a.shards.fetch(Shard(stock.signed, stock.entry)), stock, proxy, lost_bytes=3 * CUT_BYTES)
        assert proxy.rules.applied == {kind: 3}


async def test_bodies_that_end_early_go_on_at_the_byte_where_they_broke(stock: Stock, tmp_path: Path) -> None:
    async with stock.proxy() as proxy, open_node(tmp_path / "a", stock, proxy) as a:
        proxy.rules.add(Fault(kind="truncate", after_bytes=400_001, times=8, key=stock.key))
        arrived(await a.shards.fetch(Shard(stock.signed, stock.entry)), stock, proxy, lost_bytes=8 * CUT_BYTES)
        assert proxy.rules.applied == {"truncate": 8}


async def test_an_ignored_range_is_not_taken_for_the_range(stock: Stock, tmp_path: Path) -> None:
    async with (
        stock.proxy(rate_bytes_s=30e6) as proxy,
        open_node(tmp_path / "a", stock, proxy, stall_timeout_s=4.0) as a,
    ):
        proxy.rules.add(Fault(kind="ignore_range", key=stock.key))
        with pytest.raises(ShoalError) as caught:
            await a.shards.fetch(Shard(stock.signed, stock.entry))
        says(caught.value, stock)
        assert proxy.rules.applied["ignore_range"] > 1
        assert proxy.ledger.payload_bytes(stock.key) < stock.entry.size, "it was noticed late"
        proxy.rules.clear()
        arrived(await a.shards.fetch(Shard(stock.signed, stock.entry)), stock, proxy)


async def test_wrong_bytes_are_refused_and_come_from_another_origin(stock: Stock, tmp_path: Path) -> None:
    async with (
        stock.proxy(rate_bytes_s=12e6) as proxy,
        open_node(tmp_path / "a", stock, proxy, origins=(ONE, TWO)) as a,
    ):
        proxy.rules.add(Fault(kind="wrong_bytes", offset=5_000_000, key="shards/one/shards/"))
        fetched = await a.shards.fetch(Shard(stock.signed, stock.entry))
        wrong = 5_000_000 // stock.torrent.piece_length
        assert set(proxy.ledger.pieces_sent_twice(stock.key, stock.torrent.piece_length)) <= {wrong, wrong + 1}
        assert fetched.path.read_bytes() == stock.path.read_bytes()
        assert proxy.ledger.payload_bytes("shards/two/shards/") > 0


async def test_wrong_bytes_from_the_only_origin_are_an_error_and_the_rest_is_kept(stock: Stock, tmp_path: Path) -> None:
    async with (
        stock.proxy(rate_bytes_s=12e6) as proxy,
        open_node(tmp_path / "a", stock, proxy, stall_timeout_s=4.0) as a,
    ):
        proxy.rules.add(Fault(kind="wrong_bytes", offset=7_000_000, key=stock.key))
        with pytest.raises(ShoalError) as caught:
            await a.shards.fetch(Shard(stock.signed, stock.entry))
        says(caught.value, stock)
        assert caught.value.code == "origin_corrupt"
        assert list(a.shards_dir.rglob("*.part"))
        proxy.rules.clear()
        fetched = await a.shards.fetch(Shard(stock.signed, stock.entry))
        assert fetched.path.read_bytes() == stock.path.read_bytes()
        wrong = 7_000_000 // stock.torrent.piece_length
        assert set(proxy.ledger.pieces_sent_twice(stock.key, stock.torrent.piece_length)) <= {wrong, wrong + 1}


NO_TORRENT = Fault(kind="status", status=404, key="/torrents/")
"""Without its torrent a shard comes whole, and is checked by its content id."""


@pytest.mark.slow
async def test_whole_without_a_torrent_it_goes_on_at_the_byte_where_it_broke(stock: Stock, tmp_path: Path) -> None:
    async with stock.proxy() as proxy, open_node(tmp_path / "a", stock, proxy) as a:
        proxy.rules.add(NO_TORRENT)
        proxy.rules.add(Fault(kind="truncate", after_bytes=1_500_001, times=2, key=stock.key))
        proxy.rules.add(Fault(kind="stall", after_bytes=1_500_001, times=1, key=stock.key))
        proxy.rules.add(Fault(kind="status", status=503, times=2, key=stock.key))
        arrived(await a.shards.fetch(Shard(stock.signed, stock.entry)), stock, proxy, lost_bytes=3 * CUT_BYTES)
        assert proxy.rules.applied["truncate"] + proxy.rules.applied["stall"] == 3
        size = stock.entry.size
        assert proxy.ledger.of(stock.key)[0].asked in (None, (0, None), (0, size))


@pytest.mark.slow
async def test_whole_without_a_torrent_wrong_bytes_are_set_aside(stock: Stock, tmp_path: Path) -> None:
    async with stock.proxy() as proxy, open_node(tmp_path / "a", stock, proxy) as a:
        proxy.rules.add(NO_TORRENT)
        proxy.rules.add(Fault(kind="wrong_bytes", offset=7_000_000, times=1, key=stock.key))
        with pytest.raises(ShoalError) as caught:
            await a.shards.fetch(Shard(stock.signed, stock.entry))
        says(caught.value, stock)
        assert caught.value.code == "origin_corrupt"
        assert not any(file.state in ("seeding", "loaded") for file in a.shards.files())
        proxy.ledger.reset()
        arrived(await a.shards.fetch(Shard(stock.signed, stock.entry)), stock, proxy)


async def gone_for(seconds: float, stock: Stock, tmp_path: Path, **options: float) -> None:
    async with (
        stock.proxy(rate_bytes_s=6e6) as proxy,
        open_node(tmp_path / "a", stock, proxy, **options) as a,
        asyncio.TaskGroup() as tasks,
    ):
        fetch = tasks.create_task(a.shards.fetch(Shard(stock.signed, stock.entry)))
        await payload_reaches(proxy, stock.key, stock.entry.size // 3)
        await proxy.gone()
        await asyncio.sleep(seconds)
        assert not fetch.done()
        await proxy.back()
        arrived(await fetch, stock, proxy, lost_bytes=MAX_STREAMS * RESET_BYTES)


async def test_the_origin_is_gone_for_a_while_in_the_middle(stock: Stock, tmp_path: Path) -> None:
    await gone_for(1.5, stock, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_the_origin_is_gone_for_30_s_in_the_middle(stock: Stock, tmp_path: Path) -> None:
    await gone_for(30.0, stock, tmp_path, stall_timeout_s=60.0)


@pytest.mark.slow
async def test_three_cold_nodes_in_a_storm_take_each_piece_once_together(tmp_path: Path) -> None:
    async with (
        stocked(tmp_path, 16_000_005) as stock,  # of so many blocks, each of the three owns some
        stock.proxy(rate_bytes_s=6e6) as proxy,
        open_node(tmp_path / "a", stock, proxy) as a,
        open_node(tmp_path / "b", stock, proxy, bootstrap=(a,)) as b,
        open_node(tmp_path / "c", stock, proxy, bootstrap=(a,)) as c,
    ):
        proxy.rules.add(Fault(kind="status", status=503, share=0.3))
        proxy.rules.add(Fault(kind="truncate", after_bytes=900_001, share=0.3, key=stock.key))
        fetched = await asyncio.gather(*(node.shards.fetch(Shard(stock.signed, stock.entry)) for node in (a, b, c)))
        for one in fetched:
            assert one.path.read_bytes() == stock.path.read_bytes()
        assert proxy.ledger.pieces_sent_twice(stock.key, stock.torrent.piece_length) == []
        taken = [one.bytes_by_source.get("origin", 0) for one in fetched]
        assert sum(taken) <= proxy.ledger.payload_bytes(stock.key)
        assert max(taken) < stock.entry.size
