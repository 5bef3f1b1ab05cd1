"""The pipe between daemon and engine process, over a real socketpair."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from node.pipeline.stage import ipc as pipes
from node.pipeline.stage.ipc import Answer, Drawn, FromProcess, Load, Loaded, Pipe, Ready, Request
from protocol.commands.sessions import SessionToken


class End:
    """What one end of a pipe saw."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[object] = asyncio.Queue()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Pipe[Request], Pipe[FromProcess], End, End]]:
    a, b = socket.socketpair()
    at_process, at_daemon = End(), End()
    process: Pipe[Request] = await Pipe.over(a, Request, at_process.messages.put_nowait, at_process.closed.set_result)
    daemon: Pipe[FromProcess] = await Pipe.over(
        b, FromProcess, at_daemon.messages.put_nowait, at_daemon.closed.set_result
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
        orders = [Request(n, Load(n, "/x" * n * 1000)) for n in range(50)]
        for order in orders:
            daemon.send(order)
        assert [await at_process.messages.get() for _ in orders] == orders
        token = Drawn(4, SessionToken(session="s", attempt=1, position=2, token=3, piece=b"\xff\x00", end=False))
        answers = [Ready("t"), Answer(1, Loaded(1, 2, 3, True, False, 4)), Answer(2), token]
        for answer in answers:
            process.send(answer)
        assert [await at_daemon.messages.get() for _ in answers] == answers


async def test_a_closed_end_is_noticed_and_swallows_what_is_sent() -> None:
    async with pair() as (process, daemon, _, at_daemon):
        process.close()
        assert "closed the pipe" in await at_daemon.closed
        daemon.send(Request(1, Load(1, "x")))
        at_daemon.closed = asyncio.get_running_loop().create_future()
        at_daemon.closed.set_result("seen")


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x02\x91\x01"])
async def test_what_is_no_frame_ends_the_pipe(data: bytes) -> None:
    a, b = socket.socketpair()
    end = End()
    await Pipe.over(a, Request, end.messages.put_nowait, end.closed.set_result)
    with b:
        b.sendall(data)
        assert "frame" in await end.closed
    assert end.messages.empty()


async def test_an_end_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "MAX_UNSENT_BYTES", 1 << 20)
    a, b = socket.socketpair()
    end = End()
    pipe: Pipe[Request] = await Pipe.over(a, Request, end.messages.put_nowait, end.closed.set_result)
    with b:
        for n in range(100):
            pipe.send(Request(n, Load(n, "x" * 100_000)))
        assert "does not read" in await end.closed


async def test_a_frame_above_the_bound_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "MAX_FRAME_BYTES", 1000)
    async with pair() as (_, daemon, _, _):
        with pytest.raises(ValueError, match="above"):
            daemon.send(Request(1, Load(1, "x" * 2000)))
