"""The channels of an endpoint and their peers: which are open, what is queued for whom, how they end.

A closed channel leaves a tombstone for a while, to tell a late frame from an unknown one, and to answer it.
"""

from __future__ import annotations

import dataclasses
import hmac
import math
from collections import deque
from dataclasses import dataclass

from node.transport.core.messages import ChannelChanged, Event, InboxEnd, OutgoingMessage, OutletEnd, Peer, PeerLost
from node.transport.core.sender import Message
from node.transport.core.wire import Ack, ChannelAddress, Chunk, Entry, Heartbeat, Hello, Reason, Reset, encode
from node.transport.settings import TransportSettings
from node.transport.stats import Counters, TransportStats
from protocol.errors import BusyError, PeerLostError, TransportError

_ENTRIES_AT_ONCE = 24
_TOMBSTONES_KEPT = 2048
_ANSWER_EVERY_S = 0.2


class ChannelTable:
    """Outlets by link, inboxes by channel, the tombstones of both, and the events that their ends cause."""

    def __init__(self, settings: TransportSettings, ticket: str) -> None:
        self._settings = settings
        self.outlets: dict[bytes, OutletEnd] = {}
        self.inboxes: dict[bytes, InboxEnd] = {}
        self.tombstones = Tombstones()
        self.counters = Counters()
        self.queue = SendQueue(ticket, self.counters)
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
            peers=len(self.queue),
            outlets=len(self.outlets),
            inboxes=len(self.inboxes),
            messages_in_flight=sum(messages for messages, _ in flights),
            bytes_in_flight=sum(size for _, size in flights),
            frames_waiting=sum(inbox.receiver.waiting for inbox in self.inboxes.values()),
            registered=registered,
        )

    def late(self, tombstone: Tombstone | None, now: float) -> None:
        """An entry came for no open channel: count it, and answer a sender that goes on."""
        if tombstone is None:
            self.counters.dropped_unknown += 1
            return
        self.counters.dropped_late += 1
        if tombstone.peer is not None and (answer := tombstone.answer(now)) is not None:
            self.queue.outgoing.append(OutgoingMessage(tombstone.peer, tombstone.ticket, encode([answer]), None))

    def refused(self, outlet: OutletEnd, reason: int) -> None:
        """The receiver has reset the channel."""
        if not outlet.sender.ending or reason != Reason.CLOSED:
            said = {Reason.TAKEN: "another sender has it", Reason.MALFORMED: "a frame broke its rules"}
            why = next((text for known, text in said.items() if known == reason), "it was closed")
            outlet.sender.error = TransportError(f"the receiver takes no more on this channel: {why}")
        else:
            outlet.sender.abandon()
        self.settle(outlet)
        self.events.append(ChannelChanged(outlet))

    def settle(self, outlet: OutletEnd) -> None:
        """Something about the outlet changed: remove it if it is done."""
        self.events.append(ChannelChanged(outlet))
        if outlet.sender.done and self.outlets.pop(outlet.address.link, None) is not None:
            self.tombstones.add(outlet.address.link, Tombstone(outlet.expected))
            outlet.peer.outlets.discard(outlet)
            self.queue.leave(outlet.peer)

    def end_inbox(self, inbox: InboxEnd, reason: Reason) -> None:
        """Close an inbox for the wire. Its receiver keeps what was not taken."""
        self.inboxes.pop(inbox.channel, None)
        tombstone = Tombstone(inbox.expected, address=inbox.address, reason=reason)
        if (peer := inbox.peer) is not None:
            tombstone.peer, tombstone.ticket = peer.key, peer.ticket
            peer.inboxes.discard(inbox)
            peer.waiting.pop(inbox, None)
            self.queue.leave(peer)
        self.tombstones.add(inbox.channel, tombstone)
        self.events.append(ChannelChanged(inbox))

    def lose(self, end: InboxEnd | OutletEnd, now: float) -> None:
        """A channel went silent or was never answered. Without a sign of life on another one, its peer is lost."""
        if isinstance(end, OutletEnd) and end.address.link not in self.outlets:
            return  # the peer was lost with another channel, just now
        if isinstance(end, InboxEnd) and self.inboxes.get(end.channel) is not end:
            return
        peer = end.peer
        error = end.sender.error if isinstance(end, OutletEnd) else end.receiver.error
        if peer is None or not isinstance(error, PeerLostError):
            self.events.append(ChannelChanged(end))
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
            self.end_inbox(inbox, Reason.LOST)
        if not alone:
            self.counters.peers_lost += 1
            self.events.append(PeerLost(peer.ticket))


