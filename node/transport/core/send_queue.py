"""What leaves: peers, and what rides along in a message to one of them."""

from __future__ import annotations

from collections import deque

from node.transport.core.messages import Envelope, InboxEnd, OutletEnd, Peer
from node.transport.core.sender import Message
from node.transport.core.wire import Ack, Beat, Data, Entry, Open, encode
from node.transport.stats import Counters

_ENTRIES_AT_ONCE = 24


class Post:
    """Peers by key, and the queue of messages for the shell."""

    def __init__(self, ticket: str, counters: Counters) -> None:
        self._ticket = ticket
        self._counters = counters
        self._peers: dict[bytes, Peer] = {}
        self.outgoing: deque[Envelope] = deque()

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
        """A chunk leaves, and takes along what waits for its peer."""
        sender, peer = outlet.sender, outlet.peer
        sender.said_at = now
        entries: list[Entry] = [Data(outlet.address, message.number, message.sequence, message.offset, message.flags)]
        if not sender.accepted:
            entries.append(Open(outlet.address, self._ticket))
        while peer.waiting and len(entries) < _ENTRIES_AT_ONCE:
            inbox = next(iter(peer.waiting))
            entries.append(self.ack(inbox, now))
            self._counters.acks_ridden += 1
        self.emit(peer, entries, message.body)

    def ack(self, inbox: InboxEnd, now: float) -> Ack:
        """The acknowledgement of an inbox, which then waits no more."""
        if inbox.peer is not None:
            inbox.peer.waiting.pop(inbox, None)
        return Ack(inbox.address, *inbox.receiver.answer(now))

    def greeting(self, outlet: OutletEnd, now: float) -> list[Entry]:
        """A heartbeat, with the way back as long as the inbox has not answered."""
        outlet.sender.said_at = now
        beat = Beat(outlet.address)
        return [beat] if outlet.sender.accepted else [Open(outlet.address, self._ticket), beat]

    def emit(self, peer: Peer, entries: list[Entry], body: object = None) -> None:
        """Queue messages with these entries; the body goes with the first."""
        for at in range(0, len(entries), _ENTRIES_AT_ONCE):
            name = encode(entries[at : at + _ENTRIES_AT_ONCE])
            self.outgoing.append(Envelope(peer.key, peer.ticket, name, body if at == 0 else None))
