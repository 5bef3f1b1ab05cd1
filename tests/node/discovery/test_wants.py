"""Who takes pieces of a shard from the origin: short-lived records over real nodes on loopback."""

from __future__ import annotations

import asyncio

from node.discovery import WantInfo
from protocol.ids import ContentId
from protocol.records import wanted_key
from tests.support.clocks import MovedClock
from tests.support.discovery.nodes import HOST, kill, opened, pass_time

CONTENT = ContentId("cd" * 32)
OTHER = ContentId("ef" * 32)


async def test_a_wish_is_found_by_the_others_until_it_is_withdrawn():
    async with opened() as first, opened(first) as second, opened(first) as third:
        await first.announce_want(CONTENT, 7402)
        await second.announce_want(CONTENT, 7502, block_pieces=16)
        assert await third.find_wants(CONTENT) == sorted(
            [WantInfo(first.node_id, HOST, 7402), WantInfo(second.node_id, HOST, 7502, 16)],
            key=lambda want: want.node_id,
        )
        assert await first.find_wants(CONTENT) == [WantInfo(second.node_id, HOST, 7502, 16)]
        assert await third.find_wants(OTHER) == []
        await first.withdraw_want(CONTENT)
        await first.withdraw_want(OTHER)
        assert await third.find_wants(CONTENT) == [WantInfo(second.node_id, HOST, 7502, 16)]
        assert await second.find_wants(CONTENT) == []


async def test_a_wish_is_refreshed_while_its_node_lives_and_is_over_soon_after_it_died():
    clock = MovedClock()
    times = {"clock": clock, "wall_clock": clock.wall}
    async with opened(**times) as first, opened(first, **times) as second:
        await second.announce_want(CONTENT, 7402, ttl_s=3)
        await pass_time(clock, 4.0, second)
        assert len(await first.find_wants(CONTENT)) == 1
        kill(second)
        died = clock.now()
        while await first.find_wants(CONTENT):
            await clock.move(0.1)
            assert clock.now() - died < 6


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
