"""The catalog answers every question as if it looked through all files, whatever happened to them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from node.shards.store.catalog import Catalog, HeldFolder, ShardFile, torrent_of
from node.shards.store.listing import Fingerprint
from node.shards.store.manifests import Holding
from protocol.ids import ContentId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from tests.support.shards.parts import KEY

PRINT = Fingerprint(1, 1)


def holding(number: int) -> Holding:
    entries = tuple(
        ShardEntry(
            shard_id=i, filename=f"{i}.bin", size=5, content_id=ContentId(f"{(number + i) % 3:064x}"), kind="file"
        )
        for i in range(2)
    )
    return Holding(sign_manifest(Manifest(name=f"set-{number}", kind="dataset", shards=entries), KEY))


HOLDINGS = [holding(number) for number in range(3)]
FOLDERS = [Path("/shards") / str(number) for number in range(3)]
PATHS = [folder / f"{i}.bin" for folder in FOLDERS for i in range(2)]
FILES = st.builds(
    lambda path, state, holding, shard_id: ShardFile(
        path, state, "file", PRINT, holding, holding.manifest.shards[shard_id] if holding else None
    ),
    st.sampled_from(PATHS),
    st.sampled_from(["hashing", "seeding", "downloading", "invalid"]),
    st.sampled_from([*HOLDINGS, None]),
    st.integers(0, 1),
)
STEPS = st.one_of(
    st.tuples(st.just("put"), FILES),
    st.tuples(st.just("forget"), st.sampled_from(PATHS)),
    st.tuples(st.just("hold"), st.tuples(st.sampled_from(FOLDERS), st.sampled_from(HOLDINGS))),
    st.tuples(st.just("release"), st.sampled_from(FOLDERS)),
    st.tuples(st.just("load"), st.tuples(st.sampled_from(HOLDINGS), st.frozensets(st.integers(0, 1)))),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_every_index_agrees_with_the_files(steps: list[tuple[str, object]]) -> None:
    catalog = Catalog()
    files: dict[Path, ShardFile] = {}
    folders: dict[Path, Holding] = {}
    for step in steps:
        told = {one.digest: (catalog.on_disk(one.digest), catalog.loaded(one.digest)) for one in HOLDINGS}
        catalog.take_untold()
        match step:
            case ("put", ShardFile() as file):
                catalog.put(file)
                files[file.path] = file
            case ("forget", Path() as path):
                catalog.forget(path)
                files.pop(path, None)
            case ("hold", (Path() as folder, Holding() as held)):
                catalog.hold_folder(folder, HeldFolder(held, PRINT))
                folders[folder] = held
            case ("release", Path() as folder):
                catalog.release_folder(folder)
                folders.pop(folder, None)
            case ("load", (Holding() as held, frozenset() as ids)):
                catalog.set_loaded(held.digest, ids)
        held_now = {file.holding.digest for file in files.values() if file.holding}
        held_now |= {one.digest for one in folders.values()}
        assert {one.digest for one in catalog.holdings()} == held_now
        assert {file.path: file for file in catalog.files()} == files
        untold = catalog.take_untold()
        for one in HOLDINGS:
            digest = one.digest
            assert (catalog.holding(digest) is not None) == (digest in held_now)
            folder = catalog.folder_of(digest)
            assert folder is None or folders[folder].digest == digest
            assert (folder is None) == (digest not in {held.digest for held in folders.values()})
            for entry in one.manifest.shards:
                mine = {f for f in files.values() if f.holding and f.holding.digest == digest and f.entry == entry}
                assert set(catalog.of_shard(digest, entry.shard_id)) == mine
                assert (entry.shard_id in catalog.on_disk(digest)) == any(f.state == "seeding" for f in mine)
                same = {f for f in files.values() if f.entry and f.entry.content_id == entry.content_id}
                assert set(catalog.of_content(entry.content_id)) == same
                assert set(catalog.of_torrent(torrent_of(entry))) == {
                    f for f in same if f.entry == entry or (f.entry and f.entry.filename == entry.filename)
                }
            if told[digest] != (catalog.on_disk(digest), catalog.loaded(digest)):
                assert digest in untold


async def test_who_waits_sees_every_change() -> None:
    catalog = Catalog()
    file = ShardFile(PATHS[0], "seeding", "file", PRINT, HOLDINGS[0], HOLDINGS[0].manifest.shards[0])
    waiter = asyncio.create_task(catalog.wait_until(lambda: catalog.get(file.path) is file))
    await asyncio.sleep(0)
    catalog.put(ShardFile(PATHS[0], "hashing", "file", PRINT))
    await asyncio.sleep(0)
    assert not waiter.done()
    catalog.put(file)
    await asyncio.wait_for(waiter, 1)
