"""One suite over all stores that can be written, on real servers; and what is special to one of them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from node.cli.demo.s3_server import S3Server
from node.origin import local as files
from node.origin.factory import open_store
from node.origin.interface import ObjectStore
from node.origin.s3 import store as s3
from node.origin.s3.forked import S3ForkedStore
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import (
    InvalidParamsError,
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
)
from tests.support.origins.servers import PATIENT, in_parts, juicefs_gateway, s3_settings, settings_of, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")
BODY = bytes(range(251)) * 8001
LARGE = in_parts(3)


@pytest.fixture(scope="module")
def weed(shared_s3: S3Server) -> S3Server:
    return shared_s3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def juicefs(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OriginSettings]:
    async with juicefs_gateway(tmp_path_factory.mktemp("juicefs")) as settings:
        yield settings


@pytest_asyncio.fixture(loop_scope="module", params=["o3", "o3-forked", "s3-juicefs", "file"])
async def store(
    request: pytest.FixtureRequest, weed: S3Server, juicefs: OriginSettings, tmp_path: Path
) -> AsyncIterator[ObjectStore]:
    """An empty place of its own at each server."""
    name = request.node.name.partition("[")[0]
    match request.param:
        case "o3":
            opened = open_store(f"o3://shards/tests/{name}", settings_of(weed))
        case "o3-forked":
            where = OriginUrl.parse(f"o3://shards/tests/forked/{name}")
            opened = S3ForkedStore(where, settings_of(weed))
        case "s3-juicefs":
            opened = open_store(f"s3://shards/tests/{name}", juicefs)
        case _:
            opened = open_store(tmp_path.as_uri(), OriginSettings())
    yield opened
    await opened.close()


async def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key async for info in store.list(prefix)]


async def test_what_was_put_is_read_in_every_way(store: ObjectStore) -> None:
    told: list[int] = []
    put = await store.put("shards/one", BODY, on_bytes=told.append)
    assert (put.key, put.size, sum(told)) == ("shards/one", len(BODY), len(BODY))
    info = await store.head("shards/one")
    assert (info.key, info.size, info.root_cid) == ("shards/one", len(BODY), None)
    assert info.etag == put.etag
    assert info.modified_s is not None
    assert abs(info.modified_s - (put.modified_s or 0)) < 60

    assert await store.get_range("shards/one", 0, 1) == BODY[:1]
    assert await store.get_range("shards/one", 77, 70_000) == BODY[77:70_000]
    assert await store.get_range("shards/one", 5, 5) == b""
    ranges = [(9, 20), (1_500_000, 1_500_100), (0, 4), (7, 7)]
    assert await store.get_ranges("shards/one", ranges) == [BODY[start:end] for start, end in ranges]
    assert await streamed(store, "shards/one") == BODY
    assert await streamed(store, "shards/one", 1000) == BODY[1000:]
    assert await streamed(store, "shards/one", 1000, 1_000_001) == BODY[1000:1_000_001]
    assert await streamed(store, "shards/one", 1000, 1000) == b""


async def test_a_range_past_the_end_is_corrupt_and_never_short(store: ObjectStore) -> None:
    await store.put("short", BODY[:1000])
    for start, end in ((990, 1001), (1000, 1010), (2000, 2001)):
        with pytest.raises(OriginCorruptError):
            await store.get_range("short", start, end)
        with pytest.raises(OriginCorruptError):
            await streamed(store, "short", start, end)
        with pytest.raises(OriginCorruptError):
            await store.get_ranges("short", [(0, 5), (start, end)])


async def test_listing_is_by_the_letters_of_the_key_and_in_order(store: ObjectStore) -> None:
    for key in ("m/b/2.json", "m/b/1.json", "m/a/1.json", "m2/x", "other", "m/b 1+ä"):
        await store.put(key, b"x" * 200)
    assert await keys(store) == ["m/a/1.json", "m/b 1+ä", "m/b/1.json", "m/b/2.json", "m2/x", "other"]
    assert await keys(store, "m/b/") == ["m/b/1.json", "m/b/2.json"]
    assert await keys(store, "m") == ["m/a/1.json", "m/b 1+ä", "m/b/1.json", "m/b/2.json", "m2/x"]
    assert await keys(store, "m/b/2") == ["m/b/2.json"]
    assert await keys(store, "nothing/") == []
    assert (await store.get_range("m/b 1+ä", 0, 3)) == b"xxx"


async def test_not_found_exists_and_delete(store: ObjectStore) -> None:
    for ask in (store.head("no"), store.get_range("no", 0, 5), streamed(store, "no"), store.get_ranges("no", [(0, 5)])):
        with pytest.raises(OriginNotFoundError, match="'no'") as caught:
            await ask
        assert caught.value.details["origin"] == store.url
        assert caught.value.details["key"] == "no"
    await store.put("once", BODY[:500], if_absent=True)
    with pytest.raises(OriginExistsError, match="'once'"):
        await store.put("once", BODY[500:1000], if_absent=True)
    assert await streamed(store, "once") == BODY[:500]
    await store.put("once", BODY[500:1000])
    assert await streamed(store, "once") == BODY[500:1000]
    await store.delete("once")
    await store.delete("once")
    with pytest.raises(OriginNotFoundError):
        await store.head("once")


@pytest.mark.parametrize(
    "key", ["../out", "a/../../out", "/absolute", "a//b", "", "a/.", "a\\..\\b", "a\nb", "k" * 1025]
)
async def test_no_key_leads_out(store: ObjectStore, key: str) -> None:
    for ask in (store.put(key, BODY[:200]), store.head(key), store.get_range(key, 0, 1), store.delete(key)):
        with pytest.raises(InvalidParamsError):
            await ask


async def test_a_large_file_goes_in_parts_and_comes_back_whole(store: ObjectStore, tmp_path: Path) -> None:
    path, told = tmp_path / "large", list[int]()
    path.write_bytes(os.urandom(LARGE))
    await store.put("large", path, on_bytes=told.append)
    assert sum(told) == LARGE
    assert (await store.head("large")).size == LARGE
    assert await streamed(store, "large") == path.read_bytes()
    with pytest.raises(OriginExistsError):
        await store.put("large", path, if_absent=True)


async def test_o3_tells_what_the_network_did_and_takes_no_small_objects(weed: S3Server) -> None:
    store = open_store("o3://shards/cid", settings_of(weed))
    assert (store.min_object_bytes, store.writes_once) == (127, False)
    sent = {"Network-Root-Cid": "bafy2bzace", "Network-State": "done", "By": "test"}
    await store.put("a", b"x" * 127, metadata=sent)
    info = await store.head("a")
    assert (info.root_cid, info.network_state, info.metadata["by"]) == ("bafy2bzace", "done", "test")
    with pytest.raises(OriginError, match="none below 127"):
        await store.put("b", b"x" * 126)


async def test_wrong_keys_are_denied_and_no_key_is_shown(weed: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = s3_settings(weed.endpoint, weed.access_key, "not-the-secret", **PATIENT)
    store = open_store("o3://shards/denied", settings)
    shown = [repr(store), repr(settings), repr(vars(store))]
    for ask in (store.head("a"), store.get_range("a", 0, 5), store.put("a", BODY[:200]), store.put("a", BODY * 20)):
        with pytest.raises(OriginDeniedError, match="AKAVE_O3_ACCESS_KEY") as caught:
            await ask
        assert caught.value.details["status"] == "403"
        shown += [repr(caught.value), repr(caught.value.details), repr(caught.value.__cause__)]
    for text in [*shown, caplog.text]:
        for secret in ("not-the-secret", "Signature", "X-Amz", "Credential="):
            assert secret not in text.replace("SignatureDoesNotMatch", "")
    with pytest.raises(OriginDeniedError, match="AKAVE_O3"):
        await open_store("o3://shards/denied", OriginSettings(o3_endpoint=weed.endpoint)).head("a")


async def test_no_such_bucket(weed: S3Server) -> None:
    store = open_store("s3://nowhere-at-all", settings_of(weed))
    with pytest.raises(OriginNotFoundError, match="bucket"):
        await store.get_range("a", 0, 5)
    with pytest.raises(OriginNotFoundError, match="bucket"):
        await keys(store)


async def test_a_listing_is_given_up_above_its_bound(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (s3, files):
        monkeypatch.setattr(room, "MAX_LISTED", 2)
    for key in ("a/1", "a/2", "b/1"):
        await store.put(key, b"x" * 127)
    assert await keys(store, "a/") == ["a/1", "a/2"]
    with pytest.raises(OriginError, match="more than"):
        await keys(store)


async def test_a_file_that_is_not_there_is_not_sent(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(OriginError, match="No such file"):
        await store.put("a", tmp_path / "missing")


FORKED = """
import asyncio, os, sys
from node.origin.factory import open_store
from protocol.errors import OriginError
from tests.support.origins.servers import PATIENT, s3_settings

