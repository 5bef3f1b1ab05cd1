"""Listens, accepts connections, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Mapping

from node.background import BoundedGroup
from node.clock import Clock
from node.rpc.connection import Command, Connection, RpcContext
from node.rpc.requests import RequestRegistry
from node.rpc.settings import RpcSettings
from protocol.errors import BusyError
from protocol.ids import NodeId

_BACKLOG = 256
_BUFFER_BYTES = 64 * 1024
_TURNED_AWAY = 32
_log = logging.getLogger(__name__)


class RpcServer:
    """Commands by MessagePack-RPC over TCP; made once a node, and run by `serve`."""

    def __init__(
        self,
        commands: Mapping[str, Command],
        node_id: NodeId,
        settings: RpcSettings | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        """`commands` is kept, not copied: it may be filled until `serve` is entered.

        `clock` times connections out that stall.
        """
        self.commands = commands
        self.settings = settings or RpcSettings()
        self.requests = RequestRegistry(self.settings)
        self._context = RpcContext(commands, node_id, self.settings, self.requests, clock or Clock())
        self._port = 0
        self._connections: dict[asyncio.Task[None], Connection] = {}

    @property
    def port(self) -> int:
        """The TCP port, once `serve` has been entered."""
        return self._port

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    def cancel(self, request_id: str) -> bool:
        """Cancel the requests of this id, on whatever connection. False if there is none."""
        return self.requests.cancel(request_id)

    @contextlib.asynccontextmanager
    async def serve(
        self, host: str = "127.0.0.1", port: int = 0, *, bound: socket.socket | None = None
    ) -> AsyncIterator[RpcServer]:
        """Listen on an address; port 0 picks a free one. Leaving it ends every request with `cancelled`.

        `bound` is a socket that is bound already, for a port that others must know before this server may answer.
        Raises OSError if the address cannot be bound.
        """
        async with BoundedGroup.open(self.settings.shutdown_s) as tasks:

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                self._accept(tasks, reader, writer)

            if bound is None:
                listener = await asyncio.start_server(accept, host, port, limit=_BUFFER_BYTES, backlog=_BACKLOG)
            else:
                listener = await asyncio.start_server(accept, sock=bound, limit=_BUFFER_BYTES, backlog=_BACKLOG)
            self._port = listener.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                listener.close()
                await self._answer_all()

    async def _answer_all(self) -> None:
        """Cancel every request, and give the answers `shutdown_s` to leave."""
        requests = [task for connection in self._connections.values() for task in connection.cancel_all()]
        if requests:
            await asyncio.wait(requests, timeout=self.settings.shutdown_s)

    def _accept(self, tasks: BoundedGroup, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self._context, reader, writer)
        most = self.settings.max_connections
        if len(self._connections) >= most + _TURNED_AWAY:
            writer.transport.abort()
            return
        if len(self._connections) >= most:
            work = connection.turn_away(BusyError(f"this node serves {most} connections, no more; try again later"))
        else:
            work = connection.run()
        task = tasks.start(work, name=f"the RPC connection of {connection.peer}")
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)
