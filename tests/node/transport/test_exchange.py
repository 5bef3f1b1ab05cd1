"""The core over a simulated network: no sockets, no clock but the test's."""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.transport.core.exchange import Exchange
from node.transport.core.messages import ChannelChanged, PeerLost
from node.transport.core.wire import ChannelAddress, Chunk, Heartbeat, Hello, encode, token_of
from node.transport.settings import FIRST_BYTES, TransportSettings
from protocol.errors import BusyError, PeerLostError, TransportError
from tests.support.pipeline.tickets import ticket_of

KEY = bytes(range(32))
CHANNEL = b"channel1"
SMALL = TransportSettings(
    chunk_bytes=1024, window_bytes=FIRST_BYTES, window_messages=8, max_frame_bytes=1 << 20, max_channels=4
)
EMPTY = (np.empty(0, np.uint8), [0], "uint8")


def seal(chunk, shape, dtype):
    return chunk.copy(), list(shape), dtype


@dataclass
class World:
    """Two exchanges, and what the network does to their messages."""

    settings: TransportSettings = SMALL
    now: float = 100.0
    cut: set = field(default_factory=set)
    wire: list = field(default_factory=list)
    events: dict = field(default_factory=lambda: {1: [], 2: []})

    def __post_init__(self):
        links = itertools.count(1)
        self.ends = {
            number: Exchange(self.settings, ticket_of(number), seal, random=lambda size: next(links).to_bytes(size))
            for number in (1, 2)
        }

    def collect(self):
        for number, end in self.ends.items():
            while end.outgoing:
                self.wire.append((3 - number, end.outgoing.popleft()))
            while end.events:
                self.events[number].append(end.events.popleft())

    def deliver(self, at=0):
        number, envelope = self.wire.pop(at)
        if number not in self.cut:
            data, shape, dtype = envelope.body or EMPTY
            self.ends[number].receive(envelope.name, shape, dtype, lambda: data, self.now)

    def settle(self):
        self.collect()
        while self.wire:
            self.deliver()
            self.collect()

    def run(self, seconds):
        """Let time pass, with everything delivered at once."""
        until = self.now + seconds
        self.settle()
        while (due := min(end.due for end in self.ends.values())) <= until:
            self.now = max(self.now, due)
            for end in self.ends.values():
                if end.due <= self.now:
                    end.tick(self.now)
            self.settle()
        self.now = until

    def pair(self):
        inbox = self.ends[2].open_inbox(CHANNEL, KEY)
        outlet = self.ends[1].open_outlet(ticket_of(2), CHANNEL, KEY, self.now)
        self.run(0.01)
        assert outlet.sender.accepted
        return outlet, inbox

    def offer(self, outlet, sequence, tensor):
        data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        self.ends[1].offer(outlet, sequence, list(tensor.shape), str(tensor.dtype), data, self.now)


def test_a_frame_arrives_without_a_round_trip_before_it():
    world = World()
    inbox = world.ends[2].open_inbox(CHANNEL, KEY)
    outlet = world.ends[1].open_outlet(ticket_of(2), CHANNEL, KEY, world.now)
    world.offer(outlet, 5, np.arange(6, dtype=np.int32).reshape(2, 3))
    world.collect()
    while world.wire:
        world.deliver()
    frame = world.ends[2].take(inbox, world.now)
    assert frame.sequence == 5
    assert frame.tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (1, 1, 1, 1), (300, 1), (256,), (512, 3)])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_every_shape_arrives_whole(shape, dtype):
    world = World()
    outlet, inbox = world.pair()
    tensor = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    world.offer(outlet, 1, tensor)
    world.run(0.2)
    frame = world.ends[2].take(inbox, world.now)
    assert frame.tensor.dtype == dtype
    assert frame.tensor.shape == shape
    assert np.array_equal(frame.tensor, tensor)
    assert outlet.sender.idle


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_network_loses_doubles_or_reorders_frames_arrive_once_and_in_order(data):
    world = World()
    inbox = world.ends[2].open_inbox(CHANNEL, KEY)
    outlet = world.ends[1].open_outlet(ticket_of(2), CHANNEL, KEY, world.now)
    sizes = data.draw(st.lists(st.integers(0, 1500), min_size=1, max_size=12))
    waiting, got = list(enumerate(sizes)), []
    faults = data.draw(st.integers(0, 40))
    for _ in range(4000):
        if len(got) == len(sizes) and outlet.sender.idle:
            break
        if waiting and not outlet.sender.blocked:
            number, size = waiting.pop(0)
            world.offer(outlet, number, np.full(size, number, np.int32))
        world.collect()
        if world.wire:
            fault = "none"
            if faults:
                faults -= 1
                fault = data.draw(st.sampled_from(["none", "lose", "double", "later"]))
            at = data.draw(st.integers(0, len(world.wire) - 1)) if fault == "later" else 0
            if fault == "lose":
                world.wire.pop(0)
                continue
            if fault == "double":
                world.wire.append(world.wire[0])
            world.deliver(at)
            if (frame := world.ends[2].take(inbox, world.now)) is not None:
                got.append(frame)
            continue
        world.now = max(world.now, min(end.due for end in world.ends.values()))
        for end in world.ends.values():
            if end.due <= world.now:
                end.tick(world.now)
        while (frame := world.ends[2].take(inbox, world.now)) is not None:
            got.append(frame)
        if outlet.sender.error or inbox.receiver.error:
            # Enough loss in a row looks like death; then, and only then, frames may be missing.
            assert isinstance(outlet.sender.error or inbox.receiver.error, PeerLostError)
            break
    else:
        raise AssertionError("the exchange came to no end")
    assert [frame.sequence for frame in got] == list(range(len(got)))
    assert all(np.array_equal(frame.tensor, np.full(sizes[i], i, np.int32)) for i, frame in enumerate(got))


def test_what_is_in_flight_and_what_waits_is_bounded_by_credit():
    world = World()
    outlet, inbox = world.pair()
    for number in range(100):
        if outlet.sender.blocked:
            break
        world.offer(outlet, number, np.zeros(4, np.int32))
        world.run(1.0)
    assert outlet.sender.blocked
    assert inbox.receiver.waiting == SMALL.window_messages
    world.ends[2].take(inbox, world.now)
    world.run(0.1)
    assert not outlet.sender.blocked
    assert inbox.receiver.waiting == SMALL.window_messages


def test_a_tensor_larger_than_the_window_arrives_and_the_one_behind_it_waits():
    world = World(TransportSettings(chunk_bytes=64 << 10, window_bytes=FIRST_BYTES, max_frame_bytes=8 << 20))
    outlet, inbox = world.pair()
    large = np.arange(1 << 20, dtype=np.int32)
    world.offer(outlet, 0, large)
    world.run(0.5)
    assert not outlet.sender.blocked
    world.offer(outlet, 1, large)
    world.run(2.0)
    assert outlet.sender.blocked, "two whole tensors must not be held"
    assert np.array_equal(world.ends[2].take(inbox, world.now).tensor, large)
    world.run(0.5)
    assert np.array_equal(world.ends[2].take(inbox, world.now).tensor, large)


def test_a_frame_the_other_way_takes_the_acknowledgement_along():
    world = World()
    outlet, inbox = world.pair()
    back_inbox = world.ends[1].open_inbox(b"backback", KEY)
    back = world.ends[2].open_outlet(ticket_of(1), b"backback", KEY, world.now)
    world.run(0.2)
    before = world.ends[2].table.counters.acks_sent
    for number in range(20):
        world.offer(outlet, number, np.zeros(576, np.float32))
        world.settle()
        world.ends[2].take(inbox, world.now)
        world.ends[2].offer(back, number, [1], "int32", np.zeros(4, np.uint8), world.now)
        world.settle()
        assert outlet.sender.idle
        assert world.ends[1].take(back_inbox, world.now) is not None
        world.now += 0.001
    assert world.ends[2].table.counters.acks_sent == before
    assert world.ends[2].table.counters.acks_ridden >= 20


def test_a_lone_acknowledgement_leaves_in_time():
    world = World()
    outlet, _ = world.pair()
    world.offer(outlet, 0, np.zeros(4, np.int32))
    world.settle()
    assert not outlet.sender.idle
    world.run(SMALL.ack_delay_s + 0.001)
    assert outlet.sender.idle


