"""The two ends of a channel as the application holds them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from node.transport.core.messages import InboxEnd, OutletEnd
from node.transport.core.receiver import DTYPES, MAX_DIMENSIONS, Frame
from node.transport.core.wire import Reason
from protocol.errors import PeerLostError, ShoalError, TimedOutError, TransportError

if TYPE_CHECKING:
    from node.transport.endpoint import IrohEndpoint


class _Signal:
    """Wakes those who wait for a change of one channel."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def set(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)


class Inbox:
    """Where the frames of one channel arrive, in order, from the one sender that holds the key."""

    def __init__(self, endpoint: IrohEndpoint, end: InboxEnd, channel: str) -> None:
        self._endpoint = endpoint
        self._end = end
        self._channel = channel
        self._closed = False
        self.changed = _Signal()

    @property
    def lost(self) -> bool:
        """Whether the sender was noticed to be gone."""
        return isinstance(self._end.receiver.error, PeerLostError)

    async def receive(self, timeout_s: float | None = None) -> Frame:
        """The next frame. What arrived before a loss or the end is still given out first.

        Raises TimedOutError; PeerLostError when the sender is gone; TransportError when it ended the channel, when
        it broke the rules, or when the inbox or its endpoint is closed.
        """
        if (frame := self._take()) is not None:
            return frame
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self.changed.wait()
                    if (frame := self._take()) is not None:
                        return frame
        except TimeoutError:
            raise TimedOutError(f"no frame came on channel {self._channel!r} within {timeout_s:g} s") from None

    def close(self) -> None:
        """Take no more; the sender is told. What was not taken is dropped."""
        if not self._closed:
            self._closed = True
            self._endpoint.close_inbox(self._end)
            self.changed.set()

    def _take(self) -> Frame | None:
        if self._closed:
            raise TransportError(f"the inbox of channel {self._channel!r} is closed; open it again to receive")
        if (frame := self._endpoint.take(self._end)) is not None:
            return frame
        receiver = self._end.receiver
        if receiver.error is not None:
            raise _about(receiver.error, self._channel)
        if receiver.ended is not None:
            if receiver.ended == Reason.NOT_FOUND:
                raise TransportError("the peer has no tensor registered under that name")
            if receiver.ended == Reason.CUT:
                raise TransportError(f"the sender gave up channel {self._channel!r} in the middle of a tensor")
            raise TransportError(f"the sender ended channel {self._channel!r}, and every frame of it was received")
        self._endpoint.check_open()
        return None


class Outlet:
    """Where the frames of one channel leave. Frames of concurrent `send` calls leave whole, in the order of calls."""

    def __init__(self, endpoint: IrohEndpoint, end: OutletEnd, channel: str, ticket: str, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._end = end
        self._channel = channel
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._closed = False
        self.ticket = ticket
        self.changed = _Signal()

    @property
    def lost(self) -> bool:
        """Whether the receiver was noticed to be gone."""
        return isinstance(self._end.sender.error, PeerLostError)

    async def send(self, sequence: int, tensor: npt.NDArray[Any], timeout_s: float | None = None) -> None:
        """Send a float32 or int32 tensor of at most four dimensions. The array may be reused afterwards.

        Returns when all of it left (the credit bounds how much is under way); the first send of a channel returns
        when the inbox has answered. A loss that comes later is raised by the next call; `flush` waits for it.

        Raises TimedOutError, PeerLostError, TransportError. A time-out or a cancellation in the middle of a tensor
        ends the channel: the receiver cannot be left with a part of it.
        """
        data, dtype = checked(sequence, tensor, self._endpoint.max_frame_bytes)
        frame = sequence, list(tensor.shape), dtype, data
        sender = self._end.sender
        offered = False
        if self._waiting == 0 and sender.accepted:
            self._check()
            offered = True
            self._endpoint.offer(self._end, *frame)
            if not sender.blocked:
                return
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        self._waiting += 1
        try:
            async with asyncio.timeout(wait_s), self._turn:
                if not offered:
                    self._check()
                    offered = True
                    self._endpoint.offer(self._end, *frame)
                while sender.blocked or not sender.accepted:
                    self._check()
                    await self.changed.wait()
                self._check()
        except TimeoutError:
            why = "the receiver does not take what it has" if sender.accepted else "no inbox has answered yet"
            raise TimedOutError(f"frame {sequence} on channel {self._channel!r}: {why} ({wait_s:g} s)") from None
        finally:
            self._waiting -= 1
            if offered and sender.blocked and not sender.withdraw():
                self._endpoint.close_outlet(self._end, Reason.CUT)

    async def flush(self, timeout_s: float | None = None) -> None:
        """Wait until the receiver's endpoint has acknowledged all that was sent. Raises as `send` does."""
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(wait_s):
                while not self._end.sender.idle:
                    self._check()
                    await self.changed.wait()
                self._check()
        except TimeoutError:
            raise TimedOutError(f"channel {self._channel!r} was not acknowledged within {wait_s:g} s") from None

    def close(self) -> None:
        """Say the end. What was sent is still delivered, if the peer lives, while the endpoint is open."""
        if not self._closed:
            self._closed = True
            self._endpoint.close_outlet(self._end)
            self.changed.set()

    def _check(self) -> None:
        if self._closed:
            raise TransportError(f"the outlet of channel {self._channel!r} is closed; open it again to send")
        if (error := self._end.sender.error) is not None:
            raise _about(error, self._channel)
        self._endpoint.check_open()
        if self._end.sender.ending:
            raise TransportError(f"channel {self._channel!r} ended with a tensor that was cut off; open another one")


def checked(sequence: int, tensor: npt.NDArray[Any], max_bytes: int) -> tuple[npt.NDArray[np.uint8], str]:
    """The flat bytes of a tensor and its dtype's name. Raises TransportError for one that cannot be sent."""
    dtype = next((name for name, known in DTYPES.items() if tensor.dtype == known), None)
    if dtype is None or tensor.ndim > MAX_DIMENSIONS:
        raise TransportError(
            f"a tensor of {tensor.dtype} with {tensor.ndim} dimensions cannot be sent: float32 or int32, at most "
            f"{MAX_DIMENSIONS} dimensions"
        )
    if tensor.nbytes > max_bytes:
        raise TransportError(f"a tensor of {tensor.nbytes} bytes is above max_frame_bytes, {max_bytes}")
    if not -(1 << 63) <= sequence < 1 << 63:
        raise TransportError(f"sequence {sequence} does not fit 64 bits")
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8), dtype


def _about(error: ShoalError, channel: str) -> ShoalError:
    """A new exception for each caller: one object raised twice would gather tracebacks."""
    return type(error)(f"channel {channel!r}: {error.message}", error.details)
