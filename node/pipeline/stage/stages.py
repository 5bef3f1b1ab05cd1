"""The stages of a node: one engine process for each model that has shards loaded here.

If a process dies, its sessions fail with `stage_lost`, its shards are no longer loaded, and the next load starts
another process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from node.background import FirstErrorGroup
from node.pipeline.engine.loaded_shard import LoadedShard
from node.pipeline.stage.ipc import (
    CloseRequest,
    EngineStatus,
    FailureEvent,
    LoadRequest,
    OpenRequest,
    PromptTokens,
    SessionId,
    StartRequest,
    StatusRequest,
    TokenEvent,
    TokenizeRequest,
    UnloadRequest,
)
from node.pipeline.stage.process import StageProcess, StageSettings
from protocol.commands.nodes import StageStatus, TransportStatus
from protocol.commands.sessions import (
    CloseSessionParams,
    OpenSessionParams,
    OpenSessionResult,
    SessionFailed,
    SessionToken,
    StartSessionParams,
    TokenizeParams,
)
from protocol.errors import InvalidParamsError, ShardNotLoadedError, ShoalError, StageLostError
from protocol.ids import ManifestDigest

SessionEvent = Callable[[SessionToken | SessionFailed], None]
"""Called on the loop with each event of a session on this node; must not block."""
ProcessDied = Callable[[ManifestDigest, frozenset[int], str], None]
"""Called when a model's process ended without being stopped: the model, the shards it had loaded, the reason."""


