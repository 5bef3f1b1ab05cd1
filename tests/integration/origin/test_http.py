"""Reads from servers that misbehave, by the S3 store and by the web store; redirects; the hub's protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from node.clock import Clock
from node.origin.core.credentials import Credentials, Secret
from node.origin.factory import open_store
from node.origin.huggingface.store import PINNED_S
from node.origin.interface import ObjectStore
from node.origin.s3.access import S3Access
from node.origin.s3.botocore_client import S3ApiClient
from node.origin.s3.errors import S3ErrorTranslator
from node.origin.s3.forked import S3ForkedStore
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import (
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginNotFoundError,
    OriginUnavailableError,
)
from tests.support.clocks import LeapingClock
from tests.support.origins.servers import QUICK, RawServer, hub_stand_in, raw_server, s3_settings

BODY = bytes(range(251)) * 4001
Opening = Callable[..., ObjectStore]


def open_s3(server: RawServer, clock: Clock | None = None, **settings: object) -> ObjectStore:
    return open_store("o3://shards/folder", s3_settings(server.url, "access", "a-secret-key", **settings), clock)


def open_s3_forked(server: RawServer, clock: Clock | None = None, **settings: object) -> ObjectStore:
    url = OriginUrl.parse("o3://shards/folder")
    return S3ForkedStore(url, s3_settings(server.url, "access", "a-secret-key", **settings), clock)


def open_web(server: RawServer, clock: Clock | None = None, **settings: object) -> ObjectStore:
    return open_store(f"{server.url}/shards/folder", OriginSettings(**QUICK | settings), clock)  # type: ignore[arg-type]


@pytest.fixture(params=[open_s3, open_s3_forked, open_web])
def opening(request: pytest.FixtureRequest) -> Opening:
    return request.param  # type: ignore[no-any-return]


async def collected(store: ObjectStore, into: bytearray, start: int = 0, end: int | None = None) -> bytes:
    async for data in store.get_stream("a", start, end):
        into += data
    return bytes(into)


async def test_reads_are_exact(opening: Opening) -> None:
    async with raw_server(BODY) as server:
        store = opening(server)
        assert await collected(store, bytearray()) == BODY
        assert "range" not in server.requests[-1][2]
        assert await collected(store, bytearray(), 5) == BODY[5:]
        assert await collected(store, bytearray(), 5, 100) == BODY[5:100]
        assert await store.get_range("a", 0, len(BODY)) == BODY
        assert await store.get_ranges("a", [(900_000, 900_010), (4, 9), (0, 5)]) == [
            BODY[900_000:900_010],
            BODY[4:9],
            BODY[:5],
        ]
        assert server.given[-1] == (0, 900_010), "close ranges in one request"
        info = await store.head("a")
        assert (info.size, info.etag) == (len(BODY), "abc")
        await store.close()


@pytest.mark.parametrize("mode", ["breaks-off", "hangs"])
async def test_a_stream_that_breaks_off_gives_good_bytes_and_never_asks_twice(opening: Opening, mode: str) -> None:
    async with raw_server(BODY, mode) as server:
        store, into = opening(server, read_timeout_s=0.5), bytearray()
        with pytest.raises(OriginCorruptError if mode == "breaks-off" else OriginUnavailableError) as caught:
            await collected(store, into, 1000, 900_000)
        assert caught.value.details.get("broke_off", False) == (mode == "breaks-off")
        assert len(server.given) == 1
        assert len(into) > 400_000
        assert into == BODY[1000 : 1000 + len(into)]

        # Whoever reads goes on at the very byte.
        server.modes = ["ok"]
        assert await collected(store, into, 1000 + len(into), 900_000) == BODY[1000:900_000]
        await store.close()


async def test_a_range_that_breaks_off_is_asked_for_again_as_it_was(opening: Opening) -> None:
    async with raw_server(BODY, "breaks-off", "ok") as server:
        store = opening(server, LeapingClock())
        assert await store.get_range("a", 1000, 900_000) == BODY[1000:900_000]
        assert server.given == [(1000, 900_000)] * 2
        server.modes = ["breaks-off"]
        with pytest.raises(OriginCorruptError, match="tried 3 times"):
            await store.get_range("a", 1000, 900_000)
        await store.close()


@pytest.mark.parametrize("mode", ["ignores-range", "other-range", "short"])
async def test_another_range_than_asked_for_is_corrupt(opening: Opening, mode: str) -> None:
    async with raw_server(BODY, mode) as server:
        store, into = opening(server), bytearray()
        with pytest.raises(OriginCorruptError) as caught:
            await store.get_range("a", 1000, 900_000)
        assert (caught.value.details["key"], caught.value.details["origin"]) == ("a", store.url)
        with pytest.raises(OriginCorruptError):
            await collected(store, into, 1000, 900_000)
        assert into == (BODY[1000:899_990] if mode == "short" else b"")
        await store.close()


@pytest.mark.parametrize("status", ["429", "500", "503"])
async def test_an_overloaded_server_is_asked_again(opening: Opening, status: str) -> None:
    async with raw_server(BODY, "ok", status, "ok") as server:
        clock = LeapingClock()
        store = opening(server, clock)
        await store.get_range("a", 0, 10)  # what its first call imports does not count as trying
        assert await store.get_range("a", 0, 10) == BODY[:10]
        assert len(server.requests) == 3
        if status == "429" and opening is not open_s3:  # obstore shows no headers of an error
            assert sum(clock.slept_s) >= 1.0, "Retry-After was not waited for"
        server.modes = [status]
        with pytest.raises(OriginUnavailableError, match="tried") as caught:
            await store.head("a")
        assert caught.value.details["status"] == status
        assert caught.value.details["tried"] > 1
        await store.close()


@pytest.mark.parametrize(
    ("status", "kind"), [("403", OriginDeniedError), ("404", OriginNotFoundError), ("400", OriginError)]
)
async def test_what_will_not_pass_is_asked_once(opening: Opening, status: str, kind: type[OriginError]) -> None:
    async with raw_server(BODY, status) as server:
        store = opening(server)
        for ask in (store.head("a"), store.get_range("a", 0, 5), collected(store, bytearray())):
            with pytest.raises(kind) as caught:
                await ask
            assert (caught.value.details["status"], caught.value.details["tried"]) == (status, 1)
            assert "a-secret-key" not in str(caught.value)
        # After a 400, botocore asks by itself which region the bucket is in.
        assert len(server.requests) == (4 if opening is open_s3_forked and status == "400" else 3)
        await store.close()


async def test_nobody_there(opening: Opening) -> None:
    async with raw_server(BODY) as server:
        store = opening(server, LeapingClock())
    with pytest.raises(OriginUnavailableError, match="refused"):
        await store.head("a")
    await store.close()


async def test_o3_is_asked_path_style_signed_and_without_checksums(tmp_path: Path) -> None:
    async with raw_server(b"") as server:
        store = open_s3(server)
        await store.put("a", b"x" * 200, metadata={"by": "test"})
        method, path, headers = server.requests[-1]
        assert (method, path) == ("PUT", "/shards/folder/a")
        assert "/akave-network/s3/aws4_request" in headers["authorization"]
        assert headers["x-amz-meta-by"] == "test"
        assert not [name for name in headers if "checksum" in name or "sdk" in name]
        await store.close()


async def test_a_part_goes_as_o3_wants_it() -> None:
    async with raw_server(b"") as server:
        settings, url = s3_settings(server.url, "access", "a-secret-key"), OriginUrl.parse("o3://shards")
        async with S3ApiClient(S3Access.of(url, settings), S3ErrorTranslator("o3://shards", "")) as calls:
            wanted = {"Key": "a b", "UploadId": "1", "PartNumber": 3, "Body": b"x" * 200_000}
            assert (await calls.call("upload_part", "write", "a b", wanted))["ETag"] == '"abc"'
        method, path, headers = server.requests[-1]
        assert (method, path) == ("PUT", "/shards/a%20b?uploadId=1&partNumber=3")
        assert "/akave-network/s3/aws4_request" in headers["authorization"]
        assert headers["x-amz-content-sha256"] == hashlib.sha256(b"x" * 200_000).hexdigest()
        assert not [name for name in headers if "checksum" in name or "trailer" in name or name == "content-encoding"]


async def test_a_slow_uplink_is_waited_for() -> None:
    async with raw_server(b"", "reads-slowly") as server:
        store = open_s3(server, read_timeout_s=0.3)  # shorter than the body takes
        await store.put("a", b"x" * 3_000_000)
        assert len(server.requests) == 1
        await store.close()


async def test_a_web_origin_is_only_read(tmp_path: Path) -> None:
    store = open_store("https://example.org/shards", OriginSettings())
    with pytest.raises(OriginError, match="is read-only"):
        await store.put("a", b"x")
    with pytest.raises(OriginError, match="is read-only"):
        await store.delete("a")
    with pytest.raises(OriginError, match="is read-only"):
        [info async for info in store.list()]


async def test_a_redirect_leads_to_no_other_place_of_this_network() -> None:
    async with raw_server(BODY) as target, raw_server(b"", "302") as server:
        store = open_web(server)
        server.location = f"{target.url}/there?signature=secret"
        assert await store.get_range("a", 5, 10) == BODY[5:10]
        for location in ("http://169.254.169.254/latest", "http://10.0.0.1/a", "file:///etc/passwd", ""):
            server.location = location
            with pytest.raises(OriginDeniedError, match="redirects"):
                await store.get_range("a", 5, 10)
        server.location = f"{server.url}/again"
        with pytest.raises(OriginError, match="circles"):
            await store.get_range("a", 5, 10)
        await store.close()


FILES = {"config.json": b"{}" * 100, "model/one.bin": BODY, "model/two.txt": b"two" * 50, "modelx": b"x"}


def hub_settings(port: int, token: str | None = None) -> OriginSettings:
    credentials = Credentials(hf_token=Secret(token) if token else None)
    return OriginSettings(hf_endpoint=f"http://127.0.0.1:{port}", credentials=credentials, **QUICK)  # type: ignore[arg-type]


async def test_a_repository_of_the_hub_is_read_at_one_commit() -> None:
    async with raw_server(BODY) as elsewhere, hub_stand_in(FILES, elsewhere.url, token="hf-secret-token") as hub:
        store = open_store("hf://datasets/some/data@v1", hub_settings(hub.port, "hf-secret-token"))
        assert [(info.key, info.size) async for info in store.list()] == [
            (name, len(body)) for name, body in sorted(FILES.items())
        ]
        assert [info.key async for info in store.list("model/")] == ["model/one.bin", "model/two.txt"]
        assert [info.key async for info in store.list("nothing/")] == []
        info = await store.head("model/one.bin")
        assert (info.size, info.etag) == (len(BODY), hashlib.sha256(BODY).hexdigest())
        assert (await store.head("config.json")).size == 200
        assert await store.get_range("model/one.bin", 10, 900_000) == BODY[10:900_000]
        assert await store.get_range("model/two.txt", 3, 9) == b"twotwo"
        assert b"".join([data async for data in store.get_stream("model/one.bin", 7)]) == BODY[7:]
        with pytest.raises(OriginNotFoundError):
            await store.get_range("missing", 0, 5)
        with pytest.raises(OriginNotFoundError):
            await store.head("missing")

        assert all(headers["authorization"] == "Bearer hf-secret-token" for _, _, headers in hub.requests)
        assert not [headers for _, _, headers in elsewhere.requests if "authorization" in headers]
        assert len([path for _, path, _ in hub.requests if "/revision/" in path]) == 1
        await store.close()


async def test_a_branch_is_looked_up_again_after_a_while() -> None:
    async with hub_stand_in(FILES) as hub:
        clock = LeapingClock()
        store = open_store("hf://datasets/some/data", hub_settings(hub.port), clock)

        def looks() -> int:
            return len([path for _, path, _ in hub.requests if path.startswith("/api/") and "/tree/" not in path])

        await store.head("config.json")
        await store.head("config.json")
        assert looks() == 1
        for expected in (2, 3):
            await clock.sleep(PINNED_S)
            await store.head("config.json")
            assert looks() == expected
        await store.close()


async def test_a_prefix_in_a_repository() -> None:
    async with hub_stand_in(FILES) as hub:
        store = open_store("hf://datasets/some/data/model", hub_settings(hub.port))
        assert [info.key async for info in store.list()] == ["one.bin", "two.txt"]
        assert await store.get_range("one.bin", 1, 4) == BODY[1:4]
        await store.close()


async def test_a_repository_that_is_not_there_or_not_ours() -> None:
    async with hub_stand_in(FILES, token="hf-secret-token") as hub:
        store = open_store("hf://datasets/some/data", hub_settings(hub.port, "another-token"))
        with pytest.raises(OriginNotFoundError, match="HF_TOKEN") as caught:
            await store.head("config.json")
        assert "another-token" not in str(caught.value) + repr(caught.value.details)
        await store.close()
