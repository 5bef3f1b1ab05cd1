"""tensor_iroh under asyncio: the only module that knows it.

What it must be protected from, all measured with 0.1.1a3:

- The first sends to a peer dial one connection each, the pool keeps the last, and what went over the others is
  lost (3 of 40 arrived). So one message dials, and the others wait for it.
- A send that is cancelled half way breaks its connection. So no send is cancelled before the end.
- The pool never drops a dead connection: every later send to that peer fails. So a fresh node of tensor_iroh dials
  that peer from then on; the first one goes on to receive, and its ticket stays.
- `shutdown` waits, holding the GIL, for a pending `wait_for_tensor`: a deadlock. So the wait is cancelled, and seen
  to have ended, first.
- A thread of tensor_iroh that still releases a finished future when the interpreter ends aborts the process
  (once in 5 to 20 exits). So a process that had an endpoint rests before it ends; a program that wants to be
  sure leaves by `os._exit`.
- Sends that are started without waiting for each other may arrive in another order: the receiver sorts.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from node.transport.core.sender import Bytes
from protocol.errors import TransportError, UnsupportedPlatformError

logger = logging.getLogger(__name__)

OnMessage = Callable[[str, list[int], str, Callable[[], Bytes]], None]

_START_TIMEOUT_S = 20.0
_QUEUED_WHILE_DIALING = 256
_MAX_ROUTES = 4096
_MAX_SOCKETS = 4
_REST_S = 0.3
_RETIRED_S = 1.0


def _rest() -> None:
    time.sleep(_REST_S)


class _Socket:
    """One node of tensor_iroh, always read from: its own queue has no bound."""

    def __init__(self, node: Any, on_message: OnMessage) -> None:
        self._loop = asyncio.get_running_loop()
        self._node = node
        self._on_message = on_message
        self._wait: asyncio.Future[Any] | None = None
        self._retiring: asyncio.TimerHandle | None = None
        self._closed = False
        self.broken: set[bytes] = set()
        """Peers whose pooled connection is dead: this node cannot reach them any more."""

    async def start(self) -> str:
        """Bind; returns the ticket."""
        atexit.unregister(_rest)  # once
        atexit.register(_rest)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._node.start()
                return str(await self._node.get_node_addr())
        except (RuntimeError, TimeoutError) as error:
            raise TransportError(f"iroh could not start an endpoint: {error or 'no address in time'}") from error

    def start_soon(self) -> asyncio.Future[Any]:
        """Begin to bind."""
        return self._node.start()  # type: ignore[no-any-return]

    def send(self, ticket: str, name: str, tensor: object) -> asyncio.Future[Any]:
        """Begin to send."""
        return self._node.send_tensor(ticket, name, tensor)  # type: ignore[no-any-return]

    def read(self) -> None:
        """Wait for the next message. One call after the start; it goes on by itself."""
        if not self._closed:
            self._wait = self._node.wait_for_tensor()
            self._wait.add_done_callback(self._arrived)

    def retire(self, then: Callable[[_Socket], None]) -> None:
        """Stop reading; shut down `_RETIRED_S` later, and call `then`. `close` may come before."""
        self._closed = True
        if self._wait is not None:
            self._wait.cancel()

        def shut_down() -> None:
            self._shut_down()
            then(self)

        self._retiring = self._loop.call_later(_RETIRED_S, shut_down)

    async def close(self) -> None:
        """Stop. What was not received is dropped."""
        self._closed = True
        if self._retiring is not None:
            self._retiring.cancel()
        if self._wait is not None:
            self._wait.cancel()
        try:
            async with asyncio.timeout(1.0):
                while await self._node.receive_tensor() is not None:
                    pass
        except TimeoutError:
            logger.warning(
                "tensor_iroh did not release its queue within 1 s; its endpoint stays until the process ends"
            )
            return
        except RuntimeError:
            pass
        self._shut_down()

    def _shut_down(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._node.shutdown()

    def _arrived(self, wait: asyncio.Future[Any]) -> None:
        if self._closed or wait.cancelled():
            return
        if (error := wait.exception()) is not None:
            logger.error("tensor_iroh stopped delivering messages: %s", error)
            return
        name, data = wait.result()
        self._on_message(name, data.shape, data.dtype, data.as_numpy)
        # Only now, and after the task that the message woke: it need not wait for this call.
        self._loop.call_soon(self.read)


class _Route:
    """The connection to one peer: its socket, and whether it is up or dialing; messages wait while it dials."""

    def __init__(self, socket: _Socket) -> None:
        self.socket = socket
        self.dialing = False
        self.up = False
        self.queue: dict[str, tuple[str, object]] = {}
        self.sends: deque[asyncio.Future[Any]] = deque()
        """Sends that were started and not looked at since they ended. Looking at the next send, and not by a callback
        each, saves a turn of the event loop a frame."""


class IrohNode:
    """Starts sends without waiting for them, and hands every message that arrives to `on_message`."""

    def __init__(self, on_message: OnMessage) -> None:
        try:
            from tensor_iroh import PyTensorData, PyTensorNode
        except ImportError as error:
            raise UnsupportedPlatformError(
                f"tensor_iroh cannot be loaded ({error}); it has wheels for Linux x86-64 with glibc 2.34 or newer only"
            ) from error
        self._node_class, self._data_class = PyTensorNode, PyTensorData
        self._on_message = on_message
        self._sockets: list[_Socket] = []
        self._retired: set[_Socket] = set()
        """Sockets that no route uses any more, until they are shut down."""
        self._routes: dict[bytes, _Route] = {}
        self._watched: set[asyncio.Future[Any]] = set()
        """Futures whose end is waited for: of dialing, and of routes that were dropped."""
        self._closed = False
        self._empty = PyTensorData(b"", [0], "uint8", False)
        self.ticket = ""

    async def start(self) -> None:
        """Bind. Raises TransportError if the endpoint cannot be bound."""
        socket = _Socket(self._node_class(), self._on_message)
        self.ticket = await socket.start()
        self._sockets.append(socket)

    def read(self) -> None:
        """Begin to hand out what arrives."""
        self._sockets[0].read()

    def seal(self, chunk: Bytes, shape: list[int], dtype: str) -> object:
        """Copy a chunk into what tensor_iroh sends."""
        return self._data_class(chunk, shape, dtype, False)

    def send(self, peer: bytes, ticket: str, name: str, body: object | None) -> None:
        """Start to send. What fails is sent again by the layer above when it is not acknowledged."""
        if self._closed:
            return
        tensor = self._empty if body is None else body
        route = self._routes.get(peer)
        if route is None:
            route = self._route(peer)
        if route.up:
            self._begin(peer, route, ticket, name, tensor)
        elif not route.dialing:
            route.dialing = True
            self._begin(peer, route, ticket, name, tensor)
        elif len(route.queue) < _QUEUED_WHILE_DIALING:
            route.queue[name] = ticket, tensor

    async def close(self, wait_s: float) -> None:
        """Wait at most `wait_s` for what is being sent, then stop."""
        self._closed = True
        for peer, route in tuple(self._routes.items()):
            self._drop(peer, route)
        if self._watched:
            await asyncio.wait(self._watched, timeout=wait_s)
        for future in tuple(self._watched):
            future.cancel()
        for socket in (*self._sockets, *self._retired):
            await socket.close()

    def _begin(self, peer: bytes, route: _Route, ticket: str, name: str, tensor: object) -> None:
        while route.sends and route.sends[0].done():
            ended = route.sends.popleft()
            if not ended.cancelled() and (error := ended.exception()) is not None:
                logger.info("the connection to a peer broke (%s); another socket dials it", error)
                route.socket.broken.add(peer)
                self._drop(peer, route)
                self.send(peer, ticket, name, tensor)
                return
        future = route.socket.send(ticket, name, tensor)
        if route.up:
            route.sends.append(future)
        else:
            self._watch(future, lambda done: self._dialed(peer, route, done))

    def _watch(self, future: asyncio.Future[Any], then: Callable[[asyncio.Future[Any]], None]) -> None:
        def ended(done: asyncio.Future[Any]) -> None:
            self._watched.discard(done)
            then(done)

        self._watched.add(future)
        future.add_done_callback(ended)

    def _drop(self, peer: bytes, route: _Route) -> None:
        """Forget a route. What is being sent on it goes on; its errors are ignored."""
        if self._routes.get(peer) is route:
            del self._routes[peer]
        for future in route.sends:
            self._watch(future, _ignore)
        route.sends.clear()

    def _dialed(self, peer: bytes, route: _Route, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or (error := future.exception()) is not None:
            if not future.cancelled():
                logger.info("a peer could not be reached: %s", error)
            if self._routes.get(peer) is route:
                del self._routes[peer]
            return
        route.up = True
        for name, (ticket, tensor) in route.queue.items():
            if not self._closed:
                self._begin(peer, route, ticket, name, tensor)
        route.queue.clear()

    def _route(self, peer: bytes) -> _Route:
        while len(self._routes) >= _MAX_ROUTES:
            self._drop(*next(iter(self._routes.items())))
        socket = next((socket for socket in self._sockets if peer not in socket.broken), None)
        if socket is not None:
            route = self._routes[peer] = _Route(socket)
            return route
        if len(self._sockets) >= _MAX_SOCKETS:
            oldest = self._sockets.pop(1)
            for key, route in tuple(self._routes.items()):
                if route.socket is oldest:
                    self._drop(key, route)
            self._retired.add(oldest)
            oldest.retire(self._retired.discard)
        socket = _Socket(self._node_class(), self._on_message)
        route = self._routes[peer] = _Route(socket)
        route.dialing = True
        self._watch(socket.start_soon(), lambda done: self._started(peer, route, done))
        return route

    def _started(self, peer: bytes, route: _Route, future: asyncio.Future[Any]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._routes.pop(peer, None)
            return
        self._sockets.append(route.socket)
        route.socket.read()
        route.dialing = False
        queue, route.queue = route.queue, {}
        for name, (ticket, tensor) in queue.items():
            self.send(peer, ticket, name, tensor)


def _ignore(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
