"""One attempt at a generation: a session opened on the nodes of one plan, and the tokens that come back."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np

from node.background import Background, FirstErrorGroup
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
from protocol.structs import prepared

_RECOVERABLE = (EngineError, PeerLostError, StageLostError, TimedOutError, TransportError, UnreachableError)
"""Errors after which another attempt may succeed."""
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class DriverSettings:
    """How long a driver waits, and how often it tries."""

    max_attempts: int = 3
    setup_timeout_s: float = 30.0
    """For each of TOKENIZE, OPEN_SESSION and START_SESSION."""
    token_timeout_s: float = 300.0
    """Without a token for this long the pipeline is stuck; the prefill of a long prompt on slow machines takes less."""
    close_timeout_s: float = 2.0
    """For each CLOSE_SESSION."""
    lost_node_timeout_s: float = 0.3
    """After a stage reported that a neighbour is lost: for the driver's own connection to that neighbour to close."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}, it must be at least 1")


class StageConnection(Protocol):
    """A connection to a node that runs stages, as `protocol.client.Client` is."""

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
    """What to generate. Give `prompt` or `messages`, not both."""

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
    """One sampled token; a generation gives them in order."""

    token: int
    piece: bytes
    """The bytes of text that it stands for."""
    end: bool
    """Whether it is an end-of-generation token: the last one, and not part of the answer."""


class AttemptLostError(Exception):
    """Raised when an attempt failed and another one may succeed."""

    def __init__(self, cause: ShoalError, node: NodeId | None) -> None:
        """`node` is the lost one, None if that is not known."""
        super().__init__(cause.message)
        self.cause, self.node = cause, node


