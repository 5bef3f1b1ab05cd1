"""Peers that die in the middle: real daemons, killed; the origin gives what is missing, and nothing twice."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from tests.support.origins.faults import Ledger
from tests.support.origins.lab import ONE, Daemon, Stock, daemon, stocked
from tests.support.waiting import wait_until

SIZE = 16_000_005


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stock(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stock]:
    async with stocked(tmp_path_factory.mktemp("stock"), SIZE) as stock:
        yield stock


def start_seed(stack: ExitStack, home: Path, stock: Stock, rate: str, bootstrap: Daemon | None) -> Daemon:
    """A daemon that has the shard and knows of no origin."""
    folder = home / "shards" / "lab"
    folder.mkdir(parents=True)
    shutil.copyfile(stock.path, folder / "shard.bin")
    (folder / "manifest.json").write_bytes(msgspec.json.encode(stock.signed))
    seed = stack.enter_context(daemon(home, "--upload-limit", rate, bootstrap=bootstrap))
    wait_until(lambda: [file["state"] for file in seed.files().values()] == ["seeding"])
    return seed


@dataclass(frozen=True)
class Outcome:
    """A fetch whose peers died at half of it."""

    answer: dict[str, Any]
    had: int
    """Bytes that the node had when they did."""
    origin_before: int
    """Bytes that had left the origin by then."""
    origin_bytes: int
    """All that left it."""


async def fetch_while_peers_die(stock: Stock, tmp_path: Path, *, seeds: int, rate: str, number: int) -> Outcome:
    """FETCH_SHARD from a node with an origin; at half of it every seed gets a signal, at once."""
    with ExitStack() as stack:
        running: list[Daemon] = []
        for index in range(seeds):
            first = running[0] if running else None
            running.append(await asyncio.to_thread(start_seed, stack, tmp_path / f"{index}", stock, rate, first))
        async with stock.proxy() as proxy:
            flags = ("--origin", ONE, "--s3-endpoint", proxy.endpoint)
            node = await asyncio.to_thread(
                stack.enter_context, daemon(tmp_path / "n", *flags, bootstrap=running[0], **stock.environment())
            )
            selector = {"dataset": "lab", "shard_id": 0}
            await asyncio.to_thread(node.call, "GET_MANIFEST", {"dataset": "lab"})  # it has met the others
            fetch = asyncio.create_task(asyncio.to_thread(node.call, "FETCH_SHARD", selector))
            try:
                had = 0
                async with asyncio.timeout(30):
                    while had < SIZE // 2:
                        assert not fetch.done(), fetch.result()
                        downloads = (await asyncio.to_thread(node.call, "STATUS"))["downloads"]
                        had = downloads[0]["bytes_done"] if downloads else 0
                        await asyncio.sleep(0.05)
                for seed in running:
                    seed.process.send_signal(number)
                before = proxy.ledger.payload_bytes(stock.key)
                answer = await fetch
            finally:
                for seed in running:
                    seed.process.kill()  # one that was stopped would not hear of its end
                await asyncio.gather(fetch, return_exceptions=True)
            assert Path(answer["path"]).read_bytes() == stock.path.read_bytes()
            assert proxy.ledger.pieces_sent_twice(stock.key, stock.torrent.piece_length) == []
            assert proxy.ledger.repeated(stock.key) == 0
            return Outcome(answer, had, before, proxy.ledger.payload_bytes(stock.key))


def rest_came_from_the_origin(outcome: Outcome) -> None:
    assert outcome.origin_before == 0, "the peers were there, and fast enough"
    assert 0 < outcome.origin_bytes <= SIZE - outcome.had
    assert outcome.answer["bytes_by_source"]["origin"] == outcome.origin_bytes
    assert outcome.answer["bytes_by_source"]["peers"] >= outcome.had


@pytest.mark.slow
async def test_the_only_peer_is_killed_in_the_middle(stock: Stock, tmp_path: Path) -> None:
    rest_came_from_the_origin(await fetch_while_peers_die(stock, tmp_path, seeds=1, rate="5MB", number=signal.SIGKILL))


@pytest.mark.slow
async def test_all_peers_are_killed_at_half(stock: Stock, tmp_path: Path) -> None:
    rest_came_from_the_origin(await fetch_while_peers_die(stock, tmp_path, seeds=3, rate="2MB", number=signal.SIGKILL))


@pytest.mark.slow
async def test_the_only_peer_stands_still_in_the_middle(stock: Stock, tmp_path: Path) -> None:
    rest_came_from_the_origin(await fetch_while_peers_die(stock, tmp_path, seeds=1, rate="5MB", number=signal.SIGSTOP))


@pytest.mark.slow
async def test_one_of_two_that_share_the_origin_is_killed_and_the_other_takes_its_part(
    stock: Stock, tmp_path: Path
) -> None:
    selector = {"dataset": "lab", "shard_id": 0}
    # A way to the same origin for each, so that it is known which of them got what.
    async with stock.proxy(rate_bytes_s=1.5e6) as mine, stock.proxy(rate_bytes_s=1.5e6) as victims:
        with ExitStack() as stack:
            nodes: list[Daemon] = []
            for name, proxy in (("a", mine), ("b", victims)):
                first = nodes[0] if nodes else None
                flags = ("--origin", ONE, "--s3-endpoint", proxy.endpoint)
                start = daemon(tmp_path / name, *flags, bootstrap=first, **stock.environment())
                nodes.append(await asyncio.to_thread(stack.enter_context, start))
            victim = nodes[1]
            for node in nodes:  # or one of them begins later by the start of its client, and finds the other at work
                await asyncio.to_thread(node.call, "GET_MANIFEST", {"dataset": "lab"})
            fetches = [asyncio.create_task(asyncio.to_thread(node.call, "FETCH_SHARD", selector)) for node in nodes]
            try:
                async with asyncio.timeout(20):
                    while sum(one.ledger.payload_bytes(stock.key) for one in (mine, victims)) < SIZE // 2:  # noqa: ASYNC110 - on sockets
                        await asyncio.sleep(0.02)
                victim.process.kill()
                both = Ledger()
                both.sent = [*mine.ledger.of(stock.key), *victims.ledger.of(stock.key)]
                repeated = both.repeated(stock.key)
                answer = await fetches[0]
            finally:
                victim.process.kill()
                await asyncio.gather(*fetches, return_exceptions=True)
        assert Path(answer["path"]).read_bytes() == stock.path.read_bytes()
    own, dead = mine.ledger.payload_bytes(stock.key), victims.ledger.payload_bytes(stock.key)
    peers = answer["bytes_by_source"]["peers"]
    assert dead > 0, "both took a part"
    assert repeated == 0, "each its own, while both lived"
    assert peers >= dead // 2, "most of what the dead one took was passed on while it lived"
    # What the dead one had and nobody else yet comes again, and no more.
    assert own <= SIZE - peers
