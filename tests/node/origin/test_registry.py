"""How names and URLs become manifests, where origins fail, hang, list without end, and are closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.origin import registry as module
from node.origin.interface import ObjectInfo
from node.origin.layout import manifest_key, shard_key
from node.origin.local import FileStore
from node.origin.location import OriginLocation
from node.origin.registry import MAX_GUESTS, OriginRegistry
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import InvalidParamsError, OriginError, OriginNotFoundError, OriginUnavailableError
from protocol.ids import ContentId
from protocol.manifest import Manifest, ShardEntry, SignedManifest, sign_manifest
from protocol.signing import SigningKey

KEY = SigningKey.generate()
ENTRY = ShardEntry(shard_id=0, filename="a.bin", size=5, content_id=ContentId("cd" * 32), kind="file")


def signed(*origins: str, name: str = "set") -> SignedManifest:
    return sign_manifest(Manifest(name=name, kind="dataset", shards=(ENTRY,)), KEY, origins)


def written(folder: Path, manifest: SignedManifest) -> str:
    """The URL of a manifest that lies in the folder now."""
    key = manifest_key(manifest.manifest.name, manifest.digest, 7)
    (folder / key).parent.mkdir(parents=True)
    (folder / key).write_bytes(msgspec.json.encode(manifest))
    return f"file://{folder}/{key}"


class Bad:
    """A place whose listing fails, or never ends."""

    def __init__(self, url: str, error: OriginError | None) -> None:
        self.store = FileStore(OriginUrl.parse(url))
        self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        if self.error:
            raise self.error
        await asyncio.sleep(3600)
        yield ObjectInfo("x", 1)


def spoil(monkeypatch: pytest.MonkeyPatch, place: OriginLocation, error: OriginError | None) -> None:
    monkeypatch.setattr(place, "_open_store", lambda: Bad(place.url, error))
    monkeypatch.setattr(place, "_store", None)


@pytest.mark.parametrize("error", [OriginNotFoundError("NoSuchBucket"), OriginUnavailableError("no answer")])
async def test_a_name_is_unknown_only_where_every_origin_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OriginError
) -> None:
    urls = tuple(f"file://{tmp_path}/{name}" for name in ("bad", "good"))
    async with OriginRegistry.open(OriginSettings(origins=urls)) as origins:
        assert await origins.find_manifests(None, "set") == []
        spoil(monkeypatch, origins._own[urls[0]], error)
        with pytest.raises(type(error), match=str(error)):
            await origins.find_manifests(None, "set")
        written(tmp_path / "good", signed())
        assert await origins.find_manifests(None, "set") == [signed()]


async def test_a_folder_that_is_never_listed_to_its_end_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}"
    async with OriginRegistry.open(OriginSettings(origins=(url,), find_timeout_s=0.05)) as origins:
        spoil(monkeypatch, origins._own[url], None)
        with pytest.raises(OriginUnavailableError, match="did not answer within"):
            await origins.manifest_at(f"{url}/manifests/set/")
        with pytest.raises(OriginUnavailableError, match="did not answer within"):
            await origins.find_manifests(None, "set")


async def test_only_a_folder_of_manifests_is_listed(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    async with OriginRegistry.open(OriginSettings(origins=(url,))) as origins:
        for bad in (f"{url}/", f"{url}/shards/", f"{url}/set"):
            with pytest.raises(InvalidParamsError, match="manifests/NAME/"):
                await origins.manifest_at(bad)


@pytest.mark.parametrize("name", ["owner/manifests", "my set"])
async def test_names_that_look_like_something_else_in_a_url(tmp_path: Path, name: str) -> None:
    manifest = signed(name=name)
    address = written(tmp_path, manifest)
    async with OriginRegistry.open(OriginSettings(origins=(f"file://{tmp_path}",))) as origins:
        assert await origins.manifest_at(address) == manifest
        assert await origins.manifest_at(address.replace("~", "%7E").rpartition("/")[0]) == manifest


class Held(FileStore):
    """Counts what is open, and gives one byte at a time."""

    open = 0

    def __init__(self, url: str) -> None:
        super().__init__(OriginUrl.parse(url))
        Held.open += 1

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        for byte in await self.get_range(key, start, start + 5 if end is None else end):
            yield bytes([byte])

    async def close(self) -> None:
        await asyncio.sleep(0)
        Held.open -= 1


async def test_a_place_that_was_crowded_out_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / shard_key(ENTRY.content_id)).write_bytes(b"12345")
    monkeypatch.setattr(Held, "open", 0)
    monkeypatch.setattr(module, "open_store", lambda url, settings: Held(f"file://{tmp_path}"))
    async with OriginRegistry.open(OriginSettings()) as origins:
        names = ("first", "second", "third", "fourth")
        first, second, *others = (origins.locations(signed(f"s3://bucket/{name}"))[0] for name in names)
        stream = first.stream(ENTRY, 0, 5)
        assert await anext(stream) == b"1"
        assert [await place.range_unit_bytes() for place in (second, *others)] == [1, 1, 1]
        assert Held.open == 4
        for number in range(MAX_GUESTS):
            origins.locations(signed(f"s3://bucket/{number}"))
        await asyncio.gather(*(origins.find_manifests(None, "set") for _ in range(3)))
        assert Held.open == 1, "the one that is read from"
        assert b"".join([chunk async for chunk in stream]) == b"2345"
        assert Held.open == 0
        assert await second.range_unit_bytes() == 1
        assert b"".join([chunk async for chunk in second.stream(ENTRY, 0, 5)]) == b"12345"
        assert Held.open == 0
        await origins.find_manifests(None, "set")
        assert origins._retired == []
