"""What is announced, when, and again if it failed: on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from node.files import Fingerprint
from node.shards.store.announcer import GATHER_S, RETRY_S, Announcer
from node.shards.store.catalog import Catalog
from protocol.errors import UnreachableError
from protocol.ids import ContentId
from protocol.manifest import Manifest, Shard, ShardEntry, sign_manifest
from tests.support.clocks import MovedClock
from tests.support.shards.parts import KEY, MemoryDiscovery


def shard_of(name: str) -> Shard:
    entry = ShardEntry(shard_id=0, filename="0.bin", size=5, content_id=ContentId("ab" * 32), kind="file")
    return sign_manifest(Manifest(name=name, kind="dataset", shards=(entry,)), KEY).shard(0)


def admit(catalog: Catalog, shard: Shard) -> None:
    path = Path("/shards") / shard.manifest.name / "0.bin"
    record = catalog.seen(None, path, "file", Fingerprint(5, 1), shard)
    assert record
    assert catalog.admitted(record, shard)


class Unreachable(MemoryDiscovery):
    """Fails as often as the test says."""

    failures = 0

    async def announce_shards(self, *args: Any, **options: Any) -> None:
        if self.failures:
            self.failures -= 1
            raise UnreachableError("the DHT has no node")
        await super().announce_shards(*args, **options)


@asynccontextmanager
async def announcing(catalog: Catalog, directory: MemoryDiscovery) -> AsyncIterator[tuple[Announcer, MovedClock]]:
    clock = MovedClock()
    announcer = Announcer(catalog, directory, 7400, 7402, clock)
    task = asyncio.ensure_future(announcer.run())
    try:
        yield announcer, clock
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_what_failed_is_announced_again_when_its_time_has_come_and_not_before() -> None:
    catalog, directory = Catalog(), Unreachable()
    directory.failures = 2
    first, second = shard_of("first"), shard_of("second")
    async with announcing(catalog, directory) as (announcer, clock):
        admit(catalog, first)
        assert not announcer.is_idle
        await clock.move(2 * GATHER_S)
        assert announcer.is_idle  # it was tried
        assert directory.announced == {}
        # A change of another manifest in between is announced at once, and does not delay the other.
        await clock.move(RETRY_S / 2)
        directory.failures = 0
        admit(catalog, second)
        await clock.move(2 * GATHER_S)
        assert set(directory.announced) == {second.digest}
        await clock.move(RETRY_S / 2 - 5 * GATHER_S)
        assert set(directory.announced) == {second.digest}
        await clock.move(5 * GATHER_S)
        await asyncio.wait_for(announcer.wait_idle(), 1)
        assert set(directory.announced) == {first.digest, second.digest}
        assert directory.announcements == 2


async def test_changes_at_one_time_are_one_announcement_and_what_is_gone_is_withdrawn() -> None:
    catalog, directory, shard = Catalog(), MemoryDiscovery(), shard_of("set")
    async with announcing(catalog, directory) as (announcer, clock):
        admit(catalog, shard)
        assert catalog.loaded_changed(shard.digest, frozenset(), frozenset({0}))
        await clock.move(2 * GATHER_S)
        assert directory.announced == {shard.digest: (frozenset({0}), frozenset({0}))}
        assert directory.announcements == 1
        (file,) = catalog.of_shard(shard.ref)
        assert catalog.evicted(file)
        await clock.move(2 * GATHER_S)
        await asyncio.wait_for(announcer.wait_idle(), 1)
        assert (directory.announced, directory.announcements) == ({}, 1)
