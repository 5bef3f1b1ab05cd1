"""A peer in a process of its own that dies in between: noticed within 3 s, sending or not."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from node.transport import IrohEndpoint
from protocol.errors import PeerLostError, TransportError
from tests.support.waiting import OwnPauses

KEY = bytes(range(32))

CHILD = """
import asyncio, os, sys
import numpy as np
from node.transport import IrohEndpoint
async def main():
    async with IrohEndpoint.open() as endpoint:
        inbox = endpoint.open_inbox("there", bytes(range(32)))
        outlet = endpoint.open_outlet(sys.argv[2], "back", bytes(range(32)))
        offer = endpoint.pulls.offer("there", bytes(range(32)))
        os.write(int(sys.argv[1]), endpoint.ticket.encode())
        try:
            while True:
                frame = await inbox.receive(50)
                await outlet.send(frame.sequence, frame.tensor[:1])
        except Exception:
            await asyncio.sleep(50)  # the endpoint answers all the same
asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def echo():
    """An endpoint, the outlet to an echoing child, the inbox for its answers, and the child."""
    async with IrohEndpoint.open() as endpoint:
        read, write = os.pipe()
        inbox = endpoint.open_inbox("back", KEY)
        child = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-c", CHILD, str(write), endpoint.ticket],
            pass_fds=[write],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(write)
        try:
            ticket = (await asyncio.to_thread(os.read, read, 4096)).decode()
            outlet = endpoint.open_outlet(ticket, "there", KEY)
            await outlet.send(0, np.zeros(576, np.float32))
            assert (await inbox.receive(10)).sequence == 0
            yield endpoint, outlet, inbox, child
        finally:
            os.close(read)
            child.kill()
            await asyncio.to_thread(child.wait)


async def send_until_it_fails(outlet):
    number = 0
    while True:
        number += 1
        await outlet.send(number, np.zeros(576, np.float32), 10)


async def notice(how, busy, ready, pauses):
    async with echo() as (endpoint, outlet, inbox, child):
        seen = []
        endpoint.on_peer_lost(seen.append)
        await ready.wait()  # what the start of the others takes is not counted
        await asyncio.sleep(1.2)
        assert not seen
        child.send_signal(how)
        died, paused_before = time.monotonic(), pauses.seconds
        if busy:
            with pytest.raises(PeerLostError, match="plan again"):
                await send_until_it_fails(outlet)
        with pytest.raises(PeerLostError, match="plan again"):
            await inbox.receive(10)
        assert time.monotonic() - died < 3 + pauses.seconds - paused_before
        assert seen == [outlet.ticket]
        assert outlet.lost
        assert inbox.lost
        with pytest.raises(PeerLostError):
            await outlet.send(1, np.zeros(1, np.int32))
        stats = endpoint.stats()
        assert (stats.peers, stats.outlets, stats.inboxes, stats.messages_in_flight) == (0, 0, 0, 0)


async def test_a_peer_that_dies_is_noticed_within_three_seconds_sending_or_not():
    deaths = [(how, busy) for how in (signal.SIGKILL, signal.SIGSTOP) for busy in (True, False)]
    ready = asyncio.Barrier(len(deaths))
    async with OwnPauses.watched() as pauses, asyncio.TaskGroup() as tasks:
        for how, busy in deaths:
            tasks.create_task(notice(how, busy, ready, pauses))


async def test_a_short_pause_of_the_peer_is_survived():
    async with echo() as (endpoint, outlet, inbox, child):
        child.send_signal(signal.SIGSTOP)
        await asyncio.sleep(1.0)
        for number in range(1, 10):
            await outlet.send(number, np.zeros(576, np.float32))
        child.send_signal(signal.SIGCONT)
        assert [(await inbox.receive(10)).sequence for _ in range(9)] == list(range(1, 10))
        assert endpoint.stats().counters.peers_lost == 0


async def test_a_lost_peer_that_comes_back_can_be_reached_again():
    async with echo() as (endpoint, outlet, _, child):
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(PeerLostError):
            await send_until_it_fails(outlet)
        child.send_signal(signal.SIGCONT)
        with pytest.raises(TransportError, match="no tensor registered"):
            await endpoint.pulls.pull(outlet.ticket, "there", KEY, "nothing", 10)
