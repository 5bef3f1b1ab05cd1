"""Channels between stages: over the transport, or in memory if the next stage runs in the same process."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from node.pipeline.worker.interfaces import Activation, ActivationFrame, FrameReceiver, FrameSender, FrameTransport
from protocol.errors import TransportError

LOCAL_WINDOW = 16
"""Frames that may wait between two stages of one process."""


def channel_name(session: str, attempt: int, stage: int) -> str:
    """The channel into `stage`. It names the attempt, so a late frame of an earlier attempt finds no inbox."""
    return f"{session}/{attempt}/{stage}"


@dataclass(frozen=True)
class LocalFrame:
    """A frame between two stages of one process."""

    sequence: int
    tensor: Activation


class StageInbox:
    """What a stage receives. Its first frame decides whether the sender is in this process or another."""

    def __init__(self, owner: Channels, channel: str, key: bytes, remote: FrameReceiver) -> None:
        self._owner, self._channel = owner, channel
        self.key = key
        self._remote = remote
        self.local: asyncio.Queue[LocalFrame] = asyncio.Queue(LOCAL_WINDOW)
        self._source: str | None = None

    async def receive(self) -> ActivationFrame:
        """Wait for the next frame. Raises what the transport raises for a channel that ended."""
        if self._source == "remote":
            return await self._remote.receive()
        if self._source == "local":
            return await self.local.get()
        remote = asyncio.ensure_future(self._remote.receive())  # noqa: TID251 - both are awaited below
        local = asyncio.ensure_future(self.local.get())  # noqa: TID251
        try:
            await asyncio.wait((remote, local), return_when=asyncio.FIRST_COMPLETED)
            self._source, first = ("local", local) if local.done() else ("remote", remote)
            return first.result()
        finally:
            remote.cancel()
            local.cancel()
            await asyncio.wait((remote, local))
            if not remote.cancelled():
                remote.exception()

    def close(self) -> None:
        """Drop what has not been received."""
        self._owner.forget(self._channel, self)
        self._remote.close()


class LocalOutlet:
    """Sends to a stage of the same process."""

    def __init__(self, inbox: StageInbox) -> None:
        self._inbox = inbox

    async def send(self, sequence: int, tensor: Activation) -> None:
        """Put a frame into the inbox; waits while the window is full."""
        await self._inbox.local.put(LocalFrame(sequence, tensor))

    def close(self) -> None:
        """Does nothing: the inbox belongs to its stage."""


class Channels:
    """All channels of a process."""

    def __init__(self, transport: FrameTransport) -> None:
        self._transport = transport
        self._inboxes: dict[str, StageInbox] = {}

    @property
    def ticket(self) -> str:
        """The address of this process's transport."""
        return self._transport.ticket

    def on_peer_lost(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call `callback` with the ticket of each process that is lost. Returns a function that ends the calls."""
        return self._transport.on_peer_lost(callback)

    def open_inbox(self, channel: str, key: bytes) -> StageInbox:
        """Accept the frames of a channel that carry this key."""
        inbox = StageInbox(self, channel, key, self._transport.open_inbox(channel, key))
        self._inboxes[channel] = inbox
        return inbox

    def open_outlet(self, ticket: str, channel: str, key: bytes) -> FrameSender:
        """Reach the inbox of a channel, in this process or another. Raises TransportError for a bad ticket."""
        if ticket != self._transport.ticket:
            return self._transport.open_outlet(ticket, channel, key)
        inbox = self._inboxes.get(channel)
        if inbox is None or not hmac.compare_digest(inbox.key, key):
            raise TransportError(f"channel {channel} ends in this process, which has no inbox for it")
        return LocalOutlet(inbox)

    def forget(self, channel: str, inbox: StageInbox) -> None:
        """Remove a closed inbox."""
        if self._inboxes.get(channel) is inbox:
            del self._inboxes[channel]
