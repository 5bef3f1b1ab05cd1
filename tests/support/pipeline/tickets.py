"""Node tickets for tests that need no endpoint."""

import base64


def ticket_of(number: int, *, address: bytes = b"\0\x7f\0\0\1\x80\x08", relay: bytes = b"\0", count: int = 1) -> str:
    """The ticket of the key that is 32 times `number`, at 127.0.0.1:1024 unless told otherwise."""
    raw = b"\0" + bytes([number]) * 32 + relay + bytes([count]) + address
    return "node" + base64.b32encode(raw).decode().lower().rstrip("=")
