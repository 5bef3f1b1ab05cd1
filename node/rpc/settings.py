"""How much a peer may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.msgpackrpc import MIB, SERVER_LIMITS, Limits


@dataclass(frozen=True)
class RpcSettings:
    """Bounds and times; a request above a bound is answered with `busy` or `message_too_large`."""

    limits: Limits = SERVER_LIMITS
    """Bounds of one message."""
    max_connections: int = 512
    max_in_flight: int = 256
    """Requests of one connection at a time."""
    max_incoming_bytes: int = 64 * MIB
    """Half-received requests, over all connections; a peer that goes above it is disconnected."""
    max_held_bytes: int = 128 * MIB
    """Memory that requests in progress take, over all connections."""
    max_unsent_bytes: int = 8 * MIB
    """Notifications that a connection may leave unread before it is closed."""
    stall_s: float = 30.0
    """A connection is closed that takes no byte of an answer for this long, or stops within a message for it."""
    linger_s: float = 2.0
    """After a fatal error the rest of what the peer sends is read and dropped for this long, so that the error
    reaches it: closing with unread bytes would reset the connection."""

    shutdown_s: float = 1.0
    """How long the end of `serve` waits for cancelled requests to be answered, and then for connections to end."""

    def __post_init__(self) -> None:
        if min(self.max_held_bytes, self.max_incoming_bytes) < self.limits.max_message_bytes:
            raise ValueError(
                f"max_held_bytes ({self.max_held_bytes}) and max_incoming_bytes ({self.max_incoming_bytes}) must "
                f"each hold a message of max_message_bytes ({self.limits.max_message_bytes})"
            )
