"""Guards against what a fork breaks: connections do not survive it, obstore and gRPC hang after it, and an import that
another thread has begun never ends in the child.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from node.origin.core.errors import origin_error
from protocol.errors import OriginError

Library = Literal["obstore", "akavesdk"]

_used: set[Library] = set()
"""What this process has used, or the one that it was forked from."""
_hangs: set[Library] = set()
"""What was used before the fork that made this process: it would hang here, even with connections of its own."""
_forks_wait = threading.RLock()


def expect_own_process(origin: str, opened_in: int) -> None:
    """Raises OriginError if `opened_in`, the id of the process that opened the store, is not that of this process."""
    if opened_in != os.getpid():
        raise _refusal(origin, "it was opened in another process, from which this one was forked")


def hangs_here(library: Library) -> bool:
    """Whether this process was forked from one that used the library."""
    return library in _hangs


def expect_works(library: Library, origin: str) -> None:
    """Note that this process uses the library. Raises OriginError if it was forked from one that used it."""
    if library in _hangs:
        raise _refusal(origin, f"this process was forked from one that used {library}, and it would hang")
    _used.add(library)


@contextmanager
def no_fork() -> Iterator[None]:
    """No fork of this process happens during the block: mostly, the first import of a large library."""
    with _forks_wait:
        yield


def _refusal(origin: str, found: str) -> OriginError:
    advice = "start processes by spawn or forkserver, and open the origin in each of them"
    return origin_error(OriginError, "open the store", found, advice, origin=origin, key="")


def _before_fork() -> None:
    _forks_wait.acquire()


def _after_fork_in_parent() -> None:
    _forks_wait.release()


def _after_fork_in_child() -> None:
    global _forks_wait
    _forks_wait = threading.RLock()
    _hangs.update(_used)


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
