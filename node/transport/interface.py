"""What the rest of the node may know of a transport: send, receive, peer lost. tensor_iroh stands behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt

from node.transport.core.receiver import Frame
from node.transport.stats import TransportStats


class FrameInbox(Protocol):
    """Where the frames of one channel arrive, in order."""

    @property
    def lost(self) -> bool: ...

    async def receive(self, timeout_s: float | None = None) -> Frame: ...

    def close(self) -> None: ...


class FrameOutlet(Protocol):
    """Where the frames of one channel leave."""

    @property
    def lost(self) -> bool: ...

    async def send(self, sequence: int, tensor: npt.NDArray[Any], timeout_s: float | None = None) -> None: ...

    async def flush(self, timeout_s: float | None = None) -> None: ...

    def close(self) -> None: ...


class Endpoint(Protocol):
    """One process's end of the transport. `node.transport.IrohEndpoint` is the real one."""

    ticket: str

    def open_inbox(self, channel: str, key: bytes) -> FrameInbox: ...

    def open_outlet(self, ticket: str, channel: str, key: bytes) -> FrameOutlet: ...

    def on_peer_lost(self, callback: Callable[[str], None]) -> Callable[[], None]: ...

    def register(self, name: str, tensor: npt.NDArray[Any]) -> None: ...

    async def pull(self, ticket: str, name: str, timeout_s: float = ...) -> npt.NDArray[Any]: ...

    def stats(self) -> TransportStats: ...
