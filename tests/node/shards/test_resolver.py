"""What a name or a selector means: here first, then in the cluster, and never a guess."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.commands.common import ShardSelector
from protocol.errors import (
    AmbiguousNameError,
    InvalidParamsError,
    NoSourceError,
    ShardNotFoundError,
    UnknownNameError,
)
from protocol.manifest import Manifest, split_name
from tests.support.shards.parts import MemoryDiscovery, Room, age, manifest_of, open_room, write_shard, write_unsigned


@pytest.fixture
def here(tmp_path: Path) -> Manifest:
    """A model of two shards on this node."""
    folder = tmp_path / "shards" / "tiny"
    for shard_id in range(2):
        write_shard(folder / f"shard-{shard_id}.gguf", 10 + shard_id)
    manifest = manifest_of(folder, "shard-0.gguf", "shard-1.gguf", kind="model")
    write_unsigned(folder, manifest)
    return manifest


@pytest.fixture
async def room(tmp_path: Path, here: Manifest) -> AsyncIterator[Room]:
    write_shard(tmp_path / "shards" / "loose.gguf")
    age(tmp_path / "shards")
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        yield room


def elsewhere(tmp_path: Path, discovery: MemoryDiscovery, name: str, rows: int, kind: str = "model") -> Manifest:
    """A manifest that another node announces."""
    folder = tmp_path / f"elsewhere-{name.replace('/', '-')}-{rows}"
    write_shard(folder / "shard-0.gguf", rows)
    manifest = manifest_of(folder, "shard-0.gguf", name=name, kind=kind)
    discovery.publish(manifest)
    return manifest


async def test_names_are_resolved_here_first_then_in_the_cluster(tmp_path: Path, room: Room, here: Manifest) -> None:
    shards = room.shards
    assert (await shards.resolve("model", "tiny")).digest == here.digest
    assert (await shards.resolve(None, "tiny")).digest == here.digest
    assert (await shards.resolve(None, "loose.gguf")).manifest.kind == "file"
    other = elsewhere(tmp_path, room.discovery, "owner/big", 50)
    assert (await shards.resolve("model", "owner/big")).digest == other.digest
    namesake = elsewhere(tmp_path, room.discovery, "tiny", 60)
    assert (await shards.resolve("model", "tiny")).digest == here.digest
    assert (await shards.resolve("model", f"tiny@{namesake.digest[:8]}")).digest == namesake.digest
    assert (await shards.resolve("model", f"tiny@{here.digest}")).digest == here.digest
    assert (await shards.resolve(None, namesake.digest)).digest == namesake.digest


async def test_an_unknown_name_names_the_known_ones(tmp_path: Path, room: Room, here: Manifest) -> None:
    elsewhere(tmp_path, room.discovery, "other", 50)
    for kind, name in (("model", "none"), ("dataset", "tiny"), ("model", "tiny@00000000")):
        with pytest.raises(UnknownNameError):
            await room.shards.resolve(kind, name)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"other@\w{12}, tiny@\w{12}"):
        await room.shards.resolve("model", "none")


async def test_two_manifests_of_one_name_are_an_ambiguity(tmp_path: Path, room: Room) -> None:
    first = elsewhere(tmp_path, room.discovery, "twice", 50)
    second = elsewhere(tmp_path, room.discovery, "twice", 51)
    with pytest.raises(AmbiguousNameError) as caught:
        await room.shards.resolve("model", "twice")
    assert set(caught.value.details["candidates"]) == {f"twice@{m.digest[:12]}" for m in (first, second)}


async def test_without_a_name_the_only_model_of_the_cluster_is_meant(
    tmp_path: Path, room: Room, here: Manifest
) -> None:
    assert (await room.shards.resolve("model", None)).digest == here.digest
    assert (await room.shards.resolve(None, None)).digest == here.digest
    with pytest.raises(UnknownNameError):
        await room.shards.resolve("dataset", None)
    elsewhere(tmp_path, room.discovery, "data", 70, kind="dataset")
    assert (await room.shards.resolve("model", None)).digest == here.digest
    elsewhere(tmp_path, room.discovery, "second", 71)
    with pytest.raises(AmbiguousNameError, match=r"second@.*tiny@"):
        await room.shards.resolve("model", None)


async def test_a_manifest_that_nobody_gives_out_is_no_source(tmp_path: Path, room: Room) -> None:
    manifest = elsewhere(tmp_path, room.discovery, "gone", 50)
    names = room.discovery._names()
    room.discovery.manifests.clear()
    room.discovery._names = lambda: names  # type: ignore[method-assign]
    with pytest.raises(NoSourceError, match="nobody there"):
        await room.shards.resolve("model", "gone")
    room.discovery.providers.pop(manifest.digest)
    with pytest.raises(NoSourceError, match="no provider"):
        await room.shards.resolve("model", "gone")


async def test_a_shard_is_selected_by_place_content_or_file_name(tmp_path: Path, room: Room, here: Manifest) -> None:
    select = room.shards.select
    entry = here.shards[1]
    for selector in (
        ShardSelector(model="tiny", shard_id=1),
        ShardSelector(shard_id=1),
        ShardSelector(content_id=entry.content_id),
        ShardSelector(filename="shard-1.gguf"),
    ):
        found = await select(selector)
        assert (found.digest, found.entry) == (here.digest, entry)
    far = elsewhere(tmp_path, room.discovery, "far", 90, kind="dataset")
    found = await select(ShardSelector(dataset="far", shard_id=0))
    assert (found.digest, found.entry) == (far.digest, far.shards[0])
    # Only in the cluster: every manifest there is searched.
    assert (await select(ShardSelector(content_id=far.shards[0].content_id))).digest == far.digest
    (tmp_path / "far").mkdir()
    write_shard(tmp_path / "far" / "rows.parquet", 91)
    loose = manifest_of(tmp_path / "far", "rows.parquet", name="rows.parquet", kind="file")
    room.discovery.publish(loose)
    assert (await select(ShardSelector(filename="rows.parquet"))).digest == loose.digest


async def test_what_selects_nothing_or_too_much_is_an_error(tmp_path: Path, room: Room, here: Manifest) -> None:
    select = room.shards.select
    with pytest.raises(ShardNotFoundError, match="0 to 1"):
        await select(ShardSelector(model="tiny", shard_id=2))
    with pytest.raises(ShardNotFoundError):
        await select(ShardSelector(filename="none.gguf"))
    with pytest.raises(ShardNotFoundError):
        await select(ShardSelector(content_id="00" * 32))  # type: ignore[arg-type]
    for selector in (
        ShardSelector(),
        ShardSelector(model="tiny"),
        ShardSelector(model="tiny", dataset="tiny", shard_id=0),
        ShardSelector(model="tiny", filename="shard-0.gguf"),
        ShardSelector(shard_id=0, filename="shard-0.gguf"),
    ):
        with pytest.raises(InvalidParamsError):
            await select(selector)


async def test_a_file_name_of_two_models_lists_the_candidates(tmp_path: Path, here: Manifest) -> None:
    folder = tmp_path / "shards" / "other"
    write_shard(folder / "shard-0.gguf", 99)
    other = manifest_of(folder, "shard-0.gguf", name="other", kind="model")
    write_unsigned(folder, other)
    age(tmp_path / "shards")
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        with pytest.raises(AmbiguousNameError) as caught:
            await room.shards.select(ShardSelector(filename="shard-0.gguf"))
        candidates = caught.value.details["candidates"]
        assert {candidate["model"] for candidate in candidates} == {
            f"{manifest.name}@{manifest.digest[:12]}" for manifest in (here, other)
        }
        for candidate in candidates:
            shard = await room.shards.select(ShardSelector(model=candidate["model"], shard_id=0))
            assert shard.entry.content_id == candidate["content_id"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tiny", ("tiny", "")),
        ("tiny@0123abcd", ("tiny", "0123abcd")),
        ("tiny@0123ab", ("tiny@0123ab", "")),
        ("me@home", ("me@home", "")),
        ("me@home@0123abcd", ("me@home", "0123abcd")),
        ("@0123abcd", ("@0123abcd", "")),
        ("ab" * 32, ("ab" * 32, "ab" * 32)),
    ],
)
def test_a_name_is_split_at_its_digest(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts
