"""All channels of an endpoint, without I/O: whom a message is for, what must be sent, when the next step is due.

The caller puts in messages and the time, and takes out `outgoing` and `events`. Per peer, entries are batched: a
chunk takes along the acknowledgements that wait for the same peer, and heartbeats of many channels share a message.
"""

from __future__ import annotations

import hmac
import math
import os
from collections import deque
from collections.abc import Callable, Sequence

from node.transport.core.channel_table import ChannelTable
from node.transport.core.messages import (
    NO_LINK,
    ChannelChanged,
    Event,
    InboxEnd,
    OutgoingMessage,
    OutletEnd,
    Peer,
    PullRequested,
)
from node.transport.core.receiver import Frame, MalformedFrameError, Receiver
from node.transport.core.sender import Bytes, Message, Seal, Sender
from node.transport.core.wire import (
    END,
    Ack,
    ChannelAddress,
    Chunk,
    Entry,
    Heartbeat,
    Hello,
    MalformedHeaderError,
    PullRequest,
    Reason,
    Reset,
    decode,
    encode,
    token_of,
)
from node.transport.settings import TransportSettings
from node.transport.ticket import peer_of
from protocol.errors import TransportError

_PAUSE_S = 0.25
"""A tick that comes later than this was held up by our own process; peers are not to blame."""


class Exchange:
    """See the module. Every method takes the time in seconds of one monotonic clock."""

    def __init__(
        self, settings: TransportSettings, ticket: str, seal: Seal, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._settings = settings
        self._self = peer_of(ticket)
        self._seal = seal
        self._random = random
        self.table = ChannelTable(settings, ticket)
        self.due = math.inf
        """When `tick` must be called."""

    @property
    def outgoing(self) -> deque[OutgoingMessage]:
        """Messages that the caller must send."""
        return self.table.queue.outgoing

    @property
    def events(self) -> deque[Event]:
        """What the caller must pass on."""
        return self.table.events

    # ---- the application's side

    def open_outlet(self, ticket: str, channel: bytes, key: bytes, now: float) -> OutletEnd:
        """A channel to `ticket`. The first message leaves at once, so that the connection is made early."""
        peer_key = peer_of(ticket)
        if peer_key == self._self:
            raise TransportError("the ticket is this endpoint's own; hand the tensor over inside the process")
        self.table.check_room(None)
        peer = self.table.queue.peer(peer_key, ticket)
        address = ChannelAddress(channel, self._random(8), token_of(key, channel, from_outlet=True))
        sender = Sender(self._settings, self._seal, now)
        outlet = OutletEnd(sender, peer, address, token_of(key, channel, from_outlet=False))
        self.table.outlets[address.link] = outlet
        peer.outlets.add(outlet)
        self.table.queue.emit(peer, self.table.queue.heartbeat(outlet, now))
        self.due = min(self.due, sender.due())
        return outlet

    def open_inbox(self, channel: bytes, key: bytes) -> InboxEnd:
        """A channel from whoever holds `key`. One inbox a channel, one sender an inbox."""
        self.table.check_room(channel)
        tokens = token_of(key, channel, from_outlet=False), token_of(key, channel, from_outlet=True)
        inbox = self.table.inboxes[channel] = InboxEnd(Receiver(self._settings), channel, *tokens)
        self.table.tombstones.forget(channel)
        return inbox

    def close_outlet(self, outlet: OutletEnd, now: float, reason: Reason = Reason.CLOSED) -> None:
        """Send the end after what was sent. The channel lives on until that is acknowledged, or its peer is lost."""
        if not outlet.sender.ending:
            outlet.sender.end(reason)
            if (message := outlet.sender.end_message) is not None:
                self._send(outlet, [message], now)
        self.table.settle(outlet)

    def close_inbox(self, inbox: InboxEnd, now: float, reason: Reason = Reason.CLOSED) -> None:
        """Close an inbox. The sender gets a reset, and what it still sends is dropped and counted."""
        if self.table.inboxes.get(inbox.channel) is not inbox:
            return
        if inbox.peer is not None and inbox.receiver.error is None:
            ended = inbox.receiver.ended is not None
            self.table.queue.emit(
                inbox.peer, [self.table.queue.ack(inbox, now) if ended else Reset(inbox.address, int(reason))]
            )
        self.table.end_inbox(inbox, reason)

    def offer(self, outlet: OutletEnd, sequence: int, shape: list[int], dtype: str, data: Bytes, now: float) -> None:
        """Send a frame as far as the credit goes; the rest leaves with the answers. `data` must not change until
        the outlet's sender is no longer `blocked`.
        """
        outlet.sender.offer(sequence, shape, dtype, data)
        self.table.counters.frames_sent += 1
        self.fill(outlet, now)

    def fill(self, outlet: OutletEnd, now: float) -> None:
        """Send what the credit allows of the frame that was offered to the outlet's sender."""
        messages = outlet.sender.fill(now)
        self.table.counters.messages_sent += len(messages)
        for message in messages:
            self.table.counters.bytes_sent += message.size_bytes
        self._send(outlet, messages, now)

    def take(self, inbox: InboxEnd, now: float) -> Frame | None:
        """The next whole frame of an inbox."""
        frame = inbox.receiver.take(now)
        if frame is not None:
            self.table.counters.frames_received += 1
            self.table.counters.bytes_received += frame.tensor.nbytes
            self._plan_ack(inbox)
        return frame

    def ask(self, ticket: str, pull: PullRequest) -> None:
        """Ask the peer for a registered tensor; it comes to the inbox of `pull.channel`."""
        self.outgoing.append(OutgoingMessage(peer_of(ticket), ticket, encode([pull]), None))

    # ---- the network's side

    def receive(self, name: str, shape: Sequence[int], dtype: str, read: Callable[[], Bytes], now: float) -> None:
        """A message came. `read` gives its bytes, and is called only for one with the right key."""
        try:
            entries = decode(name)
        except MalformedHeaderError:
            self.table.counters.dropped_malformed += 1
            return
        for entry in entries:
            match entry:
                case Chunk(address):
                    if (inbox := self._inbox(address, entries, now)) is not None:
                        self._chunk(inbox, entry, shape, dtype, read, now)
                case Heartbeat(address):
                    if (inbox := self._inbox(address, entries, now)) is not None:
                        inbox.receiver.heard_at = now
                case Ack(address, received, messages, size_bytes):
                    if (outlet := self._outlet(address)) is not None:
                        again = outlet.sender.acknowledged(received, messages, size_bytes, now)
                        self.table.counters.messages_resent += len(again)
                        self._send(outlet, again, now)
                        if outlet.sender.blocked:
                            self.fill(outlet, now)
                        self.table.settle(outlet)
                case Reset(address, reason):
                    if (outlet := self._outlet(address)) is not None:
                        self.table.refused(outlet, reason)
                case PullRequest():
                    self.table.events.append(PullRequested(entry))

    def tick(self, now: float) -> None:
        """Do what is due: acknowledge, send heartbeats, resend, fail what is lost. `due` is then the next time."""
        pause = now - self.due
        if pause > _PAUSE_S:
            for outlet in self.table.outlets.values():
                outlet.sender.ignore_pause(pause)
            for inbox in self.table.inboxes.values():
                inbox.receiver.ignore_pause(pause)
        batches: dict[Peer, list[Entry]] = {}
        lost: list[InboxEnd | OutletEnd] = []
        for outlet in list(self.table.outlets.values()):
            again, heartbeat_due = outlet.sender.tick(now)
            self.table.counters.messages_resent += len(again)
            self._send(outlet, again, now)
            if outlet.sender.error is not None:
                lost.append(outlet)
            elif heartbeat_due:
                self.table.counters.heartbeats_sent += 1
                batches.setdefault(outlet.peer, []).extend(self.table.queue.heartbeat(outlet, now))
        for inbox in list(self.table.inboxes.values()):
            due = inbox.receiver.tick(now)
            if inbox.peer is None:
                continue
            if due:
                self.table.counters.acks_sent += 1
                batches.setdefault(inbox.peer, []).append(self.table.queue.ack(inbox, now))
            elif inbox.receiver.error is not None:
                lost.append(inbox)
        for peer, entries in batches.items():
            self.table.queue.emit(peer, entries)
        for end in lost:
            self.table.lose(end, now)
        senders = min((outlet.sender.due() for outlet in self.table.outlets.values()), default=math.inf)
        self.due = min((inbox.receiver.due() for inbox in self.table.inboxes.values()), default=math.inf)
        self.due = min(self.due, senders)

    # ---- inside

    def _send(self, outlet: OutletEnd, messages: list[Message], now: float) -> None:
        for message in messages:
            self.table.queue.chunk(outlet, message, now)
        if messages:
            self.due = min(self.due, outlet.sender.due())

    def _inbox(self, address: ChannelAddress, entries: list[Entry], now: float) -> InboxEnd | None:
        inbox = self.table.inboxes.get(address.channel)
        if inbox is None:
            self.table.late(self.table.tombstones.find(address.channel, address.token), now)
            return None
        if not hmac.compare_digest(inbox.expected, address.token):
            self.table.counters.dropped_unauthentic += 1
            return None
        if inbox.link == address.link:
            return inbox if inbox.receiver.error is None else None
        opens = (entry for entry in entries if isinstance(entry, Hello) and entry.address.link == address.link)
        ticket = next((entry.ticket for entry in opens), None)
        try:
            key = peer_of(ticket) if ticket is not None else self._self
        except TransportError:
            key = self._self
        if ticket is None or key == self._self:
            self.table.counters.dropped_malformed += 1
            return None
        if inbox.link != NO_LINK:
            self.table.counters.dropped_unauthentic += 1
            refusal = Reset(ChannelAddress(address.channel, address.link, inbox.token), int(Reason.TAKEN))
            self.outgoing.append(OutgoingMessage(key, ticket, encode([refusal]), None))
            return None
        inbox.link, inbox.peer = address.link, self.table.queue.peer(key, ticket)
        inbox.peer.inboxes.add(inbox)
        inbox.receiver.bind(now)
        self._plan_ack(inbox)
        return inbox

    def _outlet(self, address: ChannelAddress) -> OutletEnd | None:
        outlet = self.table.outlets.get(address.link)
        if outlet is None:
            self.table.late(self.table.tombstones.find(address.link, address.token), 0.0)
        elif not hmac.compare_digest(outlet.expected, address.token):
            self.table.counters.dropped_unauthentic += 1
            outlet = None
        return outlet

    def _chunk(
        self, inbox: InboxEnd, data: Chunk, shape: Sequence[int], dtype: str, read: Callable[[], Bytes], now: float
    ) -> None:
        receiver = inbox.receiver
        try:
            new = receiver.arrived(data, shape, dtype, read, now)
        except MalformedFrameError as error:
            self.table.counters.dropped_malformed += 1
            receiver.error = TransportError(f"the sender broke the channel's rules: {error}")
            if inbox.peer is not None:
                self.table.queue.emit(inbox.peer, [Reset(inbox.address, int(Reason.MALFORMED))])
            self.table.end_inbox(inbox, Reason.MALFORMED)
            return
        self._plan_ack(inbox)
        if not new:
            self.table.counters.dropped_duplicate += 1
            return
        self.table.counters.messages_received += not data.flags & END
        if receiver.waiting or receiver.ended is not None:
            self.table.events.append(ChannelChanged(inbox))

    def _plan_ack(self, inbox: InboxEnd) -> None:
        if inbox.peer is not None and inbox.receiver.ack_at < math.inf:
            inbox.peer.waiting[inbox] = None
        self.due = min(self.due, inbox.receiver.due())
