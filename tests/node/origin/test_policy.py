"""What a stranger may have this node ask: a manifest's origins must not aim it at its own network."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from node.origin.layout import manifest_key
from node.origin.policy import check_host, is_public, refusal
from node.origin.registry import MAX_GUESTS, OriginRegistry
from node.origin.settings import OriginSettings
from protocol.errors import InvalidManifestError, InvalidParamsError, OriginDeniedError, OriginError
from protocol.ids import ContentId
from protocol.manifest import Manifest, ShardEntry, SignedManifest, sign_manifest
from protocol.signing import SigningKey

KEY = SigningKey.generate()
ENTRY = ShardEntry(shard_id=0, filename="a.bin", size=5, content_id=ContentId("cd" * 32), kind="file")


def signed(*origins: str, name: str = "set") -> SignedManifest:
    return sign_manifest(Manifest(name=name, kind="dataset", shards=(ENTRY,)), KEY, origins)


@pytest.mark.parametrize(
    "url",
    [
        "o3://bucket/prefix",
        "akave://bucket",
        "s3://bucket/a/b",
        "hf://owner/name/sub",
        "https://files.example.org/shoal",
        "https://files.example.org:8443/shoal",
        "https://93.184.215.14/x",
        "https://[2606:4700::1111]/x",
    ],
)
def test_stores_of_our_settings_and_public_hosts_may_be_named(url: str) -> None:
    assert refusal(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "http://files.example.org/x",
        "http://127.0.0.1/x",
        "ftp://files.example.org/x",
        "https:///x",
        "https://localhost/x",
        "https://a.localhost/x",
        "https://printer/x",
        "https://nas.local/x",
        "https://vault.internal./x",
        "https://router.home.arpa/x",
        "https://127.0.0.1/x",
        "https://127.1/x",
        "https://2130706433/x",
        "https://0x7f.0.0.1/x",
        "https://0x7f000001/x",
        "https://10.0.0.5/x",
        "https://172.16.3.4/x",
        "https://192.168.1.1:8443/x",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/x",
        "https://0.0.0.0/x",
        "https://224.0.0.1/x",
        "https://[::1]/x",
        "https://[fe80::1%25eth0]/x",
        "https://[fd00::1]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://[64:ff9b::7f00:1]/x",
        "https://[2002:7f00:1::]/x",
        "https://user:word@files.example.org/x",
        "https://files.example.org:99999/x",
        "https://[::1/x",
    ],
)
def test_files_plain_http_and_private_places_may_not(url: str) -> None:
    assert refusal(url)


def test_addresses_are_public_only_through_and_through() -> None:
    assert is_public("93.184.215.14")
    assert is_public("::ffff:93.184.215.14")
    assert not is_public("::ffff:10.0.0.1")
    with pytest.raises(ValueError):
        is_public("files.example.org")


async def test_a_public_name_that_leads_inside_is_refused_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"good.example.org": ["93.184.215.14"], "bad.example.org": ["93.184.215.14", "169.254.169.254"]}

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        if host not in answers:
            raise OSError("unknown")
        return [(2, 1, 6, "", (address, port)) for address in answers[host]]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    await check_host("https://good.example.org/x")
    await check_host("s3://bucket")
    with pytest.raises(OriginDeniedError, match=r"169\.254\.169\.254"):
        await check_host("https://bad.example.org/x")
    with pytest.raises(OriginError, match="cannot be resolved"):
        await check_host("https://gone.example.org/x")
    async with OriginRegistry.open(OriginSettings()) as origins:
        (place,) = origins.locations(signed("https://bad.example.org/x"))
        with pytest.raises(OriginDeniedError, match="--origin"):
            await place.piece_layer(ENTRY)
        with pytest.raises(OriginDeniedError):
            [chunk async for chunk in place.stream(ENTRY, 0, 5)]


async def test_configured_origins_come_first_and_what_a_stranger_may_not_name_is_left_out(tmp_path: Path) -> None:
    own = f"file://{tmp_path}/own"
    async with OriginRegistry.open(OriginSettings(origins=(f"{own}/", own))) as origins:
        assert origins.urls == (own,)
        named = signed("file:///etc", "http://127.0.0.1:1/x", "s3://bucket/x/", f"{own}/sub", "s3://bucket/x")
        assert [place.url for place in origins.locations(named)] == [own, "s3://bucket/x", f"{own}/sub"]
        assert origins.locations(named)[1] is origins.locations(named)[1], "what a place learnt is remembered"


async def test_a_manifests_address_is_held_to_the_same_unless_it_was_typed_here(tmp_path: Path) -> None:
    inside = signed()
    key = manifest_key("set", inside.digest, 7)
    path = tmp_path / "own" / key
    path.parent.mkdir(parents=True)
    path.write_bytes(msgspec.json.encode(inside))
    url = f"file://{tmp_path}/own"
    async with OriginRegistry.open(OriginSettings()) as origins:
        with pytest.raises(OriginDeniedError, match="--manifest"):
            await origins.manifest_at(f"{url}/{key}")
        with pytest.raises(OriginDeniedError):
            await origins.manifest_at("https://169.254.169.254/latest/manifest.json")
        for bad in ("set", "https://host.example.org/m.json?X-Amz-Signature=5ec2e7", "s3://u:5ec2e7@bucket/m.json"):
            with pytest.raises(InvalidParamsError) as caught:
                await origins.manifest_at(bad)
            assert "5ec2e7" not in str(caught.value)
    async with OriginRegistry.open(OriginSettings(), trusted=[f"{url}/manifests/set/"]) as origins:
        assert await origins.manifest_at(f"{url}/manifests/set/") == inside
        assert [place.url for place in origins.locations(inside)] == [url], "where it was read from has its shards"
        path.with_name(manifest_key("set", inside.digest, 8).rpartition("/")[2]).write_bytes(b"{}")
        with pytest.raises(InvalidManifestError):
            await origins.manifest_at(f"{url}/{manifest_key('set', inside.digest, 8)}")
        assert await origins.manifest_at(f"{url}/manifests/set") == inside, "the newest valid one"


async def test_places_that_strangers_name_are_kept_within_bounds() -> None:
    async with OriginRegistry.open(OriginSettings()) as origins:
        first = origins.locations(signed("s3://bucket/0"))[0]
        await first.store()
        for number in range(1, MAX_GUESTS + 5):
            origins.locations(signed(f"s3://bucket/{number}"))
        assert len(origins._guests) == MAX_GUESTS
        assert first in origins._retired
        await origins._tidy()
        assert origins._retired == []
        assert origins.locations(signed("s3://bucket/0"))[0] is not first