@pytest.mark.parametrize("dead", [1, 2])
@pytest.mark.parametrize("busy", [True, False])
def test_a_silent_peer_is_lost_within_three_seconds(dead, busy):
    world = World()
    outlet, inbox = world.pair()
    world.run(7.3)
    assert not outlet.sender.error
    assert not inbox.receiver.error
    world.cut = {1, 2}
    if busy:
        world.offer(outlet, 0, np.zeros(4, np.int32))
    world.run(3.0)
    end = outlet.sender if dead == 2 else inbox.receiver
    assert isinstance(end.error, PeerLostError)
    lost = [event for event in world.events[3 - dead] if isinstance(event, PeerLost)]
    assert lost == [PeerLost(ticket_of(dead))], "once, with the peer's ticket"
    assert world.ends[3 - dead].table.counters.peers_lost == 1
    assert world.ends[3 - dead].due == math.inf, "nothing is left to do for a lost peer"


def test_all_channels_of_a_lost_peer_fail_together_and_it_is_told_once():
    world = World()
    outlet, _ = world.pair()
    back_inbox = world.ends[1].open_inbox(b"backback", KEY)
    world.ends[2].open_outlet(ticket_of(1), b"backback", KEY, world.now)
    world.ends[2].open_inbox(b"channel2", KEY)
    second = world.ends[1].open_outlet(ticket_of(2), b"channel2", KEY, world.now)
    world.run(4.2)
    second.sender.heard_at = outlet.sender.heard_at = back_inbox.receiver.heard_at = world.now
    world.cut = {1, 2}
    world.run(3)
    assert isinstance(outlet.sender.error, PeerLostError)
    assert isinstance(back_inbox.receiver.error, PeerLostError)
    assert [event for event in world.events[1] if isinstance(event, PeerLost)] == [PeerLost(ticket_of(2))]


def test_heartbeats_keep_an_idle_channel_alive_and_are_few():
    world = World()
    outlet, inbox = world.pair()
    world.run(60)
    assert outlet.sender.error is None
    assert inbox.receiver.error is None
    assert world.ends[1].table.counters.heartbeats_sent <= 60 / SMALL.heartbeat_s + 1


def test_our_own_pause_is_not_the_peers_death():
    world = World()
    outlet, inbox = world.pair()
    world.now += 30
    for end in world.ends.values():
        end.tick(world.now)
    world.run(5)
    assert outlet.sender.error is None
    assert inbox.receiver.error is None


def test_an_inbox_that_opens_later_gets_the_first_frames():
    world = World()
    outlet = world.ends[1].open_outlet(ticket_of(2), CHANNEL, KEY, world.now)
    world.offer(outlet, 0, np.zeros(2, np.int32))
    world.run(3.0)
    assert world.ends[2].table.counters.dropped_unknown > 0
    inbox = world.ends[2].open_inbox(CHANNEL, KEY)
    world.run(2.0)
    assert world.ends[2].take(inbox, world.now).sequence == 0
    assert outlet.sender.accepted


def test_an_inbox_that_never_opens_is_a_clear_error_in_time():
    world = World()
    outlet = world.ends[1].open_outlet(ticket_of(2), CHANNEL, KEY, world.now)
    world.offer(outlet, 0, np.zeros(2, np.int32))
    world.run(SMALL.open_timeout_s - 0.1)
    assert outlet.sender.error is None
    world.run(0.2)
    assert isinstance(outlet.sender.error, TransportError)
    assert "no inbox answered" in str(outlet.sender.error)
    assert ChannelChanged(outlet) in world.events[1]


def test_frames_without_the_key_are_dropped_counted_and_their_bytes_not_read():
    world = World()
    outlet, inbox = world.pair()
    for key in (bytes(32), KEY[:-1] + b"x"):
        address = ChannelAddress(CHANNEL, outlet.address.link, token_of(key, CHANNEL, from_outlet=True))
        name = encode([Chunk(address, 0, 0, 0, 0), Hello(address, ticket_of(1))])
        world.ends[2].receive(name, [1], "int32", lambda: pytest.fail("read"), world.now)
    # The other direction's token proves nothing either.
    name = encode([Chunk(ChannelAddress(CHANNEL, outlet.address.link, inbox.token), 0, 0, 0, 0)])
    world.ends[2].receive(name, [1], "int32", lambda: pytest.fail("read"), world.now)
    assert world.ends[2].table.counters.dropped_unauthentic == 3
    assert world.ends[2].take(inbox, world.now) is None
    world.offer(outlet, 0, np.ones(1, np.int32))
    world.run(0.1)
    assert world.ends[2].take(inbox, world.now).tensor.tolist() == [1]


def test_a_stranger_cannot_keep_a_dead_sender_alive():
    world = World()
    outlet, inbox = world.pair()
    world.cut = {1, 2}
    for _ in range(10):
        world.run(0.3)
        fake = ChannelAddress(CHANNEL, outlet.address.link, bytes(16))
        world.ends[2].receive(encode([Heartbeat(fake)]), [0], "uint8", lambda: EMPTY[0], world.now)
    assert isinstance(inbox.receiver.error, PeerLostError)


def test_late_frames_of_a_closed_inbox_are_counted_and_the_sender_is_told():
    world = World()
    outlet, inbox = world.pair()
    world.offer(outlet, 0, np.zeros(1, np.int32))
    world.collect()
    world.ends[2].close_inbox(inbox, world.now)
    world.run(0.1)
    assert world.ends[2].table.counters.dropped_late == 1
    assert "it was closed" in str(outlet.sender.error)


def test_a_late_frame_without_the_key_is_a_stranger():
    world = World()
    outlet, inbox = world.pair()
    world.ends[2].close_inbox(inbox, world.now)
    fake = ChannelAddress(CHANNEL, outlet.address.link, bytes(16))
    world.ends[2].receive(encode([Chunk(fake, 0, 0, 0, 0)]), [0], "int32", lambda: EMPTY[0], world.now)
    assert world.ends[2].table.counters.dropped_late == 0
    assert world.ends[2].table.counters.dropped_unknown == 1


def test_a_message_that_comes_again_is_dropped_and_takes_no_credit():
    world = World()
    outlet, inbox = world.pair()
    name = encode([Chunk(outlet.address, 0, 0, 0, 0)])
    for _ in range(20):
        world.ends[2].receive(name, [1 << 16], "int32", lambda: np.zeros(1 << 18, np.uint8), world.now)
    assert world.ends[2].table.counters.dropped_duplicate == 19
    assert inbox.receiver.error is None
    assert inbox.receiver.waiting == 1


def test_a_sender_beyond_its_credit_in_bytes_loses_the_channel():
    world = World()
    outlet, inbox = world.pair()
    for number in range(2):
        assert inbox.receiver.error is None
        name = encode([Chunk(outlet.address, number, 0, 0, 0)])
        world.ends[2].receive(name, [1 << 18], "int32", lambda: np.zeros(1 << 20, np.uint8), world.now)
    assert "with credit for" in str(inbox.receiver.error)


def test_what_was_sent_before_the_inbox_opened_follows_at_once():
    world = World()
    outlet = world.ends[1].open_outlet(ticket_of(2), CHANNEL, KEY, world.now)
    for number in range(3):
        world.offer(outlet, number, np.zeros(2, np.int32))
    world.run(3.0)
    inbox = world.ends[2].open_inbox(CHANNEL, KEY)
    while not outlet.sender.accepted:
        world.run(0.01)
    world.run(0.01)
    assert inbox.receiver.waiting == 3


def test_our_own_pause_does_not_use_up_the_time_to_open():
    world = World()
    outlet = world.ends[1].open_outlet(ticket_of(2), CHANNEL, KEY, world.now)
    world.now += 60
    world.ends[1].tick(world.now)
    assert outlet.sender.error is None
    world.ends[2].open_inbox(CHANNEL, KEY)
    world.run(3)
    assert outlet.sender.accepted


def test_a_second_sender_is_refused():
    world = World()
    outlet, _ = world.pair()
    second = Exchange(SMALL, ticket_of(3), seal)
    end = second.open_outlet(ticket_of(2), CHANNEL, KEY, world.now)
    envelope = second.outgoing.popleft()
    world.ends[2].receive(envelope.name, [0], "uint8", lambda: EMPTY[0], world.now)
    answer = world.ends[2].outgoing.popleft()
    assert answer.ticket == ticket_of(3)
    second.receive(answer.name, [0], "uint8", lambda: EMPTY[0], world.now)
    assert "another sender has it" in str(end.sender.error)
    assert outlet.sender.error is None


@pytest.mark.parametrize(
    ("shape", "dtype", "size", "number", "offset"),
    [
        ([1], "float64", 8, 0, 0),
        ([1, 1, 1, 1, 1], "int32", 4, 0, 0),
        ([1 << 40], "int32", 4, 0, 0),
        ([1 << 18, 1 << 18], "int32", 4, 0, 0),
        ([-1], "int32", 4, 0, 0),
        ([0, 1 << 30, 1 << 30, 1 << 30], "int32", 0, 0, 0),
        ([1], "int32", 8, 0, 0),
        ([2], "int32", 4, 0, 4),
        ([2], "int32", 0, 0, 0),
        ([1], "int32", 4, 8, 0),
        ([1], "int32", 4, 1 << 60, 0),
    ],
)
def test_a_key_holder_who_breaks_the_rules_loses_the_channel(shape, dtype, size, number, offset):
    world = World()
    outlet, inbox = world.pair()
    name = encode([Chunk(outlet.address, number, 0, offset, 0)])
    world.ends[2].receive(name, shape, dtype, lambda: np.zeros(size, np.uint8), world.now)
    world.run(0.1)
    assert isinstance(inbox.receiver.error, TransportError)
    assert "a frame broke its rules" in str(outlet.sender.error)
    assert world.ends[2].table.counters.dropped_malformed == 1


def test_the_end_comes_after_the_frames_and_is_acknowledged():
    world = World()
    outlet, inbox = world.pair()
    world.offer(outlet, 0, np.zeros(1, np.int32))
    world.ends[1].close_outlet(outlet, world.now)
    world.run(0.1)
    assert outlet.sender.done
    assert not world.ends[1].table.outlets
    assert world.ends[2].take(inbox, world.now) is not None
    assert inbox.receiver.ended is not None
    world.run(30)
    assert inbox.receiver.error is None, "a channel that ended well is not lost afterwards"
    assert world.ends[1].due == math.inf


def test_open_channels_are_bounded_and_come_back():
    world = World()
    ends = [world.ends[1].open_outlet(ticket_of(2), bytes([n]) * 8, KEY, world.now) for n in range(4)]
    inboxes = [world.ends[2].open_inbox(bytes([n]) * 8, KEY) for n in range(4)]
    with pytest.raises(BusyError):
        world.ends[1].open_outlet(ticket_of(2), bytes(8), KEY, world.now)
    with pytest.raises(BusyError):
        world.ends[2].open_inbox(b"one more", KEY)
    with pytest.raises(TransportError, match="open already"):
        world.ends[2].open_inbox(bytes(8), KEY)
    world.run(1)
    world.ends[1].close_outlet(ends[0], world.now)
    world.ends[2].close_inbox(inboxes[1], world.now)
    world.run(1)
    world.ends[2].open_inbox(b"one more", KEY)
    world.ends[1].open_outlet(ticket_of(2), b"one more", KEY, world.now)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_noise_changes_nothing(noise):
    world = World()
    outlet, inbox = world.pair()
    for raw in noise:
        for end in world.ends.values():
            end.receive("\1" + raw.decode("latin-1"), [1], "int32", lambda: np.zeros(4, np.uint8), world.now)
    world.offer(outlet, 3, np.ones(1, np.int32))
    world.settle()
    assert world.ends[2].take(inbox, world.now).sequence == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"ack_delay_s": 1.0},
        {"heartbeat_s": 2.0},
        {"chunk_bytes": 10},
        {"chunk_bytes": 8 << 20},
        {"window_bytes": 1000},
        {"window_messages": 1},
        {"max_channels": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError):
        TransportSettings(**wrong)
