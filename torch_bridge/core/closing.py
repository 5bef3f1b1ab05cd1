"""What an iteration holds, and how it is let go of wherever the iteration ends."""

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
    """Lets go of what was entered, last first, at the end of its block: there, or where that thread must not wait
    (`may_wait`), on a thread of its own soon after. Not in a forked child, whose it is not, nor at the interpreter's
    end, which takes locks along.

    For generators: `with ClosingStack() as held: held.enter_context(lock); held.callback(threads.close); yield ...`
    """

    def __init__(self, *closings: Callable[[], object]) -> None:
        super().__init__()
        self._process = os.getpid()
        self._loop = loop_thread()  # now: nothing can be begun where it is needed
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
        except Exception as error:  # nobody is there to be told
            _log.warning("an iteration that was left did not end as it should: %s", error)
        finally:
            _leaving.discard(self)


def wait_for_others(limit_s: float) -> None:
    """Until what lets go on threads of its own right now, of this process, has."""
    others, until = set(_leaving), time.monotonic() + limit_s
    while others & _leaving and time.monotonic() < until:
        time.sleep(_LOOK_S)


_held: set[ClosingStack] = set()
"""What has not ended. The collector, which ends the parts of a thing in any order, finds none of it here."""
_leaving: set[ClosingStack] = set()
"""Of these, what is letting go on a thread of its own."""
os.register_at_fork(after_in_child=_leaving.clear)
