"""Datagrams to requests and answers, and back. No I/O; nothing raises, whatever comes in.

The format is rpcudp's: a byte (0 request, 1 answer), 20 bytes of message id, MessagePack (a request is
`[method, args]`). A datagram is at most 8,192 bytes in either direction: rpcudp refuses to send longer requests.
"""

from __future__ import annotations

import ipaddress
from typing import Any, NamedTuple

import msgpack
from kademlia.node import Node

MAX_DATAGRAM_BYTES = 8_192
MESSAGE_ID_BYTES = 20
CONTACT_ID_BYTES = 20
_HEADER_BYTES = 1 + MESSAGE_ID_BYTES
# Small, because an unpacker allocates an array at the length that its header announces, at every level of nesting.
_MAX_ARRAY = 256
_MAX_MAP = 16


class DhtRequest(NamedTuple):
    """A peer asks."""

    message_id: bytes
    method: str
    args: list[Any]


class DhtAnswer(NamedTuple):
    """A peer's answer to the request of that message id."""

    message_id: bytes
    result: Any


def pack_request(message_id: bytes, method: str, args: tuple[Any, ...]) -> bytes:
    return b"\x00" + message_id + bytes(msgpack.packb([method, args]))


def pack_answer(message_id: bytes, result: Any) -> bytes:
    return b"\x01" + message_id + bytes(msgpack.packb(result))


def parse(datagram: bytes) -> DhtRequest | DhtAnswer | None:
    """None for anything else, and for more than MAX_DATAGRAM_BYTES."""
    if not _HEADER_BYTES < len(datagram) <= MAX_DATAGRAM_BYTES:
        return None
    try:
        body = msgpack.unpackb(datagram[_HEADER_BYTES:], max_array_len=_MAX_ARRAY, max_map_len=_MAX_MAP, max_ext_len=0)
    except (ValueError, TypeError, RecursionError):
        return None
    message_id = datagram[1:_HEADER_BYTES]
    if datagram[0] == 1:
        return DhtAnswer(message_id, body)
    if datagram[0] != 0 or not isinstance(body, list) or len(body) != 2:
        return None
    method, args = body
    if not isinstance(method, str) or not isinstance(args, list):
        return None
    return DhtRequest(message_id, method, args)


def is_id(value: object) -> bool:
    """Whether it has the shape of a contact id or a key: 20 bytes."""
    return isinstance(value, bytes) and len(value) == CONTACT_ID_BYTES


def parse_contacts(value: object, sender_host: str, limit: int) -> list[Node]:
    """The contacts of an answer, at most `limit`; items that are not `[id, IPv4 address, port]` are left out.

    Host names are left out (a peer must not make this node resolve them), and so are loopback addresses from
    another machine.
    """
    if not isinstance(value, list):
        return []
    local = ipaddress.ip_address(sender_host).is_loopback
    contacts: list[Node] = []
    for item in value[:limit]:
        if not isinstance(item, list) or len(item) != 3:
            continue
        contact_id, host, port = item
        if not is_id(contact_id) or not isinstance(host, str) or type(port) is not int or not 0 < port < 65536:
            continue
        try:
            address = ipaddress.IPv4Address(host)
        except ValueError:
            continue
        if address.is_multicast or address.is_unspecified or address.is_reserved:
            continue
        if address.is_loopback and not local:
            continue
        contacts.append(Node(contact_id, host, port))
    return contacts
