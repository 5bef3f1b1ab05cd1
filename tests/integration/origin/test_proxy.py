"""The fault-injecting proxy, with plain HTTP against the real S3 server behind it: what it must do to be believed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys

import aiohttp
import pytest

from node.cli.demo.s3_server import S3Server
from tests.support.origins.faults import Fault, Ledger, Range, Rules, Sent
from tests.support.origins.presigned import presigned_url
from tests.support.origins.proxy import OriginProxy
from tests.support.waiting import eventually

SIZE = 1_000_003
BYTES = random.Random(3).randbytes(SIZE)
KEY = "shards/some/object"


@pytest.fixture(scope="module")
def s3(shared_s3: S3Server) -> S3Server:
    return shared_s3


def signed(endpoint: str, s3: S3Server, method: str = "GET", key: str = KEY) -> str:
    return presigned_url(endpoint, key, s3.access_key, s3.secret_key, method=method)


async def get(
    session: aiohttp.ClientSession, url: str, start: int | None = None, end: int | None = None
) -> tuple[int, bytes]:
    headers = {} if start is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
    async with session.get(url, headers=headers) as answer:
        return answer.status, await answer.read()


def open_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20))


async def put(proxy: OriginProxy, s3: S3Server, session: aiohttp.ClientSession) -> str:
    """Put the object there, through the proxy; a URL to read it."""
    async with session.put(signed(proxy.endpoint, s3, "PUT"), data=BYTES) as answer:
        assert answer.status == 200, await answer.text()
    return signed(proxy.endpoint, s3)


def keys(s3: S3Server) -> tuple[str, str]:
    return s3.access_key, s3.secret_key


async def test_what_passes_is_what_the_server_says_and_every_byte_of_payload_is_counted(s3: S3Server) -> None:
    async with OriginProxy.running(s3.endpoint) as proxy, open_session() as session:
        url = await put(proxy, s3, session)
        assert await get(session, url) == (200, BYTES)
        assert await get(session, url, 100, 300_000) == (206, BYTES[100:300_000])
        assert await get(session, url, 900_000) == (206, BYTES[900_000:])
        async with session.head(signed(proxy.endpoint, s3, "HEAD")) as answer:
            assert (answer.status, answer.content_length) == (200, SIZE)
        counted = [(sent.key, sent.start, sent.size, sent.asked) for sent in proxy.ledger.of()]
        assert counted == [
            (KEY, 0, SIZE, None),
            (KEY, 100, 299_900, (100, 300_000)),
            (KEY, 900_000, SIZE - 900_000, (900_000, None)),
        ]
        assert proxy.ledger.payload_bytes("some/") == SIZE + proxy.ledger.repeated("some/")
        assert proxy.ledger.repeated() == 299_900 + SIZE - 900_000
        assert proxy.ledger.payload_bytes("other") == 0

        # The signature is the client's, for the proxy's host: a wrong one is refused by the server behind.
        wrong = presigned_url(proxy.endpoint, KEY, s3.access_key, "wrong")
        assert (await get(session, wrong))[0] == 403
        assert (await get(session, signed(s3.endpoint, s3).replace(s3.endpoint, proxy.endpoint)))[0] == 403
        assert (await get(session, signed(proxy.endpoint, s3, key="shards/none")))[0] == 404
        listing = presigned_url(proxy.endpoint, "shards/", *keys(s3), query={"list-type": "2", "prefix": "some/"})
        assert KEY.partition("/")[2].encode() in (await get(session, listing))[1]
        assert proxy.ledger.payload_bytes() == SIZE + proxy.ledger.repeated()


async def test_an_error_for_the_next_n_requests_a_share_of_them_or_one_key(s3: S3Server) -> None:
    async with OriginProxy.running(s3.endpoint) as proxy, open_session() as session:
        url = await put(proxy, s3, session)
        proxy.rules.add(Fault(kind="status", status=429, retry_after_s=7, times=1))
        proxy.rules.add(Fault(kind="expired", times=1))
        proxy.rules.add(Fault(kind="expired", status=403, times=1))
        async with session.get(url) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
        status, body = await get(session, url)
        assert (status, b"<Code>ExpiredToken<" in body) == (400, True)
        status, body = await get(session, url)
        assert (status, b"Request has expired" in body) == (403, True)
        assert (await get(session, url))[0] == 200
        proxy.rules.clear()
        proxy.rules.add(Fault(kind="status", status=503, share=0.5))
        assert [(await get(session, url))[0] for _ in range(6)] == [503, 200] * 3
        proxy.rules.clear()
        proxy.rules.add(Fault(kind="status", status=404, key="other"))
        assert (await get(session, url))[0] == 200
        assert proxy.rules.applied == {"status": 4, "expired": 2}
        assert proxy.ledger.payload_bytes() == 5 * SIZE


async def test_bodies_that_end_early_stand_still_or_lie(s3: S3Server) -> None:
    async with OriginProxy.running(s3.endpoint, keys=keys(s3)) as proxy, open_session() as session:
        url = await put(proxy, s3, session)
        proxy.rules.add(Fault(kind="truncate", after_bytes=100_001, times=1))
        got = b""
        async with session.get(url, headers={"Range": "bytes=5-"}) as answer:
            with contextlib.suppress(aiohttp.ClientPayloadError):
                async for block in answer.content.iter_any():
                    got += block
        assert got == BYTES[5 : 5 + 100_001]
        assert proxy.ledger.payload_bytes() == 100_001

        for fault in (Fault(kind="hang", times=1), Fault(kind="stall", after_bytes=50_000, times=1)):
            proxy.ledger.reset()
            proxy.rules.add(fault)
            reading = asyncio.create_task(get(session, url))
            await eventually(lambda fault=fault: proxy.rules.applied.get(fault.kind))
            await eventually(lambda fault=fault: proxy.ledger.payload_bytes() == fault.after_bytes)
            await asyncio.sleep(0.3)
            assert not reading.done()
            assert proxy.ledger.payload_bytes() == fault.after_bytes
            reading.cancel()
            await asyncio.wait([reading])

        proxy.rules.add(Fault(kind="ignore_range", times=1))
        assert await get(session, url, 10, 20) == (200, BYTES)
        assert await get(session, url, 10, 20) == (206, BYTES[10:20])
        proxy.rules.add(Fault(kind="wrong_bytes", offset=200_000, times=1))
        assert (await get(session, url, 0, 200_000))[1] == BYTES[:200_000]
        _, lied = await get(session, url, 100_000, 300_000)
        assert [i for i in range(200_000) if lied[i] != BYTES[100_000 + i]] == [100_000]
        assert (await get(session, url, 100_000, 300_000))[1] == BYTES[100_000:300_000]


async def test_the_rate_holds_for_all_connections_together(s3: S3Server) -> None:
    async with OriginProxy.running(s3.endpoint, rate_bytes_s=2_000_000) as proxy, open_session() as session:
        url = await put(proxy, s3, session)
        began = asyncio.get_running_loop().time()
        assert [body for _, body in await asyncio.gather(*(get(session, url) for _ in range(3)))] == [BYTES] * 3
        # Slower is the machine's business; faster would be the proxy's. A twentieth of a second may leave at once.
        assert asyncio.get_running_loop().time() - began > 3 * SIZE / 2_000_000 - 0.1


async def test_gone_for_a_time_it_refuses_and_comes_back_on_the_same_port(s3: S3Server) -> None:
    async with OriginProxy.running(s3.endpoint, rate_bytes_s=1_000_000) as proxy, open_session() as session:
        url = await put(proxy, s3, session)
        reading = asyncio.create_task(get(session, url))
        async with asyncio.timeout(10):
            while proxy.ledger.payload_bytes() < 200_000:  # noqa: ASYNC110 - it happens on a socket
                await asyncio.sleep(0.01)
        await proxy.gone()
        with pytest.raises(aiohttp.ClientError):
            await reading
        assert proxy.ledger.payload_bytes() < SIZE
        with pytest.raises(aiohttp.ClientConnectorError):
            await get(session, url)
        await proxy.back()
        assert await get(session, url) == (200, BYTES)


async def test_as_a_program_it_is_asked_over_its_control_port(s3: S3Server) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.origins.proxy",
        *("--upstream", s3.endpoint),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        said = json.loads(await process.stdout.readline())
        async with open_session() as session:
            async with session.put(signed(said["endpoint"], s3, "PUT"), data=BYTES) as answer:
                assert answer.status == 200
            url = signed(said["endpoint"], s3)
            async with session.post(said["control"] + "/faults", json={"kind": "nonsense"}) as answer:
                assert answer.status == 400
            async with session.post(said["control"] + "/faults", json={"kind": "status", "status": 503}) as answer:
                assert answer.status == 204
            assert (await get(session, url))[0] == 503
            await session.delete(said["control"] + "/faults")
            assert await get(session, url, 0, 1000) == (206, BYTES[:1000])
            await session.post(said["control"] + "/gone")
            with pytest.raises(aiohttp.ClientError):
                await get(session, url)
            await session.post(said["control"] + "/back")
            assert (await get(session, url, 500, 1500))[0] == 206
            async with session.get(said["control"] + "/sent") as answer:
                told = await answer.json()
            assert (told["payload_bytes"], told["repeated_bytes"], told["applied"]) == (2000, 500, {"status": 1})
            await session.post(said["control"] + "/reset")
            async with session.get(said["control"] + "/sent") as answer:
                assert (await answer.json())["payload_bytes"] == 0
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_the_ledger_and_the_rules_by_themselves() -> None:
    ledger = Ledger()
    for key, start, size, fault in (
        ("a", 0, 100, ""),
        ("a", 50, 100, ""),
        ("a", 60, 10, ""),
        ("b", 0, 100, ""),
        ("b", 0, 30, "ignore_range"),
    ):
        ledger.sent.append(Sent(key=key, start=start, size=size, asked=None, fault=fault))
    assert (ledger.repeated("a"), ledger.repeated("b"), ledger.repeated()) == (60, 0, 60)
    assert ledger.pieces_sent_twice("a", 10) == [5, 6, 7, 8, 9]
    assert ledger.pieces_sent_twice("a", 50) == [1]
    assert ledger.pieces_sent_twice("a", 100) == []
    assert ledger.pieces_sent_twice("b", 10) == []
    assert Range.asked("bytes=5-9") == (5, 10)
    assert Range.asked("bytes=5-") == (5, None)
    assert [Range.asked(header) for header in (None, "bytes=-5", "items=1-2", "bytes=1-2,4-5")] == [None] * 4
    rules = Rules()
    rules.add(Fault(kind="status", share=0.25, times=2))
    assert [rules.take("GET", "k", None) is not None for _ in range(12)] == ([True] + [False] * 3) * 2 + [False] * 4
