"""Who may wait. What the garbage collector ends is ended on whatever thread it runs, in the middle of whatever that
does: locks may be held there that others need, and it may be the very thread that is waited for.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable


class ServingThread(threading.Thread):
    """A daemon that others wait for: what ends on it waits for nobody."""

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)


_collecting: set[int] = set()
"""Threads in whose midst the garbage collector runs."""


def is_collecting() -> bool:
    """Whether this is called by what the collector ends."""
    return threading.get_ident() in _collecting


def may_wait() -> bool:
    """Whether it may be waited here for any other thread."""
    return not is_collecting() and not isinstance(threading.current_thread(), ServingThread)


def _note(
    phase: str, _: object, here: Callable[[], int] = threading.get_ident, threads: set[int] = _collecting
) -> None:  # all of it at hand: the interpreter's end takes a module's names away, and collects on
    if phase == "start":
        threads.add(here())
    else:
        threads.discard(here())


gc.callbacks.append(_note)
os.register_at_fork(after_in_child=_collecting.clear)
