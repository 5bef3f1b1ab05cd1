"""What an iteration holds, and its release on whatever thread the iteration ends."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from torch_bridge.core.loop_thread import loop_thread, may_wait

_log = logging.getLogger(__name__)
_LOOK_S = 0.02


class ClosingStack(ExitStack):
    """Closes what was entered, last first, at the end of its block: there, or if that thread must not wait
    (`may_wait`), on a thread of its own soon after. It closes nothing in a forked child, which does not own it, nor at
    the interpreter's end, when locks may be gone.

    For generators: `with ClosingStack() as held: held.enter_context(lock); held.callback(threads.close); yield ...`
    """

    def __init__(self, *closings: Callable[[], object]) -> None:
        super().__init__()
        self._process = os.getpid()
        self._loop = loop_thread()  # now: nothing can be started when it is needed
        for close in closings:
            self.callback(close)
        _held.add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if self._process != os.getpid() or sys.is_finalizing():
            return False
        if not may_wait():
            _leaving.add(self)
            self._loop.call_apart(self._close_later)
            return False
        _held.discard(self)
        return super().__exit__(kind, error, traceback)

    def _close_later(self) -> None:
        try:
            self.close()
        except Exception as error:  # there is no caller to raise it to
            _log.warning("an abandoned iteration did not close cleanly: %s", error)
        finally:
            _leaving.discard(self)


def wait_for_others(limit_s: float) -> None:
    """Wait for the stacks of this process that are being closed on threads of their own now."""
    others, until = set(_leaving), time.monotonic() + limit_s
    while others & _leaving and time.monotonic() < until:
        time.sleep(_LOOK_S)


_held: set[ClosingStack] = set()
"""Stacks that are open. The garbage collector, which ends parts of a thing in any order, does not reach them here."""
_leaving: set[ClosingStack] = set()
"""Of these, the ones that are being closed on a thread of their own."""
os.register_at_fork(after_in_child=_leaving.clear)
