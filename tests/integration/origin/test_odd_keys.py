"""Keys that cannot be read, among others that can: each listing gives the others, and names these in one warning."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from node.cli.demo.s3_server import S3Server
from node.origin.core.listing import NAMED
from node.origin.encryption.store import EncryptedStore
from node.origin.factory import open_store
from node.origin.interface import ObjectStore
from node.origin.s3.access import S3Access
from node.origin.s3.botocore_client import S3ApiClient
from node.origin.s3.errors import S3ErrorTranslator
from node.origin.s3.forked import S3ForkedStore
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import InvalidParamsError, OriginDeniedError, OriginError, OriginUnavailableError
from tests.support.clocks import LeapingClock
from tests.support.origins.odd_bucket import GOOD, MARKERS, REFUSED, STORED_BY_SEAWEED, odd_bucket, odd_objects
from tests.support.origins.servers import hub_stand_in, s3_settings, settings_of

Opening = Callable[[str, OriginSettings], ObjectStore]


def open_forked(url: str, settings: OriginSettings) -> ObjectStore:
    return S3ForkedStore(OriginUrl.parse(url), settings)


@pytest.fixture(params=[open_store, open_forked])
def opening(request: pytest.FixtureRequest) -> Opening:
    return request.param  # type: ignore[no-any-return]


async def listed(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key async for info in store.list(prefix)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages since the last call."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


def left_out(message: str, keys: tuple[str, ...], total: int) -> None:
    """AssertionError unless a warning tells how many of how many, names the first of them, and says what to do."""
    assert f"leaves out {len(keys)} of {total} objects" in message
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    assert f": {', '.join(map(repr, sorted(keys)[:NAMED]))}{more} cannot be read: " in message
    assert "copy the object to such a key, or rename the file" in message


@pytest.mark.parametrize("prefix", ["", "run/data"])
async def test_no_key_ends_a_listing(opening: Opening, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    inside = f"{prefix}/" if prefix else ""
    elsewhere = {"run/data2": b"x"} if prefix else {}
    own_marker = {inside: b""} if prefix else {}
    async with odd_bucket(odd_objects(inside) | elsewhere | own_marker) as bucket:
        store = opening(f"s3://shards/{prefix}", s3_settings(bucket.endpoint, "access", "a-secret-key"))
        found = [info async for info in store.list()]
        assert [info.key for info in found] == sorted(GOOD, key=str.encode)
        (message,) = warnings(caplog)
        left_out(message, REFUSED, len(GOOD) + len(REFUSED))
        assert message.startswith(f"{store.url}: ")
        for info in found:
            body = (inside + info.key).encode()
            assert await store.get_range(info.key, 0, info.size) == body
            head = await store.head(info.key)
            assert (head.size, head.etag, head.modified_s) == (info.size, info.etag, info.modified_s)

        assert await listed(store, "a/") == ["a/1", "a/2 +ä%41"]
        (message,) = warnings(caplog)
        under = tuple(key for key in REFUSED if key.startswith("a/"))
        left_out(message, under, len(under) + 2)
        assert "under 'a/'" in message
        assert await listed(store, "b/") == ["b/3"]
        assert await listed(store, "empty/") == await listed(store, "nested") == []
        assert warnings(caplog) == [], "markers hold nothing"

        for key in (*REFUSED, *MARKERS):
            with pytest.raises(InvalidParamsError, match="copy the object to such a key") as caught:
                await store.get_range(key, 0, 1)
            assert repr(key) in caught.value.message
        await store.close()


async def test_keys_of_seaweed(opening: Opening, shared_s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    url, settings = OriginUrl.parse(f"s3://shards/odd/{opening.__name__}"), settings_of(shared_s3)
    access = S3Access.of(url, settings)
    objects = dict.fromkeys((*GOOD, *STORED_BY_SEAWEED), b"x" * 200) | {"a/": b"", "empty/": b""}
    async with S3ApiClient(access, S3ErrorTranslator(str(url), "")) as client:
        for key, body in objects.items():
            await client.call("put_object", "write", key, {"Key": f"{url.prefix}/{key}", "Body": body})
    store = opening(str(url), settings)
    assert await listed(store) == sorted(GOOD, key=str.encode)
    (message,) = warnings(caplog)
    left_out(message, STORED_BY_SEAWEED, len(GOOD) + len(STORED_BY_SEAWEED))
    for key in GOOD:
        assert await store.get_range(key, 0, 200) == objects[key]
    await store.close()


async def test_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = ("a\n1", "a\\1", "new\nline/x", "a/\t1", os.fsdecode(b"latin-\xe9"))
    for key in (*GOOD, *odd):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    store = open_store(tmp_path.as_uri(), OriginSettings())
    assert await listed(store) == sorted(GOOD, key=str.encode)
    (message,) = warnings(caplog)
    left_out(message, odd, len(GOOD) + len(odd))
    for key in odd:
        with pytest.raises(InvalidParamsError, match="rename the file"):
            await store.head(key)


async def test_a_repository(caplog: pytest.LogCaptureFixture) -> None:
    odd = ("a\n1", "b\\1")
    async with hub_stand_in(dict.fromkeys((*GOOD, *odd), b"some bytes")) as hub:
        store = open_store("hf://datasets/some/data", OriginSettings(hf_endpoint=f"http://127.0.0.1:{hub.port}"))
        assert await listed(store) == sorted(GOOD, key=str.encode)
        (message,) = warnings(caplog)
        left_out(message, odd, len(GOOD) + len(odd))
        await store.close()


async def test_objects_that_are_not_encrypted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = open_store(tmp_path.as_uri(), OriginSettings())
    store = EncryptedStore(plain, bytes(range(32)))
    await store.put("sealed", b"x" * 100)
    await plain.put("plain", b"x" * 10)
    await asyncio.to_thread((tmp_path / "a\nb").write_bytes, b"x" * 10)
    assert await listed(store) == ["sealed"]
    odd, unsealed = warnings(caplog)
    left_out(odd, ("a\nb",), 3)
    assert "leaves out 1 of 2 objects: 'plain' are not encrypted" in unsealed


async def test_a_listing_is_asked_for_again_as_any_request(opening: Opening, caplog: pytest.LogCaptureFixture) -> None:
    clock = LeapingClock()
    async with odd_bucket(odd_objects()) as bucket:
        url, settings = OriginUrl.parse("s3://shards"), s3_settings(bucket.endpoint, "access", "a-secret-key")
        store = S3ForkedStore(url, settings, clock) if opening is open_forked else open_store(url, settings, clock)
        await listed(store, "b/")  # what its first call imports does not count as trying
        bucket.statuses = [503, 500]
        assert await listed(store) == sorted(GOOD, key=str.encode)
        assert len(clock.slept_s) == 2
        assert len([message for message in warnings(caplog) if "leaves out" in message]) == 1
        bucket.statuses = [503] * 99
        with pytest.raises(OriginUnavailableError, match=r"list.*503.*tried"):
            await listed(store)
        bucket.statuses = [403]
        with pytest.raises(OriginDeniedError, match="AWS_ACCESS_KEY_ID"):
            await listed(store)
        bucket.statuses = [301]
        with pytest.raises(OriginError, match="another region: set AWS_REGION"):
            await listed(store)
        bucket.statuses = []
        await store.close()
        assert await listed(store, "b/") == ["b/3"], "a closed store opens its connections again"
        await store.close()


async def test_a_listing_that_cannot_be_finished_is_an_error(opening: Opening) -> None:
    async with odd_bucket({f"key/{number}": b"x" for number in range(7)}) as bucket:
        store = opening("s3://shards", s3_settings(bucket.endpoint, "access", "a-secret-key"))
        assert len(await listed(store)) == 7
        assert len(bucket.requests) == 3
        bucket.gives_tokens = False
        with pytest.raises(OriginError, match="there is more, and not how to get it"):
            await listed(store)
        await store.close()
