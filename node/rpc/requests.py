"""The requests in progress over all connections of a server: by id, with the memory that they hold."""

from __future__ import annotations

import asyncio

from node.rpc.settings import RpcSettings
from protocol.errors import BusyError


class RequestRegistry:
    """Finds a request to cancel by its id, and bounds what all requests together hold."""

    def __init__(self, settings: RpcSettings) -> None:
        self.held_bytes = 0
        """About how much memory the requests in progress take, over all connections."""
        self.incoming_bytes = 0
        """Bytes of half-received requests, over all connections."""
        self._settings = settings
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        self._cancelled: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many request ids are in progress."""
        return len(self._tasks)

    def add(self, task: asyncio.Task[None], request_id: str, cost_bytes: int) -> None:
        """Keep a request until its task is done."""
        self.held_bytes += cost_bytes
        self._tasks.setdefault(request_id, set()).add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self.held_bytes -= cost_bytes
            self._cancelled.discard(done)
            tasks = self._tasks[request_id]
            tasks.discard(done)
            if not tasks:
                del self._tasks[request_id]

        task.add_done_callback(forget)

    def cancel(self, request_id: str) -> bool:
        """Cancel the requests of this id, on whatever connection; each is answered with the error `cancelled`.

        The request that asks for it is left alone if it has the same id. False if there is no other.
        """
        tasks = self._tasks.get(request_id, set()) - {asyncio.current_task()}
        for task in tasks:
            self.cancel_task(task)
        return bool(tasks)

    def cancel_task(self, task: asyncio.Task[None]) -> None:
        """Cancel one request whose client is still connected and gets an answer."""
        self._cancelled.add(task)
        task.cancel()

    def was_cancelled(self, task: asyncio.Task[None]) -> bool:
        """Whether `cancel_task` ended this request, rather than the loss of its connection."""
        return task in self._cancelled

    def count_incoming(self, more_bytes: int) -> None:
        """Count bytes of half-received requests; negative if they are whole now, or dropped.

        Raises BusyError above `max_incoming_bytes`.
        """
        most = self._settings.max_incoming_bytes
        if more_bytes > 0 and self.incoming_bytes + more_bytes > most:
            raise BusyError(_no_room("half-received", self.incoming_bytes, more_bytes, most))
        self.incoming_bytes += more_bytes

    def check_room(self, cost_bytes: int) -> None:
        """Raise BusyError if the requests in progress would hold more than `max_held_bytes`."""
        most = self._settings.max_held_bytes
        if self.held_bytes + cost_bytes > most:
            raise BusyError(_no_room("running", self.held_bytes, cost_bytes, most))


def _no_room(which: str, there: int, more: int, most: int) -> str:
    return f"{which} requests hold {there} bytes of the node's memory, {more} more are above {most}; try again later"
