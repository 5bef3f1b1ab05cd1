"""One tensor_iroh node under asyncio: the only module that knows tensor_iroh.

What it must be protected from, all measured with 0.1.1a3:

- The first sends to a peer dial one connection each, the pool keeps the last, and what went over the others is
  lost (3 of 40 arrived). So one message dials, and the others wait for it.
- A send that is cancelled half way breaks its connection. So a send is never cancelled while its peer lives.
- The pool never drops a dead connection: every later send to that peer fails. So a fresh node takes over dialing.
- `shutdown` waits, holding the GIL, for a pending `wait_for_tensor`: a deadlock. So the wait is cancelled, and seen
  to have ended, first.
- A future that completes while the interpreter ends aborts the process. So closing waits for every future.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


from node.transport.sender import Bytes
from protocol.errors import TransportError, UnsupportedPlatformError

logger = logging.getLogger(__name__)

OnMessage = Callable[[str, list[int], str, Callable[[], Bytes]], None]

_START_TIMEOUT_S = 20.0
_QUEUED_WHILE_DIALING = 256


def _node_class() -> tuple[Any, Any]:
    try:
        from tensor_iroh import PyTensorData, PyTensorNode
    except ImportError as error:
        raise UnsupportedPlatformError(
            f"tensor_iroh cannot be loaded here ({error}); it has wheels for Linux x86-64 with glibc 2.34 or newer only"
        ) from error
    return PyTensorNode, PyTensorData


@dataclass(slots=True)
class _Route:
    """The way to one peer: up, or dialing with messages that wait."""

    up: bool = False
    queue: deque[tuple[str, str, object]] = field(default_factory=deque)


class IrohNode:
    """Starts sends without waiting for them, and hands every message that arrives to `on_message`."""

    def __init__(self, on_message: OnMessage) -> None:
        self._node_class, self._data_class = _node_class()
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._node: Any = None
        self._wait: asyncio.Future[Any] | None = None
        self._routes: dict[bytes, _Route] = {}
        self._sends: set[asyncio.Future[Any]] = set()
        self._closed = False
        self._empty = self._data_class(b"", [0], "uint8", False)
        self.ticket = ""

    async def start(self) -> None:
        """Bind and read. Raises TransportError when the endpoint cannot be made."""
        self._node = self._node_class()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._node.start()
                self.ticket = await self._node.get_node_addr()
        except (RuntimeError, TimeoutError) as error:
            raise TransportError(f"iroh could not start an endpoint: {error or 'no address in time'}") from error

    def read(self) -> None:
        """Wait for the next message. One call after `start`; it goes on by itself."""
        if self._closed:
            return
        self._wait = self._node.wait_for_tensor()
        self._wait.add_done_callback(self._arrived)

    def seal(self, chunk: Bytes, shape: list[int], dtype: str) -> object:
        """Copy a chunk into what tensor_iroh sends."""
        return self._data_class(chunk, shape, dtype, False)

    def send(self, peer: bytes, ticket: str, name: str, body: object | None) -> None:
        """Start to send; what fails is sent again by the layer above when it is not acknowledged."""
        if self._closed:
            return
        tensor = self._empty if body is None else body
        route = self._routes.get(peer)
        if route is None:
            self._routes[peer] = route = _Route()
        elif not route.up:
            if len(route.queue) < _QUEUED_WHILE_DIALING:
                route.queue.append((ticket, name, tensor))
            return
        future: asyncio.Future[Any] = self._node.send_tensor(ticket, name, tensor)
        self._sends.add(future)
        future.add_done_callback(self._sent if route.up else lambda done: self._dialed(peer, route, done))

    def forget(self, peer: bytes) -> None:
        """No channel leads to the peer any more."""

    async def close(self, wait_s: float) -> None:
        """Let what is being sent leave, at most `wait_s`, then stop."""
        if self._closed:
            return
        self._closed = True
        if self._sends:
            await asyncio.wait(self._sends, timeout=wait_s)
        for future in (*self._sends, *([self._wait] if self._wait is not None else [])):
            future.cancel()
        if self._node is None:
            return
        try:
            async with asyncio.timeout(1.0):
                while await self._node.receive_tensor() is not None:
                    pass
        except TimeoutError:
            logger.warning("tensor_iroh did not let go of its queue; its endpoint stays until the process ends")
            return
        except RuntimeError:
            pass
        with contextlib.suppress(RuntimeError):
            self._node.shutdown()

    def _sent(self, future: asyncio.Future[Any]) -> None:
        self._sends.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.debug("a send failed: %s", error)

    def _dialed(self, peer: bytes, route: _Route, future: asyncio.Future[Any]) -> None:
        self._sent(future)
        if future.cancelled() or future.exception() is not None:
            if self._routes.get(peer) is route:
                del self._routes[peer]
            return
        route.up = True
        while route.queue and not self._closed:
            self.send(peer, *route.queue.popleft())

    def _arrived(self, wait: asyncio.Future[Any]) -> None:
        if self._closed or wait.cancelled():
            return
        if (error := wait.exception()) is not None:
            logger.error("tensor_iroh gives no more messages: %s", error)
            return
        name, data = wait.result()
        # The next wait is begun after the task that this message wakes has run: 20 µs that it need not wait for.
        self._on_message(name, data.shape, data.dtype, data.as_numpy)
        self._loop.call_soon(self.read)


