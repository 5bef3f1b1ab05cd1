"""The catalog's state machine: only the diagram's transitions occur, each if the caller knew the newest record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from node.files import Fingerprint
from node.shards.store import catalog as catalog_module
from node.shards.store.catalog import TRANSITIONS, Catalog, ShardFile, Transition, torrent_of
from node.shards.store.manifests import LocalManifest
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import Manifest, Shard, ShardEntry, SignedManifest, sign_manifest
from tests.support.shards.parts import KEY

PRINT = Fingerprint(5, 1)


def signed_set(number: int, *origins: str) -> SignedManifest:
    entries = tuple(
        ShardEntry(
            shard_id=i, filename=f"{i}.bin", size=5, content_id=ContentId(f"{(number + i) % 3:064x}"), kind="file"
        )
        for i in range(2)
    )
    return sign_manifest(Manifest(name=f"set-{number}", kind="dataset", shards=entries), KEY, origins)


MANIFESTS = [signed_set(number, *origins) for number in range(3) for origins in ((), ("o3://bucket/prefix",))]
DIGESTS = {signed.digest for signed in MANIFESTS}
FOLDERS = [Path("/shards") / str(number) for number in range(3)]
PATHS = [folder / f"{i}.bin" for folder in FOLDERS for i in range(2)]
SHARDS = [signed.shard(i) for signed in MANIFESTS for i in range(2)]

paths, shards = st.sampled_from(PATHS), st.sampled_from(SHARDS)
prints = st.builds(Fingerprint, st.just(5), st.integers(1, 2))
ages = st.integers(0, 3) | st.just(0)
"""How many records of the same path ago the caller looked; 0 is up to date."""


class CatalogMachine(RuleBasedStateMachine):
    """Callers that are up to date and callers that are not, against a dictionary of files."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()
        self.files: dict[Path, ShardFile] = {}
        self.history: dict[Path, list[ShardFile | None]] = {path: [None] for path in PATHS}
        self.folders: dict[Path, LocalManifest] = {}
        self.was_held: list[LocalManifest | None] = [None]
        self.loaded: dict[ManifestDigest, frozenset[int]] = {}
        self.told = self.news()

    def known(self, path: Path, age: int) -> ShardFile | None:
        return self.history[path][max(-len(self.history[path]), -1 - age)]

    def step(self, transition: Transition, known: ShardFile | None, path: Path, call: Callable[[], object]) -> None:
        """Do a transition; it takes place if `known` is the newest record and the diagram has the arrow."""
        is_newest = known is self.files.get(path)
        after = TRANSITIONS.get((known.state if known else "absent", transition)) if is_newest else None
        result = call()
        assert bool(result) == (after is not None)
        if after == "absent":
            del self.files[path]
            self.history[path].append(None)
        elif after is not None:
            assert isinstance(result, ShardFile)
            assert (result.path, result.state) == (path, after)
            self.files[path] = result
            self.history[path].append(result)

    @rule(path=paths, age=ages, fingerprint=prints, shard=shards | st.none())
    def seen(self, path: Path, age: int, fingerprint: Fingerprint, shard: Shard | None) -> None:
        known = self.known(path, age)
        self.step("seen", known, path, lambda: self.catalog.seen(known, path, "file", fingerprint, shard))

    @rule(path=paths, age=ages, shard=shards)
    def fetch_started(self, path: Path, age: int, shard: Shard) -> None:
        known = self.known(path, age)
        self.step("fetch_started", known, path, lambda: self.catalog.fetch_started(known, path, shard))

    @rule(path=paths, age=ages, shard=shards)
    def admitted(self, path: Path, age: int, shard: Shard) -> None:
        if known := self.known(path, age):
            self.step("admitted", known, path, lambda: self.catalog.admitted(known, shard))

    @rule(path=paths, age=ages)
    def rejected(self, path: Path, age: int) -> None:
        if known := self.known(path, age):
            self.step("rejected", known, path, lambda: self.catalog.rejected(known, "it is wrong", PRINT))

    @rule(path=paths, age=ages, fingerprint=prints)
    def fetch_finished(self, path: Path, age: int, fingerprint: Fingerprint) -> None:
        if known := self.known(path, age):
            self.step("fetch_finished", known, path, lambda: self.catalog.fetch_finished(known, fingerprint))

    @rule(path=paths, age=ages, end=st.sampled_from(["fetch_failed", "evicted", "gone"]))
    def ended(self, path: Path, age: int, end: Transition) -> None:
        if known := self.known(path, age):
            self.step(end, known, path, lambda: getattr(self.catalog, end)(known))

    @rule(folder=st.sampled_from(FOLDERS), signed=st.sampled_from(MANIFESTS), stale=st.booleans())
    def manifest_held(self, folder: Path, signed: SignedManifest, stale: bool) -> None:
        known = self.was_held[-1] if stale else self.folders.get(folder)
        held = LocalManifest(folder, signed, PRINT)
        is_newest = known is self.folders.get(folder)
        assert self.catalog.manifest_held(known, held) == is_newest
        if is_newest:
            self.folders[folder] = held
            self.was_held.append(held)

    @precondition(lambda self: len(self.was_held) > 1)
    @rule(pick=st.integers(0, 5))
    def manifest_released(self, pick: int) -> None:
        held = self.was_held[1 + pick % (len(self.was_held) - 1)]
        assert held is not None
        is_newest = self.folders.get(held.folder) is held
        assert self.catalog.manifest_released(held) == is_newest
        if is_newest:
            del self.folders[held.folder]

    @rule(
        digest=st.sampled_from(sorted(DIGESTS)),
        known=st.frozensets(st.integers(0, 1)) | st.none(),
        now=st.frozensets(st.integers(0, 1)),
    )
    def loaded_changed(self, digest: ManifestDigest, known: frozenset[int] | None, now: frozenset[int]) -> None:
        before = self.loaded.get(digest, frozenset())
        known = before if known is None else known
        changes = known == before and now != before
        assert self.catalog.loaded_changed(digest, known, now) == changes
        if changes:
            self.loaded[digest] = now

    @rule()
    def told_to_others(self) -> None:
        """What changed since the announcer looked last is in the set that it takes."""
        now, unannounced = self.news(), self.catalog.take_unannounced()
        assert {digest for digest in DIGESTS if now[digest] != self.told[digest]} <= unannounced
        assert not self.catalog.has_unannounced()
        self.told = now

    def news(self) -> dict[ManifestDigest, Any]:
        of = self.catalog
        return {digest: (of.on_disk(digest), of.loaded(digest), of.fetching(digest)) for digest in DIGESTS}

    @invariant()
    def the_indexes_agree_with_the_files(self) -> None:
        catalog, files = self.catalog, set(self.files.values())
        assert {file.path: file for file in catalog.files()} == self.files
        for shard in SHARDS:
            mine = {file for file in files if file.shard and file.shard.ref == shard.ref}
            assert set(catalog.of_shard(shard.ref)) == mine
            states = [file.state for file in catalog.of_shard(shard.ref)]
            assert states == sorted(states, key=lambda state: state != "seeding")
            assert (shard.entry.shard_id in catalog.on_disk(shard.digest)) == ("seeding" in states)
            is_fetching = "downloading" in states and "seeding" not in states
            assert (shard.entry.shard_id in catalog.fetching(shard.digest)) == is_fetching
            same = {file for file in files if file.shard and file.shard.entry.content_id == shard.entry.content_id}
            assert set(catalog.of_content(shard.entry.content_id)) == same
            torrent = torrent_of(shard.entry)
            assert set(catalog.of_torrent(torrent)) == {file for file in same if file.torrent == torrent}
        assert catalog.is_idle == all(file.state in ("seeding", "invalid") for file in files)

    @invariant()
    def the_manifests_agree_with_folders_and_files(self) -> None:
        catalog = self.catalog
        assert catalog.folders() == self.folders
        of_files = {file.shard.digest for file in self.files.values() if file.shard}
        in_folders = {held.digest for held in self.folders.values()}
        assert {signed.digest for signed in catalog.manifests()} == of_files | in_folders
        for digest in DIGESTS:
            signed, folder = catalog.manifest(digest), catalog.folder_of(digest)
            assert (signed is not None) == (digest in of_files | in_folders)
            assert (folder is not None) == (digest in in_folders)
            assert folder is None or self.folders[folder].digest == digest
            homes = {file.path.parent for file in self.files.values() if file.shard and file.shard.digest == digest}
            homes |= {path for path, held in self.folders.items() if held.digest == digest}
            if homes == {folder} and folder is not None:
                assert signed == self.folders[folder].signed  # as it is signed there now
            assert catalog.loaded(digest) == self.loaded.get(digest, frozenset())


CatalogMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestCatalogMachine = CatalogMachine.TestCase


def test_the_diagram_is_what_the_catalog_follows() -> None:
    rows = [line.split()[:3] for line in (catalog_module.__doc__ or "").splitlines() if line.startswith("    ")]
    assert {(before, transition): after for before, transition, after in rows[2:]} == TRANSITIONS


async def test_who_waits_for_a_file_is_woken_by_its_changes_alone() -> None:
    catalog, looks = Catalog(), 0

    def is_seeding(file: ShardFile | None) -> bool:
        nonlocal looks
        looks += 1
        return file is not None and file.state == "seeding"

    waiter = asyncio.create_task(catalog.wait_for(PATHS[0], is_seeding))
    await asyncio.sleep(0)
    assert catalog.seen(None, PATHS[1], "file", PRINT)
    await asyncio.sleep(0)
    assert looks == 1
    record = catalog.seen(None, PATHS[0], "file", PRINT)
    await asyncio.sleep(0)
    assert (looks, waiter.done()) == (2, False)
    assert record
    file = catalog.admitted(record, SHARDS[0])
    assert await asyncio.wait_for(waiter, 1) is file
    assert looks == 3


async def test_who_waits_for_a_shard_gets_its_files_when_none_is_hashed() -> None:
    catalog = Catalog()
    records = [catalog.seen(None, path, "file", PRINT, SHARDS[0]) for path in PATHS[:2]]
    waiter = asyncio.create_task(catalog.wait_for_shard(SHARDS[0].ref))
    idle = asyncio.create_task(catalog.wait_idle())
    leaver = asyncio.create_task(catalog.wait_for_shard(SHARDS[0].ref))
    await asyncio.sleep(0)
    leaver.cancel()
    assert records[0]
    assert catalog.rejected(records[0], "it is wrong")
    await asyncio.sleep(0)
    assert not waiter.done()
    assert not idle.done()
    assert records[1]
    good = catalog.admitted(records[1], SHARDS[0])
    assert [file.state for file in await asyncio.wait_for(waiter, 1)] == ["seeding", "invalid"]
    await asyncio.wait_for(idle, 1)
    assert good
    assert catalog.evicted(good)
    assert await catalog.wait_for_shard(SHARDS[0].ref) == catalog.of_shard(SHARDS[0].ref)


async def test_who_tells_others_is_woken_by_news_alone() -> None:
    catalog = Catalog()
    teller = asyncio.create_task(catalog.wait_unannounced())
    assert catalog.seen(None, PATHS[0], "file", PRINT)  # it is not known yet what it is
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not teller.done()
    assert catalog.fetch_started(None, PATHS[1], SHARDS[0])
    await asyncio.wait_for(teller, 1)
    assert catalog.take_unannounced() == {SHARDS[0].digest}
    assert catalog.loaded_changed(SHARDS[0].digest, frozenset(), frozenset({0}))
    await asyncio.wait_for(catalog.wait_unannounced(), 1)
