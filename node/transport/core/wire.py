"""What a message's header says, as bytes and back.

A message is one tensor of tensor_iroh. Its name carries the header, its data a chunk of a tensor's bytes (or
nothing), its shape and dtype those of the *whole* tensor. The header is binary, carried as latin-1 text because
tensor_iroh's names are text: a version byte, then entries one after the other. At most one entry, the first, is
Data; the others ride along (an acknowledgement of another channel with the same peer, a heartbeat).

All integers are little-endian. Each entry opens with its kind (1 byte), and but for Pull with an address: channel
(8 bytes, a hash of the name), link (8 random bytes that the outlet chose) and token (16 bytes, from the key).
"""

from __future__ import annotations

import enum
import hashlib
import struct

import msgspec

VERSION = 1
MAX_HEADER_BYTES = 65536
MAX_NAME_BYTES = 512
MAX_CHANNEL_BYTES = 512
KEY_BYTES = 32

_ADDRESS = struct.Struct("<8s8s16s")
_DATA = struct.Struct("<8s8s16sQqQB")
_ACK = struct.Struct("<8s8s16sQQQ")
_BYTE = struct.Struct("<8s8s16sB")
_PULL = struct.Struct("<8s32sHH")
_LENGTH = struct.Struct("<H")


class Kind(enum.IntEnum):
    """The first byte of an entry."""

    DATA = 1
    ACK = 2
    BEAT = 3
    OPEN = 4
    GONE = 5
    PULL = 6


ANSWER = 1
"""Flag of a Data entry: the sender waits, acknowledge at once."""

END = 2
"""Flag of a Data entry: no chunk, but the end of the channel; `sequence` holds the reason."""


class Reason(enum.IntEnum):
    """Why a side ended a channel."""

    CLOSED = 0
    TAKEN = 1
    MALFORMED = 2
    NOT_FOUND = 3
    LOST = 4
    CUT = 5
    """A tensor was given up half way."""


class Address(msgspec.Struct, frozen=True, gc=False):
    """To which channel an entry belongs, and the proof that its sender holds the key."""

    channel: bytes
    link: bytes
    token: bytes


class Data(msgspec.Struct, frozen=True, gc=False):
    """A chunk: the `number`th message of its link, at `offset` (bytes) of the tensor `sequence`."""

    address: Address
    number: int
    sequence: int
    offset: int
    flags: int


class Ack(msgspec.Struct, frozen=True, gc=False):
    """Messages below `received` arrived; credit reaches up to `messages` and `size_bytes`, from the start."""

    address: Address
    received: int
    messages: int
    size_bytes: int


class Beat(msgspec.Struct, frozen=True, gc=False):
    """The outlet is still there."""

    address: Address


class Open(msgspec.Struct, frozen=True, gc=False):
    """Where the inbox finds the sender. Rides along until the first answer."""

    address: Address
    ticket: str


class Gone(msgspec.Struct, frozen=True, gc=False):
    """The inbox takes no more."""

    address: Address
    reason: int


class Pull(msgspec.Struct, frozen=True, gc=False):
    """Send the tensor registered as `name` to the channel `channel` of `ticket`."""

    channel: bytes
    key: bytes
    ticket: str
    name: str


Entry = Data | Ack | Beat | Open | Gone | Pull


class MalformedHeaderError(ValueError):
    """Raised when a header is not one of ours."""


def channel_id(channel: str) -> bytes:
    """The 8 bytes that stand for a channel's name on the wire."""
    return hashlib.blake2b(channel.encode(), digest_size=8, person=b"shoal channel").digest()


def token_of(key: bytes, channel: bytes, *, from_outlet: bool) -> bytes:
    """What proves the key: another one for each direction, so that an echo proves nothing."""
    direction = b"out" if from_outlet else b"in"
    return hashlib.blake2b(channel + direction, digest_size=16, key=key, person=b"shoal token").digest()


def encode(entries: list[Entry]) -> str:
    """The name of the message that carries `entries`."""
    parts = [bytes((VERSION,))]
    for entry in entries:
        match entry:
            case Data(a, number, sequence, offset, flags):
                parts += b"\1", _DATA.pack(a.channel, a.link, a.token, number, sequence, offset, flags)
            case Ack(a, received, messages, size_bytes):
                parts += b"\2", _ACK.pack(a.channel, a.link, a.token, received, messages, size_bytes)
            case Beat(a):
                parts += b"\3", _ADDRESS.pack(a.channel, a.link, a.token)
            case Open(a, ticket):
                text = ticket.encode()
                parts += b"\4", _ADDRESS.pack(a.channel, a.link, a.token), _LENGTH.pack(len(text)), text
            case Gone(a, reason):
                parts += b"\5", _BYTE.pack(a.channel, a.link, a.token, reason)
            case Pull(channel, key, ticket, name):
                text, named = ticket.encode(), name.encode()
                parts += b"\6", _PULL.pack(channel, key, len(text), len(named)), text, named
    return b"".join(parts).decode("latin-1")


def decode(name: str) -> list[Entry]:
    """The entries of a message's name. Raises MalformedHeaderError; never allocates more than the name holds."""
    if not 2 <= len(name) <= MAX_HEADER_BYTES:
        raise MalformedHeaderError(f"a header of {len(name)} bytes")
    entries: list[Entry] = []
    try:
        data = name.encode("latin-1")
        if data[0] != VERSION:
            raise MalformedHeaderError(f"version {data[0]}")
        at, end = 1, len(data)
        while at < end:
            entry, at = _entry(data, at)
            if isinstance(entry, Data) and entries:
                raise MalformedHeaderError("a chunk that is not the first entry")
            entries.append(entry)
    except (struct.error, UnicodeError, IndexError) as error:
        raise MalformedHeaderError(str(error)) from error
    return entries


def _entry(data: bytes, at: int) -> tuple[Entry, int]:
    kind = data[at]
    at += 1
    match kind:
        case Kind.DATA:
            channel, link, token, number, sequence, offset, flags = _DATA.unpack_from(data, at)
            return Data(Address(channel, link, token), number, sequence, offset, flags), at + _DATA.size
        case Kind.ACK:
            channel, link, token, received, messages, size_bytes = _ACK.unpack_from(data, at)
            return Ack(Address(channel, link, token), received, messages, size_bytes), at + _ACK.size
        case Kind.BEAT:
            return Beat(Address(*_ADDRESS.unpack_from(data, at))), at + _ADDRESS.size
        case Kind.OPEN:
            address = Address(*_ADDRESS.unpack_from(data, at))
            at += _ADDRESS.size
            (length,) = _LENGTH.unpack_from(data, at)
            text, at = _text(data, at + _LENGTH.size, length)
            return Open(address, text), at
        case Kind.GONE:
            channel, link, token, reason = _BYTE.unpack_from(data, at)
            return Gone(Address(channel, link, token), reason), at + _BYTE.size
        case Kind.PULL:
            channel, key, length, named = _PULL.unpack_from(data, at)
            ticket, at = _text(data, at + _PULL.size, length)
            name, at = _text(data, at, named)
            return Pull(channel, key, ticket, name), at
    raise MalformedHeaderError(f"an entry of kind {kind}")


def _text(data: bytes, at: int, length: int) -> tuple[str, int]:
    if at + length > len(data):
        raise MalformedHeaderError("a text that is cut")
    return data[at : at + length].decode(), at + length
