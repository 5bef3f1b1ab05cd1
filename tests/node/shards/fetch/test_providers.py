"""Which nodes a fetch asks, how long it looks for them, and what its error says."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from node.discovery.values import ProviderInfo
from node.shards.fetch.providers import Providers, peer_addresses
from node.shards.settings import ShardsSettings
from node.swarm.torrent import PeerAddress
from protocol.errors import NoSourceError, OriginDeniedError, OriginUnavailableError, UnreachableError
from protocol.ids import ContentId, NodeId
from protocol.manifest import Manifest, Shard, ShardEntry, sign_manifest
from protocol.signing import SigningKey
from tests.support.clocks import MovedClock
from tests.support.shards.parts import MemoryDiscovery

OTHER = NodeId("cd" * 32)
ENTRY = ShardEntry(shard_id=0, filename="a.bin", size=9, content_id=ContentId("ab" * 32), kind="file")
SHARD: Shard = sign_manifest(Manifest(name="set", kind="dataset", shards=(ENTRY,)), SigningKey(bytes(32))).shard(0)


def provider(
    bt_port: int, on_disk: Collection[int] = (), fetching: Collection[int] = (), host: str = "127.0.0.1"
) -> ProviderInfo:
    """A node that discovery names."""
    return ProviderInfo(OTHER, host, 1, bt_port, frozenset(on_disk), frozenset(), frozenset(fetching))


class Directory(MemoryDiscovery):
    """Names the providers that the test gives it, or none, if it fails."""

    found: Sequence[ProviderInfo] = ()
    fails = False

    async def find_providers(self, digest: str) -> list[ProviderInfo]:
        if self.fails:
            raise UnreachableError("no node answers")
        return list(self.found)


def providers(directory: Directory, clock: MovedClock) -> Providers:
    settings = ShardsSettings(Path("/shards"), Path("/data"), find_timeout_s=30.0, origin_after_s=1.0)
    return Providers(settings, directory, SHARD, clock)


HAS, FETCHES, LACKS = provider(1, on_disk=[0]), provider(2, fetching=[0]), provider(3)


async def test_those_that_have_or_fetch_the_shard_are_peers_and_only_the_first_count_as_complete() -> None:
    directory, clock = Directory(), MovedClock()
    found = providers(directory, clock)
    directory.found = [FETCHES, LACKS]
    assert await found.look_up() == [PeerAddress("127.0.0.1", 2)]
    assert not found.any_complete
    directory.found = [HAS, FETCHES, LACKS]
    assert await found.look_up() == [PeerAddress("127.0.0.1", 1), PeerAddress("127.0.0.1", 2)]
    assert found.any_complete
    directory.fails = True
    assert await found.look_up() == []
    assert not found.any_complete


async def test_without_an_origin_the_search_goes_on_and_its_error_says_what_was_tried() -> None:
    directory, clock = Directory(), MovedClock()
    directory.found = [LACKS, FETCHES]
    found = providers(directory, clock)
    looking = asyncio.create_task(found.first(has_origin=False))
    await clock.move(29.0)
    assert not looking.done(), "a node that only fetches the shard is not a source"
    await clock.move(2.0)
    with pytest.raises(NoSourceError, match=r"a\.bin.*no peer had it within 30 s.*127\.0\.0\.1:3 \(lacks it\)"):
        await looking


async def test_with_an_origin_the_search_is_short_and_those_that_fetch_are_peers() -> None:
    directory, clock = Directory(), MovedClock()
    directory.found = [FETCHES]
    looking = asyncio.create_task(providers(directory, clock).first(has_origin=True))
    await clock.move(0.9)
    assert not looking.done()
    await clock.move(0.2)
    assert await looking == [PeerAddress("127.0.0.1", 2)]


async def test_the_error_is_that_of_the_best_origin_that_may_work_later() -> None:
    found = providers(Directory(), MovedClock())
    denied = OriginDeniedError("denied", {"origin": "o3://a", "status": "403"})
    busy = OriginUnavailableError("busy", {"origin": "o3://b", "status": "503"})
    error = found.no_source_or_origin("0 of 9 bytes came", {"o3://a": denied, "o3://b": busy})
    assert isinstance(error, OriginUnavailableError)
    assert error.details["origin"] == "o3://b"
    assert "denied; busy" in error.message
    assert isinstance(found.no_source_or_origin("0 of 9 bytes came", {}), NoSourceError)


async def test_a_host_name_is_resolved_and_one_that_does_not_resolve_is_left_out() -> None:
    assert PeerAddress("127.0.0.1", 5) in await peer_addresses(provider(5, host="localhost"))
    assert await peer_addresses(provider(5, host="a..b")) == []
