"""Keeps an engine's cores from going to sleep between two tokens.

A stage waits for the others most of the time, and a core that idled for a few milliseconds is slow afterwards: its
clock is down, and a virtual one was given away. A stage of 15 layers of SmolLM2 took 9.0 ms a token with 9 ms of sleep
between tokens, 6.8 ms without a pause, and 6.6 ms with the pause and a process beside it that spins at SCHED_IDLE. Such
a process gets a core only while nobody else wants it (sched(7)), so it takes no time from anyone; it costs power, and
runs only while a session is open.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from types import TracebackType

_SPIN = """
import os, select
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while word := os.read(0, 1):
    while word == b"+" and not select.select([0], [], [], 0)[0]:
        for _ in range(10_000):
            pass
"""
"""Spins between a `+` and a `-` on stdin, and ends with it."""


class KeepAwake:
    """One spinning process for each core; a context manager that ends them."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> KeepAwake:
        command = [sys.executable, "-S", "-E", "-c", _SPIN]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(self._cores)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()

    def busy(self, busy: bool) -> None:
        """Spin from now on, or rest."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):  # one that died is no reason to stop
                os.write(process.stdin.fileno(), b"+" if busy else b"-")
