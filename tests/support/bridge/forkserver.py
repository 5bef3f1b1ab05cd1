"""Processes that start with torch imported and share nothing else with the tests' process: spawned ones cost more."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOAD = [
    "tests.support.bridge.training",
    "torch._dynamo",  # tensors that are cut import it, seconds later
    "torch_bridge.checkpoints.dcp",
    "torch_bridge.streaming.dataset",
]


def forkserver() -> ForkServerContext:
    """One server for all tests of a run; the imports are done at its first process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context