class SendQueue:
    """Peers by key, and the messages that must be sent."""

    def __init__(self, ticket: str, counters: Counters) -> None:
        self._ticket = ticket
        self._counters = counters
        self._peers: dict[bytes, Peer] = {}
        self.outgoing: deque[OutgoingMessage] = deque()

    def __len__(self) -> int:
        return len(self._peers)

    def peer(self, key: bytes, ticket: str) -> Peer:
        """The peer of that key; the ticket that was known first stays."""
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = Peer(key, ticket)
        return peer

    def leave(self, peer: Peer) -> bool:
        """Forget the peer if no channel leads to it any more."""
        if peer.outlets or peer.inboxes or self._peers.get(peer.key) is not peer:
            return False
        del self._peers[peer.key]
        return True

    def chunk(self, outlet: OutletEnd, message: Message, now: float) -> None:
        """Queue a chunk, with the acknowledgements that wait for the same peer."""
        sender, peer = outlet.sender, outlet.peer
        sender.said_at = now
        entries: list[Entry] = [Chunk(outlet.address, message.number, message.sequence, message.offset, message.flags)]
        if not sender.accepted:
            entries.append(Hello(outlet.address, self._ticket))
        while peer.waiting and len(entries) < _ENTRIES_AT_ONCE:
            inbox = next(iter(peer.waiting))
            entries.append(self.ack(inbox, now))
            self._counters.acks_ridden += 1
        self.emit(peer, entries, message.body)

    def ack(self, inbox: InboxEnd, now: float) -> Ack:
        """The acknowledgement of an inbox, which then no longer waits."""
        if inbox.peer is not None:
            inbox.peer.waiting.pop(inbox, None)
        return Ack(inbox.address, *inbox.receiver.answer(now))

    def heartbeat(self, outlet: OutletEnd, now: float) -> list[Entry]:
        """A heartbeat, with this endpoint's ticket as long as the inbox has not answered."""
        outlet.sender.said_at = now
        beat = Heartbeat(outlet.address)
        return [beat] if outlet.sender.accepted else [Hello(outlet.address, self._ticket), beat]

    def emit(self, peer: Peer, entries: list[Entry], body: object = None) -> None:
        """Queue messages with these entries; the body goes with the first."""
        for at in range(0, len(entries), _ENTRIES_AT_ONCE):
            name = encode(entries[at : at + _ENTRIES_AT_ONCE])
            self.outgoing.append(OutgoingMessage(peer.key, peer.ticket, name, body if at == 0 else None))


@dataclass(slots=True)
class Tombstone:
    """What is left of a channel: the tokens that late frames must carry, and, of an inbox, how to answer them."""

    expected: bytes
    peer: bytes | None = None
    ticket: str = ""
    address: ChannelAddress | None = None
    reason: Reason = Reason.CLOSED
    answered_at: float = -math.inf

    def answer(self, now: float) -> Reset | None:
        """The reset for a sender that goes on; None if its address is unknown or it was answered just now."""
        if self.address is None or self.peer is None or now < self.answered_at + _ANSWER_EVERY_S:
            return None
        self.answered_at = now
        return Reset(self.address, self.reason)


class Tombstones:
    """The last 2,048 channels that were closed."""

    def __init__(self) -> None:
        self._stones: dict[bytes, Tombstone] = {}

    def add(self, name: bytes, tombstone: Tombstone) -> None:
        """Remember the outlet of the link `name`, or the inbox of the channel `name`."""
        self._stones.pop(name, None)
        self._stones[name] = tombstone
        if len(self._stones) > _TOMBSTONES_KEPT:
            del self._stones[next(iter(self._stones))]

    def find(self, name: bytes, token: bytes) -> Tombstone | None:
        """The tombstone of that name, if the token is its channel's."""
        tombstone = self._stones.get(name)
        return tombstone if tombstone is not None and hmac.compare_digest(tombstone.expected, token) else None

    def forget(self, name: bytes) -> None:
        """Remove a tombstone: a channel of that name is open again."""
        self._stones.pop(name, None)
