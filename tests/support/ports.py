"""Ports that a test releases and binds again: outside the ranges of port 0 and of SeaweedFS, so that no other test gets
one in between.
"""

from __future__ import annotations

import random
import socket

_PORTS = range(4_096, 7_000)


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of 127.0.0.1 that is free now."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
