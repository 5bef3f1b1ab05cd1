"""The driver of one generation: opens a session on the nodes of a plan, and gives out tokens as they are drawn.

When a stage is lost, it plans again and has the tokens so far replayed on the new stages, so that the stream goes
on with no token lost or doubled. It speaks to nodes through connections that it is given, one for each node and
attempt: a node closes the sessions of a connection that is lost, so a driver that dies leaves nothing running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from node.pipeline.plan import Plan
from protocol.commands.common import ChatMessage
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
    ContextOverflowError,
    EngineError,
    InvalidParamsError,
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

MAX_ATTEMPTS = 3
SETUP_TIMEOUT_S = 30.0
"""For each of TOKENIZE, OPEN_SESSION and START_SESSION."""
CLOSE_TIMEOUT_S = 2.0
TOKEN_TIMEOUT_S = 300.0
"""Without a token for this long the pipeline is taken to be stuck; a long prompt on slow machines is faster."""
_LOST = (EngineError, PeerLostError, StageLostError, TimedOutError, TransportError, UnreachableError)
"""What another attempt may mend."""
_log = logging.getLogger(__name__)
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
MakePlan = Callable[[frozenset[NodeId]], Awaitable[Plan]]
"""Plans without the nodes that were lost, and returns when every shard of the plan is loaded."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be generated; `prompt` or `messages`, not both."""

    model: ManifestDigest
    context_length: int
    """Tokens that the model was trained for."""
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    max_tokens: int = 128
    sampling: Sampling = Sampling()
    exact: bool = False


@dataclass(frozen=True)
class GeneratedToken:
    """One token, in order."""

    token: int
    piece: bytes
    """Its bytes as text."""
    end: bool
    """An end-of-generation token: the last one, and not part of the answer."""


@dataclass
class Generation:
    """Iterate `tokens()` once; the other fields tell how it went."""

    request: GenerationRequest
    make_plan: MakePlan
    connect: Connect
    plan: Plan | None = None
    """Of the last attempt."""
    attempts: int = 0
    prompt_tokens: int = 0
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    _prompt: bytes | None = None
    _drawn: list[int] = field(default_factory=list)

    async def tokens(self) -> AsyncGenerator[GeneratedToken, None]:
        """Yield the tokens of the answer, at most `max_tokens`.

        Close it (`contextlib.aclosing`) where it may be left early. Raises ContextOverflowError before anything
        runs, StageLostError after three attempts, and what planning, tokenizing and opening raise.
        """
        lost: set[NodeId] = set()
        while True:
            attempt = self.attempts
            self.attempts += 1
            self.plan = None
            try:
                self.plan = await self.make_plan(frozenset(lost))
                async with _Attempt(self.session, attempt, self.request, self.plan, self.connect) as running:
                    await self._begin(running)
                    while True:
                        token = await running.next_token(self.prompt_tokens + len(self._drawn))
                        self._drawn.append(token.token)
                        yield token
                        if token.end or len(self._drawn) == self.request.max_tokens:
                            return
            except _LostError as err:
                if err.node is not None:
                    lost.add(err.node)
                _log.warning("session %s, attempt %d: %s", self.session, attempt, err.cause.message)
                if self.attempts == MAX_ATTEMPTS:
                    raise StageLostError(
                        f"the generation broke {MAX_ATTEMPTS} times, the last time after {len(self._drawn)} tokens: "
                        f"{err.cause.message}",
                        {"attempts": self.attempts, "tokens": len(self._drawn), "cause": err.cause.to_wire()},
                    ) from err.cause

    async def _begin(self, running: _Attempt) -> None:
        request = self.request
        if self._prompt is None:
            prompt = await running.tokenize()
            if not prompt or len(prompt) % 4:
                raise InvalidParamsError("the prompt gives no tokens; give one with some text")
            self._prompt, self.prompt_tokens = prompt, len(prompt) // 4
        total = self.prompt_tokens + request.max_tokens
        if total > request.context_length:
            raise ContextOverflowError(
                f"the prompt takes {self.prompt_tokens} tokens and the answer up to {request.max_tokens}, the model's "
                f"context has {request.context_length}; shorten the prompt or lower max_tokens",
                {"prompt_tokens": self.prompt_tokens, "context_length": request.context_length},
            )
        await running.start(total, self._prompt, self._drawn)


class _LostError(Exception):
    """Raised when an attempt failed in a way that another one may not."""

    def __init__(self, cause: ShoalError, node: NodeId | None) -> None:
        super().__init__(cause.message)
        self.cause, self.node = cause, node


class _Attempt:
    """One session on the nodes of one plan. Entering connects; leaving closes the session everywhere."""

    def __init__(self, session: str, attempt: int, request: GenerationRequest, plan: Plan, connect: Connect) -> None:
        self._session, self._attempt, self._request, self._plan = session, attempt, request, plan
        self._connect = connect
        self._connections: dict[NodeId, StageConnection] = {}
        self._events: asyncio.Queue[SessionToken | _LostError | ShoalError] = asyncio.Queue()
        self._stack = AsyncExitStack()
        self._watching: list[asyncio.Task[None]] = []
        self._opened: list[int] = []

    async def __aenter__(self) -> _Attempt:
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
            await self._call(number, "START_SESSION", params, object)

        tickets = await _all([open_stage(number) for number in range(len(stages))])
        await _all([start_stage(number) for number in range(1, len(stages))])
        await start_stage(0)

    async def next_token(self, position: int) -> GeneratedToken:
        """The token at `position`. Raises _LostError, or the error that ended the session."""
        try:
            async with asyncio.timeout(TOKEN_TIMEOUT_S):
                event = await self._events.get()
        except TimeoutError:
            raise _LostError(TimedOutError(f"no token came for {TOKEN_TIMEOUT_S:g} s"), None) from None
        if not isinstance(event, SessionToken):
            raise event
        if event.position != position:
            raise _LostError(StageLostError(f"a token is missing: got {event.position}, expected {position}"), None)
        return GeneratedToken(event.token, event.piece, event.end)

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
            await connection.call("CLOSE_SESSION", params, result_type=object, timeout_s=CLOSE_TIMEOUT_S)

    async def _watch(self, node: NodeId, connection: StageConnection) -> None:
        await connection.closed.wait()
        self._events.put_nowait(_LostError(UnreachableError(f"the connection to node {node} is lost"), node))

    def _got_token(self, _: str, params: dict[str, Any]) -> None:
        with contextlib.suppress(msgspec.ValidationError):
            token = msgspec.convert(params, SessionToken)
            if (token.session, token.attempt) == (self._session, self._attempt):
                self._events.put_nowait(token)

    def _got_failure(self, _: str, params: dict[str, Any]) -> None:
        with contextlib.suppress(msgspec.ValidationError):
            failed = msgspec.convert(params, SessionFailed)
            if (failed.session, failed.attempt) != (self._session, self._attempt):
                return
            error = error_from_wire(failed.error)
            # The node that reports is alive; whoever is not is found when the next plan is carried out.
            self._events.put_nowait(_LostError(error, None) if isinstance(error, _LOST) else error)


@contextlib.contextmanager
def _lost_with(node: NodeId) -> Any:
    """Turn errors that another attempt may mend into _LostError; an unreachable node is left out of the next plan."""
    try:
        yield
    except (UnreachableError, TimedOutError, MalformedMessageError) as err:
        raise _LostError(err, node) from err
    except (*_LOST, ShardNotLoadedError) as err:
        raise _LostError(err, None) from err


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
