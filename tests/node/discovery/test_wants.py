"""Who takes pieces of a shard from the origin: short-lived records over real nodes on loopback."""

from __future__ import annotations

import asyncio
import time

from node.discovery import FoundWant
from protocol.ids import ContentId
from protocol.records import wanted_key
from tests.support.discovery.nodes import HOST, kill, opened

CONTENT = ContentId("cd" * 32)
OTHER = ContentId("ef" * 32)


async def test_a_wish_is_found_by_the_others_until_it_is_withdrawn():
    async with opened() as first, opened(first) as second, opened(first) as third:
        await first.announce_want(CONTENT, 7402)
        await second.announce_want(CONTENT, 7502, block_pieces=16)
        assert await third.find_wants(CONTENT) == sorted(
            [FoundWant(first.node_id, HOST, 7402), FoundWant(second.node_id, HOST, 7502, 16)],
            key=lambda want: want.node_id,
        )
        assert await first.find_wants(CONTENT) == [FoundWant(second.node_id, HOST, 7502, 16)]
        assert await third.find_wants(OTHER) == []
        await first.withdraw_want(CONTENT)
        await first.withdraw_want(OTHER)
        assert await third.find_wants(CONTENT) == [FoundWant(second.node_id, HOST, 7502, 16)]
        assert await second.find_wants(CONTENT) == []


async def test_a_wish_is_refreshed_while_its_node_lives_and_is_over_soon_after_it_died():
    async with opened() as first, opened(first) as second:
        await second.announce_want(CONTENT, 7402, ttl_s=3)
        await asyncio.sleep(4.0)
        assert len(await first.find_wants(CONTENT)) == 1
        kill(second)
        died = time.monotonic()
        while await first.find_wants(CONTENT):
            await asyncio.sleep(0.1)
            assert time.monotonic() - died < 6


async def test_a_wish_whose_announcement_was_cancelled_can_be_withdrawn():
    async with opened() as first, opened(first) as second:
        announcing = asyncio.create_task(second.announce_want(CONTENT, 7402))
        await asyncio.sleep(0)
        announcing.cancel()
        await asyncio.wait([announcing])
        await second.withdraw_want(CONTENT)
        key = wanted_key("reef", CONTENT)
        assert [record.withdrawn for record in second._overlay.storage.records(key)] == [True]
        assert await first.find_wants(CONTENT) == []
