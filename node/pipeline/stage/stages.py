"""The stages of a node: one engine process for each model that has shards loaded here.

A process that dies is an event: its sessions fail with `stage_lost`, its shards count as not loaded, and the next
load starts a fresh one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from node.pipeline.stage.ipc import (
    Broken,
    Close,
    Condition,
    Drawn,
    Inspect,
    Load,
    Loaded,
    Open,
    Start,
    Tokenize,
    Tokens,
    Unload,
)
from node.pipeline.stage.process import StageProcess, StageSettings
from node.pipeline.worker.session import SessionId
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
"""Gets what happens to a session on this node; called on the loop, must not block."""
Died = Callable[[ManifestDigest, frozenset[int], str], None]
"""A model's process is gone though nobody stopped it, these shards with it, and why."""
_INSPECT_TIMEOUT_S = 2.0


@dataclass
class _Stage:
    name: str
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the process starts or stops."""
    process: StageProcess | None = None
    loading: int = 0
    shards: dict[int, Loaded] = field(default_factory=dict)
    sessions: dict[SessionId, SessionEvent] = field(default_factory=dict)


class Stages:
    """Made by `open`; leaving it ends all processes."""

    def __init__(self, settings: StageSettings, tasks: asyncio.TaskGroup, on_died: Died | None) -> None:
        self._settings, self._tasks, self._on_died = settings, tasks, on_died
        self._stages: dict[ManifestDigest, _Stage] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: StageSettings, *, on_died: Died | None = None) -> AsyncIterator[Stages]:
        """No process is started before the first load."""
        failure: BaseException | None = None
        async with asyncio.TaskGroup() as tasks:
            stages = cls(settings, tasks, on_died)
            try:
                yield stages
            except BaseException as err:  # raised below, as it is and not in a group
                failure = err
            await stages._stop_all()
        if failure is not None:
            raise failure

    async def load(self, model: ManifestDigest, shard_id: int, path: Path, *, name: str = "") -> Loaded:
        """Load a shard file into the model's process, which is started if need be.

        Raises EngineError, InvalidShardError, InsufficientMemoryError, UnsupportedPlatformError. `name` is the
        model's, for STATUS.
        """
        stage = self._stages.setdefault(model, _Stage(name))
        stage.loading += 1
        try:
            async with stage.busy:
                process = stage.process
                if process is None or process.dead:
                    process = stage.process = await self._start(model, stage)
            loaded = await process.order(Load(shard_id, str(path)), Loaded)
            if stage.process is process:
                stage.shards[shard_id] = loaded
            return loaded
        finally:
            stage.loading -= 1
            await self._stop_if_idle(stage)

    async def unload(self, model: ManifestDigest, shard_id: int) -> None:
        """Free a shard; the process goes with the last one. Raises ShardInUseError, ShardNotLoadedError."""
        stage = self._stages.get(model)
        if stage is None or stage.process is None or shard_id not in stage.shards:
            raise ShardNotLoadedError(f"shard {shard_id} of {model} is not loaded here", {"shard_id": shard_id})
        await stage.process.order(Unload(shard_id), type(None))
        stage.shards.pop(shard_id, None)
        await self._stop_if_idle(stage)

    def loaded(self, model: ManifestDigest) -> frozenset[int]:
        """Shards of a model that are loaded here."""
        stage = self._stages.get(model)
        return frozenset(stage.shards) if stage else frozenset()

    async def tokenize(self, params: TokenizeParams) -> bytes:
        """Prompt or chat to tokens, int32 little-endian. Raises ShardNotLoadedError, InvalidParamsError."""
        return (await self._process(params.model).order(Tokenize(params), Tokens)).tokens

    async def open_session(self, params: OpenSessionParams, on_event: SessionEvent) -> OpenSessionResult:
        """Make a session ready on this node's stage of it.

        Whoever opens it closes it, also when nothing else worked. Raises ShardNotLoadedError, BusyError,
        ContextOverflowError, InvalidParamsError, EngineError.
        """
        process = self._process(params.model)
        session_id = (params.session, params.attempt, params.stage)
        if self._find(session_id) is not None:
            raise InvalidParamsError(f"session {params.session} is open already as stage {params.stage}")
        stage = self._stages[params.model]
        stage.sessions[session_id] = on_event
        try:
            await process.order(Open(params), type(None))
        except asyncio.CancelledError:
            with contextlib.suppress(ShoalError):
                await asyncio.shield(self._close(session_id))
            raise
        except BaseException:
            stage.sessions.pop(session_id, None)
            raise
        return OpenSessionResult(ticket=process.ticket)

    async def start_session(self, params: StartSessionParams) -> None:
        """Let it run. Raises InvalidParamsError where it is not open."""
        stage = self._find((params.session, params.attempt, params.stage))
        if stage is None or stage.process is None:
            raise InvalidParamsError(f"session {params.session} (attempt {params.attempt}) is not open here")
        await stage.process.order(Start(params), type(None))

    async def close_session(self, params: CloseSessionParams) -> None:
        """End it; nothing happens where it is not open (any more)."""
        with contextlib.suppress(ShoalError):
            await self._close((params.session, params.attempt, params.stage))

    async def status(self) -> tuple[list[StageStatus], TransportStatus]:
        """Of every process that answers, and the transport figures of all together."""
        running = [(model, stage) for model, stage in self._stages.items() if stage.process is not None]
        answers = await asyncio.gather(*(self._inspect(model, stage) for model, stage in running))
        found = [answer for answer in answers if answer is not None]
        totals = {key: sum(figures.get(key, 0) for _, figures in found) for key in TransportStatus.__struct_fields__}
        return [status for status, _ in found], TransportStatus(**totals)

    async def _inspect(self, model: ManifestDigest, stage: _Stage) -> tuple[StageStatus, dict[str, int]] | None:
        process = stage.process
        if process is None or process.dead:
            return None
        try:
            async with asyncio.timeout(_INSPECT_TIMEOUT_S):
                condition = await process.order(Inspect(), Condition)
            memory_bytes = psutil.Process(process.pid).memory_info().rss
        except (TimeoutError, ShoalError, psutil.Error):
            return None
        status = StageStatus(
            model=stage.name,
            digest=model,
            shards=sorted(stage.shards),
            sessions=condition.sessions,
            pid=process.pid,
            memory_bytes=memory_bytes,
            forwards=condition.forwards,
            forward_s=condition.forward_s,
            ticket=process.ticket,
        )
        return status, condition.transport

    async def _start(self, model: ManifestDigest, stage: _Stage) -> StageProcess:
        return await StageProcess.start(
            self._settings,
            on_event=lambda event: self._happened(stage, event),
            on_died=lambda why: self._died(model, stage, why),
            tasks=self._tasks,
        )

    def _happened(self, stage: _Stage, event: Drawn | Broken) -> None:
        match event:
            case Drawn(number, token):
                callback = stage.sessions.get((token.session, token.attempt, number))
                if callback is not None:
                    callback(token)
            case Broken(failed):
                callback = stage.sessions.pop((failed.session, failed.attempt, failed.stage), None)
                if callback is not None:
                    callback(failed)

    def _died(self, model: ManifestDigest, stage: _Stage, why: str) -> None:
        wanted = stage.process is None or stage.process.stopping
        shards, sessions = frozenset(stage.shards), dict(stage.sessions)
        stage.process = None
        stage.shards.clear()
        stage.sessions.clear()
        error = StageLostError(f"{why}; its shards have to be loaded again", {"model": model}).to_wire()
        for (session, attempt, number), callback in sessions.items():
            callback(SessionFailed(session=session, attempt=attempt, stage=number, error=error))
        if self._on_died is not None and not wanted:
            self._on_died(model, shards, why)

    async def _close(self, session_id: SessionId) -> None:
        stage = self._find(session_id)
        if stage is None:
            return
        del stage.sessions[session_id]
        if stage.process is not None:
            session, attempt, number = session_id
            await stage.process.order(
                Close(CloseSessionParams(session=session, attempt=attempt, stage=number)), type(None)
            )

    async def _stop_if_idle(self, stage: _Stage) -> None:
        async with stage.busy:
            if stage.process is not None and not stage.shards and not stage.loading:
                await stage.process.stop()

    async def _stop_all(self) -> None:
        async with asyncio.TaskGroup() as stopping:
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
