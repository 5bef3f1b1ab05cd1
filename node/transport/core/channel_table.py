"""Which channels are open, how they end, and what is remembered of them."""

from __future__ import annotations

import dataclasses
import math
from collections import deque

from node.transport.core.messages import Changed, Envelope, Event, InboxEnd, OutletEnd, PeerLost
from node.transport.core.send_queue import Post
from node.transport.core.tombstones import Grave, Graves
from node.transport.core.wire import Reason, encode
from node.transport.settings import TransportSettings
from node.transport.stats import Counters, TransportStats
from protocol.errors import BusyError, PeerLostError, TransportError


class Table:
    """Outlets by link, inboxes by channel, the graves of both, and the events that their ends cause."""

    def __init__(self, settings: TransportSettings, ticket: str) -> None:
        self._settings = settings
        self.outlets: dict[bytes, OutletEnd] = {}
        self.inboxes: dict[bytes, InboxEnd] = {}
        self.graves = Graves()
        self.counters = Counters()
        self.post = Post(ticket, self.counters)
        self.events: deque[Event] = deque()

    def check_room(self, channel: bytes | None) -> None:
        """Raises BusyError at the bound of outlets (`channel` None) or inboxes, TransportError for a second inbox."""
        if channel is not None and channel in self.inboxes:
            raise TransportError("an inbox of this channel is open already; close it, or name the channel otherwise")
        count = len(self.outlets if channel is None else self.inboxes)
        if count >= self._settings.max_channels:
            kind = "outlets" if channel is None else "inboxes"
            raise BusyError(f"{count} {kind} are open, the bound; close one first")

    def stats(self, registered: int) -> TransportStats:
        """The counters as they are now, and what is open and in flight."""
        flights = [outlet.sender.in_flight for outlet in self.outlets.values()]
        return TransportStats(
            counters=dataclasses.replace(self.counters),
            peers=len(self.post),
            outlets=len(self.outlets),
            inboxes=len(self.inboxes),
            messages_in_flight=sum(messages for messages, _ in flights),
            bytes_in_flight=sum(size for _, size in flights),
            frames_waiting=sum(inbox.receiver.waiting for inbox in self.inboxes.values()),
            registered=registered,
        )

    def late(self, grave: Grave | None, now: float) -> None:
        """An entry came for no open channel: count it, and answer a sender that goes on."""
        if grave is None:
            self.counters.dropped_unknown += 1
            return
        self.counters.dropped_late += 1
        if grave.peer is not None and (answer := grave.answer(now)) is not None:
            self.post.outgoing.append(Envelope(grave.peer, grave.ticket, encode([answer]), None))

    def refused(self, outlet: OutletEnd, reason: int) -> None:
        """The receiver wants no more."""
        if not outlet.sender.ending or reason != Reason.CLOSED:
            said = {Reason.TAKEN: "another sender has it", Reason.MALFORMED: "a frame broke its rules"}
            why = next((text for known, text in said.items() if known == reason), "it was closed")
            outlet.sender.error = TransportError(f"the receiver takes no more on this channel: {why}")
        else:
            outlet.sender.abandon()
        self.settle(outlet)
        self.events.append(Changed(outlet))

    def settle(self, outlet: OutletEnd) -> None:
        """Something about the outlet changed; bury it if it is done."""
        self.events.append(Changed(outlet))
        if outlet.sender.done and self.outlets.pop(outlet.address.link, None) is not None:
            self.graves.dig(outlet.address.link, Grave(outlet.expected))
            outlet.peer.outlets.discard(outlet)
            self.post.leave(outlet.peer)

    def bury_inbox(self, inbox: InboxEnd, reason: Reason) -> None:
        """Close an inbox for the wire. Its receiver keeps what was not taken."""
        self.inboxes.pop(inbox.channel, None)
        grave = Grave(inbox.expected, address=inbox.address, reason=reason)
        if (peer := inbox.peer) is not None:
            grave.peer, grave.ticket = peer.key, peer.ticket
            peer.inboxes.discard(inbox)
            peer.waiting.pop(inbox, None)
            self.post.leave(peer)
        self.graves.dig(inbox.channel, grave)
        self.events.append(Changed(inbox))

    def lose(self, end: InboxEnd | OutletEnd, now: float) -> None:
        """A channel went silent or was never answered. Without a sign of life on another one, its peer is lost."""
        if isinstance(end, OutletEnd) and end.address.link not in self.outlets:
            return  # the peer was lost with another channel, just now
        if isinstance(end, InboxEnd) and self.inboxes.get(end.channel) is not end:
            return
        peer = end.peer
        error = end.sender.error if isinstance(end, OutletEnd) else end.receiver.error
        if peer is None or not isinstance(error, PeerLostError):
            self.events.append(Changed(end))
            if isinstance(end, OutletEnd):
                self.settle(end)
            return
        heard = [outlet.sender.heard_at for outlet in peer.outlets if outlet.sender.accepted]
        heard += [inbox.receiver.heard_at for inbox in peer.inboxes if inbox.receiver.ended is None]
        alone = max(heard, default=-math.inf) > now - 3 * self._settings.heartbeat_s
        for outlet in [end] if alone and isinstance(end, OutletEnd) else [] if alone else list(peer.outlets):
            outlet.sender.error = outlet.sender.error or error
            self.settle(outlet)
        for inbox in [end] if alone and isinstance(end, InboxEnd) else [] if alone else list(peer.inboxes):
            if inbox.receiver.ended is None:
                inbox.receiver.error = inbox.receiver.error or error
            self.bury_inbox(inbox, Reason.LOST)
        if not alone:
            self.counters.peers_lost += 1
            self.events.append(PeerLost(peer.ticket))
