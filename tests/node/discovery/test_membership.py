"""Joining, staying and joining again, over real nodes on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket

import pytest

from node.discovery import Discovery, DiscoverySettings
from protocol.signing import SigningKey
from tests.support.discovery.nodes import HOST, a_manifest, announce, kill, opened
from tests.support.ports import free_port
from tests.support.waiting import eventually


async def test_a_bootstrap_node_that_comes_up_later_is_joined_and_gets_the_records(caplog):
    port = free_port(socket.SOCK_DGRAM)
    with caplog.at_level(logging.WARNING):
        async with opened((HOST, port), retry_s=0.05) as early:
            signed = a_manifest()
            await announce(early, signed, 0)
            assert early.stats().nodes == 0
            await eventually(lambda: caplog.records)
            async with opened(port=port) as late:
                await eventually(lambda: early.stats().nodes == 1)
                await eventually(lambda: late.stats().records == 3)
                assert [p.node_id for p in await late.find_providers(signed.digest)] == [early.node_id]
    assert [record.message for record in caplog.records] == [
        f"no DHT node answers at {HOST}:{port}; trying again in the background"
    ]


async def test_one_of_several_bootstrap_nodes_is_enough_and_names_are_resolved():
    async with opened() as first:
        dead = (HOST, free_port(socket.SOCK_DGRAM))
        unknown = ("no-such-host.invalid", 7401)
        async with opened(dead, unknown, ("localhost", first.port)) as second:
            assert second.stats().nodes == 1


async def test_a_node_whose_peers_all_died_goes_on_alone_and_joins_again():
    port = free_port(socket.SOCK_DGRAM)
    async with opened(port=port) as first, opened(first) as second:
        signed = a_manifest()
        await announce(second, signed, 0)
        kill(first)
        another = a_manifest("another")
        await announce(second, another, 0)  # the stock `set` raises ValueError here
        assert second.stats().nodes == 0
        assert [found.name for found in await second.list_names()] == ["another", "corpus"]
        async with opened(port=port) as reborn:
            await eventually(lambda: second.stats().nodes == 1)
            await eventually(lambda: reborn.stats().records == 6)
            assert [p.node_id for p in await reborn.find_providers(another.digest)] == [second.node_id]


async def test_a_node_that_lists_itself_as_bootstrap_is_simply_alone():
    port = free_port(socket.SOCK_DGRAM)
    async with opened((HOST, port), port=port) as node:
        await announce(node, a_manifest(), 0)
        assert node.stats().nodes == 0
        assert len(await node.list_names()) == 1


async def test_groups_of_different_bootstrap_nodes_become_one():
    port = free_port(socket.SOCK_DGRAM)
    often = {"upkeep_s": 0.2}
    async with opened(**often) as left, opened(left, (HOST, port), **often) as between:
        signed = a_manifest()
        await announce(left, signed, 0)
        async with opened(
            port=port, upkeep_s=0.2
        ) as right:  # knows no node; `between` has a contact, and still looks for it
            await eventually(lambda: right.stats().nodes == 2)
            await eventually(lambda: between.stats().nodes == 2)
            assert len(await right.find_providers(signed.digest)) == 1


async def test_a_contact_id_follows_from_the_public_key():
    key = SigningKey.generate()
    async with opened(key=key) as one, opened(one) as two:
        (contact,) = two._protocol.router.contacts()

        assert contact.id == hashlib.sha1(bytes.fromhex(key.node_id)).digest()


async def test_an_address_that_is_taken_is_an_error():
    async with opened() as node:
        with pytest.raises(OSError):
            async with opened(port=node.port):
                pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"cluster": ""},
        {"record_ttl_s": 0},
        {"record_ttl_s": 4_000},
        {"rpc_timeout_s": 0.0},
        {"port": 70_000},
        {"bootstrap": (("seed.example", 0),)},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError):
        DiscoverySettings(**{"cluster": "reef", "advertise_host": HOST} | wrong)


async def test_opening_cleans_up_where_it_is_cancelled_while_joining():

    async def open_it():
        async with Discovery.open(
            DiscoverySettings(
                cluster="reef", advertise_host=HOST, bootstrap=((HOST, free_port(socket.SOCK_DGRAM)),), rpc_timeout_s=10
            ),
            SigningKey.generate(),
        ):
            raise AssertionError("there is no node to join")

    task = asyncio.create_task(open_it())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
