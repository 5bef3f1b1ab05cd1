"""Work of another user of this machine, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest

NOBODY = 65534
"""The user and the group that own nothing (Linux Standard Base: nobody, nogroup)."""


def as_nobody(work: Callable[[], Any], *, umask: int = 0o022) -> Any:
    """The result of `work`, done as a user who owns nothing: permission bits hold for it, as they do not for root.

    Raises what `work` raises.
    """
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, umask, theirs))
    child.start()
    theirs.close()
    assert ours.poll(60), "the other user's work does not end"
    result = ours.recv()
    child.join(20)
    if isinstance(result, BaseException):
        raise result
    return result


def _work(work: Callable[[], Any], umask: int, said: Any) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.umask(umask)
    try:
        said.send(work())
    except Exception as error:
        said.send(error)
