"""Locks between the processes of one machine: each ends with its process, however that dies."""

from __future__ import annotations

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import CancelledRequestError

_POLL_S = 0.05


class FileLock:
    """An exclusive flock on a file, which stays. A forked child does not keep its parent's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        _all.add(self)

    def take(self) -> bool:
        """Whether it is ours now, without waiting. OSError where the file cannot be opened."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def leave(self) -> None:
        """Let go; nothing happens where it is not ours."""
        fd, self._fd = self._fd, None
        if fd is not None:
            fcntl.flock(fd, fcntl.LOCK_UN)  # also where a child that was just forked still has the descriptor
            os.close(fd)

    def forget(self) -> None:
        """In a forked child: close the copy, which does not end the parent's lock."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


_all: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_all):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


@contextmanager
def locked(path: Path, stop: threading.Event | None = None) -> Iterator[None]:
    """Wait for a lock and hold it. Raises CancelledRequestError where `stop` is set meanwhile."""
    lock = FileLock(path)
    while not lock.take():
        if stop is not None and stop.is_set():
            raise CancelledRequestError(f"{path.name} was not waited for any longer: this side stops")
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        lock.leave()
