"""Which pieces of a download its connected peers have, asked for no more often than it is worth."""

from __future__ import annotations

import contextlib
import time

from node.swarm.handle import Handle
from protocol.errors import ShoalError

ASK_EVERY_S = 1.0


class Availability:
    """As of at most a second ago."""

    def __init__(self) -> None:
        self._pieces: frozenset[int] = frozenset()
        self._due = 0.0

    async def pieces(self, handle: Handle | None) -> frozenset[int]:
        """The pieces that some connected peer has."""
        now = time.monotonic()
        if handle and now >= self._due:
            self._due = now + ASK_EVERY_S
            with contextlib.suppress(ShoalError):  # it is being begun anew, or has just ended
                counts = await handle.availability()
                self._pieces = frozenset(index for index, peers in enumerate(counts) if peers)
        return self._pieces
