"""Spinning processes: only while busy, only when nobody else wants the core, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from node.pipeline.keep_awake import KeepAwake

HOLD = """
import time
from node.pipeline.keep_awake import KeepAwake
with KeepAwake(2) as cores:
    cores.busy(True)
    print("spinning", flush=True)
    time.sleep(30)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def cpu_s(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def spinners(of: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(of).children() if "SCHED_IDLE" in " ".join(child.cmdline())]


def test_it_spins_at_idle_priority_while_busy_and_ends_with_the_block() -> None:
    with KeepAwake(1) as cores:
        (spinner,) = spinners(os.getpid())
        wait_until(lambda: os.sched_getscheduler(spinner.pid) == os.SCHED_IDLE)
        cores.busy(True)
        before = cpu_s(spinner)
        wait_until(lambda: cpu_s(spinner) > before + 0.1)
        cores.busy(False)
        wait_until(lambda: spinner.status() == psutil.STATUS_SLEEPING)
        rested = cpu_s(spinner)
        time.sleep(0.3)
        assert cpu_s(spinner) == rested
    assert not spinner.is_running()


def test_none_is_left_behind_by_a_killed_engine() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"spinning\n"
        wait_until(lambda: len(spinners(holder.pid)) == 2)
        left = spinners(holder.pid)
        holder.send_signal(signal.SIGKILL)
        holder.wait(5)
        wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in left))
    finally:
        holder.kill()
        holder.wait(5)
        if holder.stdout:
            holder.stdout.close()
