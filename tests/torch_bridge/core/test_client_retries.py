"""What is tried again, how long is waited, and what is said in the end; streams that break and go on."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from node.origin.core.errors import corrupt_error, origin_error
from node.origin.interface import ObjectInfo, OnBytes
from node.origin.local import FileStore
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import (
    InvalidParamsError,
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginUnavailableError,
)
from tests.support.bridge.o3_client import BODY, served
from tests.support.origins.servers import RawServer, raw_server
from torch_bridge import O3Client, RetryPolicy
from torch_bridge.core.location import StoreLocation
from torch_bridge.core.retry import BROKEN_TRIES
from torch_bridge.core.store import Store

QUICK = RetryPolicy(total_s=20.0, first_wait_s=0.01, longest_wait_s=0.05)


def error(kind: type[OriginError] = OriginUnavailableError, **others: float) -> OriginError:
    return origin_error(kind, "read", "nothing", "wait", origin="o3://b", key="k", **others)  # type: ignore[arg-type]


def test_waits_grow_are_spread_and_end_with_the_time() -> None:
    policy = RetryPolicy(total_s=60.0, first_wait_s=1.0, longest_wait_s=10.0)
    for tries, longest in ((1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (900, 10.0)):
        waits = [policy.wait_s(error(), tries, 0.0) or 0.0 for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
        assert len(set(waits)) > 10
    assert policy.wait_s(error(), 1, 59.9) is None
    assert RetryPolicy(attempts=3).wait_s(error(), 3, 0.0) is None
    assert RetryPolicy(attempts=3).wait_s(error(), 2, 0.0) is not None


def test_a_server_that_asks_for_a_wait_is_waited_for_or_given_up_at_once() -> None:
    policy = RetryPolicy(total_s=60.0, longest_wait_s=1.0)
    assert 30.0 <= (policy.wait_s(error(retry_after_s=30.0), 1, 0.0) or 0.0) <= 31.0
    assert policy.wait_s(error(retry_after_s=30.0), 1, 40.0) is None
    assert policy.wait_s(error(retry_after_s=3600.0), 1, 0.0) is None


def test_what_will_not_pass_is_not_tried_again() -> None:
    for kind in (OriginDeniedError, OriginExistsError, OriginCorruptError, OriginError):
        assert RetryPolicy().wait_s(error(kind), 1, 0.0) is None
    assert RetryPolicy().wait_s(ValueError(), 1, 0.0) is None
    broken = corrupt_error("read", "it broke off", origin="o3://b", key="k", broke_off=True)
    assert RetryPolicy().wait_s(broken, BROKEN_TRIES - 1, 0.0) is not None
    assert RetryPolicy().wait_s(broken, BROKEN_TRIES, 0.0) is None


@pytest.mark.parametrize(
    "wrong", [{"total_s": -1.0}, {"first_wait_s": 0.0}, {"longest_wait_s": 0.01}, {"attempts": 0}, {"attempts": -1}]
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: Mapping[str, float]) -> None:
    with pytest.raises(InvalidParamsError, match="total_s must be 0 or more"):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


async def test_time_counts_anew_when_bytes_have_moved() -> None:
    moved = 0

    async def call(tries: int) -> int:
        nonlocal moved
        moved += tries <= 5
        raise error()

    with pytest.raises(OriginUnavailableError, match="tried 3 times") as caught:
        await RetryPolicy(attempts=3, first_wait_s=0.001, longest_wait_s=0.001).run(call, lambda: moved)
    assert (moved, caught.value.details["tried"]) == (5, 3)


async def test_a_wait_can_be_cancelled() -> None:
    async def call(_: int) -> None:
        raise error(retry_after_s=50.0)

    task = asyncio.create_task(RetryPolicy().run(call))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def store_of(server: RawServer, retry: RetryPolicy = QUICK) -> Store:
    return O3Client(retry=retry, settings=OriginSettings()).at(f"{server.url}/shards")


def test_one_layer_of_retries_that_says_how_often_it_tried(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with served(raw_server(BODY, "503", "503", "ok")) as server:
        store = store_of(server)
        assert store.get_range("a", 5, 900) == BODY[5:900]
        assert len(server.requests) == 3
        assert [record.name for record in caplog.records if "503" in record.message] == ["torch_bridge.core.retry"] * 2
        assert "stamina.retry_scheduled" not in caplog.text
        few = store_of(server, RetryPolicy(attempts=4, first_wait_s=0.01))
        server.modes, server.requests = ["503"], []
        with pytest.raises(OriginUnavailableError, match=r"tried 4 times in \d") as caught:
            few.head("a")
        assert (len(server.requests), caught.value.details["tried"]) == (4, 4)
        server.modes, server.requests = ["403"], []
        with pytest.raises(OriginDeniedError):
            store.head("a")
        assert len(server.requests) == 1
        store.close()
        few.close()


def test_each_of_several_ranges_is_retried_by_itself() -> None:
    with served(raw_server(BODY * 4, "ok")) as server:
        store = store_of(server)
        wanted = [(0, 100), (3_000_000, 3_000_100), (6_000_000, 6_000_100)]
        server.modes = ["503", "ok"]
        assert store.get_ranges("a", wanted) == [(BODY * 4)[start:end] for start, end in wanted]
        assert len(server.requests) == 4
        store.close()


def test_a_stream_goes_on_at_the_byte_and_asks_for_none_twice() -> None:
    body = BODY[:300_000]  # what comes before a break is handed on in time: more might wait, and be asked for again
    with served(raw_server(body, *["breaks-off", "503"] * 8, "ok")) as server:
        # Two tries in a row never fail: with two, only a count that begins anew gets through.
        store = store_of(server, RetryPolicy(attempts=2, first_wait_s=0.01))
        assert b"".join(store.stream("a", 1000)) == body[1000:]
        assert len(server.given) > 5
        for (start, end), (after, _) in zip(server.given, server.given[1:], strict=False):
            assert after == start + (end - start) * 2 // 3
        assert asyncio.run(store.aio.get("a")) == body
        server.modes = ["503"]
        with pytest.raises(OriginUnavailableError, match="tried 2 times"):
            store.get("a")
        store.close()


def test_a_wrong_answer_ends_a_stream() -> None:
    with served(raw_server(BODY, "breaks-off", "ignores-range")) as server:
        store = store_of(server)
        with pytest.raises(OriginCorruptError, match="ignores Range"):
            store.get("a")
        assert len(server.requests) == 2
        store.close()


class AnswerLost(FileStore):
    """It writes, and the answer of the first write is lost."""

    writes = 0
    other: bytes | None = None
    """What lies there instead, by the time of the second try."""

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        self.writes += 1
        assert isinstance(body, bytes)
        found = await super().put(key, self.other or body, if_absent=if_absent, metadata=metadata, on_bytes=on_bytes)
        if self.writes == 1:
            raise error()
        return found


@pytest.mark.parametrize("other", [None, b"z" * len(BODY)])
def test_what_was_written_by_a_try_whose_answer_was_lost_is_ours(tmp_path: Path, other: bytes | None) -> None:
    place, told = StoreLocation(tmp_path.as_uri(), OriginSettings(), QUICK), list[int]()
    place._opened = backing = AnswerLost(OriginUrl.parse(tmp_path.as_uri()))
    backing.other = other
    store = Store(place)
    if other is None:
        assert store.put("a", BODY, if_absent=True, on_bytes=told.append).size == len(BODY)
        assert sum(told) == len(BODY), "each byte is told once"
    else:
        with pytest.raises(OriginExistsError):
            store.put("a", BODY, if_absent=True)
    assert backing.writes == 2
    with pytest.raises(OriginExistsError):
        store.put("a", BODY, if_absent=True)


def test_one_store_in_many_threads_opens_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY)
    client = O3Client(settings=OriginSettings())
    opened, barrier = set[int](), threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        store = client.at(tmp_path.as_uri())
        opened.add(id(store.backing))
        assert store.get_range("a", 0, 10) == BODY[:10]

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(opened) == 1
