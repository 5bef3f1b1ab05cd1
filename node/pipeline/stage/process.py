"""One engine process as the daemon sees it: started, sent requests, watched, stopped.

Its death, by a crash or a kill, is an event. It ends with the daemon: the pipe closes, and on Linux the kernel kills
it (PR_SET_PDEATHSIG). Its output goes to the daemon's stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

import node
from node.pipeline.engine.loaded_shard import LoadedShard
from node.pipeline.engine.settings import EngineSettings
from node.pipeline.stage.ipc import (
    EngineMessage,
    EngineReady,
    EngineRequest,
    EngineResult,
    EngineStatus,
    ErrorReply,
    FailureEvent,
    NumberedRequest,
    Pipe,
    PromptTokens,
    StopRequest,
    SuccessReply,
    TokenEvent,
)
from protocol.errors import EngineError, error_from_wire

LOG_FD = 2
R = TypeVar("R", LoadedShard, PromptTokens, EngineStatus, None)


@dataclass(frozen=True)
class StageSettings:
    """How engine processes are started, asked and stopped."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    share_cores: bool = True
    """Whether other processes compute on the same cores: OpenMP's threads then sleep while they wait. Spinning is
    faster for a process that has its cores alone; processes that share cores fall to a quarter of their speed."""
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 2.0
    """For a clean end; after it the process is killed."""
    exit_timeout_s: float = 0.5
    """After a process closed its pipe: for it to log its error and end; after it the process is killed."""
    status_timeout_s: float = 2.0
    """A process that does not answer by then is left out of STATUS."""


class StageProcess:
    """Made by `start`. Callbacks run on the loop; `on_died` is called once, also after `stop`."""

    def __init__(
        self,
        settings: StageSettings,
        on_event: Callable[[TokenEvent | FailureEvent], None],
        on_died: Callable[[str], None],
    ) -> None:
        self._settings, self._on_event, self._on_died = settings, on_event, on_died
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[EngineResult]] = {}
        self._ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._pipe_closed = asyncio.Event()
        self._ended = asyncio.Event()
        self._pipe: Pipe[EngineMessage] | None = None
        self._child: asyncio.subprocess.Process
        self.ticket = ""
        """Of the process's transport."""
        self.dead: str | None = None
        """Why the process ended, once it has."""
        self.stopping = False
        """Whether `stop` was called."""

    @classmethod
    async def start(
        cls,
        settings: StageSettings,
        *,
        on_event: Callable[[TokenEvent | FailureEvent], None],
        on_died: Callable[[str], None],
        tasks: asyncio.TaskGroup,
    ) -> StageProcess:
        """Start a process and wait until it takes requests. Raises EngineError if it does not start."""
        process = cls(settings, on_event, on_died)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process._child = await _spawn(settings, theirs.fileno())
            process._pipe = await Pipe.over(
                ours, EngineMessage, process._received, lambda _: process._pipe_closed.set()
            )
        except BaseException:
            ours.close()  # if the process runs, it ends with the pipe
            raise
        tasks.create_task(process._watch(), name=f"watch engine process {process.pid}")
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                process.ticket = await asyncio.shield(process._ready)
        except BaseException as err:
            process.kill()
            await process._ended.wait()
            if isinstance(err, TimeoutError):
                raise EngineError(
                    f"an engine process was not ready within {settings.start_timeout_s:g} s; the daemon's log has its "
                    "output"
                ) from None
            raise
        return process

    @property
    def pid(self) -> int:
        return self._child.pid

    async def request(self, request: EngineRequest, result_type: type[R]) -> R:
        """Send a request and wait for its result.

        Raises the error of the reply, EngineError if the process is dead or dies before it replies.
        """
        if self.dead is not None or self._pipe is None:
            raise EngineError(self.dead or "the engine process is not running")
        number = next(self._numbers)
        reply = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._pipe.send(NumberedRequest(number, request))
            result = await reply
        finally:
            del self._waiting[number]
        if not isinstance(result, result_type):
            raise EngineError(f"the engine process answered {type(request).__name__} with {type(result).__name__}")
        return result

    async def stop(self) -> None:
        """End it: cleanly within `stop_timeout_s`, else by a kill. Returns once it ended and `on_died` was called."""
        self.stopping = True
        if self.dead is None and self._pipe is not None:
            self._pipe.send(NumberedRequest(0, StopRequest()))
            try:
                async with asyncio.timeout(self._settings.stop_timeout_s):
                    await self._child.wait()
            except TimeoutError:
                self.kill()
        await self._ended.wait()

    def kill(self) -> None:
        """End it at once; `on_died` follows."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()

    async def _watch(self) -> None:
        await self._pipe_closed.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.exit_timeout_s):
                await self._child.wait()
        self.kill()  # a process without a pipe is of no use
        code = await self._child.wait()
        self.dead = f"the engine process {self.pid} {_exit_reason(code)}"
        error = EngineError(self.dead, {"pid": self.pid, "exit_code": code})
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()
        self._on_died(self.dead)
        self._ended.set()

    def _received(self, message: EngineMessage) -> None:
        match message:
            case TokenEvent() | FailureEvent():
                self._on_event(message)
            case SuccessReply(number, result):
                self._settle(number, result, None)
            case ErrorReply(number, error):
                self._settle(number, None, error)
            case EngineReady(ticket):
                if not self._ready.done():
                    self._ready.set_result(ticket)

    def _settle(self, number: int, result: EngineResult, error: dict[str, object] | None) -> None:
        reply = self._waiting.get(number)
        if reply is None or reply.done():
            return  # the caller was cancelled
        if error is None:
            reply.set_result(result)
        else:
            reply.set_exception(error_from_wire(error))


async def _spawn(settings: StageSettings, fd: int) -> asyncio.subprocess.Process:
    root = str(Path(node.__file__).parents[1])
    path = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
        "OMP_NUM_THREADS": str(settings.engine.threads),
        "OMP_WAIT_POLICY": "PASSIVE" if settings.share_cores else "ACTIVE",
    }
    command = [sys.executable, "-P", "-m", "node.pipeline.worker.main", "--fd", str(fd), "--parent", str(os.getpid())]
    engine = msgspec.json.encode(settings.engine).decode()
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            "--engine",
            engine,
            "--log-level",
            str(logging.getLogger().getEffectiveLevel()),
            pass_fds=(fd,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=LOG_FD,
            stderr=LOG_FD,
            env=environment,
        )
    except OSError as err:
        raise EngineError(f"cannot start an engine process: {err}") from None


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
