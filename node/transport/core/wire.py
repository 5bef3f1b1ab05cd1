"""The header of a message, as bytes and back.

A message is one tensor of tensor_iroh. Its name carries the header, its data a chunk of a tensor's bytes (or
nothing), its shape and dtype those of the *whole* tensor. The header is binary, carried as latin-1 text because
tensor_iroh's names are text: a version byte, then entries one after the other. At most one entry, the first, is
a Chunk; the others ride along (an acknowledgement of another channel with the same peer, a heartbeat).

All integers are little-endian. Each entry begins with its kind (1 byte). In all but PullRequest an address follows:
channel (8 bytes, a hash of the name), link (8 random bytes that the outlet chose) and token (16 bytes, from the key).
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
_CHUNK = struct.Struct("<8s8s16sQqQB")
_ACK = struct.Struct("<8s8s16sQQQ")
_BYTE = struct.Struct("<8s8s16sB")
_PULL = struct.Struct("<8s8s24sHH")
_LENGTH = struct.Struct("<H")


class Kind(enum.IntEnum):
    """The first byte of an entry."""

    CHUNK = 1
    ACK = 2
    HEARTBEAT = 3
    HELLO = 4
    RESET = 5
    PULL = 6


ANSWER = 1
"""Flag of a Chunk entry: the sender waits, acknowledge at once."""

END = 2
"""Flag of a Chunk entry: no chunk, but the end of the channel; `sequence` holds the reason."""


class Reason(enum.IntEnum):
    """Why a side ended a channel."""

    CLOSED = 0
    TAKEN = 1
    MALFORMED = 2
    NOT_FOUND = 3
    LOST = 4
    CUT = 5
    """The sender stopped in the middle of a tensor."""


class ChannelAddress(msgspec.Struct, frozen=True, gc=False):
    """To which channel an entry belongs, and the proof that its sender holds the key."""

    channel: bytes
    link: bytes
    token: bytes


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A chunk: the `number`th message of its link, at `offset` (bytes) of the tensor `sequence`."""

    address: ChannelAddress
    number: int
    sequence: int
    offset: int
    flags: int


class Ack(msgspec.Struct, frozen=True, gc=False):
    """Messages below `received` arrived; credit reaches up to `messages` and `size_bytes`, from the start."""

    address: ChannelAddress
    received: int
    messages: int
    size_bytes: int


class Heartbeat(msgspec.Struct, frozen=True, gc=False):
    """The outlet is still there."""

    address: ChannelAddress


class Hello(msgspec.Struct, frozen=True, gc=False):
    """Where the inbox finds the sender. Rides along until the first answer."""

    address: ChannelAddress
    ticket: str


class Reset(msgspec.Struct, frozen=True, gc=False):
    """The inbox takes no more."""

    address: ChannelAddress
    reason: int


class PullRequest(msgspec.Struct, frozen=True, gc=False):
    """Send the tensor registered as `name` to the channel `channel` of `ticket`. Made by `pull_request`."""

    channel: bytes
    """8 random bytes: where the answer goes."""
    offer: bytes
    """The id of the channel under which the tensor is offered."""
    proof: bytes
    """24 bytes that show that the requester holds that channel's key."""
    ticket: str
    name: str


Entry = Chunk | Ack | Heartbeat | Hello | Reset | PullRequest


class MalformedHeaderError(ValueError):
    """Raised when a header is not one of ours."""


def channel_id(channel: str) -> bytes:
    """The 8 bytes that stand for a channel's name on the wire."""
    return hashlib.blake2b(channel.encode(), digest_size=8, person=b"shoal channel").digest()


def token_of(key: bytes, channel: bytes, *, from_outlet: bool) -> bytes:
    """What proves the key: another one for each direction, so that an echo proves nothing."""
    direction = b"out" if from_outlet else b"in"
    return hashlib.blake2b(channel + direction, digest_size=16, key=key, person=b"shoal token").digest()


