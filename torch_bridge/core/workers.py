"""A DataLoader's worker ends with its training process, also if that was killed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

_log = logging.getLogger(__name__)
LOOK_S = 0.2
"""Seconds between two looks at the training process. PR_SET_PDEATHSIG of prctl(2) would follow the thread that started
the worker, which may end before its process does."""


def end_with_trainer() -> None:
    """In a DataLoader's worker: end this process as soon as its training process is gone, by a thread that watches it.
    Does nothing in a training process.

    torch's own watch looks every 5 s while the worker waits for work, and takes whoever adopted the worker for its
    trainer if that was gone before the worker began; until it ends, the worker holds its part of a folder. What it was
    doing stays on the disk as after SIGKILL.
    """
    if multiprocessing.parent_process() is None or os.getpid() in _watched:
        return
    _end_if_left()
    _watched.add(os.getpid())
    threading.Thread(target=_watch, name="trainer-watch", daemon=True).start()


def trainer_is_gone() -> bool:
    """Whether the process that started this one by multiprocessing has ended."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid == os.getppid():
        return False
    # Adopted, or started by a fork server. A forked sibling may hold the pipe that would tell.
    return not parent.is_alive() or _has_ended(parent.pid)


def _watch() -> None:
    while True:
        time.sleep(LOOK_S)
        _end_if_left()


def _end_if_left() -> None:
    if trainer_is_gone():
        _log.warning("the training process is gone: this worker ends")
        os._exit(1)  # the training loop's exit handlers and threads are none of a worker's that nobody asks for batches


def _has_ended(pid: int | None) -> bool:
    """proc(5): the state comes after the name in parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return Path("/proc/self").exists()


_watched: set[int] = set()
"""Process ids: a forked child does not have its parent's threads."""
