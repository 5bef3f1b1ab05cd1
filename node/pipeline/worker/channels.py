"""Channels between stages: over the transport, or within the process where the next stage is in it too."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from node.pipeline.worker.interfaces import Array, EndpointLike, FrameLike, InboxLike, OutletLike
from protocol.errors import TransportError

LOCAL_WINDOW = 16
"""Frames that wait between two stages of one process."""


def channel_name(session: str, attempt: int, stage: int) -> str:
    """Of what `stage` receives; a late frame of a dead attempt finds no inbox."""
    return f"{session}/{attempt}/{stage}"


@dataclass(frozen=True)
class LocalFrame:
    """A frame that never left the process."""

    sequence: int
    tensor: Array


class Inbox:
    """What a stage receives, from wherever its first frame comes."""

    def __init__(self, owner: Channels, channel: str, key: bytes, remote: InboxLike) -> None:
        self._owner, self._channel = owner, channel
        self.key = key
        self._remote = remote
        self.local: asyncio.Queue[LocalFrame] = asyncio.Queue(LOCAL_WINDOW)
        self._from: str | None = None

    async def receive(self) -> FrameLike:
        """Wait for the next frame. Raises what the transport raises for a channel that ended."""
        if self._from == "remote":
            return await self._remote.receive()
        if self._from == "local":
            return await self.local.get()
        remote = asyncio.ensure_future(self._remote.receive())
        local = asyncio.ensure_future(self.local.get())
        try:
            await asyncio.wait((remote, local), return_when=asyncio.FIRST_COMPLETED)
            self._from, first = ("local", local) if local.done() else ("remote", remote)
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
    """To a stage of the same process."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    async def send(self, sequence: int, tensor: Array) -> None:
        """Hand it over; waits while the window is full."""
        await self._inbox.local.put(LocalFrame(sequence, tensor))

    def close(self) -> None:
        """Nothing to do: the inbox belongs to its stage."""


class Channels:
    """All channels of a process."""

    def __init__(self, endpoint: EndpointLike) -> None:
        self._endpoint = endpoint
        self._here: dict[str, Inbox] = {}

    @property
    def ticket(self) -> str:
        return self._endpoint.ticket

    def on_peer_lost(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call back with the ticket of a process that is gone. Returns what takes the callback back."""
        return self._endpoint.on_peer_lost(callback)

    def open_inbox(self, channel: str, key: bytes) -> Inbox:
        """Take frames for a channel from now on, those with this key."""
        inbox = Inbox(self, channel, key, self._endpoint.open_inbox(channel, key))
        self._here[channel] = inbox
        return inbox

    def open_outlet(self, ticket: str, channel: str, key: bytes) -> OutletLike:
        """Reach the inbox of a channel, in this process or another. Raises TransportError for a bad ticket."""
        if ticket != self._endpoint.ticket:
            return self._endpoint.open_outlet(ticket, channel, key)
        inbox = self._here.get(channel)
        if inbox is None or not hmac.compare_digest(inbox.key, key):
            raise TransportError(f"channel {channel} is to end in this process, which has no such inbox")
        return LocalOutlet(inbox)

    def forget(self, channel: str, inbox: Inbox) -> None:
        """An inbox was closed."""
        if self._here.get(channel) is inbox:
            del self._here[channel]