def pull_request(key: bytes, channel: bytes, offer: bytes, ticket: str, name: str) -> PullRequest:
    """The request with the proof that the key gives: over every field, so that none can be exchanged."""
    text, named = ticket.encode(), name.encode()
    fields = _PULL.pack(channel, offer, bytes(24), len(text), len(named)) + text + named
    proof = hashlib.blake2b(fields, digest_size=24, key=key, person=b"shoal pull").digest()
    return PullRequest(channel, offer, proof, ticket, name)


def answer_key(key: bytes, channel: bytes) -> bytes:
    """The key of the channel on which a pulled tensor comes: another one for each request."""
    return hashlib.blake2b(channel, digest_size=KEY_BYTES, key=key, person=b"shoal answer").digest()


def encode(entries: list[Entry]) -> str:
    """The name of the message that carries `entries`."""
    parts = [bytes((VERSION,))]
    for entry in entries:
        match entry:
            case Chunk(a, number, sequence, offset, flags):
                parts += b"\1", _CHUNK.pack(a.channel, a.link, a.token, number, sequence, offset, flags)
            case Ack(a, received, messages, size_bytes):
                parts += b"\2", _ACK.pack(a.channel, a.link, a.token, received, messages, size_bytes)
            case Heartbeat(a):
                parts += b"\3", _ADDRESS.pack(a.channel, a.link, a.token)
            case Hello(a, ticket):
                text = ticket.encode()
                parts += b"\4", _ADDRESS.pack(a.channel, a.link, a.token), _LENGTH.pack(len(text)), text
            case Reset(a, reason):
                parts += b"\5", _BYTE.pack(a.channel, a.link, a.token, reason)
            case PullRequest(channel, offer, proof, ticket, name):
                text, named = ticket.encode(), name.encode()
                parts += b"\6", _PULL.pack(channel, offer, proof, len(text), len(named)), text, named
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
            if isinstance(entry, Chunk) and entries:
                raise MalformedHeaderError("a chunk that is not the first entry")
            entries.append(entry)
    except (struct.error, UnicodeError, IndexError) as error:
        raise MalformedHeaderError(str(error)) from error
    return entries


def _entry(data: bytes, at: int) -> tuple[Entry, int]:
    kind = data[at]
    at += 1
    match kind:
        case Kind.CHUNK:
            channel, link, token, number, sequence, offset, flags = _CHUNK.unpack_from(data, at)
            return Chunk(ChannelAddress(channel, link, token), number, sequence, offset, flags), at + _CHUNK.size
        case Kind.ACK:
            channel, link, token, received, messages, size_bytes = _ACK.unpack_from(data, at)
            return Ack(ChannelAddress(channel, link, token), received, messages, size_bytes), at + _ACK.size
        case Kind.HEARTBEAT:
            return Heartbeat(ChannelAddress(*_ADDRESS.unpack_from(data, at))), at + _ADDRESS.size
        case Kind.HELLO:
            address = ChannelAddress(*_ADDRESS.unpack_from(data, at))
            at += _ADDRESS.size
            (length,) = _LENGTH.unpack_from(data, at)
            text, at = _text(data, at + _LENGTH.size, length)
            return Hello(address, text), at
        case Kind.RESET:
            channel, link, token, reason = _BYTE.unpack_from(data, at)
            return Reset(ChannelAddress(channel, link, token), reason), at + _BYTE.size
        case Kind.PULL:
            channel, offer, proof, length, named = _PULL.unpack_from(data, at)
            ticket, at = _text(data, at + _PULL.size, length)
            name, at = _text(data, at, named)
            return PullRequest(channel, offer, proof, ticket, name), at
    raise MalformedHeaderError(f"an entry of kind {kind}")


def _text(data: bytes, at: int, length: int) -> tuple[str, int]:
    if at + length > len(data):
        raise MalformedHeaderError("a text that is cut")
    return data[at : at + length].decode(), at + length
