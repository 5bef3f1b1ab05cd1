"""Names that only an origin knows: asked after the cluster, before any waiting for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from node.clock import Clock
from node.files import Fingerprint
from node.shards.resolver import ManifestResolver
from node.shards.settings import ShardsSettings
from node.shards.store.catalog import Catalog
from node.shards.store.manifests import LocalManifest, write_manifest
from protocol.commands.common import ShardSelector
from protocol.errors import (
    AmbiguousNameError,
    InvalidParamsError,
    NoSourceError,
    OriginUnavailableError,
    ShoalError,
    UnknownNameError,
)
from protocol.ids import ContentId
from protocol.manifest import Manifest, ShardEntry, SignedManifest, sign_manifest
from tests.support.shards.parts import (
    OTHER_KEY,
    MemoryDiscovery,
    age,
    manifest_of,
    open_room,
    write_shard,
    write_unsigned,
)

PATIENCE_S = 30.0
"""Longer than a test may take: who waits for it fails."""


def published(name: str, letter: str, kind: Any = "dataset", filename: str = "a.bin") -> SignedManifest:
    entry = ShardEntry(shard_id=0, filename=filename, size=5, content_id=ContentId(letter * 64), kind="file")
    return sign_manifest(Manifest(name=name, kind=kind, shards=(entry,)), OTHER_KEY)


@dataclass
class MemoryOrigin:
    """An origin as the test describes it, and what it was asked."""

    manifests: list[SignedManifest] = field(default_factory=list)
    at: dict[str, SignedManifest] = field(default_factory=dict)
    failure: ShoalError | None = None
    asked: list[str] = field(default_factory=list)

    def locations(self, signed: SignedManifest) -> list[Any]:
        return []

    async def find_manifests(self, kind: str | None, name: str) -> list[SignedManifest]:
        self.asked.append(name)
        if self.failure:
            raise self.failure
        plain, _, digest = name.partition("@")
        return [
            one
            for one in self.manifests
            if plain in (one.manifest.name, one.digest)
            and one.digest.startswith(digest)
            and kind in (None, one.manifest.kind)
        ]

    async def manifest_at(self, url: str) -> SignedManifest:
        return self.at[url]


def names_of(
    tmp_path: Path, origin: MemoryOrigin | None, *, patience_s: float = PATIENCE_S
) -> tuple[ManifestResolver, Any]:
    settings = ShardsSettings(shards_dir=tmp_path, data_dir=tmp_path, name_timeout_s=patience_s)
    discovery = MemoryDiscovery()
    return ManifestResolver(settings, Catalog(), discovery, discovery.fetch_manifest, origin, Clock()), discovery


async def test_an_origin_is_asked_at_once_and_only_where_the_cluster_does_not_know(tmp_path: Path) -> None:
    at_origin, in_cluster = published("set", "a"), published("set", "b")
    origin = MemoryOrigin([at_origin])
    names, discovery = names_of(tmp_path, origin)
    assert await names.resolve("dataset", "set") == at_origin
    assert await names.resolve(None, f"set@{at_origin.digest[:12]}") == at_origin
    assert await names.resolve(None, at_origin.digest) == at_origin
    asked = len(origin.asked)
    discovery.publish(in_cluster.manifest)
    assert (await names.resolve("dataset", "set")).digest == in_cluster.digest
    assert len(origin.asked) == asked


async def test_a_manifest_that_is_read_from_the_disk_meanwhile_is_found(tmp_path: Path) -> None:
    names, _ = names_of(tmp_path, None)
    looking = asyncio.create_task(names.resolve("dataset", "set"))
    await asyncio.sleep(0.05)
    assert not looking.done()
    here = published("set", "a")
    names._catalog.manifest_held(None, LocalManifest(tmp_path / "set", here, Fingerprint(1, 1)))
    assert await looking == here


async def test_two_origins_that_differ_are_an_ambiguity(tmp_path: Path) -> None:
    names, _ = names_of(tmp_path, MemoryOrigin([published("set", "a"), published("set", "b")]))
    with pytest.raises(AmbiguousNameError):
        await names.resolve("dataset", "set")


async def test_why_an_origin_did_not_answer_stands_in_the_error(tmp_path: Path) -> None:
    origin = MemoryOrigin(failure=OriginUnavailableError("o3://bucket does not answer: is it up?"))
    names, _ = names_of(tmp_path, origin, patience_s=0.0)
    with pytest.raises(UnknownNameError, match="o3://bucket does not answer"):
        await names.resolve("dataset", "set")


async def test_a_name_whose_node_is_gone_is_given_out_by_the_origin(tmp_path: Path) -> None:
    gone = published("set", "a")
    origin = MemoryOrigin([gone])
    names, discovery = names_of(tmp_path, origin)
    discovery.publish(gone.manifest)
    announced = discovery._names()
    discovery.manifests.clear()
    discovery._names = lambda: announced
    assert await names.resolve("dataset", "set") == gone
    assert origin.asked == [f"set@{gone.digest}"]
    names, discovery = names_of(tmp_path, MemoryOrigin())
    discovery._names = lambda: announced
    with pytest.raises(NoSourceError):
        await names.resolve("dataset", "set")


async def test_an_address_is_a_manifest_whose_digest_then_is_known(tmp_path: Path) -> None:
    signed, url = published("set", "a"), "o3://bucket/manifests/set/"
    names, _ = names_of(tmp_path, MemoryOrigin(at={url: signed}))
    assert await names.resolve("dataset", url) == signed
    assert await names.resolve("dataset", f"set@{signed.digest}") == signed
    assert await names.select(ShardSelector(content_id=ContentId("a" * 64))) == signed.shard(0)
    with pytest.raises(InvalidParamsError, match="dataset set, not a model"):
        await names.resolve("model", url)
    names, _ = names_of(tmp_path, None)
    with pytest.raises(InvalidParamsError, match="no origins"):
        await names.resolve("dataset", url)


async def test_a_loose_file_is_found_at_an_origin_by_its_name(tmp_path: Path) -> None:
    loose = published("rows.bin", "a", kind="file", filename="rows.bin")
    names, _ = names_of(tmp_path, MemoryOrigin([loose]), patience_s=0.0)
    assert await names.select(ShardSelector(filename="rows.bin")) == loose.shard(0)


async def test_a_manifest_that_is_signed_anew_with_origins_is_what_the_node_gives_out(tmp_path: Path) -> None:
    folder = tmp_path / "shards" / "tiny"
    write_shard(folder / "rows.bin")
    manifest = manifest_of(folder, "rows.bin")
    write_unsigned(folder, manifest)
    age(tmp_path / "shards")
    async with open_room(tmp_path) as room:
        await room.shards.settled()
        assert (await room.shards.resolve("dataset", "tiny")).origins == ()
        write_manifest(folder, sign_manifest(manifest, OTHER_KEY, ["o3://bucket/prefix"]))
        for _ in range(200):
            signed = await room.shards.resolve("dataset", "tiny")
            if signed.origins:
                break
            await asyncio.sleep(0.05)
        assert signed.origins == ("o3://bucket/prefix",)
        assert room.shards.on_disk(signed.digest) == {0}
