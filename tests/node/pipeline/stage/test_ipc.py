"""The pipe between daemon and engine process, over a real socketpair."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from node.pipeline.engine.loaded_shard import LoadedShard
from node.pipeline.stage.ipc import (
    EngineMessage,
    EngineReady,
    LoadRequest,
    NumberedRequest,
    Pipe,
    PipeLimits,
    SuccessReply,
    TokenEvent,
)
from protocol.commands.sessions import SessionToken

DEFAULT = PipeLimits()
SHARD = LoadedShard(0, 1, 2, 3, is_first=True, is_last=False, memory_bytes=4)


class End:
    """What one end of a pipe saw."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()


@asynccontextmanager
async def pair(
    limits: PipeLimits = DEFAULT,
) -> AsyncIterator[tuple[Pipe[NumberedRequest], Pipe[EngineMessage], End, End]]:
    a, b = socket.socketpair()
    at_process, at_daemon = End(), End()
    process: Pipe[NumberedRequest] = await Pipe.over(
        a, NumberedRequest, at_process.messages.put_nowait, at_process.closed.set_result
    )
    daemon: Pipe[EngineMessage] = await Pipe.over(
        b, EngineMessage, at_daemon.messages.put_nowait, at_daemon.closed.set_result, limits=limits
    )
    try:
        yield process, daemon, at_process, at_daemon
    finally:
        process.close()
        daemon.close()
        await at_process.closed
        await at_daemon.closed


async def test_messages_come_whole_and_in_order_both_ways() -> None:
    async with pair() as (process, daemon, at_process, at_daemon):
        orders = [NumberedRequest(n, LoadRequest(n, "/x" * n * 1000)) for n in range(50)]
        for order in orders:
            daemon.send(order)
        assert [await at_process.messages.get() for _ in orders] == orders
        token = TokenEvent(4, SessionToken(session="s", attempt=1, position=2, token=3, piece=b"\xff\x00", end=False))
        answers = [EngineReady("t"), SuccessReply(1, SHARD), SuccessReply(2), token]
        for answer in answers:
            process.send(answer)
        assert [await at_daemon.messages.get() for _ in answers] == answers


async def test_a_closed_end_is_noticed_and_swallows_what_is_sent() -> None:
    async with pair() as (process, daemon, _, at_daemon):
        process.close()
        assert "closed the pipe" in await at_daemon.closed
        daemon.send(NumberedRequest(1, LoadRequest(1, "x")))
        at_daemon.closed = asyncio.get_running_loop().create_future()
        at_daemon.closed.set_result("seen")


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x02\x91\x01"])
async def test_what_is_no_frame_ends_the_pipe(data: bytes) -> None:
    a, b = socket.socketpair()
    end = End()
    await Pipe.over(a, NumberedRequest, end.messages.put_nowait, end.closed.set_result)
    with b:
        b.sendall(data)
        assert "frame" in await end.closed
    assert end.messages.empty()


async def test_an_end_that_does_not_read_is_given_up() -> None:
    a, b = socket.socketpair()
    end = End()
    limits = PipeLimits(unsent_bytes=1 << 20)
    pipe: Pipe[NumberedRequest] = await Pipe.over(
        a, NumberedRequest, end.messages.put_nowait, end.closed.set_result, limits=limits
    )
    with b:
        for n in range(100):
            pipe.send(NumberedRequest(n, LoadRequest(n, "x" * 100_000)))
        assert "does not read" in await end.closed


async def test_a_frame_above_the_bound_is_not_sent() -> None:
    async with pair(PipeLimits(frame_bytes=1000)) as (_, daemon, _, _):
        with pytest.raises(ValueError, match="above"):
            daemon.send(NumberedRequest(1, LoadRequest(1, "x" * 2000)))
