"""The one socket option that both ends of a connection need."""

from __future__ import annotations

import socket

_QUIET_S, _INTERVAL_S, _PROBES = 5, 2, 3


def notice_dead_peer(sock: socket.socket) -> None:
    """Have the kernel ask a quiet peer for a sign of life, so that one whose machine is gone is noticed in about 11 s.

    A peer whose process died is noticed at once without this: its kernel closes the connection.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _QUIET_S), ("TCP_KEEPINTVL", _INTERVAL_S), ("TCP_KEEPCNT", _PROBES)):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
