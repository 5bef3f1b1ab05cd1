"""The two ends of a channel as the application holds them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import numpy.typing as npt

from node.transport.core.messages import InboxEnd, OutletEnd
from node.transport.core.receiver import DTYPES, MAX_DIMENSIONS, Frame
from node.transport.core.wire import MAX_CHANNEL_BYTES, Reason, channel_id
from node.transport.driver import ExchangeDriver
from protocol.errors import PeerLostError, ShoalError, TimedOutError, TransportError


class _Signal:
    """Wakes those who wait for a change of one channel when it is called."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def __call__(self) -> None:
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


class FrameInbox:
    """Where the frames of one channel arrive, in order, from the one sender that holds the key."""

    def __init__(self, driver: ExchangeDriver, end: InboxEnd, channel: str) -> None:
        self._driver = driver
        self._end = end
        self._channel = channel
        self._closed = False
        self._changed = driver.listeners[end] = _Signal()

    @property
    def lost(self) -> bool:
        """Whether the sender was noticed to be gone."""
        return isinstance(self._end.receiver.error, PeerLostError)

    async def receive(self, timeout_s: float | None = None) -> Frame:
        """The next frame. What arrived before a loss or the end is still given out first.

        Raises TimedOutError; PeerLostError if the sender is gone; TransportError if it ended the channel, if it broke
        the rules, or if the inbox or its endpoint is closed.
        """
        if (frame := self._take()) is not None:
            return frame
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._changed.wait()
                    if (frame := self._take()) is not None:
                        return frame
        except TimeoutError:
            raise TimedOutError(f"no frame came on channel {self._channel!r} within {timeout_s:g} s") from None

    def close(self) -> None:
        """Take no more frames, and say so to the sender. Frames that were not received are dropped."""
        if not self._closed:
            self._closed = True
            self._driver.close_inbox(self._end)
            self._changed()

    def _take(self) -> Frame | None:
        if self._closed:
            raise TransportError(f"the inbox of channel {self._channel!r} is closed; open it again to receive")
        if (frame := self._driver.take(self._end)) is not None:
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
        self._driver.check_open()
        return None


class FrameOutlet:
    """Where the frames of one channel leave. Frames of concurrent `send` calls leave whole, in the order of calls."""

    def __init__(self, driver: ExchangeDriver, end: OutletEnd, channel: str, ticket: str, timeout_s: float) -> None:
        self._driver = driver
        self._end = end
        self._channel = channel
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._closed = False
        self.ticket = ticket
        self._changed = driver.listeners[end] = _Signal()

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
        data, dtype = checked_tensor(sequence, tensor, self._driver.settings.max_frame_bytes)
        frame = sequence, list(tensor.shape), dtype, data
        sender = self._end.sender
        offered = False
        if self._waiting == 0 and sender.accepted:
            self._check()
            offered = True
            self._driver.offer(self._end, *frame)
            if not sender.blocked:
                return
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        self._waiting += 1
        try:
            async with asyncio.timeout(wait_s), self._turn:
                if not offered:
                    self._check()
                    offered = True
                    self._driver.offer(self._end, *frame)
                while sender.blocked or not sender.accepted:
                    self._check()
                    await self._changed.wait()
                self._check()
        except TimeoutError:
            why = "the receiver does not take what it has" if sender.accepted else "no inbox has answered yet"
            raise TimedOutError(f"frame {sequence} on channel {self._channel!r}: {why} ({wait_s:g} s)") from None
        finally:
            self._waiting -= 1
            if offered and sender.blocked and not sender.withdraw():
                self._driver.close_outlet(self._end, Reason.CUT)

    async def flush(self, timeout_s: float | None = None) -> None:
        """Wait until the receiver's endpoint has acknowledged all that was sent. Raises as `send` does."""
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(wait_s):
                while not self._end.sender.idle:
                    self._check()
                    await self._changed.wait()
                self._check()
        except TimeoutError:
            raise TimedOutError(f"channel {self._channel!r} was not acknowledged within {wait_s:g} s") from None

    def close(self) -> None:
        """End the channel. What was sent is still delivered, if the peer lives, while the endpoint is open."""
        if not self._closed:
            self._closed = True
            self._driver.close_outlet(self._end)
            self._changed()

    def _check(self) -> None:
        if self._closed:
            raise TransportError(f"the outlet of channel {self._channel!r} is closed; open it again to send")
        if (error := self._end.sender.error) is not None:
            raise _about(error, self._channel)
        self._driver.check_open()
        if self._end.sender.ending:
            raise TransportError(f"channel {self._channel!r} ended with a tensor that was cut off; open another one")


def checked_tensor(sequence: int, tensor: npt.NDArray[Any], max_bytes: int) -> tuple[npt.NDArray[np.uint8], str]:
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


def checked_channel(channel: str, key: bytes) -> bytes:
    """The id of a channel. Raises TransportError for a name or a key of a wrong length."""
    if not 16 <= len(key) <= 64:
        raise TransportError(f"a channel's key has 16 to 64 bytes, not {len(key)}")
    if not 0 < len(channel.encode()) <= MAX_CHANNEL_BYTES:
        raise TransportError(f"a channel's name has 1 to {MAX_CHANNEL_BYTES} bytes, not {len(channel.encode())}")
    return channel_id(channel)


def _about(error: ShoalError, channel: str) -> ShoalError:
    """A new exception for each caller: one object raised twice would gather tracebacks."""
    return type(error)(f"channel {channel!r}: {error.message}", error.details)
