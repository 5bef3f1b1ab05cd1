"""MessagePack-RPC without I/O: bytes to messages and back.

Source: https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md and
https://github.com/msgpack/msgpack/blob/master/spec.md. A request is `[0, msgid, method, params]`, an answer
`[1, msgid, error, result]`, a notification `[2, method, params]`.

Bytes may be hostile. A walk over the headers alone, which allocates nothing, checks every
length and count against `Limits` as soon as it is announced; only a message that is whole and within them is
decoded. So a length of 5 GB costs its five bytes, and no array is made before its items are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import msgpack
import msgspec

from protocol.errors import MalformedMessageError, MessageTooLargeError, ShoalError

MAX_MSGID = (1 << 32) - 1
MIB = 1 << 20
_ITEM_COST_BYTES = 100
"""An empty map is one byte on the wire and 64 in CPython, and 16 for the collector, and 8 in its list."""


@dataclass(frozen=True)
class Limits:
    """What a decoder takes at most in one message."""

    max_message_bytes: int
    max_items: int
    """Of all arrays and maps together; a key and its value are two."""
    max_depth: int = 64
    """Arrays and maps within each other."""


SERVER_LIMITS = Limits(max_message_bytes=8 * MIB, max_items=65_536)
CLIENT_LIMITS = Limits(max_message_bytes=64 * MIB, max_items=4_000_000)
"""A client asked for what it gets: manifests, long lists of files."""


@dataclass(frozen=True)
class Request:
    """`[0, msgid, method, params]`."""

    msgid: int
    """0 to 2**32 - 1, unique among the requests in flight on a connection."""
    method: str
    params: list[Any]
    cost_bytes: int = field(default=0, compare=False, repr=False)
    """About how much memory it takes decoded, at most; set by the decoder."""


@dataclass(frozen=True)
class Response:
    """`[1, msgid, error, result]`; one of error and result is None."""

    msgid: int | None
    """None if the answer is to bytes in which no request was found."""
    error: Any
    result: Any


@dataclass(frozen=True)
class Notification:
    """`[2, method, params]`."""

    method: str
    params: list[Any]


@dataclass(frozen=True)
class NotRpc:
    """A whole MessagePack value that is not MessagePack-RPC; the messages after it can be read."""

    msgid: int | None
    """None if none was found."""
    reason: str


Message = Request | Response | Notification | NotRpc


class Decoder:
    """Bytes, as they come, to messages."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._position = 0
        """Of the next header in the buffer; past its end if a payload is still to come."""
        self._open: list[int] = [1]
        """Values still to come, in the message and in each array or map that is open."""
        self._items = 0
        self._failure: ShoalError | None = None

    @property
    def buffered_bytes(self) -> int:
        """Of an incomplete message."""
        return len(self._buffer)

    @property
    def msgid(self) -> int | None:
        """Of the incomplete or failed message, if it is a request's or an answer's."""
        return _peek_msgid(self._buffer)

    def drop(self) -> None:
        """Give back the memory of the incomplete or failed message; nothing can be fed after it."""
        self._buffer.clear()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take bytes in and go through the messages that are whole by now.

        The iterator raises MalformedMessageError for bytes that are not MessagePack, and MessageTooLargeError
        for what is above the limits. Both are final: the start of the next message is not known.
        """
        self._buffer += data
        return self._messages()

    def _messages(self) -> Iterator[Message]:
        while self._walk():
            message, items = self._buffer[: self._position], self._items
            del self._buffer[: self._position]
            self._position, self._open, self._items = 0, [1], 0
            yield _decode(message, len(message) + items * _ITEM_COST_BYTES)

    def _walk(self) -> bool:
        """Go on to the next header until the message is whole. Each byte is looked at once."""
        if self._failure:
            raise self._failure
        try:
            return self._walk_headers()
        except (MalformedMessageError, MessageTooLargeError) as err:
            self._failure = err
            raise

    def _walk_headers(self) -> bool:
        buffer, position, open_, limits = self._buffer, self._position, self._open, self._limits
        available = len(buffer)
        while True:
            while open_ and not open_[-1]:
                open_.pop()
            if not open_:
                return position <= available
            if position >= available:
                return False
            tag = buffer[position]
            if not position and tag not in _ARRAY_TAGS:
                raise MalformedMessageError(
                    f"a message begins with an array, not with 0x{tag:02x}; is it MessagePack-RPC?"
                )
            length_bytes, payload, values = _HEADERS[tag]
            start = position + 1 + length_bytes
            if start > available:
                return False
            if tag == _NEVER_USED:
                raise MalformedMessageError("0xc1 was found, which is never used in MessagePack")
            if length_bytes:
                length = int.from_bytes(buffer[position + 1 : start])
                payload += 0 if values else length
                values *= length
            self._position = position = start + payload
            if position > limits.max_message_bytes:
                raise MessageTooLargeError(
                    f"a message of at least {position} bytes is above this receiver's {limits.max_message_bytes}",
                    {"max_message_bytes": limits.max_message_bytes},
                )
            open_[-1] -= 1
            if not values:
                continue
            self._items += values
            if self._items > limits.max_items:
                raise MessageTooLargeError(
                    f"a message of at least {self._items} items is above this receiver's {limits.max_items}",
                    {"max_items": limits.max_items},
                )
            if len(open_) > limits.max_depth:
                raise MessageTooLargeError(
                    f"a message nests deeper than this receiver's {limits.max_depth} levels",
                    {"max_depth": limits.max_depth},
                )
            open_.append(values)


def encode(message: Request | Response | Notification) -> bytes:
    """Pack a message; structs in it become maps. Raises TypeError or ValueError for a value that has none."""
    match message:
        case Request(msgid, method, params):
            plain: list[Any] = [0, msgid, method, params]
        case Response(msgid, error, result):
            plain = [1, msgid, error, result]
        case Notification(method, params):
            plain = [2, method, params]
    return bytes(msgpack.packb(plain, default=_to_plain))


def _to_plain(value: object) -> Any:
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value, builtin_types=(bytes,))
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no MessagePack form")


def _decode(packed: bytearray, cost_bytes: int) -> Message:
    try:
        found = msgpack.unpackb(packed)
    except (ValueError, TypeError, OverflowError) as err:
        # Text that is not UTF-8, a key that is not text, a timestamp of an odd length: the framing is still right.
        return NotRpc(_peek_msgid(packed), f"a message cannot be decoded: {err}"[:500])
    match found:
        case [0, int(msgid), str() | bytes() as method, list(params)] if _is_msgid(msgid):
            return Request(msgid, _text(method), params, cost_bytes)
        case [1, int() | None as msgid, error, result] if msgid is None or _is_msgid(msgid):
            return Response(msgid, error, result)
        case [2, str() | bytes() as method, list(params)]:
            return Notification(_text(method), params)
        case _:
            return NotRpc(
                _peek_msgid(packed),
                "a message is none of [0, msgid, method, params], [1, msgid, error, result], [2, method, params]",
            )


def _text(method: str | bytes) -> str:
    return method.decode(errors="backslashreplace") if isinstance(method, bytes) else method


def _peek_msgid(packed: bytes | bytearray) -> int | None:
    """The msgid of a request, whatever comes after it."""
    head = msgpack.Unpacker(max_buffer_size=64)
    head.feed(packed[:32])
    try:
        if head.read_array_header() < 2 or head.unpack() != 0:
            return None
        msgid = head.unpack()
    except (ValueError, msgpack.UnpackException):
        return None
    return msgid if _is_msgid(msgid) else None


def _is_msgid(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_MSGID


_ARRAY_TAGS = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
_NEVER_USED = 0xC1


def _headers() -> list[tuple[int, int, int]]:
    """By first byte: bytes of length that follow it, bytes of payload, and values within (a factor of the length)."""
    table = [(0, 0, 0)] * 256
    for tag in range(16):
        table[0x80 + tag], table[0x90 + tag] = (0, 0, 2 * tag), (0, 0, tag)
    for tag in range(32):
        table[0xA0 + tag] = (0, tag, 0)
    for index, length_bytes in enumerate((1, 2, 4)):
        table[0xC4 + index] = table[0xD9 + index] = (length_bytes, 0, 0)
        table[0xC7 + index] = (length_bytes, 1, 0)
    for index in range(4):
        table[0xCC + index] = table[0xD0 + index] = (0, 1 << index, 0)
    for index in range(5):
        table[0xD4 + index] = (0, 1 + (1 << index), 0)
    table[0xCA], table[0xCB] = (0, 4, 0), (0, 8, 0)
    table[0xDC], table[0xDD] = (2, 0, 1), (4, 0, 1)
    table[0xDE], table[0xDF] = (2, 0, 2), (4, 0, 2)
    return table


_HEADERS = _headers()
