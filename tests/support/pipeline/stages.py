"""Workers over a memory transport, as the daemon sees them, and sessions over several of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from node.pipeline.stage.ipc import (
    CloseRequest,
    EngineMessage,
    EngineRequest,
    ErrorReply,
    FailureEvent,
    LoadRequest,
    NumberedRequest,
    OpenRequest,
    StartRequest,
    SuccessReply,
    TokenEvent,
)
from node.pipeline.worker.channels import Channels
from node.pipeline.worker.scheduler import EngineThread
from node.pipeline.worker.worker import Worker, WorkerSettings
from protocol.commands.sessions import (
    CloseSessionParams,
    OpenSessionParams,
    SessionFailed,
    SessionToken,
    StartSessionParams,
)
from protocol.errors import ShoalError, error_from_wire
from protocol.ids import ManifestDigest
from tests.support.pipeline.parts import MemoryNetwork, TinyEngine

MODEL = ManifestDigest("0" * 64)
KEY = b"k" * 32


class Stage:
    """A worker as the daemon sees it, without a process."""

    def __init__(self, network: MemoryNetwork, ticket: str, engine: TinyEngine) -> None:
        self.network, self.ticket, self.engine = network, ticket, engine
        self.endpoint = network.endpoint(ticket)
        self.events: asyncio.Queue[SessionToken | SessionFailed] = asyncio.Queue()
        self.seen: list[SessionToken] = []
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.worker: Worker
        self.thread: EngineThread

    @contextlib.asynccontextmanager
    async def running(self, shards: Sequence[int], max_sessions: int = 4) -> AsyncIterator[Stage]:
        settings = WorkerSettings(ctx_size=256, max_sessions=max_sessions)
        async with EngineThread(self.engine) as self.thread:
            async with Worker(self.thread, Channels(self.endpoint), settings, self._take) as self.worker:
                for shard_id in shards:
                    await self.request(LoadRequest(shard_id, "/nowhere"))
                yield self
            assert not self.engine.open, "a sequence was left open"
        assert not [name for name in self.network.inboxes if name[0] == self.ticket], "an inbox was left open"

    async def request(self, request: EngineRequest) -> Any:
        number = len(self._answers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        self.worker.handle(NumberedRequest(number, request))
        return await self._answers[number]

    def _take(self, message: EngineMessage) -> None:
        match message:
            case SuccessReply(number, result):
                self._answers[number].set_result(result)
            case ErrorReply(number, error):
                self._answers[number].set_exception(error_from_wire(error))
            case TokenEvent(_, token):
                self.network.log.append(f"report {token.position}")
                self.seen.append(token)
                self.events.put_nowait(token)
            case FailureEvent(failed):
                self.events.put_nowait(failed)

    async def token(self, session: str | None = None) -> SessionToken:
        while True:
            event = await asyncio.wait_for(self.events.get(), 10)
            assert isinstance(event, SessionToken), event
            if session in (None, event.session):
                return event

    async def failure(self) -> ShoalError:
        while isinstance(event := await asyncio.wait_for(self.events.get(), 10), SessionToken):
            pass
        return error_from_wire(event.error)


@contextlib.asynccontextmanager
async def pipeline(*shards: Sequence[int], engines: Sequence[TinyEngine] = ()) -> AsyncIterator[list[Stage]]:
    """One process for each run of shards."""
    network = MemoryNetwork()
    n_shards = 1 + max(shard for run in shards for shard in run)
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                Stage(network, f"t{n}", engines[n] if engines else TinyEngine(n_shards)).running(run)
            )
            for n, run in enumerate(shards)
        ]


def int32(values: Sequence[int]) -> bytes:
    return np.asarray(values, "<i4").tobytes()


def opening(number: int, n_stages: int, shards: Sequence[int], **more: Any) -> OpenSessionParams:
    given: dict[str, Any] = {"session": "s", "key": KEY, "model": MODEL, "n_positions": 50, **more}
    return OpenSessionParams(stage=number, n_stages=n_stages, shards=tuple(shards), **given)


async def begin(
    stages: Sequence[Stage],
    runs: Sequence[Sequence[int]],
    prompt: Sequence[int],
    max_tokens: int,
    *,
    replay: Sequence[int] = (),
    session: str = "s",
    **more: Any,
) -> None:
    """Open and start a session over `stages`, stage k with the shards `runs[k]`."""
    n_positions = len(prompt) + len(replay) + max_tokens
    for number, (stage, run) in enumerate(zip(stages, runs, strict=True)):
        await stage.request(
            OpenRequest(opening(number, len(runs), run, session=session, n_positions=n_positions, **more))
        )
    for number in reversed(range(len(stages))):
        await stages[number].request(
            StartRequest(
                StartSessionParams(
                    session=session,
                    attempt=more.get("attempt", 0),
                    stage=number,
                    next_ticket=stages[(number + 1) % len(stages)].ticket,
                    tokens=int32(prompt) if number == 0 else b"",
                    replay=int32(replay) if number == 0 else b"",
                    max_tokens=max_tokens,
                )
            )
        )


async def end(stages: Sequence[Stage], session: str = "s", attempt: int = 0) -> None:
    for number, stage in enumerate(stages):
        await stage.request(CloseRequest(CloseSessionParams(session=session, attempt=attempt, stage=number)))


async def drawn(stage: Stage, count: int, session: str | None = None) -> list[int]:
    return [(await stage.token(session)).token for _ in range(count)]


async def reference(prompt: Sequence[int], count: int, n_shards: int) -> list[int]:
    async with pipeline(range(n_shards)) as [whole]:
        await begin([whole], [range(n_shards)], prompt, count)
        return await drawn(whole, count)


PROMPT = [(7 * n + 3) % 90 for n in range(70)]


async def refused(stage: Stage, order: EngineRequest) -> str:
    with pytest.raises(ShoalError) as caught:
        await stage.request(order)
    return caught.value.code
