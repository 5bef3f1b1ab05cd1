"""Real endpoints in one process: the cases that tensor_iroh lists for itself, through our own API."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from node.transport import IrohEndpoint, TransportSettings
from node.transport.core.wire import ChannelAddress, Chunk, channel_id, encode, pull_request, token_of
from protocol.errors import BusyError, TimedOutError, TransportError
from tests.support.pipeline.tickets import ticket_of
from tests.support.waiting import eventually

KEY = bytes(range(32))

pytestmark = pytest.mark.asyncio(loop_scope="module")


@contextlib.asynccontextmanager
async def endpoints(count=2, **changes):
    settings = TransportSettings(**changes)
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(IrohEndpoint.open(settings)) for _ in range(count)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def warm():
    """Two endpoints that have met: the first contact takes tensor_iroh a second."""
    async with endpoints() as (a, b):
        for one, other in ((a, b), (b, a)):
            inbox, outlet = other.open_inbox("warm", KEY), one.open_outlet(other.ticket, "warm", KEY)
            await outlet.send(0, np.zeros(1, np.int32))
            outlet.close()
            inbox.close()
        yield a, b


async def take(inbox, count, timeout_s=20):
    return [await inbox.receive(timeout_s) for _ in range(count)]


async def test_send_and_receive():
    async with endpoints() as (a, b):
        inbox = b.open_inbox("session/0/1", KEY)
        outlet = a.open_outlet(b.ticket, "session/0/1", KEY)
        hidden = np.random.default_rng(0).normal(size=(3, 576)).astype(np.float32)
        await outlet.send(11, hidden)
        hidden_sent = hidden.copy()
        hidden[:] = 0
        frame = await inbox.receive(5)
        assert frame.sequence == 11
        assert np.array_equal(frame.tensor, hidden_sent)
        assert frame.tensor.flags.writeable
        await outlet.send(12, np.array([7], np.int32))
        assert (await inbox.receive(5)).tensor.tolist() == [7]
        await outlet.flush(5)
        assert a.stats().messages_in_flight == 0
        assert b.stats().counters.bytes_received == hidden.nbytes + 4


async def test_pull_by_request_and_a_tensor_that_does_not_exist(warm):
    a, b = warm
    weights = np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)
    offer = a.pulls.offer("session", KEY)
    offer.register("weights", weights)
    expected = weights.copy()
    weights[:] = 0
    assert np.array_equal(await b.pulls.pull(a.ticket, "session", KEY, "weights", 10), expected)
    pulled = await asyncio.gather(*(b.pulls.pull(a.ticket, "session", KEY, "weights", 20) for _ in range(3)))
    assert all(np.array_equal(tensor, expected) for tensor in pulled)
    with pytest.raises(TransportError, match="no tensor registered"):
        await b.pulls.pull(a.ticket, "session", KEY, "nothing", 10)
    offer.unregister("weights")
    with pytest.raises(TransportError, match="no tensor registered"):
        await b.pulls.pull(a.ticket, "session", KEY, "weights", 10)
    offer.close()
    await eventually(lambda: (a.stats().outlets, b.stats().inboxes, a.stats().registered) == (0, 0, 0))


async def test_a_pull_without_the_channels_key_gets_nothing_and_is_counted(warm):
    a, b = warm
    offer = a.pulls.offer("secret", KEY)
    offer.register("cache", np.ones(4, np.float32))
    before = a.stats().counters
    for channel, key in (("secret", KEY[:-1] + b"x"), ("another", KEY)):
        with pytest.raises(TimedOutError, match="did not answer"):
            await b.pulls.pull(a.ticket, channel, key, "cache", 0.3)
    counters = a.stats().counters
    assert counters.dropped_unauthentic > before.dropped_unauthentic
    assert counters.dropped_unknown > before.dropped_unknown
    assert counters.messages_sent == before.messages_sent
    assert a.stats().outlets == 0
    # Nor does a request whose proof is another request's: here the answer would go to another channel.
    proven = pull_request(KEY, bytes(8), channel_id("secret"), b.ticket, "cache")
    forged = msgspec.structs.replace(proven, channel=bytes([1]) * 8)
    unauthentic = a.stats().counters.dropped_unauthentic
    b._driver.exchange.ask(a.ticket, forged)
    b._driver.pump()
    await eventually(lambda: a.stats().counters.dropped_unauthentic == unauthentic + 1)
    assert (await b.pulls.pull(a.ticket, "secret", KEY, "cache", 10)).tolist() == [1, 1, 1, 1]
    offer.close()
    with pytest.raises(TransportError, match="offer of tensors is closed"):
        offer.register("cache", np.ones(4, np.float32))


async def test_offers_are_bounded():
    async with endpoints(1, max_registered=1, max_channels=1) as (a,):
        offer = a.pulls.offer("c", KEY)
        offer.register("x", np.zeros(1, np.int32))
        offer.register("x", np.ones(1, np.int32))
        with pytest.raises(BusyError):
            offer.register("y", np.zeros(1, np.int32))
        with pytest.raises(BusyError):
            a.pulls.offer("d", KEY)
        with pytest.raises(TransportError, match="offered already"):
            a.pulls.offer("c", KEY)
        with pytest.raises(TransportError, match="a tensor's name"):
            offer.register("", np.zeros(1, np.int32))


async def test_concurrent_sends_from_the_first_contact_on():
    """Bare tensor_iroh loses most of what is sent at once to a peer that it has not met."""
    async with endpoints() as (a, b):
        inboxes = [b.open_inbox(f"c{n}", KEY) for n in range(20)]
        outlets = [a.open_outlet(b.ticket, f"c{n}", KEY) for n in range(20)]

        async def feed(number, outlet):
            await asyncio.gather(*(outlet.send(i, np.full(64, number, np.int32)) for i in range(10)))

        frames, *_ = await asyncio.gather(
            asyncio.gather(*(take(inbox, 10) for inbox in inboxes)),
            *(feed(number, outlet) for number, outlet in enumerate(outlets)),
        )
        for number, of_one in enumerate(frames):
            assert [frame.sequence for frame in of_one] == list(range(10))
            assert all((frame.tensor == number).all() for frame in of_one)


async def test_rapid_fire_keeps_order_and_stays_within_the_credit(warm):
    a, b = warm
    inbox = b.open_inbox("rapid_fire_keeps_ord", KEY)
    outlet = a.open_outlet(b.ticket, "rapid_fire_keeps_ord", KEY)
    most = 0

    async def feed():
        nonlocal most
        for number in range(1000):
            await outlet.send(number, np.full((1, 576), number, np.float32), 20)
            most = max(most, outlet._end.sender.in_flight[0])

    frames, _ = await asyncio.gather(take(inbox, 1000), feed())
    assert [frame.sequence for frame in frames] == list(range(1000))
    assert all((frame.tensor == frame.sequence).all() for frame in frames)
    assert 1 < most <= TransportSettings().window_messages


async def test_a_tensor_of_more_than_100_mb(warm):
    a, b = warm
    inbox = b.open_inbox("a_tensor_of_more_tha", KEY)
    outlet = a.open_outlet(b.ticket, "a_tensor_of_more_tha", KEY)
    large = np.arange(26_500_000, dtype=np.int32).reshape(100, 265_000)
    most = 0

    async def watch():
        nonlocal most
        while True:
            most = max(most, outlet._end.sender.in_flight[1])
            await asyncio.sleep(0.01)

    watching = asyncio.ensure_future(watch())
    frame, _ = await asyncio.gather(inbox.receive(40), outlet.send(0, large, 40))
    watching.cancel()
    assert large.nbytes > 100_000_000
    assert np.array_equal(frame.tensor, large)
    assert 0 < most <= TransportSettings().window_bytes


async def test_several_receivers():
    async with endpoints(4) as (a, *others):
        inboxes = [other.open_inbox("c", KEY) for other in others]
        outlets = [a.open_outlet(other.ticket, "c", KEY) for other in others]
        for number in range(5):
            await asyncio.gather(*(outlet.send(number, np.full(8, n, np.int32)) for n, outlet in enumerate(outlets)))
        for n, inbox in enumerate(inboxes):
            frames = await take(inbox, 5)
            assert [frame.sequence for frame in frames] == list(range(5))
            assert all((frame.tensor == n).all() for frame in frames)


async def test_an_inbox_that_opens_after_the_first_send_gets_it(warm):
    a, b = warm
    before = b.stats().counters.dropped_unknown
    outlet = a.open_outlet(b.ticket, "inbox_opens_after", KEY)
    sending = asyncio.ensure_future(outlet.send(3, np.ones(4, np.float32)))
    await eventually(lambda: b.stats().counters.dropped_unknown > before, 9)
    assert not sending.done()
    inbox = b.open_inbox("inbox_opens_after", KEY)
    await sending
    assert (await inbox.receive(5)).sequence == 3


async def test_an_inbox_that_never_opens_is_a_clear_error_in_time():
    async with endpoints(open_timeout_s=0.5) as (a, b):
        outlet = a.open_outlet(b.ticket, "c", KEY)
        started = time.monotonic()
        with pytest.raises(TransportError, match=r"no inbox answered within 0\.5 s"):
            await outlet.send(0, np.ones(4, np.float32))
        assert time.monotonic() - started < 4
        with pytest.raises(TransportError, match="no inbox answered"):
            await outlet.flush()


async def test_immediate_shutdown_still_delivers_and_ends_in_time():
    async with endpoints(1) as (b,):
        inbox = b.open_inbox("c", KEY)
        async with IrohEndpoint.open() as a:
            await a.open_outlet(b.ticket, "c", KEY).send(1, np.ones(4, np.float32))
            started = time.monotonic()
        assert time.monotonic() - started < 2
        assert (await inbox.receive(5)).sequence == 1
        with pytest.raises(TransportError, match="ended"):
            await inbox.receive(5)
        assert not inbox.lost


async def test_open_and_close_at_once():
    for _ in range(3):
        async with IrohEndpoint.open() as endpoint:
            assert endpoint.ticket.startswith("node")
    started = time.monotonic()
    async with IrohEndpoint.open() as endpoint:
        endpoint.open_outlet(ticket_of(9), "c", KEY)
        endpoint.open_inbox("c", KEY)
    assert time.monotonic() - started < 3


async def test_timeouts_leave_the_channel_usable(warm):
    a, b = warm
    inbox = b.open_inbox("timeouts_leave_the_c", KEY)
    outlet = a.open_outlet(b.ticket, "timeouts_leave_the_c", KEY)
    with pytest.raises(TimedOutError, match="no frame came"):
        await inbox.receive(0.1)
    sent = TransportSettings().window_messages
    for number in range(sent):
        await outlet.send(number, np.zeros(4, np.int32), 5)
    with pytest.raises(TimedOutError, match="does not take"):
        await outlet.send(sent, np.zeros(4, np.int32), 0.3)
    frames = await take(inbox, sent)
    await outlet.send(sent, np.zeros(4, np.int32), 5)
    assert [frame.sequence for frame in [*frames, await inbox.receive(5)]] == list(range(sent + 1))
    with pytest.raises(TimedOutError, match="did not answer"):
        await a.pulls.pull(ticket_of(9), "session", KEY, "weights", 0.5)


async def test_a_tensor_that_is_cut_off_ends_the_channel_and_nothing_else(warm):
    a, b = warm
    inbox = b.open_inbox("a_tensor_that_is_cut", KEY)
    outlet = a.open_outlet(b.ticket, "a_tensor_that_is_cut", KEY)
    other_inbox = b.open_inbox("other", KEY)
    other = a.open_outlet(b.ticket, "other", KEY)
    await outlet.send(0, np.zeros(4, np.int32))
    assert (await inbox.receive(5)).sequence == 0
    large = np.zeros(8 << 20, np.float32)
    await outlet.send(1, large, 5)
    await outlet.flush(10)  # the next one has room to begin
    with pytest.raises(TimedOutError):
        await outlet.send(2, large, 0.3)
    with pytest.raises(TransportError, match="cut off"):
        await outlet.send(9, np.zeros(4, np.int32))
    assert (await inbox.receive(5)).sequence == 1
    with pytest.raises(TransportError, match="in the middle of a tensor"):
        await inbox.receive(5)
    await other.send(0, np.zeros(4, np.int32))
    assert (await other_inbox.receive(5)).sequence == 0


async def test_a_bad_ticket(warm):
    a, _ = warm
    for bad in ("", "junk", "node", "nodejunk", ticket_of(1)[:-5]):
        with pytest.raises(TransportError, match="not an iroh node ticket"):
            a.open_outlet(bad, "bad", KEY)
        with pytest.raises(TransportError, match="not an iroh node ticket"):
            await a.pulls.pull(bad, "session", KEY, "weights")
    with pytest.raises(TransportError, match="own"):
        a.open_outlet(a.ticket, "bad", KEY)


async def test_what_cannot_be_sent_is_refused():
    async with endpoints(max_frame_bytes=1 << 20) as (a, b):
        outlet = a.open_outlet(b.ticket, "c", KEY)
        for wrong in (np.zeros(1), np.zeros((1, 1, 1, 1, 1), np.float32), np.zeros(1 << 20, np.float32)):
            with pytest.raises(TransportError):
                await outlet.send(0, wrong)
        for name, key in (("", KEY), ("c" * 600, KEY), ("d", b"short"), ("d", bytes(65))):
            with pytest.raises(TransportError):
                a.open_inbox(name, key)


async def test_use_after_shutdown():
    async with IrohEndpoint.open() as b:
        async with IrohEndpoint.open() as a:
            inbox = b.open_inbox("c", KEY)
            back = a.open_inbox("back", KEY)
            outlet = a.open_outlet(b.ticket, "c", KEY)
            offer = a.pulls.offer("c", KEY)
            await outlet.send(0, np.zeros(1, np.int32))
            receiving = asyncio.ensure_future(back.receive())
            await asyncio.sleep(0)
        for use in (
            outlet.send(1, np.zeros(1, np.int32)),
            outlet.flush(),
            back.receive(1),
            receiving,
            a.pulls.pull(b.ticket, "session", KEY, "w"),
        ):
            with pytest.raises(TransportError, match="closed"):
                await use
        for call in (
            lambda: a.open_inbox("x", KEY),
            lambda: a.open_outlet(b.ticket, "x", KEY),
            lambda: a.pulls.offer("x", KEY),
            lambda: offer.register("x", np.zeros(1, np.int32)),
        ):
            with pytest.raises(TransportError, match="closed"):
                call()
        outlet.close()
        back.close()
        inbox.close()
        with pytest.raises(TransportError, match="is closed"):
            await inbox.receive(1)


async def test_a_connection_is_reused_and_channels_come_and_go():
    async with endpoints() as (a, b):
        for attempt in range(20):
            inbox = b.open_inbox(f"session/{attempt}", KEY)
            outlet = a.open_outlet(b.ticket, f"session/{attempt}", KEY)
            await outlet.send(attempt, np.zeros(1, np.int32))
            assert (await inbox.receive(5)).sequence == attempt
            outlet.close()
            with pytest.raises(TransportError, match="ended"):
                await inbox.receive(5)
            inbox.close()
        assert await a._driver.node._sockets[0]._node.pool_size() == 1
        for one in (a, b):
            await eventually(lambda one=one: (one.stats().outlets, one.stats().inboxes, one.stats().peers) == (0, 0, 0))
        assert not a._driver.listeners
        assert not b._driver.listeners


async def test_frames_without_the_key_and_late_frames_are_counted_and_hold_nothing(warm):
    a, b = warm
    inbox = b.open_inbox("frames_without_the_k", KEY)
    thief = a.open_outlet(b.ticket, "frames_without_the_k", bytes(32))
    with pytest.raises(TimedOutError):
        await thief.send(0, np.zeros(1 << 16, np.float32), 0.3)
    assert b.stats().counters.dropped_unauthentic > 0
    assert b.stats().frames_waiting == 0
    thief.close()
    outlet = a.open_outlet(b.ticket, "frames_without_the_k", KEY)
    await outlet.send(0, np.zeros(1, np.int32))
    inbox.close()
    late = b.stats().counters.dropped_late
    await outlet.send(1, np.zeros(1, np.int32), 5)
    with pytest.raises(TransportError, match="takes no more"):
        await outlet.flush(5)
    await eventually(lambda: b.stats().counters.dropped_late > late)


async def test_a_hostile_flood_is_read_away(warm):
    """What has no key is taken out of tensor_iroh's queue at once, and nothing of it stays."""
    a, b = warm
    inbox = b.open_inbox("a_hostile_flood_is_r", KEY)
    outlet = a.open_outlet(b.ticket, "a_hostile_flood_is_r", KEY)
    await outlet.send(0, np.zeros(1, np.int32))
    before = b.stats().counters
    channel = channel_id("a_hostile_flood_is_r")
    name = encode(
        [Chunk(ChannelAddress(channel, bytes(8), token_of(bytes(32), channel, from_outlet=True)), 0, 0, 0, 0)]
    )
    body = a._driver.node.seal(np.zeros(256 << 10, np.uint8), [64 << 10], "float32")
    route = next(iter(a._driver.node._routes.values()))
    for junk in (name, "junk", "\1" * 5000, "x" * 100_000):
        for _ in range(50):
            await route.socket.send(b.ticket, junk, body)
    await outlet.send(1, np.zeros(1, np.int32), 10)
    assert [frame.sequence for frame in await take(inbox, 2)] == [0, 1]

    def dropped():
        counters = b.stats().counters
        return (
            counters.dropped_unauthentic - before.dropped_unauthentic,
            counters.dropped_malformed - before.dropped_malformed,
        )

    await eventually(lambda: sum(dropped()) >= 200)
    assert dropped() == (50, 150)


