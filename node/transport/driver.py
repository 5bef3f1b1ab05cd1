"""The exchange under asyncio: messages and the time go in, sends, wake-ups and callbacks come out.

Everything runs in callbacks of one event loop: a message that arrives is handed to its inbox in the callback of the
future that brought it, a frame that is sent leaves before `send` returns. There is no task, and no other thread but
tensor_iroh's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from node.transport.core.exchange import Exchange
from node.transport.core.messages import ChannelChanged, InboxEnd, OutletEnd, PeerLost, PullRequested
from node.transport.core.receiver import Frame
from node.transport.core.sender import Bytes
from node.transport.core.wire import PullRequest, Reason
from node.transport.iroh import IrohNode
from node.transport.settings import TransportSettings
from protocol.errors import TransportError

logger = logging.getLogger(__name__)


class ExchangeDriver:
    """Runs one exchange over one node of tensor_iroh. Channels and pulls act through it."""

    exchange: Exchange
    """Set by `start`."""

    def __init__(self, settings: TransportSettings) -> None:
        self.settings = settings
        self.node = IrohNode(self._arrived)
        self.listeners: dict[InboxEnd | OutletEnd, Callable[[], None]] = {}
        """Called when an end of a channel may have something new. A done outlet is removed."""
        self.on_peer_lost: list[Callable[[str], None]] = []
        """Called with the peer's ticket."""
        self.on_pull_request: Callable[[PullRequest], None] = _ignore
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False
        self._no_outlets = asyncio.Event()
        self._started = False
        self._closed = False

    async def start(self) -> str:
        """Bind, and begin to read; returns the ticket. Raises TransportError if the endpoint cannot be bound."""
        await self.node.start()
        self.exchange = Exchange(self.settings, self.node.ticket, self.node.seal)
        self._started = True
        self.node.read()
        return self.node.ticket

    @property
    def now(self) -> float:
        """The loop's time, in seconds."""
        return self._loop.time()

    def check_open(self) -> None:
        """Raises TransportError once the endpoint is closed."""
        if self._closed:
            raise TransportError("the transport endpoint is closed; open another one")

    def offer(self, end: OutletEnd, sequence: int, shape: list[int], dtype: str, data: Bytes) -> None:
        """Let a frame of an outlet leave as far as its credit goes."""
        self.exchange.offer(end, sequence, shape, dtype, data, self.now)
        self.pump()

    def take(self, end: InboxEnd) -> Frame | None:
        """The next whole frame of an inbox."""
        frame = self.exchange.take(end, self.now)
        if frame is not None:
            self._schedule()
        return frame

    def close_inbox(self, end: InboxEnd) -> None:
        """Close an inbox; does nothing after the endpoint was closed."""
        self.listeners.pop(end, None)
        if not self._closed:
            self.exchange.close_inbox(end, self.now)
            self.pump()

    def close_outlet(self, end: OutletEnd, reason: Reason = Reason.CLOSED) -> None:
        """End an outlet; does nothing after the endpoint was closed."""
        if not self._closed:
            self.exchange.close_outlet(end, self.now, reason)
            self.pump()

    def pump(self) -> None:
        """Do what the exchange wants: send, call back, set the timer."""
        if self._pumping:
            return
        self._pumping = True
        outgoing, events = self.exchange.outgoing, self.exchange.events
        while outgoing or events:
            while outgoing:
                message = outgoing.popleft()
                self.node.send(message.peer, message.ticket, message.name, message.body)
            if events:
                match events.popleft():
                    case ChannelChanged(end):
                        self._changed(end)
                    case PeerLost(ticket):
                        self._lost(ticket)
                    case PullRequested(request):
                        self.on_pull_request(request)
        self._pumping = False
        self._schedule()

    async def close(self) -> None:
        """End all channels, give what was sent `close_timeout_s` to be acknowledged, and stop."""
        if self._closed or not self._started:
            self._closed = True
            await self.node.close(0.0)
            return
        table = self.exchange.table
        for inbox in list(table.inboxes.values()):
            self.exchange.close_inbox(inbox, self.now)
        for outlet in list(table.outlets.values()):
            self.exchange.close_outlet(outlet, self.now)
        self.pump()
        if any(outlet.sender.accepted for outlet in table.outlets.values()):
            self._no_outlets.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.close_timeout_s):
                    await self._no_outlets.wait()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for listener in tuple(self.listeners.values()):
            listener()
        await self.node.close(self.settings.close_timeout_s / 4)

    def _arrived(self, name: str, shape: list[int], dtype: str, read: Callable[[], Bytes]) -> None:
        self.exchange.receive(name, shape, dtype, read, self.now)
        self.pump()

    def _tick(self) -> None:
        self._timer = None
        self.exchange.tick(self.now)
        self.pump()

    def _schedule(self) -> None:
        due = self.exchange.due
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
            self._timer = None
        if due < float("inf") and not self._closed:
            self._timer = self._loop.call_at(due, self._tick)

    def _changed(self, end: InboxEnd | OutletEnd) -> None:
        if (listener := self.listeners.get(end)) is not None:
            listener()
        if isinstance(end, OutletEnd) and end.sender.done:
            self.listeners.pop(end, None)
        if not self.exchange.table.outlets:
            self._no_outlets.set()

    def _lost(self, ticket: str) -> None:
        logger.warning("lost the transport peer %s...", ticket[:16])
        for callback in tuple(self.on_peer_lost):
            try:
                callback(ticket)
            except Exception:
                logger.exception("a callback for a lost peer failed")


def _ignore(_: PullRequest) -> None:
    return None
