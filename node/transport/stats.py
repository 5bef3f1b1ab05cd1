"""Counters of an endpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals since the endpoint was opened."""

    frames_sent: int = 0
    frames_received: int = 0
    messages_sent: int = 0
    """Chunks that left for the first time."""
    messages_resent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    """Payload bytes of chunks that left for the first time."""
    bytes_received: int = 0
    acks_sent: int = 0
    """Acknowledgements that needed a message of their own."""
    acks_ridden: int = 0
    """Acknowledgements that rode along with a chunk."""
    heartbeats_sent: int = 0
    peers_lost: int = 0
    dropped_malformed: int = 0
    """Messages whose header is not ours, or whose chunk breaks the rules."""
    dropped_unknown: int = 0
    """Entries for a channel that is not known here (also: whose inbox is not open yet)."""
    dropped_unauthentic: int = 0
    """Entries for an open channel without its key."""
    dropped_late: int = 0
    """Entries for a channel that was closed here."""
    dropped_duplicate: int = 0


@dataclass(frozen=True, slots=True)
class TransportStats:
    """A snapshot: the counters, and what is open and in flight now."""

    counters: Counters
    peers: int
    outlets: int
    inboxes: int
    messages_in_flight: int
    bytes_in_flight: int
    frames_waiting: int
    registered: int