async def test_a_broken_connection_is_made_again():
    """tensor_iroh's pool keeps a dead connection for ever; a send that is cancelled half way makes one."""
    async with endpoints(lost_after_s=10.0) as (a, b):
        inbox = b.open_inbox("c", KEY)
        outlet = a.open_outlet(b.ticket, "c", KEY)
        await outlet.send(0, np.zeros(1, np.int32))
        socket = next(iter(a._driver.node._routes.values())).socket
        large = a._driver.node.seal(np.zeros(32 << 20, np.uint8), [1], "float32")

        async def cancel_until_it_breaks():
            for _ in range(20):
                half_way = socket.send(b.ticket, "large", large)
                await asyncio.sleep(0.05)
                half_way.cancel()
                await asyncio.sleep(0.2)
                await socket.send(b.ticket, "small", a._driver.node.seal(np.zeros(4, np.uint8), [1], "float32"))

        with pytest.raises(RuntimeError):
            await cancel_until_it_breaks()
        ticket = a.ticket
        for number in range(1, 6):
            await outlet.send(number, np.zeros(1, np.int32), 10)
        assert [frame.sequence for frame in await take(inbox, 6)] == list(range(6))
        assert a.ticket == ticket
        assert len(a._driver.node._sockets) == 2


CLEAN = """
import asyncio, sys
import numpy as np
from node.transport import IrohEndpoint
async def main():
    async with IrohEndpoint.open() as a, IrohEndpoint.open() as b:
        inbox = b.open_inbox("c", bytes(32))
        outlet = a.open_outlet(b.ticket, "c", bytes(32))
        await outlet.send(0, np.zeros(1 << 20, np.float32))
        if sys.argv[1] == "busy":
            await outlet.send(1, np.zeros(1 << 20, np.float32))
        else:
            await inbox.receive()
asyncio.run(main())
"""


async def test_a_process_that_used_the_transport_exits_cleanly():
    async def run(how):
        arguments = [sys.executable, "-c", CLEAN, how]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        done = await asyncio.to_thread(
            subprocess.run, arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=30
        )
        assert done.returncode == 0, (how, done.stderr.decode()[-2000:])
        assert done.stderr == b"", how

    await asyncio.gather(run("idle"), run("busy"))


async def test_nothing_is_left_behind():
    async with endpoints() as (a, b):
        inbox = b.open_inbox("c", KEY)
        outlet = a.open_outlet(b.ticket, "c", KEY)
        await outlet.send(0, np.zeros(1, np.int32))
        await inbox.receive(5)
        assert len(asyncio.all_tasks()) == 1
    assert len(asyncio.all_tasks()) == 1
    gc.collect()
