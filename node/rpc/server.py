"""Listens, and knows every request of the node by its id."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

from node.rpc.call import Command
from node.rpc.connection import Connection
from node.rpc.settings import RpcSettings
from protocol.errors import BusyError
from protocol.ids import NodeId

_SHUTDOWN_S = 1.0
_BACKLOG = 256
_BUFFER_BYTES = 64 * 1024
_TURNED_AWAY = 32
_log = logging.getLogger(__name__)


class RpcServer:
    """Commands by MessagePack-RPC over TCP; made once a node, and run by `serve`."""

    def __init__(self, commands: Mapping[str, Command], node_id: NodeId, settings: RpcSettings | None = None) -> None:
        """`commands` is kept, not copied: it may be filled until `serve` is entered."""
        self.commands = commands
        self.node_id = node_id
        self.settings = settings or RpcSettings()
        self.held_bytes = 0
        """About how much memory the requests in progress take, over all connections."""
        self.incoming_bytes = 0
        """Of requests that are not whole yet, over all connections."""
        self._port = 0
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._running: dict[str, set[asyncio.Task[None]]] = {}
        self._cancelled: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The TCP port, once `serve` has been entered."""
        return self._port

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self._connections)

    @contextlib.asynccontextmanager
    async def serve(
        self, host: str = "127.0.0.1", port: int = 0, *, bound: socket.socket | None = None
    ) -> AsyncIterator[RpcServer]:
        """Listen on an address; port 0 picks a free one. Leaving it ends every request with `cancelled`.

        `bound` is a socket that is bound already, for a port that others must know before this may answer.
        Raises OSError where the address cannot be bound.
        """
        where: dict[str, Any] = {"host": host, "port": port} if bound is None else {"sock": bound}
        listener = await asyncio.start_server(self._accept, **where, limit=_BUFFER_BYTES, backlog=_BACKLOG)
        self._port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            await self._hang_up()

    async def _hang_up(self) -> None:
        requests = [task for connection in self._connections.values() for task in connection.cancel_all()]
        if requests:
            await asyncio.wait(requests, timeout=_SHUTDOWN_S)
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        if connections:
            _, stuck = await asyncio.wait(connections, timeout=_SHUTDOWN_S)
            for task in stuck:
                _log.warning("a request of %s does not end when cancelled", self._connections[task].peer)

    def cancel(self, request_id: str) -> bool:
        """End the requests of this id, on whatever connection; each is answered with the error `cancelled`.

        The request that asks for it is left alone, should it have the same id. False where there is none.
        """
        tasks = self._running.get(request_id, set()) - {asyncio.current_task()}
        for task in tasks:
            self.cancel_task(task)
        return bool(tasks)

    def cancel_task(self, task: asyncio.Task[None]) -> None:
        """Cancel one request and remember that its client is still there to be told."""
        self._cancelled.add(task)
        task.cancel()

    def was_cancelled(self, task: asyncio.Task[None]) -> bool:
        """Whether `cancel_task` ended this request, and not the loss of its connection."""
        return task in self._cancelled

    def receive(self, more_bytes: int) -> None:
        """Count bytes of requests that are not whole yet; negative when they are, or are dropped.

        Raises BusyError where there would be too many.
        """
        if more_bytes > 0 and self.incoming_bytes + more_bytes > self.settings.max_incoming_bytes:
            raise BusyError(
                _no_room("half-received", self.incoming_bytes, more_bytes, self.settings.max_incoming_bytes)
            )
        self.incoming_bytes += more_bytes

    def check_room(self, cost_bytes: int) -> None:
        """Raise BusyError where the requests in progress would take more memory than they may."""
        if self.held_bytes + cost_bytes > self.settings.max_held_bytes:
            raise BusyError(_no_room("running", self.held_bytes, cost_bytes, self.settings.max_held_bytes))

    def add(self, task: asyncio.Task[None], request_id: str, cost_bytes: int) -> None:
        """Know a request until its task is done."""
        self.held_bytes += cost_bytes
        self._running.setdefault(request_id, set()).add(task)

        def forget(done: asyncio.Task[None]) -> None:
            self.held_bytes -= cost_bytes
            self._cancelled.discard(done)
            tasks = self._running[request_id]
            tasks.discard(done)
            if not tasks:
                del self._running[request_id]

        task.add_done_callback(forget)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        most = self.settings.max_connections
        if len(self._connections) >= most + _TURNED_AWAY:
            writer.transport.abort()
            return
        if len(self._connections) >= most:
            work = connection.turn_away(BusyError(f"this node serves {most} connections, no more; try again later"))
        else:
            work = connection.run()
        task = asyncio.get_running_loop().create_task(work, name=f"rpc {connection.peer}")
        self._connections[task] = connection
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        connection = self._connections.pop(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("the connection of %s failed", connection.peer, exc_info=error)


def _no_room(which: str, there: int, more: int, most: int) -> str:
    return f"{which} requests hold {there} bytes of the node's memory, {more} more are above {most}; try again later"