class Attempt:
    """One session on the nodes of one plan. Made by `open`; leaving it closes the session on every stage."""

    def __init__(
        self,
        session: str,
        number: int,
        request: GenerationRequest,
        plan: Plan,
        settings: DriverSettings,
    ) -> None:
        self._session, self._number, self._request, self._plan = session, number, request, plan
        self._settings = settings
        self._connections: dict[NodeId, StageConnection] = {}
        self._connection_lost = asyncio.Event()
        self._events: asyncio.Queue[SessionToken | AttemptLostError | ShoalError] = asyncio.Queue()
        self._opened: list[int] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        session: str,
        number: int,
        request: GenerationRequest,
        plan: Plan,
        connect: Connect,
        settings: DriverSettings,
    ) -> AsyncIterator[Attempt]:
        """Connect to every node of the plan. Raises AttemptLostError if one cannot be reached."""
        attempt = cls(session, number, request, plan, settings)
        async with AsyncExitStack() as connections, Background.open() as watchers:
            for node in plan.nodes():
                with _attempt_lost(node):
                    connection = await connections.enter_async_context(connect(node))
                connection.on("SESSION_TOKEN", attempt._token_received)
                connection.on("SESSION_FAILED", attempt._failure_received)
                attempt._connections[node] = connection
                watchers.start(attempt._watch(node, connection), name=f"watch the connection to node {node[:16]}")
            try:
                yield attempt
            finally:
                await _gather(attempt._close(stage) for stage in attempt._opened)

    async def tokenize(self) -> bytes:
        """The prompt's token ids, int32 little-endian."""
        params = TokenizeParams(model=self._request.model, prompt=self._request.prompt, messages=self._request.messages)
        return (await self._call(0, "TOKENIZE", params, TokenizeResult)).tokens

    async def start(self, n_positions: int, prompt: bytes, sampled: Sequence[int]) -> None:
        """Open the session on every stage, then start it on every stage, on the first one last."""
        stages, request = self._plan.stages, self._request
        key = secrets.token_bytes(32)

        async def open_stage(number: int) -> str:
            self._opened.append(number)
            params = OpenSessionParams(
                session=self._session,
                key=key,
                attempt=self._number,
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
                attempt=self._number,
                stage=number,
                next_ticket=tickets[(number + 1) % len(stages)],
                tokens=prompt if number == 0 else b"",
                replay=np.asarray(sampled, "<i4").tobytes() if number == 0 else b"",
                max_tokens=request.max_tokens - len(sampled),
            )
            await self._call(number, "START_SESSION", params, Empty)

        tickets = await _gather(open_stage(number) for number in range(len(stages)))
        await _gather(start_stage(number) for number in range(1, len(stages)))
        await start_stage(0)

    async def next_token(self, position: int) -> GeneratedToken:
        """The token at `position`. Raises AttemptLostError, or the error that ended the session."""
        timeout_s = self._settings.token_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                event = await self._events.get()
        except TimeoutError:
            raise AttemptLostError(TimedOutError(f"no token came for {timeout_s:g} s"), None) from None
        if not isinstance(event, SessionToken):
            raise event
        if event.position != position:
            raise AttemptLostError(
                StageLostError(f"a token is missing: got {event.position}, expected {position}"), None
            )
        return GeneratedToken(event.token, event.piece, event.end)

    async def lost_nodes(self) -> set[NodeId]:
        """The nodes whose connections are closed; waits `lost_node_timeout_s` for the first one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.lost_node_timeout_s):
                await self._connection_lost.wait()
        return {node for node, connection in self._connections.items() if connection.closed.is_set()}

    async def _call(self, number: int, method: str, params: msgspec.Struct, result_type: type[R]) -> R:
        node = self._plan.stages[number].node_id
        with _attempt_lost(node):
            return await self._connections[node].call(
                method, params, result_type=result_type, timeout_s=self._settings.setup_timeout_s
            )

    async def _close(self, number: int) -> None:
        connection = self._connections[self._plan.stages[number].node_id]
        params = CloseSessionParams(session=self._session, attempt=self._number, stage=number)
        with contextlib.suppress(ShoalError):  # closing the connection closes the session too
            await connection.call("CLOSE_SESSION", params, result_type=Empty, timeout_s=self._settings.close_timeout_s)

    async def _watch(self, node: NodeId, connection: StageConnection) -> None:
        await connection.closed.wait()
        self._connection_lost.set()
        self._events.put_nowait(AttemptLostError(UnreachableError(f"the connection to node {node} is lost"), node))

    def _token_received(self, _: str, params: dict[str, Any]) -> None:
        with contextlib.suppress(msgspec.ValidationError):
            token = msgspec.convert(params, prepared(SessionToken))
            ours = (token.session, token.attempt) == (self._session, self._number)
            if ours and self._events.qsize() <= self._request.max_tokens:  # a node may not fill the queue with more
                self._events.put_nowait(token)

    def _failure_received(self, _: str, params: dict[str, Any]) -> None:
        with contextlib.suppress(msgspec.ValidationError):
            failed = msgspec.convert(params, prepared(SessionFailed))
            if (failed.session, failed.attempt) != (self._session, self._number):
                return
            error = error_from_wire(failed.error)
            # The node that reports is alive; the next plan finds out which node is not.
            self._events.put_nowait(AttemptLostError(error, None) if isinstance(error, _RECOVERABLE) else error)


@contextlib.contextmanager
def _attempt_lost(node: NodeId) -> Iterator[None]:
    """Turn recoverable errors into AttemptLostError; it names the node if that cannot be reached."""
    try:
        yield
    except (UnreachableError, TimedOutError, MalformedMessageError) as err:
        raise AttemptLostError(err, node) from err
    except (*_RECOVERABLE, ShardNotLoadedError) as err:
        raise AttemptLostError(err, None) from err


async def _gather(calls: Iterable[Coroutine[Any, Any, R]]) -> list[R]:
    """Run all at once; the first error cancels the others and is raised."""
    async with FirstErrorGroup() as group:
        running = [group.create_task(call) for call in calls]
    return [task.result() for task in running]
