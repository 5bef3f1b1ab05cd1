"""Work of a node that nobody waits for, with an owner all the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

log = logging.getLogger(__name__)


class Background:
    """Tasks that are cancelled when the context ends. One that fails is logged, and takes nothing else along."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._running: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[Background]:
        """Cancels what still runs at the exit, and waits for its end."""
        async with asyncio.TaskGroup() as group:
            background = cls(group)
            try:
                yield background
            finally:
                for task in background._running:
                    task.cancel()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run it beside everything else."""
        task = self._group.create_task(_logged(work, name), name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)


async def _logged(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except Exception:
        log.exception("%s failed", name)
