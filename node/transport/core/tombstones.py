"""Channels that were closed here, for a while: to tell a late frame from an unknown one, and to answer it."""

from __future__ import annotations

import hmac
import math
from dataclasses import dataclass

from node.transport.core.wire import Address, Gone, Reason

_KEPT = 2048
_ANSWER_EVERY_S = 0.2


@dataclass(slots=True)
class Grave:
    """What is left of a channel: the tokens that late frames must carry, and, of an inbox, how to answer them."""

    expected: bytes
    peer: bytes | None = None
    ticket: str = ""
    address: Address | None = None
    reason: Reason = Reason.CLOSED
    answered_at: float = -math.inf

    def answer(self, now: float) -> Gone | None:
        """What to tell a sender that goes on: not at each frame, and only if its address is known."""
        if self.address is None or self.peer is None or now < self.answered_at + _ANSWER_EVERY_S:
            return None
        self.answered_at = now
        return Gone(self.address, self.reason)


class Graves:
    """The last 2,048 channels that were closed."""

    def __init__(self) -> None:
        self._graves: dict[bytes, Grave] = {}

    def dig(self, name: bytes, grave: Grave) -> None:
        """Remember the outlet of the link `name`, or the inbox of the channel `name`."""
        self._graves.pop(name, None)
        self._graves[name] = grave
        if len(self._graves) > _KEPT:
            del self._graves[next(iter(self._graves))]

    def find(self, name: bytes, token: bytes) -> Grave | None:
        """The grave of that name, if the token is its channel's."""
        grave = self._graves.get(name)
        return grave if grave is not None and hmac.compare_digest(grave.expected, token) else None

    def forget(self, name: bytes) -> None:
        """A channel of that name is open again."""
        self._graves.pop(name, None)
