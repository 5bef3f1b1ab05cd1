"""One attempt at a generation: a session opened on the nodes of one plan, and the tokens that come back."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from node.pipeline.driver.plan import Plan
from protocol.commands.common import ChatMessage, Empty
from protocol.commands.sessions import (
    CloseSessionParams,
    OpenSessionParams,
    OpenSessionResult,
    SessionFailed,
    SessionToken,
    StartSessionParams,
    TokenizeParams,
    TokenizeResult,
)
from protocol.commands.tasks import Sampling
from protocol.errors import (
    EngineError,
    MalformedMessageError,
    PeerLostError,
    ShardNotLoadedError,
    ShoalError,
    StageLostError,
    TimedOutError,
    TransportError,
    UnreachableError,
    error_from_wire,
)
from protocol.ids import ManifestDigest, NodeId

SETUP_TIMEOUT_S = 30.0
"""For each of TOKENIZE, OPEN_SESSION and START_SESSION."""
CLOSE_TIMEOUT_S = 2.0
TOKEN_TIMEOUT_S = 300.0
"""Without a token for this long the pipeline is taken to be stuck; a long prompt on slow machines is faster."""
_GRACE_S = 0.3
"""A stage often learns sooner that its neighbour is gone than we do; then this is waited for our own connections."""
_MENDABLE = (EngineError, PeerLostError, StageLostError, TimedOutError, TransportError, UnreachableError)
R = TypeVar("R")


class StageConnection(Protocol):
    """A connection to a node, as `protocol.client.Client` is."""

    @property
    def closed(self) -> asyncio.Event: ...
    def on(self, method: str, callback: Callable[[str, dict[str, Any]], None]) -> None: ...
    async def call(
        self, method: str, params: msgspec.Struct, *, result_type: type[R], timeout_s: float | None = None
    ) -> R: ...


Connect = Callable[[NodeId], AbstractAsyncContextManager[StageConnection]]
"""Opens a new connection to a node; raises UnreachableError."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be generated; `prompt` or `messages`, not both."""

    model: ManifestDigest
    context_length: int
    """Tokens that the model was trained for."""
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    exact: bool = False


@dataclass(frozen=True)
class GeneratedToken:
    """One token, in order."""

    token: int
    piece: bytes
    """Its bytes as text."""
    end: bool
    """An end-of-generation token: the last one, and not part of the answer."""


class AttemptLostError(Exception):
    """Raised when an attempt failed in a way that another one may not."""

    def __init__(self, cause: ShoalError, node: NodeId | None) -> None:
        """`node` is the one that was lost, where that is known."""
        super().__init__(cause.message)
        self.cause, self.node = cause, node


