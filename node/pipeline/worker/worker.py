"""The inside of an engine process: answers the daemon's requests, and owns the loaded shards and the sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from node.background import FirstErrorGroup
from node.pipeline.engine.chat import render_chat
from node.pipeline.engine.loaded_shard import LoadedShard
from node.pipeline.stage.ipc import (
    CloseRequest,
    EngineMessage,
    EngineRequest,
    EngineResult,
    EngineStatus,
    ErrorReply,
    FailureEvent,
    LoadRequest,
    NumberedRequest,
    OpenRequest,
    PromptTokens,
    SessionId,
    StartRequest,
    StatusRequest,
    StopRequest,
    SuccessReply,
    TokenEvent,
    TokenizeRequest,
    UnloadRequest,
)
from node.pipeline.worker.channels import Channels
from node.pipeline.worker.interfaces import Tokenizer
from node.pipeline.worker.scheduler import EngineThread
from node.pipeline.worker.session import StageSession, check_session
from protocol.commands.sessions import (
    OpenSessionParams,
    SessionFailed,
    StartSessionParams,
    TokenizeParams,
)
from protocol.errors import (
    BusyError,
    EngineError,
    InternalError,
    InvalidParamsError,
    PeerLostError,
    ShardInUseError,
    ShardNotLoadedError,
    ShoalError,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """Bounds of one engine process."""

    ctx_size: int
    """Tokens of one session."""
    max_sessions: int
    """Sessions open at once."""

    def __post_init__(self) -> None:
        for name, value in (("ctx_size", self.ctx_size), ("max_sessions", self.max_sessions)):
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")


@dataclass
class _OpenSession:
    session: StageSession
    running: asyncio.Task[None] | None = None
    next_ticket: str = ""
    """Of the transport of the next stage."""


class Worker:
    """Answers requests. An async context manager: leaving it closes all sessions."""

    def __init__(
        self,
        engine: EngineThread,
        channels: Channels,
        settings: WorkerSettings,
        send: Callable[[EngineMessage], None],
        *,
        transport_stats: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._engine, self._channels, self._settings, self._send = engine, channels, settings, send
        self._transport_stats = transport_stats
        self._shards: dict[int, LoadedShard] = {}
        self._tokenizers: dict[int, Tokenizer] = {}
        self._sessions: dict[SessionId, _OpenSession] = {}
        self._opening: dict[SessionId, asyncio.Event] = {}
        """Sessions that are being opened; the event is set when that ended."""
        self._tasks = FirstErrorGroup()
        self.stopped = asyncio.Event()
        """Set when the daemon asked the process to end."""

    async def __aenter__(self) -> Worker:
        await self._tasks.__aenter__()
        self._unsubscribe = self._channels.on_peer_lost(self._peer_lost)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unsubscribe()
        for session_id in list(self._sessions):
            await self._close(session_id)
        await self._tasks.__aexit__(kind, error, trace)

    def handle(self, message: NumberedRequest) -> None:
        """Begin a request; the reply goes to `send` once it is done."""
        self._tasks.create_task(self._reply(message), name=f"{type(message.request).__name__} {message.number}")

    async def _reply(self, message: NumberedRequest) -> None:
        try:
            result = await self._result(message.request)
        except Exception as err:  # the edge of the process: every failure is a reply
            self._send(ErrorReply(message.number, _on_wire(err)))
        else:
            self._send(SuccessReply(message.number, result))

    async def _result(self, request: EngineRequest) -> EngineResult:
        match request:
            case LoadRequest(shard_id, path):
                return await self._load(shard_id, Path(path))
            case UnloadRequest(shard_id):
                await self._unload(shard_id)
            case TokenizeRequest(params):
                return PromptTokens(await self._tokenize(params))
            case OpenRequest(params):
                await self._open(params)
            case StartRequest(params):
                self._start(params)
            case CloseRequest(params):
                await self._close(SessionId.of(params))
            case StatusRequest():
                return self._status()
            case StopRequest():
                self.stopped.set()
        return None

    async def _load(self, shard_id: int, path: Path) -> LoadedShard:
        if shard_id not in self._shards:
            self._shards[shard_id] = await self._engine.call(lambda engine: engine.load(shard_id, path))
        return self._shards[shard_id]

    async def _unload(self, shard_id: int) -> None:
        users = [
            session_id for session_id, opened in self._sessions.items() if shard_id in opened.session.params.shards
        ]
        if users or self._opening:
            raise ShardInUseError(
                f"shard {shard_id} is in use by {len(users)} sessions, and {len(self._opening)} are being opened; "
                "unload it when they are closed",
                {"shard_id": shard_id, "sessions": [user.session for user in users]},
            )
        if self._shards.pop(shard_id, None) is not None:
            self._tokenizers.pop(shard_id, None)
            await self._engine.call(lambda engine: engine.unload(shard_id))

    def _status(self) -> EngineStatus:
        return EngineStatus(
            sessions=len(self._sessions),
            shards=sorted(self._shards),
            forwards=self._engine.forwards,
            forward_s=self._engine.forward_s,
            transport=dict(self._transport_stats()),
        )

    async def _tokenize(self, params: TokenizeParams) -> bytes:
        first = next((shard_id for shard_id, shard in sorted(self._shards.items()) if shard.is_first), None)
        if first is None:
            raise ShardNotLoadedError("the model's first shard, which has the tokenizer, is not loaded here")
        tokenizer = await self._tokenizer(first)
        if (params.prompt is None) == (params.messages is None):
            raise InvalidParamsError("give prompt or messages, exactly one of them")
        if params.messages is not None:
            text = await asyncio.to_thread(
                render_chat,
                tokenizer.chat_template,
                params.messages,
                bos_token=tokenizer.bos_text,
                eos_token=tokenizer.eos_text,
            )
        else:
            text = params.prompt or ""
        # A chat template writes the model's special tokens as text, BOS among them. In a plain prompt such text is
        # text, and the tokenizer's own rule says whether a BOS comes first.
        chat = params.messages is not None
        tokens = await self._engine.call(lambda _: tokenizer.tokenize(text, add_special=not chat, parse_special=chat))
        return np.asarray(tokens, "<i4").tobytes()

    async def _tokenizer(self, shard_id: int) -> Tokenizer:
        if shard_id not in self._tokenizers:
            self._tokenizers[shard_id] = await self._engine.call(lambda engine: engine.vocabulary(shard_id))
        return self._tokenizers[shard_id]

    async def _open(self, params: OpenSessionParams) -> None:
        session_id = SessionId.of(params)
        check_session(params, self._shards, self._settings.ctx_size)
        if session_id in self._sessions or session_id in self._opening:
            raise InvalidParamsError(f"session {params.session} is open already as stage {params.stage}")
        if len(self._sessions) + len(self._opening) >= self._settings.max_sessions:
            raise BusyError(
                f"all {self._settings.max_sessions} sessions of this stage are in use; try again when one is closed",
                {"max_sessions": self._settings.max_sessions},
            )
        done = self._opening[session_id] = asyncio.Event()
        try:
            last = params.stage == params.n_stages - 1
            tokenizer = await self._tokenizer(params.shards[-1]) if last else None
            sequence = await self._engine.call(lambda engine: engine.open_sequence())
            try:
                session = StageSession(
                    params,
                    sequence,
                    n_embd=self._shards[params.shards[0]].n_embd,
                    tokenizer=tokenizer,
                    channels=self._channels,
                    engine=self._engine,
                    report=lambda token: self._send(TokenEvent(params.stage, token)),
                )
            except BaseException:
                await self._engine.call(lambda engine: engine.close_sequence(sequence))
                raise
            self._sessions[session_id] = _OpenSession(session)
            self._engine.sessions = len(self._sessions)
        finally:
            del self._opening[session_id]
            done.set()

    def _start(self, params: StartSessionParams) -> None:
        session_id = SessionId.of(params)
        opened = self._sessions.get(session_id)
        if opened is None:
            raise InvalidParamsError(f"session {params.session} (attempt {params.attempt}) is not open here")
        if opened.running is not None:
            raise InvalidParamsError(f"session {params.session} (attempt {params.attempt}) was started already")
        opened.next_ticket = params.next_ticket
        opened.running = self._tasks.create_task(self._run(session_id, opened.session, params))

    async def _run(self, session_id: SessionId, session: StageSession, start: StartSessionParams) -> None:
        try:
            await session.run(start)
        except Exception as err:  # the edge of a session: its failure is an event
            self._report_failure(session_id, err)
            opened = self._sessions.pop(session_id, None)
            if opened is not None:
                await self._release(opened.session)

    def _peer_lost(self, ticket: str) -> None:
        """End the sessions whose next stage is lost, also those that have nothing to send now."""
        for session_id, opened in list(self._sessions.items()):
            if opened.next_ticket == ticket and opened.running is not None and not opened.running.done():
                following = (session_id.stage + 1) % opened.session.params.n_stages
                self._report_failure(session_id, PeerLostError(f"stage {following} of the pipeline does not answer"))
                self._tasks.create_task(self._close(session_id))

    def _report_failure(self, session_id: SessionId, err: Exception) -> None:
        session, attempt, stage = session_id
        self._send(FailureEvent(SessionFailed(session=session, attempt=attempt, stage=stage, error=_on_wire(err))))

    async def _close(self, session_id: SessionId) -> None:
        if session_id in self._opening:
            await self._opening[session_id].wait()
        opened = self._sessions.pop(session_id, None)
        if opened is None:
            return
        if opened.running is not None:
            opened.running.cancel()
            await asyncio.wait((opened.running,))
        await self._release(opened.session)

    async def _release(self, session: StageSession) -> None:
        session.close()
        self._engine.sessions = len(self._sessions)
        await self._engine.call(lambda engine: engine.close_sequence(session.sequence))


def _on_wire(err: Exception) -> dict[str, object]:
    match err:
        case ShoalError():
            return err.to_wire()
        case msgspec.MsgspecError() | MemoryError() | OSError():
            return EngineError(f"the engine process failed: {type(err).__name__}: {err}").to_wire()
        case _:
            _log.error("the engine process failed", exc_info=err)
            return InternalError(
                f"the engine process failed: {type(err).__name__}; the daemon's log has the details"
            ).to_wire()
