"""Uploads that are interrupted, cancelled, raced or answered into the void, on real servers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from node.cli.demo.s3_server import S3Server
from node.origin.factory import open_store
from node.origin.s3.botocore_client import S3ApiClient
from node.origin.settings import OriginSettings
from protocol.errors import OriginDeniedError, OriginExistsError, OriginNotFoundError, OriginUnavailableError
from tests.support.origins.servers import PART_BYTES, in_parts, juicefs_gateway, settings_of, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")
LARGE, SIX_PARTS = in_parts(3), in_parts(6)


@pytest.fixture(scope="module")
def weed(shared_s3: S3Server) -> S3Server:
    return shared_s3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def juicefs(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[OriginSettings]:
    async with juicefs_gateway(tmp_path_factory.mktemp("juicefs")) as settings:
        yield settings


class Recorded:
    """Which calls an upload made, and where it is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fail_from_part = 1 << 30
        self.brought, self.brought_the_others = 0, asyncio.Event()
        real = S3ApiClient.call

        async def call(calls: S3ApiClient, method: str, did: str, key: str, wanted: dict[str, int]) -> object:
            self.calls.append((method, wanted.get("PartNumber", 0)))
            if method == "upload_part" and wanted["PartNumber"] >= self.fail_from_part:
                await self.brought_the_others.wait()
                raise OriginDeniedError("cut off")
            answer = await real(calls, method, did, key, wanted)
            self.brought += method == "upload_part"
            if self.brought == self.fail_from_part - 1:
                self.brought_the_others.set()
            return answer

        monkeypatch.setattr(S3ApiClient, "call", call)

    def parts(self) -> list[int]:
        return sorted(number for method, number in self.calls if method == "upload_part")


@pytest.mark.parametrize("server", ["weed", "juicefs"])
async def test_an_interrupted_upload_sends_only_what_is_missing(
    server: str, weed: S3Server, juicefs: OriginSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    store = open_store("s3://shards/resumed", settings_of(weed) if server == "weed" else juicefs)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIX_PARTS))
    recorded.fail_from_part = 4
    with pytest.raises(OriginDeniedError, match="cut off"):
        await store.put("file", path)
    assert recorded.parts()[:3] == [1, 2, 3]
    with pytest.raises(OriginNotFoundError):
        await store.head("file")

    # Part 2 is another one now: it counts no more.
    with path.open("r+b") as file:
        file.seek(PART_BYTES + 5)
        file.write(b"changed")
    recorded.calls.clear()
    recorded.fail_from_part = 1 << 30
    told: list[int] = []
    await store.put("file", path, on_bytes=told.append)
    assert recorded.parts() == [2, 4, 5, 6]
    assert ("create_multipart_upload", 0) not in recorded.calls
    assert sum(told) == SIX_PARTS
    assert await streamed(store, "file") == path.read_bytes()


async def test_a_cancelled_upload_ends_at_once_and_goes_on_later(
    weed: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    store = open_store("o3://shards/cancelled", settings_of(weed))
    body, sent = os.urandom(SIX_PARTS), asyncio.Event()
    upload = asyncio.create_task(store.put("file", body, on_bytes=lambda _: sent.set()))
    await sent.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(upload, 5)
    begun = len(recorded.parts())
    recorded.calls.clear()
    await store.put("file", body)
    assert begun >= 1
    assert len(recorded.parts()) < 6, "what was there went again"
    assert await streamed(store, "file") == body


async def test_the_answer_of_complete_is_lost(weed: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real, lost = S3ApiClient.call, list[str]()

    async def call(calls: S3ApiClient, method: str, did: str, key: str, wanted: dict[str, int]) -> object:
        answer = await real(calls, method, did, key, wanted)
        if method == "complete_multipart_upload" and not lost:
            lost.append(method)
            raise OriginUnavailableError("the connection broke", {"origin": "", "key": "", "status": "", "tried": 1})
        return answer

    monkeypatch.setattr(S3ApiClient, "call", call)
    store, body = open_store("o3://shards/lost", settings_of(weed)), os.urandom(LARGE)
    info = await store.put("file", body)
    assert lost
    assert info.etag == (await store.head("file")).etag


@pytest.mark.parametrize("size", [1000, LARGE])
async def test_of_two_writers_of_a_new_name_one_wins(weed: S3Server, tmp_path: Path, size: int) -> None:
    for store in (
        open_store(f"o3://shards/race/{size}", settings_of(weed)),
        open_store(tmp_path.as_uri(), OriginSettings()),
    ):
        bodies = [os.urandom(size), os.urandom(size)]
        done = await asyncio.gather(*(store.put("a", body, if_absent=True) for body in bodies), return_exceptions=True)
        won = [body for body, outcome in zip(bodies, done, strict=True) if not isinstance(outcome, BaseException)]
        assert len(won) == 1, done
        assert [type(outcome) for outcome in done if isinstance(outcome, BaseException)] == [OriginExistsError], done
        assert await streamed(store, "a") == won[0]


async def test_two_writers_of_other_bytes_do_not_take_each_others_parts(
    weed: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    store, bodies = open_store("o3://shards/mixed", settings_of(weed)), [os.urandom(LARGE), os.urandom(LARGE)]
    sent = asyncio.Event()
    first = asyncio.create_task(store.put("file", bodies[0], if_absent=True, on_bytes=lambda _: sent.set()))
    await sent.wait()
    second = asyncio.create_task(store.put("file", bodies[1], if_absent=True))
    done = await asyncio.gather(first, second, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in done) == ["ObjectInfo", "OriginExistsError"], done
    won = [body for body, outcome in zip(bodies, done, strict=True) if not isinstance(outcome, BaseException)]
    assert await streamed(store, "file") == won[0]
    assert [method for method, _ in recorded.calls].count("create_multipart_upload") == 2
