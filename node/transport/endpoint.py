"""The endpoint: tensor_iroh's messages and the clock go into the exchange, what it wants done comes out.

Everything runs in callbacks of one event loop: a message that arrives is handed to its inbox in the callback of the
future that brought it, a frame that is sent leaves before `send` returns. There is no task, and no other thread but
tensor_iroh's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy.typing as npt

from node.transport.channels import Inbox, Outlet, checked
from node.transport.core.exchange import Exchange
from node.transport.core.messages import Changed, InboxEnd, OutletEnd, PeerLost, PullAsked
from node.transport.core.receiver import Frame
from node.transport.core.sender import Bytes
from node.transport.core.wire import MAX_CHANNEL_BYTES, MAX_NAME_BYTES, Pull, Reason, channel_id
from node.transport.iroh import IrohNode
from node.transport.settings import TransportSettings
from node.transport.stats import TransportStats
from node.transport.ticket import peer_of
from protocol.errors import BusyError, TimedOutError, TransportError

logger = logging.getLogger(__name__)

_ASK_AGAIN_S = 0.5


class IrohEndpoint:
    """One tensor_iroh endpoint with its channels. Made by `open`."""

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._node = IrohNode(self._arrived)
        self._exchange: Exchange
        self._handles: dict[InboxEnd | OutletEnd, Inbox | Outlet] = {}
        self._registered: dict[str, tuple[list[int], str, Bytes]] = {}
        self._serving: dict[OutletEnd, Pull] = {}
        self._on_lost: list[Callable[[str], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False
        self._quiet = asyncio.Event()
        self._closed = False
        self.max_frame_bytes = settings.max_frame_bytes
        self.ticket = ""
        """Where others reach this endpoint: an iroh node ticket. It does not change while the endpoint is open."""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: TransportSettings | None = None) -> AsyncIterator[IrohEndpoint]:
        """Bind an endpoint, and close it at the end: what was sent is given `close_timeout_s` to arrive.

        Raises TransportError when it cannot be bound, UnsupportedPlatformError where tensor_iroh has no wheel.
        """
        endpoint = cls(settings if settings is not None else TransportSettings())
        try:
            await endpoint._node.start()
            endpoint.ticket = endpoint._node.ticket
            endpoint._exchange = Exchange(endpoint._settings, endpoint.ticket, endpoint._node.seal)
            endpoint._node.read()
            yield endpoint
        finally:
            await endpoint._close()

    def open_inbox(self, channel: str, key: bytes) -> Inbox:
        """Take frames of `channel` from whoever holds `key` (16 to 64 bytes). One inbox a channel, one sender an inbox.

        Raises TransportError for a channel that is open, BusyError at the bound.
        """
        self.check_open()
        end = self._exchange.open_inbox(_named(channel, key), key)
        inbox = self._handles[end] = Inbox(self, end, channel)
        return inbox

    def open_outlet(self, ticket: str, channel: str, key: bytes) -> Outlet:
        """Send frames to the inbox of `channel` at `ticket`. The connection is made at once, in the background.

        Raises TransportError for a bad ticket, BusyError at the bound.
        """
        self.check_open()
        end = self._exchange.open_outlet(ticket, _named(channel, key), key, self._loop.time())
        outlet = Outlet(self, end, channel, ticket, self._settings.open_timeout_s + self._settings.lost_after_s)
        self._handles[end] = outlet
        self._pump()
        return outlet

    def on_peer_lost(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call `callback(ticket)` when a peer is noticed to be gone. Returns what takes the callback back."""
        self._on_lost.append(callback)
        return lambda: self._on_lost.remove(callback) if callback in self._on_lost else None

    def register(self, name: str, tensor: npt.NDArray[Any]) -> None:
        """Let others pull a copy of `tensor` by `name`. Whoever can reach this endpoint and knows the name can pull:
        a name that must stay secret must be hard to guess.

        Raises TransportError for a tensor or name that cannot be sent, BusyError at the bound.
        """
        self.check_open()
        _check_name(name)
        if name not in self._registered and len(self._registered) >= self._settings.max_registered:
            raise BusyError(f"{len(self._registered)} tensors are registered, the bound; unregister one first")
        data, dtype = checked(0, tensor, self._settings.max_frame_bytes)
        self._registered[name] = list(tensor.shape), dtype, data.copy()

    def unregister(self, name: str) -> None:
        """No longer offer `name`. Unknown names are fine."""
        self._registered.pop(name, None)

    async def pull(self, ticket: str, name: str, timeout_s: float = 30.0) -> npt.NDArray[Any]:
        """A copy of the tensor that the peer registered as `name`.

        Raises TransportError if it has none of that name or the ticket is bad, TimedOutError, PeerLostError.
        """
        self.check_open()
        _check_name(name)
        if peer_of(ticket) == peer_of(self.ticket):
            raise TransportError("the ticket is this endpoint's own; it has the tensor already")
        pull = Pull(os.urandom(8), os.urandom(32), self.ticket, name)
        end = self._exchange.open_inbox(pull.channel, pull.key)
        inbox = self._handles[end] = Inbox(self, end, f"pull of {name!r}")
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if not end.receiver.bound:
                        self._exchange.ask(ticket, pull)
                        self._pump()
                    with contextlib.suppress(TimedOutError):
                        return (await inbox.receive(_ASK_AGAIN_S)).tensor
        except TimeoutError:
            heard = "did not answer" if not end.receiver.bound else "did not send all of it"
            raise TimedOutError(f"pull of {name!r}: the peer {heard} within {timeout_s:g} s") from None
        finally:
            inbox.close()

    def stats(self) -> TransportStats:
        """Counters, and what is open and in flight now."""
        return self._exchange.table.stats(len(self._registered))

    # ---- for the channels

    def check_open(self) -> None:
        """Raises TransportError once the endpoint is closed."""
        if self._closed:
            raise TransportError("the transport endpoint is closed; open another one")

    def offer(self, end: OutletEnd, sequence: int, shape: list[int], dtype: str, data: Bytes) -> None:
        """Let a frame of an outlet leave as far as its credit goes."""
        self._exchange.offer(end, sequence, shape, dtype, data, self._loop.time())
        self._pump()

    def take(self, end: InboxEnd) -> Frame | None:
        """The next whole frame of an inbox."""
        frame = self._exchange.take(end, self._loop.time())
        if frame is not None:
            self._schedule()
        return frame

    def close_inbox(self, end: InboxEnd) -> None:
        """Close an inbox; nothing happens after the endpoint was closed."""
        self._handles.pop(end, None)
        if not self._closed:
            self._exchange.close_inbox(end, self._loop.time())
            self._pump()

    def close_outlet(self, end: OutletEnd, reason: Reason = Reason.CLOSED) -> None:
        """End an outlet; nothing happens after the endpoint was closed."""
        if not self._closed:
            self._exchange.close_outlet(end, self._loop.time(), reason)
            self._pump()

    # ---- inside

    def _arrived(self, name: str, shape: list[int], dtype: str, read: Callable[[], Bytes]) -> None:
        self._exchange.receive(name, shape, dtype, read, self._loop.time())
        self._pump()

    def _tick(self) -> None:
        self._timer = None
        self._exchange.tick(self._loop.time())
        self._pump()

    def _pump(self) -> None:
        """Do what the exchange wants: send, tell, wake up in time."""
        if self._pumping:
            return
        self._pumping = True
        outgoing, events = self._exchange.outgoing, self._exchange.events
        while outgoing or events:
            while outgoing:
                envelope = outgoing.popleft()
                self._node.send(envelope.peer, envelope.ticket, envelope.name, envelope.body)
            if events:
                match events.popleft():
                    case Changed(end):
                        self._changed(end)
                    case PeerLost(ticket):
                        self._lost(ticket)
                    case PullAsked(pull):
                        self._asked(pull)
        self._pumping = False
        self._schedule()

    def _schedule(self) -> None:
        due = self._exchange.due
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
            self._timer = None
        if due < float("inf") and not self._closed:
            self._timer = self._loop.call_at(due, self._tick)

    def _changed(self, end: InboxEnd | OutletEnd) -> None:
        if (handle := self._handles.get(end)) is not None:
            handle.changed.set()
        if isinstance(end, OutletEnd):
            if end in self._serving:
                self._serve(end)
            if end.sender.done:
                self._handles.pop(end, None)
        if not self._exchange.table.outlets:
            self._quiet.set()

    def _lost(self, ticket: str) -> None:
        logger.warning("lost the transport peer %s...", ticket[:16])
        for callback in tuple(self._on_lost):
            try:
                callback(ticket)
            except Exception:
                logger.exception("a callback for a lost peer failed")

    def _asked(self, pull: Pull) -> None:
        known = any(serving.channel == pull.channel for serving in self._serving.values())
        if known or len(self._serving) >= self._settings.max_serving:
            return
        with contextlib.suppress(TransportError, BusyError):
            end = self._exchange.open_outlet(pull.ticket, pull.channel, pull.key, self._loop.time())
            self._serving[end] = pull

    def _serve(self, end: OutletEnd) -> None:
        """Go on with a pull: the tensor leaves when the asker's inbox has answered, so that nobody can have it sent
        to a third party; the end follows it.
        """
        sender = end.sender
        if sender.done:
            del self._serving[end]
        elif sender.accepted and not sender.ending and not sender.blocked:
            found = self._registered.get(self._serving[end].name)
            now = self._loop.time()
            if found is not None:
                self._exchange.offer(end, 0, *found, now)
            self._exchange.close_outlet(end, now, Reason.NOT_FOUND if found is None else Reason.CLOSED)

    async def _close(self) -> None:
        if self._closed or not hasattr(self, "_exchange"):
            self._closed = True
            await self._node.close(0.0)
            return
        now = self._loop.time()
        for inbox in list(self._exchange.table.inboxes.values()):
            self._exchange.close_inbox(inbox, now)
        for outlet in list(self._exchange.table.outlets.values()):
            self._exchange.close_outlet(outlet, now)
        self._pump()
        if any(outlet.sender.accepted for outlet in self._exchange.table.outlets.values()):
            self._quiet.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.close_timeout_s):
                    await self._quiet.wait()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for handle in self._handles.values():
            handle.changed.set()
        await self._node.close(self._settings.close_timeout_s / 4)


def _named(channel: str, key: bytes) -> bytes:
    if not 16 <= len(key) <= 64:
        raise TransportError(f"a channel's key has 16 to 64 bytes, not {len(key)}")
    if not 0 < len(channel.encode()) <= MAX_CHANNEL_BYTES:
        raise TransportError(f"a channel's name has 1 to {MAX_CHANNEL_BYTES} bytes")
    return channel_id(channel)


def _check_name(name: str) -> None:
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise TransportError(f"a tensor's name has 1 to {MAX_NAME_BYTES} bytes")
