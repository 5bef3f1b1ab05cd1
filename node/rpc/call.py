"""A command's declaration, and a request in progress as its handler sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from node.rpc.connection import Connection


@dataclass(frozen=True)
class Call:
    """One request in progress."""

    method: str
    request_id: str
    """The client's, or made up; what CANCEL names."""
    sender: str | None
    """What the client says it is (`from`); nobody has checked it."""
    connection: Connection

    def notify(self, method: str, params: msgspec.Struct | Mapping[str, Any]) -> None:
        """Send a notification to the client. Its params must carry the request id themselves, to reach the call."""
        self.connection.notify(method, params)


Handler = Callable[[Any, Call], Awaitable[msgspec.Struct | Mapping[str, Any] | None]]
"""Takes the decoded parameters. Its task is cancelled by CANCEL, and when the connection is lost."""


@dataclass(frozen=True)
class Command:
    """What the server needs to know of one command."""

    params: type[msgspec.Struct] | None
    """None: the handler gets the map as it came, a `dict[str, Any]`, and decodes it itself."""
    handler: Handler
