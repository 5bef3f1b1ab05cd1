"""What tests of O3Client share: a forked child that is waited for, and what is asked of a store in any process."""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

from node.cli.demo.s3_server import S3Server
from protocol.errors import OriginDeniedError
from torch_bridge import O3Client, RetryPolicy
from torch_bridge.core.store import Store

T = TypeVar("T")
BODY = bytes(range(251)) * 8001
CHILD_S = 30.0


def client_of(server: S3Server, **others: Any) -> O3Client:
    """With the keys as arguments."""
    return O3Client(
        endpoint=server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        backend="gateway",
        retry=RetryPolicy(total_s=10.0),
        **others,
    )


def in_fork(work: Callable[[], T]) -> T:
    """What `work` gives in a forked child; AssertionError with what it raised, or where it hangs."""
    into, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                said = pickle.dumps((True, work()))
            except BaseException:
                said = pickle.dumps((False, traceback.format_exc()))
            os.close(into)
            with os.fdopen(out, "wb") as pipe:
                pipe.write(said)
        finally:
            os._exit(0)
    os.close(out)
    with os.fdopen(into, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], CHILD_S)
        if not ready:
            os.kill(child, signal.SIGKILL)
        data = pipe.read()
    os.waitpid(child, 0)
    assert data, "the child hung, or died"
    fine, found = pickle.loads(data)
    assert fine, found
    return found  # type: ignore[no-any-return]


def read_in_every_way(store: Store, key: str = "a") -> str:
    """AssertionError where something is not as it was written."""
    assert store.head(key).size == len(BODY)
    assert store.get(key) == BODY
    assert store.get_range(key, 5, 900_000) == BODY[5:900_000]
    assert store.get_ranges(key, [(9, 20), (1_900_000, 1_900_100)]) == [BODY[9:20], BODY[1_900_000:1_900_100]]
    assert b"".join(store.stream(key, 1000, 1_000_001)) == BODY[1000:1_000_001]
    assert asyncio.run(store.aio.get_range(key, 0, 3)) == BODY[:3]
    return "read"


def say_what_is_read(store: Store, said: Any) -> None:
    """For a spawned process; `said` is a queue."""
    try:
        said.put(read_in_every_way(store))
    except OriginDeniedError as error:
        said.put(error.message)


@contextmanager
def served(server: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Run an async server on a loop of its own, so that blocking clients of this process can ask it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def counted(items: int, closed: list[bool]) -> AsyncIterator[int]:
    """Numbers; `closed` gets an entry when it is closed."""
    try:
        for number in range(items):
            await asyncio.sleep(0)
            yield number
    finally:
        await asyncio.sleep(0.01)
        closed.append(True)
