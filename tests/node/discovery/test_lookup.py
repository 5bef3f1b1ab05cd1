"""Lookups over real nodes on loopback: what is announced is found, by whom it should be, for as long as it should."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import pytest

from node.discovery import DhtStats, DiscoverySettings, FoundNode, NameInfo, ProviderInfo
from protocol.errors import UnknownNameError
from protocol.signing import SigningKey
from tests.support.clocks import MovedClock
from tests.support.discovery.nodes import HOST, a_manifest, announce, kill, node_info, opened, pass_time
from tests.support.waiting import eventually


async def test_a_node_alone_finds_its_own_names_and_node_but_is_not_its_own_provider():
    async with opened() as node:
        signed = a_manifest()
        await announce(node, signed, 0, 2)
        await node.announce_node(node_info(node))
        named = NameInfo("corpus", "dataset", signed.digest, (node.node_id,))
        assert await node.find_name("corpus") == [named]
        assert await node.list_names() == [named]
        assert await node.list_nodes() == [FoundNode(node.node_id, node_info(node))]
        assert await node.find_providers(signed.digest) == []
        assert node.stats() == DhtStats(nodes=0, records=4)


async def test_a_joiner_finds_at_once_what_a_lone_node_announced_before():
    async with opened() as first:
        signed = a_manifest(shards=9)
        await announce(first, signed, 0, 8, loaded=(8,))
        async with opened(first) as second:
            assert await second.find_providers(signed.digest) == [
                ProviderInfo(first.node_id, HOST, 7400, 7402, frozenset({0, 8}), frozenset({8}))
            ]
            assert [found.digest for found in await second.find_name("corpus")] == [signed.digest]


async def test_records_are_pushed_to_a_joiner_and_outlive_the_first_node():
    async with opened() as first:
        signed = a_manifest()
        await announce(first, signed, 1)
        async with opened(first) as second:
            await eventually(lambda: second.stats().records == 3)
            kill(first)
            (provider,) = await second.find_providers(signed.digest)
            assert provider.node_id == first.node_id


async def test_twenty_nodes_find_every_provider_before_and_after_ten_were_killed():
    async with AsyncExitStack() as stack:
        default_s = DiscoverySettings("reef", HOST).rpc_timeout_s
        nodes = [await stack.enter_async_context(opened(rpc_timeout_s=default_s))]
        nodes += [await stack.enter_async_context(opened(nodes[0], rpc_timeout_s=default_s)) for _ in range(19)]
        signed = a_manifest()
        providers = nodes[4:16]
        for place, node in enumerate(providers):
            await announce(node, signed, place % 3)

        async def find_all(node):
            async with asyncio.timeout(3):  # the issue's own bound, for each lookup
                found = await node.find_providers(signed.digest)
            assert {provider.node_id for provider in found} == {p.node_id for p in providers} - {node.node_id}
            assert [name.digest for name in await node.find_name("corpus")] == [signed.digest]

        await asyncio.gather(*map(find_all, nodes))
        for node in nodes[:10]:
            kill(node)
        for node in nodes[10:]:  # one after the other: all at once would be this process's pace
            await find_all(node)
        # And it goes on: who is left takes new records.
        other = a_manifest("later")
        await announce(nodes[10], other, 0)
        assert [p.node_id for p in await nodes[19].find_providers(other.digest)] == [nodes[10].node_id]


async def test_clusters_in_one_dht_do_not_see_each_other():
    async with opened(cluster="reef") as ours, opened(ours, cluster="kelp") as theirs, opened(theirs) as third:
        signed = a_manifest()
        await announce(ours, signed, 0)
        await ours.announce_node(node_info(ours))
        assert await theirs.find_providers(signed.digest) == []
        assert await theirs.find_name("corpus") == []
        assert await theirs.list_names() == []
        assert await theirs.list_nodes() == []
        # It is one DHT all the same: the third node is of the first's cluster and joined through the second.
        assert [p.node_id for p in await third.find_providers(signed.digest)] == [ours.node_id]


async def test_two_publishers_of_one_name_with_different_content_are_both_found():
    async with opened() as one, opened(one) as two, opened(one) as three:
        first, second = a_manifest(salt="a"), a_manifest(salt="b")
        await announce(one, first, 0)
        await announce(two, first, 0)
        await announce(three, second, 0)
        found = {name.digest: name.publishers for name in await two.find_name("corpus")}
        assert found == {
            first.digest: tuple(sorted([one.node_id, two.node_id])),
            second.digest: (three.node_id,),
        }


async def test_a_loose_file_is_found_by_its_file_name_and_not_listed():
    async with opened() as one, opened(one) as two:
        signed = a_manifest("weights.gguf", shards=1, kind="file")
        await announce(one, signed, 0)
        assert [(f.name, f.kind) for f in await two.find_name("weights.gguf")] == [("weights.gguf", "file")]
        assert await two.list_names() == []


async def test_the_latest_announcement_replaces_the_one_before_also_within_a_millisecond():
    now = time.time()
    async with opened(wall_clock=lambda: now) as one, opened(one) as two:
        signed = a_manifest()
        for shards in ((0,), (0, 1), (2,)):
            await announce(one, signed, *shards)
            (provider,) = await two.find_providers(signed.digest)
            assert provider.on_disk == frozenset(shards)


async def test_announcements_that_overlap_end_with_the_last():
    async with opened() as one, opened(one) as two:
        signed = a_manifest(shards=30)
        await asyncio.gather(*(announce(one, signed, *range(count)) for count in range(1, 31)))
        (provider,) = await two.find_providers(signed.digest)
        assert provider.on_disk == frozenset(range(30))


async def test_records_expire_unless_their_node_refreshes_them():
    clock = MovedClock()
    times = {"clock": clock, "wall_clock": clock.wall}
    async with opened(**times) as keeper, opened(keeper, record_ttl_s=2, **times) as alive:
        signed = a_manifest()
        async with opened(keeper, record_ttl_s=2, **times) as dying:
            await announce(alive, signed, 0)
            await announce(dying, signed, 1)
            assert len(await keeper.find_providers(signed.digest)) == 2
            kill(dying)
            await pass_time(clock, 3, alive)
            assert [p.node_id for p in await keeper.find_providers(signed.digest)] == [alive.node_id]


async def test_what_is_withdrawn_or_left_behind_cleanly_is_not_found():
    async with opened() as keeper:
        async with opened(keeper) as leaving:
            kept, evicted = a_manifest("kept"), a_manifest("evicted")
            await announce(leaving, kept, 0)
            await announce(leaving, evicted, 0)
            await leaving.announce_node(node_info(leaving))
            await leaving.withdraw_shards(evicted.digest)
            assert await keeper.find_providers(evicted.digest) == []
            assert await leaving.find_name("evicted") == []
            assert [found.name for found in await keeper.list_names()] == ["kept"]
            await announce(leaving, evicted, 1)
            assert len(await keeper.find_providers(evicted.digest)) == 1
        assert await keeper.find_providers(kept.digest) == []
        assert await keeper.find_providers(evicted.digest) == []
        assert await keeper.list_names() == []
        assert await keeper.list_nodes() == []
        assert keeper.stats().records == 0


async def test_a_withdrawal_goes_to_holders_that_are_no_contacts_any_more():
    async with opened() as keeper:
        async with opened(keeper) as leaving:
            signed = a_manifest()
            await announce(leaving, signed, 0)
            assert len(await keeper.find_providers(signed.digest)) == 1
            leaving._protocol.router.flush()
        assert await keeper.find_providers(signed.digest) == []


async def test_leaving_takes_no_long_time_when_everybody_else_is_dead():
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(opened())
        async with opened(first, withdraw_timeout_s=0.5) as last:
            for count in range(40):
                await announce(last, a_manifest(f"set-{count}"), 0)
            kill(first)
            began = time.monotonic()
        assert time.monotonic() - began < 8  # it is 0.5 s; without a bound it would be minutes of timeouts


async def test_a_node_says_of_itself_the_latest_that_it_was_given():
    async with opened() as one, opened(one) as two:
        await one.announce_node(node_info(one, cores=4))
        await one.announce_node(node_info(one, cores=8))
        await two.announce_node(node_info(two, cores=2))
        found = {node.node_id: node.info.cores for node in await two.list_nodes()}
        assert found == {one.node_id: 8, two.node_id: 2}


async def test_a_manifest_of_very_many_shards_is_announced_as_far_as_it_fits():
    async with opened() as one, opened(one) as two:
        signed = a_manifest(shards=20_000)
        await announce(one, signed, *range(20_000))
        (provider,) = await two.find_providers(signed.digest)
        assert len(provider.on_disk) > 14_000
        assert provider.on_disk == frozenset(range(len(provider.on_disk)))


async def test_the_users_own_exception_comes_out_as_it_is_and_records_are_withdrawn():
    async with opened() as keeper:
        signed = a_manifest()

        async def fail():
            async with opened(keeper) as node:
                await announce(node, signed, 0)
                raise UnknownNameError("none of that name")

        with pytest.raises(UnknownNameError):
            await fail()
        assert await keeper.find_providers(signed.digest) == []


async def test_a_cancelled_node_withdraws_too():
    async with opened() as keeper:
        signed = a_manifest()
        ready = asyncio.Event()

        async def serve():
            async with opened(keeper) as node:
                await announce(node, signed, 0)
                ready.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(serve())
        await ready.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await keeper.find_providers(signed.digest) == []


async def test_a_restarted_node_with_the_same_key_takes_its_place_again():
    key = SigningKey.generate()
    async with opened() as keeper:
        signed = a_manifest()
        async with opened(keeper, key=key) as before:
            await announce(before, signed, 0)
            kill(before)
        async with opened(keeper, key=key) as after:
            await announce(after, signed, 1)
            (provider,) = await keeper.find_providers(signed.digest)
            assert provider.on_disk == frozenset({1})
            other = a_manifest("other")
            await announce(keeper, other, 0)
            await eventually(lambda: after.stats().records >= 6)
