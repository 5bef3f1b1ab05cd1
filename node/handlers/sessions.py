"""TOKENIZE, OPEN_SESSION, START_SESSION and CLOSE_SESSION: what a coordinating node asks of this one's stages.

A session belongs to the connection that opened it: its tokens go there, and it is closed when that connection is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from node.background import Background
from node.pipeline.stage.ipc import SessionId
from node.pipeline.stage.stages import Stages
from node.rpc import Call
from protocol.commands.common import Empty
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


@dataclass(frozen=True)
class SessionHandlers:
    """Session commands of one node; `background` owns the closing of sessions whose driver is gone."""

    stages: Stages
    background: Background
    _forget: dict[SessionId, Callable[[], None]] = field(default_factory=dict)
    """For each open session, what takes it off its connection's list: a connection may see many."""

    async def tokenize(self, params: TokenizeParams) -> TokenizeResult:
        """TOKENIZE."""
        return TokenizeResult(tokens=await self.stages.tokenize(params))

    async def open(self, params: OpenSessionParams, call: Call) -> OpenSessionResult:
        """OPEN_SESSION."""

        def tell(event: SessionToken | SessionFailed) -> None:
            method = "SESSION_TOKEN" if isinstance(event, SessionToken) else "SESSION_FAILED"
            call.connection.notify(method, event)

        result = await self.stages.open_session(params, tell)
        session_id = SessionId.of(params)
        closing = CloseSessionParams(session=params.session, attempt=params.attempt, stage=params.stage)

        def driver_is_gone() -> None:
            self._forget.pop(session_id, None)
            self.background.start(self.stages.close_session(closing), name=f"closing session {params.session}")

        forget = call.connection.on_close(driver_is_gone)
        if not call.connection.closed.is_set():
            self._forget[session_id] = forget
        return result

    async def start(self, params: StartSessionParams) -> Empty:
        """START_SESSION."""
        await self.stages.start_session(params)
        return Empty()

    async def close(self, params: CloseSessionParams) -> Empty:
        """CLOSE_SESSION."""
        self._forget.pop(SessionId.of(params), lambda: None)()
        await self.stages.close_session(params)
        return Empty()
