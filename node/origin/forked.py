"""Connections do not survive a fork, and obstore hangs after one: both are refused, in words."""

from __future__ import annotations

import os

from node.origin.failures import failed
from protocol.errors import OriginError

_obstore_used_in: int | None = None
"""The process that used obstore; a child that is forked from it inherits this, and would hang even with a store of its
own."""


def expect_own_process(origin: str, opened_in: int) -> None:
    """Raises OriginError where this process is not the one, by its id, that opened the store."""
    if opened_in != os.getpid():
        raise _refusal(origin, "it was opened in another process, from which this one was forked")


def expect_obstore_works(origin: str) -> None:
    """Raises OriginError in a process that was forked from one that used obstore. Else this one counts as using it."""
    global _obstore_used_in
    if _obstore_used_in not in (None, os.getpid()):
        raise _refusal(origin, "this process was forked from one that used it, and it would hang")
    _obstore_used_in = os.getpid()


def _refusal(origin: str, found: str) -> OriginError:
    advice = "start processes by spawn or forkserver, and open the origin in each"
    return failed(OriginError, "open the store", found, advice, origin=origin, key="")
