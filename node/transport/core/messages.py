"""The values that the exchange works with: peers, the two ends of channels, outgoing messages, events."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from node.transport.core.receiver import Receiver
from node.transport.core.sender import Sender
from node.transport.core.wire import ChannelAddress, PullRequest

NO_LINK = bytes(8)


@dataclass(slots=True, eq=False)
class Peer:
    """One other endpoint, and the channels that lead to it."""

    key: bytes
    """Its public key, 32 bytes."""
    ticket: str
    outlets: set[OutletEnd] = field(default_factory=set)
    inboxes: set[InboxEnd] = field(default_factory=set)
    waiting: dict[InboxEnd, None] = field(default_factory=dict)
    """Inboxes whose acknowledgement waits for something to ride along with."""


@dataclass(slots=True, eq=False)
class OutletEnd:
    """A sender, its peer, and the tokens of its channel."""

    sender: Sender
    peer: Peer
    address: ChannelAddress
    expected: bytes
    """The token that answers must carry."""


@dataclass(slots=True, eq=False)
class InboxEnd:
    """A receiver, the tokens of its channel, and the sender that is bound to it."""

    receiver: Receiver
    channel: bytes
    token: bytes
    expected: bytes
    """The token that chunks must carry."""
    link: bytes = NO_LINK
    peer: Peer | None = None

    @property
    def address(self) -> ChannelAddress:
        return ChannelAddress(self.channel, self.link, self.token)


class OutgoingMessage(msgspec.Struct, frozen=True, gc=False):
    """A message that must leave: to whom, its name, and its body (None: no tensor)."""

    peer: bytes
    ticket: str
    name: str
    body: object


class PeerLost(msgspec.Struct, frozen=True, gc=False):
    """A peer was silent for too long; its channels have failed."""

    ticket: str


class ChannelChanged(msgspec.Struct, frozen=True, gc=False):
    """A channel may have something new: a frame, credit, an error, the end."""

    end: InboxEnd | OutletEnd


class PullRequested(msgspec.Struct, frozen=True, gc=False):
    """A peer wants a registered tensor."""

    pull: PullRequest


Event = PeerLost | ChannelChanged | PullRequested