class Attempt:
    """One session on the nodes of one plan. Entering connects; leaving closes the session everywhere."""

    def __init__(self, session: str, attempt: int, request: GenerationRequest, plan: Plan, connect: Connect) -> None:
        self._session, self._attempt, self._request, self._plan = session, attempt, request, plan
        self._connect = connect
        self._connections: dict[NodeId, StageConnection] = {}
        self._events: asyncio.Queue[SessionToken | AttemptLostError | ShoalError] = asyncio.Queue()
        self._stack = AsyncExitStack()
        self._watching: list[asyncio.Task[None]] = []
        self._opened: list[int] = []

    async def __aenter__(self) -> Attempt:
        try:
            for node in self._plan.nodes():
                with _lost_with(node):
                    connection = await self._stack.enter_async_context(self._connect(node))
                connection.on("SESSION_TOKEN", self._got_token)
                connection.on("SESSION_FAILED", self._got_failure)
                self._connections[node] = connection
                self._watching.append(asyncio.create_task(self._watch(node, connection)))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await asyncio.gather(*map(self._close, self._opened))
        finally:
            for task in self._watching:
                task.cancel()
            try:
                await asyncio.gather(*self._watching, return_exceptions=True)
            finally:
                await self._stack.aclose()

    async def tokenize(self) -> bytes:
        """The prompt's tokens, int32."""
        params = TokenizeParams(model=self._request.model, prompt=self._request.prompt, messages=self._request.messages)
        return (await self._call(0, "TOKENIZE", params, TokenizeResult)).tokens

    async def start(self, n_positions: int, prompt: bytes, drawn: Sequence[int]) -> None:
        """Open the session on every stage, then let them run, the first one last."""
        stages, request = self._plan.stages, self._request
        key = secrets.token_bytes(32)

        async def open_stage(number: int) -> str:
            self._opened.append(number)
            params = OpenSessionParams(
                session=self._session,
                key=key,
                attempt=self._attempt,
                model=request.model,
                stage=number,
                n_stages=len(stages),
                shards=stages[number].shards,
                exact=request.exact,
                n_positions=n_positions,
                sampling=request.sampling,
            )
            return (await self._call(number, "OPEN_SESSION", params, OpenSessionResult)).ticket

        async def start_stage(number: int) -> None:
            params = StartSessionParams(
                session=self._session,
                attempt=self._attempt,
                stage=number,
                next_ticket=tickets[(number + 1) % len(stages)],
                tokens=prompt if number == 0 else b"",
                replay=np.asarray(drawn, "<i4").tobytes() if number == 0 else b"",
                max_tokens=request.max_tokens - len(drawn),
            )
            await self._call(number, "START_SESSION", params, Empty)

        tickets = await _all([open_stage(number) for number in range(len(stages))])
        await _all([start_stage(number) for number in range(1, len(stages))])
        await start_stage(0)

    async def next_token(self, position: int) -> GeneratedToken:
        """The token at `position`. Raises AttemptLostError, or the error that ended the session."""
        try:
            async with asyncio.timeout(TOKEN_TIMEOUT_S):
                event = await self._events.get()
        except TimeoutError:
            raise AttemptLostError(TimedOutError(f"no token came for {TOKEN_TIMEOUT_S:g} s"), None) from None
        if not isinstance(event, SessionToken):
            raise event
        if event.position != position:
            raise AttemptLostError(
                StageLostError(f"a token is missing: got {event.position}, expected {position}"), None
            )
        return GeneratedToken(event.token, event.piece, event.end)

    async def lost_nodes(self) -> set[NodeId]:
        """Nodes whose connections are gone, or go within a moment."""
        waits = [asyncio.ensure_future(connection.closed.wait()) for connection in self._connections.values()]
        try:
            if waits:
                await asyncio.wait(waits, timeout=_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
            return {node for node, connection in self._connections.items() if connection.closed.is_set()}
        finally:
            for wait in waits:
                wait.cancel()

    async def _call(self, number: int, method: str, params: msgspec.Struct, result_type: type[R]) -> R:
        node = self._plan.stages[number].node_id
        with _lost_with(node):
            return await self._connections[node].call(
                method, params, result_type=result_type, timeout_s=SETUP_TIMEOUT_S
            )

    async def _close(self, number: int) -> None:
        connection = self._connections[self._plan.stages[number].node_id]
        params = CloseSessionParams(session=self._session, attempt=self._attempt, stage=number)
        with contextlib.suppress(ShoalError):  # closing the connection closes the session too
            await connection.call("CLOSE_SESSION", params, result_type=Empty, timeout_s=CLOSE_TIMEOUT_S)

    async def _watch(self, node: NodeId, connection: StageConnection) -> None:
        await connection.closed.wait()
        self._events.put_nowait(AttemptLostError(UnreachableError(f"the connection to node {node} is lost"), node))

    def _got_token(self, _: str, params: dict[str, Any]) -> None:
        with contextlib.suppress(msgspec.ValidationError):
            token = msgspec.convert(params, SessionToken)
            here = (token.session, token.attempt) == (self._session, self._attempt)
            if here and self._events.qsize() <= self._request.max_tokens:  # a node that sends more is not believed
                self._events.put_nowait(token)

    def _got_failure(self, _: str, params: dict[str, Any]) -> None:
        with contextlib.suppress(msgspec.ValidationError):
            failed = msgspec.convert(params, SessionFailed)
            if (failed.session, failed.attempt) != (self._session, self._attempt):
                return
            error = error_from_wire(failed.error)
            # The node that reports is alive; whoever is not is found when the next plan is carried out.
            self._events.put_nowait(AttemptLostError(error, None) if isinstance(error, _MENDABLE) else error)


@contextlib.contextmanager
def _lost_with(node: NodeId) -> Iterator[None]:
    """Turn what another attempt may mend into AttemptLostError; the next plan does without an unreachable node."""
    try:
        yield
    except (UnreachableError, TimedOutError, MalformedMessageError) as err:
        raise AttemptLostError(err, node) from err
    except (*_MENDABLE, ShardNotLoadedError) as err:
        raise AttemptLostError(err, None) from err


async def _all(calls: Sequence[Awaitable[R]]) -> list[R]:
    """Run all at once; the first error cancels the others and is raised itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(_awaited(call)) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


async def _awaited(call: Awaitable[R]) -> R:
    return await call
