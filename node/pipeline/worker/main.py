"""Composition root of an engine process: engine, transport, worker, and the pipe to the daemon.

`node.pipeline.stage.process` starts it as `python -m node.pipeline.worker.main`. Lines that tensor_iroh prints to
stdout go to the log, a sample of them. The process ends when the daemon says so, when the pipe closes, or with the
daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import faulthandler
import gc
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from protocol.structs import prepared

if TYPE_CHECKING:
    from node.transport import TransportStats

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""
_STOP_TIMEOUT_S = 1.5
"""For a clean end, a forward in progress included; then the process exits."""


def main() -> None:
    """Serve the daemon over the socket whose file descriptor it passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--log-level", type=int, default=logging.INFO)
    args = parser.parse_args()
    _end_with_parent(args.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon stops this process
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)-7s engine[%(process)d]: %(message)s")
    faulthandler.enable()  # to the daemon's stderr: the stack of every thread if a native library crashes
    _redirect_stdout()
    code = 1
    try:
        with socket.socket(fileno=args.fd) as sock:
            asyncio.run(_serve(sock, args.engine))
        code = 0
    except Exception:
        logging.exception("the engine process cannot go on")
    finally:
        logging.shutdown()
        os._exit(code)  # without the destructors of native libraries, whose threads may still run


async def _serve(sock: socket.socket, engine_settings: str) -> None:
    # Imported here: the process is tied to its parent, and its stdout redirected, before native libraries load.
    from node.pipeline.engine.engine import Engine
    from node.pipeline.engine.settings import EngineSettings
    from node.pipeline.stage.ipc import EngineReady, NumberedRequest, Pipe
    from node.pipeline.worker.channels import Channels
    from node.pipeline.worker.scheduler import INLINE_S, EngineThread
    from node.pipeline.worker.worker import Worker, WorkerSettings
    from node.transport import IrohEndpoint, TransportSettings

    settings = msgspec.json.decode(engine_settings, type=prepared(EngineSettings))
    # First, in the main thread: every thread that starts later inherits the CPUs that it is pinned to.
    engine = Engine(settings)
    inline = settings.threads == 1 or os.environ.get("OMP_WAIT_POLICY") == "PASSIVE"
    gc.freeze()  # these objects live as long as the process: the collector skips them
    async with (
        IrohEndpoint.open(TransportSettings()) as endpoint,
        EngineThread(engine, inline_s=INLINE_S if inline else 0.0) as thread,
    ):
        pipe: Pipe[NumberedRequest]
        worker = Worker(
            thread,
            Channels(endpoint),
            WorkerSettings(ctx_size=settings.ctx_size, max_sessions=settings.max_sessions),
            lambda message: pipe.send(message),
            transport_stats=lambda: _figures(endpoint.stats()),
        )
        async with worker:
            pipe = await Pipe.over(sock, NumberedRequest, worker.handle, lambda _: worker.stopped.set())
            pipe.send(EngineReady(endpoint.ticket))
            await worker.stopped.wait()
            end = threading.Timer(_STOP_TIMEOUT_S, os._exit, (1,))
            end.daemon = True
            end.start()


class LogSampler:
    """Drops lines of a Rust library's log: one of each module every ten minutes stays.

    Without the internet iroh logs over and over, in colour, that it cannot publish its address.
    """

    EVERY_S = 600.0
    MAX_KINDS = 64
    MAX_CHARS = 300
    _COLOUR = re.compile(r"\x1b\[[0-9;]*m")
    _MODULE = re.compile(r"\b(\w+(?:::\w+)*): ")
    _CHATTER = "[GET_ADDR] Created NodeTicket"
    """Logged at every start, as an ERROR."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def take(self, line: str, now: float) -> str | None:
        """The line to log, or None. `now` is in seconds."""
        line = self._COLOUR.sub("", line).strip()
        found = self._MODULE.search(line)
        kind = found[1] if found else ""
        if not line or self._CHATTER in line:
            return None
        if now - self._last.get(kind, -self.EVERY_S) < self.EVERY_S:
            return None
        if len(self._last) >= self.MAX_KINDS:
            self._last.clear()
        self._last[kind] = now
        return line[found.start() if found else 0 :][: self.MAX_CHARS]


def _redirect_stdout() -> None:
    ours, theirs = os.pipe()
    os.dup2(theirs, 1)
    os.close(theirs)

    def pump() -> None:
        sampler, told = LogSampler(), False
        with os.fdopen(ours, errors="replace") as lines:
            while line := lines.readline(4096):
                if text := sampler.take(line, time.monotonic()):
                    if not told:
                        logging.info(
                            "tensor_iroh has warnings, most often that its public address service cannot be reached, "
                            "which Shoal does not need; --log-level debug shows them"
                        )
                        told = True
                    logging.debug("tensor_iroh: %s", text)

    threading.Thread(target=pump, name="stdout", daemon=True).start()


def _figures(stats: TransportStats) -> dict[str, int]:
    """By the names that STATUS gives."""
    counters = stats.counters
    dropped = (
        counters.dropped_malformed + counters.dropped_unknown + counters.dropped_unauthentic + counters.dropped_late
    )
    return {
        "sent_frames": counters.frames_sent,
        "sent_bytes": counters.bytes_sent,
        "received_frames": counters.frames_received,
        "received_bytes": counters.bytes_received,
        "dropped_frames": dropped,
        "peers": stats.peers,
    }


def _end_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the daemon that started this engine process has ended")


if __name__ == "__main__":
    main()
