"""One engine process, seen from the daemon: started, given orders, watched, ended.

Its death, by a crash or a kill, is an event. It dies with the daemon: the pipe ends, and on Linux the kernel kills
it (PR_SET_PDEATHSIG). What it prints goes where the daemon's log goes.
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
from node.pipeline.engine.settings import EngineSettings
from node.pipeline.stage.ipc import (
    Answer,
    Broken,
    Condition,
    Drawn,
    FromProcess,
    Loaded,
    Order,
    Pipe,
    Ready,
    Refused,
    Request,
    Stop,
    Tokens,
)
from protocol.errors import EngineError, error_from_wire

LOG_FD = 2
_LAST_WORDS_S = 0.5
"""For a process that fails to write why."""
R = TypeVar("R", Loaded, Tokens, Condition, None)


@dataclass(frozen=True)
class StageSettings:
    """How engine processes are started and ended."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    share_cores: bool = True
    """Whether other processes compute on the same cores: OpenMP's threads then sleep while they wait. Spinning is
    faster for a process that has its cores alone, and ruins everyone where it has not (a quarter of the speed)."""
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 2.0
    """Of a clean end; then it is killed."""


class StageProcess:
    """Made by `start`. Callbacks run on the loop; `on_died` comes once, also after `stop`."""

    def __init__(self, on_event: Callable[[Drawn | Broken], None], on_died: Callable[[str], None]) -> None:
        self._on_event, self._on_died = on_event, on_died
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Loaded | Tokens | Condition | None]] = {}
        self._ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()
        self._gone = asyncio.Event()
        self._pipe: Pipe[FromProcess] | None = None
        self.ticket = ""
        """Of the process's transport."""
        self.dead: str | None = None
        """Why it is dead, once it is."""
        self.stopping = False
        """Whether its end is wanted."""
        self._settings = StageSettings()
        self._child: asyncio.subprocess.Process

    @classmethod
    async def start(
        cls,
        settings: StageSettings,
        *,
        on_event: Callable[[Drawn | Broken], None],
        on_died: Callable[[str], None],
        tasks: asyncio.TaskGroup,
    ) -> StageProcess:
        """Start a process and wait until it takes orders. Raises EngineError where it does not come up."""
        process = cls(on_event, on_died)
        process._settings = settings
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process._child = await _spawn(settings, theirs.fileno())
            process._pipe = await Pipe.over(ours, FromProcess, process._take, lambda _: process._lost.set())
        except BaseException:
            ours.close()  # the process, if there is one, ends with the pipe
            raise
        tasks.create_task(process._watch(), name=f"watch engine process {process.pid}")
        try:
            async with asyncio.timeout(settings.start_timeout_s):
                process.ticket = await asyncio.shield(process._ready)
        except TimeoutError:
            process.kill()
            await process._gone.wait()
            raise EngineError(
                f"an engine process was not ready within {settings.start_timeout_s:g} s; the log has what it said"
            ) from None
        except BaseException:
            process.kill()
            raise
        return process

    @property
    def pid(self) -> int:
        return self._child.pid

    async def order(self, order: Order, result_type: type[R]) -> R:
        """Give an order and wait for its answer.

        Raises the error it is refused with, EngineError where the process is dead or dies before it answers.
        """
        if self.dead is not None or self._pipe is None:
            raise EngineError(self.dead or "the engine process is not running")
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._pipe.send(Request(number, order))
            result = await answer
        finally:
            del self._waiting[number]
        if not isinstance(result, result_type):
            raise EngineError(f"the engine process answered {type(order).__name__} with {type(result).__name__}")
        return result

    async def stop(self) -> None:
        """End it, cleanly within `stop_timeout_s`, else by a kill. Returns when it is gone and `on_died` was called."""
        self.stopping = True
        if self.dead is None and self._pipe is not None:
            self._pipe.send(Request(0, Stop()))
            try:
                async with asyncio.timeout(self._settings.stop_timeout_s):
                    await self._child.wait()
            except TimeoutError:
                self.kill()
        await self._gone.wait()

    def kill(self) -> None:
        """At once; `on_died` follows."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()

    async def _watch(self) -> None:
        await self._lost.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._child.wait()
        self.kill()  # one that closed its pipe and lives on serves nobody
        code = await self._child.wait()
        self.dead = f"the engine process {self.pid} {_how_it_ended(code)}"
        error = EngineError(self.dead, {"pid": self.pid, "exit_code": code})
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()
        self._on_died(self.dead)
        self._gone.set()

    def _take(self, message: FromProcess) -> None:
        match message:
            case Drawn() | Broken():
                self._on_event(message)
            case Answer(number, result):
                self._settle(number, result, None)
            case Refused(number, error):
                self._settle(number, None, error)
            case Ready(ticket):
                if not self._ready.done():
                    self._ready.set_result(ticket)

    def _settle(self, number: int, result: Loaded | Tokens | Condition | None, error: dict[str, object] | None) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return  # whoever asked is gone
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error_from_wire(error))


async def _spawn(settings: StageSettings, fd: int) -> asyncio.subprocess.Process:
    here = str(Path(node.__file__).parents[1])
    path = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{here}{os.pathsep}{path}" if path else here,
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


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