def main():
    settings = s3_settings(*sys.argv[1:4], **PATIENT)
    store = open_store("o3://shards/forked", settings)
    asyncio.run(store.put("a", b"x" * 11_000_000))
    child = os.fork()
    if child == 0:
        found = []
        for one in (store, open_store("o3://shards/forked", settings)):
            try:
                asyncio.run(one.put("b", b"y" * 11_000_000))
                found.append(len(asyncio.run(one.get_range("b", 5, 900_000))))
            except OriginError as error:
                found.append("refused" if "spawn" in error.message else error.message)
        os.write(1, repr(found).encode())
        os._exit(0)
    os.waitpid(child, 0)

main()
"""


async def test_a_forked_child_opens_its_own_and_is_refused_its_parents(weed: S3Server) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        FORKED,
        weed.endpoint,
        weed.access_key,
        weed.secret_key,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 45)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert out.decode() == "['refused', 899995]"


async def test_the_environment_has_no_say(weed: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "another",
        "AWS_SECRET_ACCESS_KEY": "another",
        "AWS_SESSION_TOKEN": "another",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_PROFILE": "no-such-profile",
    }.items():
        monkeypatch.setenv(name, value)
    store = open_store("o3://shards/environment", settings_of(weed))
    await store.put("small", BODY[:300])
    await store.put("large", os.urandom(LARGE))
    assert await keys(store) == ["large", "small"]
    monkeypatch.setenv("AWS_CHECKSUM_ALGORITHM", "SHA256")
    with pytest.raises(InvalidParamsError, match="AWS_CHECKSUM_ALGORITHM"):
        await open_store("o3://shards/environment", settings_of(weed)).head("small")


async def test_a_link_in_a_folder_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "origin" / "out").symlink_to(tmp_path)
    store = open_store((tmp_path / "origin").as_uri(), OriginSettings())
    for key in ("link", "out/secret"):
        with pytest.raises(OriginDeniedError):
            await store.get_range(key, 0, 5)
        with pytest.raises(OriginDeniedError):
            await store.put(key, b"over it")
    assert (tmp_path / "secret").read_text() == "secret"


async def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    store, sent = open_store((tmp_path / "origin").as_uri(), OriginSettings()), asyncio.Event()
    write = asyncio.create_task(store.put("a", os.urandom(LARGE), on_bytes=lambda _: sent.set()))
    await sent.wait()
    assert await keys(store) == []
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    assert [path for path in (tmp_path / "origin").rglob("*") if path.is_file()] == []
