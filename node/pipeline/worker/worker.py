"""What runs in an engine process: carries out the daemon's orders, and owns the sessions of this stage."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from node.pipeline.engine.chat import render_chat
from node.pipeline.stage.ipc import (
    Answer,
    Broken,
    Close,
    Condition,
    Drawn,
    FromProcess,
    Inspect,
    Load,
    Loaded,
    Open,
    Order,
    Refused,
    Request,
    Start,
    Stop,
    Tokenize,
    Tokens,
    Unload,
)
from node.pipeline.worker.admission import check_opening
from node.pipeline.worker.channels import Channels
from node.pipeline.worker.interfaces import ShardFacts, Words
from node.pipeline.worker.scheduler import EngineThread
from node.pipeline.worker.session import SessionId, StageSession
from protocol.commands.sessions import (
    CloseSessionParams,
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
    """Tokens a session."""
    max_sessions: int
    """Open at once."""

    def __post_init__(self) -> None:
        if self.ctx_size < 1 or self.max_sessions < 1:
            raise ValueError("ctx_size and max_sessions must be at least 1")


@dataclass
class _Hosted:
    session: StageSession
    running: asyncio.Task[None] | None = None
    next_ticket: str = ""


class Worker:
    """An async context manager: leaving it ends all sessions."""

    def __init__(
        self,
        engine: EngineThread,
        channels: Channels,
        settings: WorkerSettings,
        send: Callable[[FromProcess], None],
        *,
        transport_stats: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._engine, self._channels, self._settings, self._send = engine, channels, settings, send
        self._transport_stats = transport_stats
        self._shards: dict[int, ShardFacts] = {}
        self._words: dict[int, Words] = {}
        self._sessions: dict[SessionId, _Hosted] = {}
        self._opening: dict[SessionId, asyncio.Event] = {}
        self._tasks = asyncio.TaskGroup()
        self.stopped = asyncio.Event()
        """Set when the daemon asked for the end."""

    async def __aenter__(self) -> Worker:
        await self._tasks.__aenter__()
        self._forget_peers = self._channels.on_peer_lost(self._peer_lost)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget_peers()
        for session_id in list(self._sessions):
            await self._close(session_id)
        await self._tasks.__aexit__(None, None, None)  # an error of the body goes on as it is

    def handle(self, request: Request) -> None:
        """Begin an order; the answer goes to `send` when it is done."""
        self._tasks.create_task(self._answer(request), name=f"{type(request.order).__name__} {request.number}")

    async def _answer(self, request: Request) -> None:
        try:
            result = await self._carry_out(request.order)
        except Exception as err:  # the edge of the process: every failure is an answer
            self._send(Refused(request.number, _on_wire(err)))
        else:
            self._send(Answer(request.number, result))

    async def _carry_out(self, order: Order) -> Loaded | Tokens | Condition | None:
        match order:
            case Load(shard_id, path):
                return await self._load(shard_id, Path(path))
            case Unload(shard_id):
                await self._unload(shard_id)
            case Tokenize(params):
                return Tokens(await self._tokenize(params))
            case Open(params):
                await self._open(params)
            case Start(params):
                self._start(params)
            case Close(CloseSessionParams(session=session, attempt=attempt, stage=stage)):
                await self._close((session, attempt, stage))
            case Inspect():
                return self._condition()
            case Stop():
                self.stopped.set()
        return None

    async def _load(self, shard_id: int, path: Path) -> Loaded:
        if shard_id not in self._shards:
            self._shards[shard_id] = await self._engine.call(lambda engine: engine.load(shard_id, path))
        facts = self._shards[shard_id]
        return Loaded(
            n_layers=facts.n_layers,
            n_embd=facts.n_embd,
            n_vocab=facts.n_vocab,
            is_first=facts.is_first,
            is_last=facts.is_last,
            memory_bytes=facts.memory_bytes,
        )

    async def _unload(self, shard_id: int) -> None:
        users = [
            session_id for session_id, hosted in self._sessions.items() if shard_id in hosted.session.params.shards
        ]
        if users or self._opening:
            raise ShardInUseError(
                f"shard {shard_id} is used by {len(users) or 'opening'} sessions; unload it when they are over",
                {"shard_id": shard_id, "sessions": [session for session, _, _ in users]},
            )
        if self._shards.pop(shard_id, None) is not None:
            self._words.pop(shard_id, None)
            await self._engine.call(lambda engine: engine.unload(shard_id))

    def _condition(self) -> Condition:
        return Condition(
            sessions=len(self._sessions),
            shards=sorted(self._shards),
            forwards=self._engine.forwards,
            forward_s=self._engine.forward_s,
            transport=dict(self._transport_stats()),
        )

    async def _tokenize(self, params: TokenizeParams) -> bytes:
        first = next((shard_id for shard_id, facts in sorted(self._shards.items()) if facts.is_first), None)
        if first is None:
            raise ShardNotLoadedError("the model's first shard, which has the tokenizer, is not loaded here")
        words = await self._words_of(first)
        if (params.prompt is None) == (params.messages is None):
            raise InvalidParamsError("give prompt or messages, one of the two")
        if params.messages is not None:
            text = await asyncio.to_thread(
                render_chat, words.chat_template, params.messages, bos_token=words.bos_text, eos_token=words.eos_text
            )
        else:
            text = params.prompt or ""
        # A chat template writes the model's special tokens as text, BOS among them. In a plain prompt such text is
        # text, and the tokenizer's own rule says whether a BOS comes first.
        chat = params.messages is not None
        tokens = await self._engine.call(lambda _: words.tokenize(text, add_special=not chat, parse_special=chat))
        return np.asarray(tokens, "<i4").tobytes()

    async def _words_of(self, shard_id: int) -> Words:
        if shard_id not in self._words:
            self._words[shard_id] = await self._engine.call(lambda engine: engine.vocabulary(shard_id))
        return self._words[shard_id]

    async def _open(self, params: OpenSessionParams) -> None:
        session_id = (params.session, params.attempt, params.stage)
        check_opening(params, self._shards, self._settings.ctx_size)
        if session_id in self._sessions or session_id in self._opening:
            raise InvalidParamsError(f"session {params.session} is open already as stage {params.stage}")
        if len(self._sessions) + len(self._opening) >= self._settings.max_sessions:
            raise BusyError(
                f"this stage runs {self._settings.max_sessions} sessions, its bound; try again when one is over",
                {"max_sessions": self._settings.max_sessions},
            )
        opened = self._opening[session_id] = asyncio.Event()
        try:
            last = params.stage == params.n_stages - 1
            words = await self._words_of(params.shards[-1]) if last else None
            sequence = await self._engine.call(lambda engine: engine.open_sequence())
            try:
                session = StageSession(
                    params,
                    sequence,
                    width=self._shards[params.shards[0]].n_embd,
                    words=words,
                    channels=self._channels,
                    engine=self._engine,
                    report=lambda token: self._send(Drawn(params.stage, token)),
                )
            except BaseException:
                await self._engine.call(lambda engine: engine.close_sequence(sequence))
                raise
            self._sessions[session_id] = _Hosted(session)
            self._engine.sessions = len(self._sessions)
        finally:
            del self._opening[session_id]
            opened.set()

    def _start(self, params: StartSessionParams) -> None:
        session_id = (params.session, params.attempt, params.stage)
        hosted = self._sessions.get(session_id)
        if hosted is None:
            raise InvalidParamsError(f"session {params.session} (attempt {params.attempt}) is not open here")
        if hosted.running is not None:
            raise InvalidParamsError(f"session {params.session} (attempt {params.attempt}) was started already")
        hosted.next_ticket = params.next_ticket
        hosted.running = self._tasks.create_task(self._run(session_id, hosted.session, params))

    async def _run(self, session_id: SessionId, session: StageSession, start: StartSessionParams) -> None:
        try:
            await session.run(start)
        except Exception as err:  # the edge of a session: its failure is an event
            self._report_failure(session_id, err)
            hosted = self._sessions.pop(session_id, None)
            if hosted is not None:
                await self._release(hosted.session)

    def _peer_lost(self, ticket: str) -> None:
        """Where a stage sends to is gone; noticed also while it has nothing to send."""
        for session_id, hosted in list(self._sessions.items()):
            if hosted.next_ticket == ticket and hosted.running is not None and not hosted.running.done():
                following = (session_id[2] + 1) % hosted.session.params.n_stages
                self._report_failure(session_id, PeerLostError(f"stage {following} of the pipeline does not answer"))
                self._tasks.create_task(self._close(session_id))

    def _report_failure(self, session_id: SessionId, err: Exception) -> None:
        name, attempt, stage = session_id
        self._send(Broken(SessionFailed(session=name, attempt=attempt, stage=stage, error=_on_wire(err))))

    async def _close(self, session_id: SessionId) -> None:
        if session_id in self._opening:
            await self._opening[session_id].wait()
        hosted = self._sessions.pop(session_id, None)
        if hosted is None:
            return
        if hosted.running is not None:
            hosted.running.cancel()
            await asyncio.wait((hosted.running,))
        await self._release(hosted.session)

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
            return InternalError(f"the engine process failed: {type(err).__name__}; its log has the rest").to_wire()
