"""A peer's address as iroh writes it, checked before it is used.

tensor_iroh does not say that a ticket is bad before it has tried to send, and reports it on stdout. The form is
iroh 0.90's NodeTicket: the word `node`, then base32 (RFC 4648, lower case, no padding) of a postcard-encoded
structure: variant 0, the ed25519 public key (32 bytes), an optional relay URL, and socket addresses.
"""

from __future__ import annotations

import base64
import binascii

from protocol.errors import TransportError

MAX_TICKET_LENGTH = 2048
_MAX_ADDRESSES = 64


class _CutError(Exception):
    """Raised when the bytes end before the structure does."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count:
            raise _CutError
        self._at += count
        return piece

    def varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise _CutError

    @property
    def left(self) -> int:
        return len(self._data) - self._at


def peer_of(ticket: str) -> bytes:
    """The 32-byte public key that `ticket` addresses.

    Raises TransportError if it is not a ticket, names no address at all, or is cut.
    """
    problem = "it does not start with 'node'"
    if isinstance(ticket, str) and ticket.startswith("node") and len(ticket) <= MAX_TICKET_LENGTH:
        try:
            return _parse(ticket)
        except (_CutError, binascii.Error, ValueError) as error:
            problem = str(error) or "it is cut"
    shown = repr(ticket)
    shown = shown if len(shown) < 100 else shown[:90] + "...'"
    raise TransportError(f"{shown} is not an iroh node ticket: {problem}. Take it from the peer's endpoint.ticket")


def _parse(ticket: str) -> bytes:
    text = ticket[4:]
    if text != text.lower():
        raise ValueError("it has upper-case letters")
    reader = _Reader(base64.b32decode(text.upper() + "=" * (-len(text) % 8)))
    if reader.take(1) != b"\0":
        raise ValueError("its variant is unknown")
    key = reader.take(32)
    has_relay = reader.take(1)[0]
    if has_relay > 1:
        raise ValueError("its relay field is malformed")
    if has_relay:
        reader.take(reader.varint())
    count = reader.varint()
    if count > _MAX_ADDRESSES or (count == 0 and not has_relay):
        raise ValueError(f"it holds {count} addresses")
    for _ in range(count):
        family = reader.varint()
        if family > 1:
            raise ValueError("an address is neither IPv4 nor IPv6")
        reader.take(16 if family else 4)
        if not 0 < reader.varint() < 65536:
            raise ValueError("a port is out of range")
    if reader.left:
        raise ValueError(f"{reader.left} bytes follow its end")
    return key
