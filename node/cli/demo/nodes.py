"""Node processes of a demo: started, awaited, and always ended."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 6.0
_SEEN_S = 0.3
_LOG_LINES = 60
"""Of a log, in an error: the stacks of a few threads."""


class NodeStartError(RuntimeError):
    """Raised when a node process ended, or said nothing in time, instead of getting ready."""


@dataclass(frozen=True)
class RunningNode:
    """One node process that said it is ready."""

    name: str
    node_id: str
    rpc_port: int
    dht_port: int
    log_path: Path
    process: asyncio.subprocess.Process

    async def stop(self) -> None:
        """End it now, in order; nothing happens if it has ended."""
        await _stop(self.process)


@asynccontextmanager
async def running_node(
    name: str, home: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> AsyncIterator[RunningNode]:
    """Start `shoal serve` on free loopback ports with `home` as its data directory; end it at the exit.

    `environment` is added to this process's own and has precedence over it. Raises NodeStartError with the last lines
    of its log; if the block fails and the node has ended by itself meanwhile, they are a note of that error.
    """
    home.mkdir(parents=True, exist_ok=True)
    log_path = home / "node.log"
    command = [sys.executable, "-m", "node", "serve", "--data-dir", str(home), *arguments]
    for port in ("rpc", "dht", "bt", "http"):
        command += [f"--{port}-port", "0"]
    with log_path.open("wb") as log_file:
        process = await asyncio.create_subprocess_exec(
            *ended_with_parent(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log_file,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),
            start_new_session=True,  # Ctrl-C is for the demo, which then stops its nodes in order
        )
    try:
        ready = await _ready_line(process, log_path)
        ports, node_id = ready["ports"], ready["node_id"]
        try:
            yield RunningNode(name, node_id, ports["rpc"], ports["dht"], log_path, process)
        except Exception as err:
            with suppress(TimeoutError):  # its connections end before it is seen to have ended
                await asyncio.wait_for(process.wait(), _SEEN_S)
            if process.returncode:
                err.add_note(
                    f"node {name} had ended with status {process.returncode}; its log ends:\n{_tail(log_path)}"
                )
            raise
    finally:
        await _stop(process)


async def _ready_line(process: asyncio.subprocess.Process, log_path: Path) -> dict[str, Any]:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            line = await process.stdout.readline()
    except TimeoutError:
        line = b""
    try:
        ready: dict[str, Any] = json.loads(line)
        return ready
    except json.JSONDecodeError:
        what = "ended" if process.stdout.at_eof() else f"was not ready within {READY_TIMEOUT_S:.0f} s"
        raise NodeStartError(f"a node {what}; its log ends:\n{_tail(log_path)}") from None


def _tail(log_path: Path) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:])


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        pass
    finally:  # cancelled too: it ends now, and who stops it hears of the cancellation
        if process.returncode is None:
            process.kill()
        await process.wait()


def ended_with_parent(command: Sequence[str], by: signal.Signals = signal.SIGTERM) -> list[str]:
    """The command, run so that a signal ends it when the thread that starts it ends, however that happens.

    By setpriv (util-linux), if it is there: what Python itself runs between fork and exec may wait for ever if there
    are threads.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", by.name.removeprefix("SIG"), "--", *command] if setpriv else [*command]
