"""Pieces that were fetched elsewhere and wait for their check."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from node.swarm.handle import Handle


class Offers:
    """Who waits for the check of which piece."""

    def __init__(self) -> None:
        self._waiting: defaultdict[int, list[asyncio.Future[bool]]] = defaultdict(list)

    def __contains__(self, index: int) -> bool:
        return index in self._waiting

    async def give(self, handle: Handle, index: int, data: bytes) -> bool:
        """Give a piece to the session. Returns whether it was kept."""
        answer = self.wait(index)
        try:
            handle.add_piece(index, data)
            return await answer
        finally:
            self.forget(index, answer)

    def wait(self, index: int) -> asyncio.Future[bool]:
        """A future that tells whether the piece was kept."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[index].append(future)
        return future

    def forget(self, index: int, future: asyncio.Future[bool]) -> None:
        """Who waited gave up, or has the answer."""
        waiting = self._waiting.get(index, [])
        if future in waiting:
            waiting.remove(future)
        if not waiting:
            self._waiting.pop(index, None)

    def answer(self, index: int, *, kept: bool) -> None:
        """A piece was checked."""
        for future in self._waiting.pop(index, ()):
            if not future.done():
                future.set_result(kept)

    def answer_all(self, *, kept: bool) -> None:
        """No more checks are to come."""
        for index in tuple(self._waiting):
            self.answer(index, kept=kept)