@dataclass
class _Stage:
    name: str
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the process starts or stops."""
    process: StageProcess | None = None
    loading: int = 0
    """Loads in progress."""
    shards: dict[int, LoadedShard] = field(default_factory=dict)
    sessions: dict[SessionId, SessionEvent] = field(default_factory=dict)


class Stages:
    """Loads shards and runs sessions on this node. Made by `open`; leaving it ends all processes."""

    def __init__(self, settings: StageSettings, tasks: asyncio.TaskGroup, on_died: ProcessDied | None) -> None:
        self._settings, self._tasks, self._on_died = settings, tasks, on_died
        self._stages: dict[ManifestDigest, _Stage] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: StageSettings, *, on_died: ProcessDied | None = None) -> AsyncIterator[Stages]:
        """The first load of a model starts its process."""
        async with FirstErrorGroup() as tasks:
            stages = cls(settings, tasks, on_died)
            try:
                yield stages
            finally:
                await stages._stop_all()

    async def load(self, model: ManifestDigest, shard_id: int, path: Path, *, name: str = "") -> LoadedShard:
        """Load a shard file into the model's process; start the process if there is none.

        `name` is the model's, for STATUS. Raises EngineError, InvalidShardError, InsufficientMemoryError,
        UnsupportedPlatformError.
        """
        stage = self._stages.setdefault(model, _Stage(name))
        stage.loading += 1
        try:
            async with stage.busy:
                process = stage.process
                if process is None or process.dead:
                    process = stage.process = await self._start(model, stage)
            loaded = await process.request(LoadRequest(shard_id, str(path)), LoadedShard)
            if stage.process is process:
                stage.shards[shard_id] = loaded
            return loaded
        finally:
            stage.loading -= 1
            await self._stop_if_idle(stage)

    async def unload(self, model: ManifestDigest, shard_id: int) -> None:
        """Free a shard; the process ends with the last one. Raises ShardInUseError, ShardNotLoadedError."""
        stage = self._stages.get(model)
        if stage is None or stage.process is None or shard_id not in stage.shards:
            raise ShardNotLoadedError(
                f"shard {shard_id} of {model} is not loaded here; loaded: {sorted(self.loaded(model)) or 'none'}",
                {"shard_id": shard_id},
            )
        await stage.process.request(UnloadRequest(shard_id), type(None))
        stage.shards.pop(shard_id, None)
        await self._stop_if_idle(stage)

    def loaded(self, model: ManifestDigest) -> frozenset[int]:
        """Shards of a model that are loaded here."""
        stage = self._stages.get(model)
        return frozenset(stage.shards) if stage else frozenset()

    async def tokenize(self, params: TokenizeParams) -> bytes:
        """Token ids of a prompt or chat, int32 little-endian. Raises ShardNotLoadedError, InvalidParamsError."""
        return (await self._process(params.model).request(TokenizeRequest(params), PromptTokens)).tokens

    async def open_session(self, params: OpenSessionParams, on_event: SessionEvent) -> OpenSessionResult:
        """Open a session on this node's stage.

        The caller closes what it opened, also after a failure. Raises ShardNotLoadedError, BusyError,
        ContextOverflowError, InvalidParamsError, EngineError.
        """
        process = self._process(params.model)
        session_id = SessionId.of(params)
        if self._find(session_id) is not None:
            raise InvalidParamsError(f"session {params.session} is open already as stage {params.stage}")
        stage = self._stages[params.model]
        stage.sessions[session_id] = on_event
        try:
            await process.request(OpenRequest(params), type(None))
        except asyncio.CancelledError:
            with contextlib.suppress(ShoalError):
                await asyncio.shield(self._close(session_id))
            raise
        except BaseException:
            stage.sessions.pop(session_id, None)
            raise
        return OpenSessionResult(ticket=process.ticket)

    async def start_session(self, params: StartSessionParams) -> None:
        """Run an open session. Raises InvalidParamsError if it is not open."""
        stage = self._find(SessionId.of(params))
        if stage is None or stage.process is None:
            raise InvalidParamsError(f"session {params.session} (attempt {params.attempt}) is not open here")
        await stage.process.request(StartRequest(params), type(None))

    async def close_session(self, params: CloseSessionParams) -> None:
        """Close a session; does nothing if it is not open."""
        with contextlib.suppress(ShoalError):
            await self._close(SessionId.of(params))

    async def status(self) -> tuple[list[StageStatus], TransportStatus]:
        """Every process that answers, and the sums of their transport figures."""
        running = [(model, stage) for model, stage in self._stages.items() if stage.process is not None]
        answers = await asyncio.gather(*(self._stage_status(model, stage) for model, stage in running))
        found = [answer for answer in answers if answer is not None]
        totals = {key: sum(figures.get(key, 0) for _, figures in found) for key in TransportStatus.__struct_fields__}
        return [status for status, _ in found], TransportStatus(**totals)

    async def _stage_status(self, model: ManifestDigest, stage: _Stage) -> tuple[StageStatus, dict[str, int]] | None:
        process = stage.process
        if process is None or process.dead:
            return None
        try:
            async with asyncio.timeout(self._settings.status_timeout_s):
                figures = await process.request(StatusRequest(), EngineStatus)
            memory_bytes = psutil.Process(process.pid).memory_info().rss
        except (TimeoutError, ShoalError, psutil.Error):
            return None
        status = StageStatus(
            model=stage.name,
            digest=model,
            shards=sorted(stage.shards),
            sessions=figures.sessions,
            pid=process.pid,
            memory_bytes=memory_bytes,
            forwards=figures.forwards,
            forward_s=figures.forward_s,
            ticket=process.ticket,
        )
        return status, figures.transport

    async def _start(self, model: ManifestDigest, stage: _Stage) -> StageProcess:
        return await StageProcess.start(
            self._settings,
            on_event=lambda event: self._session_event(stage, event),
            on_died=lambda reason: self._died(model, stage, reason),
            tasks=self._tasks,
        )

    def _session_event(self, stage: _Stage, event: TokenEvent | FailureEvent) -> None:
        match event:
            case TokenEvent(number, token):
                callback = stage.sessions.get(SessionId(token.session, token.attempt, number))
                if callback is not None:
                    callback(token)
            case FailureEvent(failed):
                callback = stage.sessions.pop(SessionId.of(failed), None)
                if callback is not None:
                    callback(failed)

    def _died(self, model: ManifestDigest, stage: _Stage, reason: str) -> None:
        stopped = stage.process is None or stage.process.stopping
        shards, sessions = frozenset(stage.shards), dict(stage.sessions)
        stage.process = None
        stage.shards.clear()
        stage.sessions.clear()
        error = StageLostError(f"{reason}; its shards have to be loaded again", {"model": model}).to_wire()
        for (session, attempt, number), callback in sessions.items():
            callback(SessionFailed(session=session, attempt=attempt, stage=number, error=error))
        if self._on_died is not None and not stopped:
            self._on_died(model, shards, reason)

    async def _close(self, session_id: SessionId) -> None:
        stage = self._find(session_id)
        if stage is None:
            return
        del stage.sessions[session_id]
        if stage.process is not None:
            session, attempt, number = session_id
            params = CloseSessionParams(session=session, attempt=attempt, stage=number)
            await stage.process.request(CloseRequest(params), type(None))

    async def _stop_if_idle(self, stage: _Stage) -> None:
        async with stage.busy:
            if stage.process is not None and not stage.shards and not stage.loading:
                await stage.process.stop()

    async def _stop_all(self) -> None:
        async with FirstErrorGroup() as stopping:
            for stage in self._stages.values():
                if stage.process is not None:
                    stopping.create_task(stage.process.stop())

    def _process(self, model: ManifestDigest) -> StageProcess:
        stage = self._stages.get(model)
        if stage is None or stage.process is None or stage.process.dead:
            raise ShardNotLoadedError(f"no shard of model {model} is loaded here; LOAD_SHARD it first")
        return stage.process

    def _find(self, session_id: SessionId) -> _Stage | None:
        return next((stage for stage in self._stages.values() if session_id in stage.sessions), None)
