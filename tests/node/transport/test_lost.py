"""A peer in a process of its own that dies in between: noticed within 3 s, sending or not."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from node.transport import IrohEndpoint
from protocol.errors import PeerLostError, TransportError
from tests.support.waiting import OwnPauses

KEY = bytes(range(32))

TEMPLATE = """
import asyncio, os, signal, sys
import numpy as np
from node.transport import IrohEndpoint
async def echo(back):
    async with IrohEndpoint.open() as endpoint:
        inbox = endpoint.open_inbox("there", bytes(range(32)))
        outlet = endpoint.open_outlet(back, "back", bytes(range(32)))
        offer = endpoint.pulls.offer("there", bytes(range(32)))
        os.write(REPORT, f"{os.getpid()} {endpoint.ticket}\\n".encode())
        try:
            while True:
                frame = await inbox.receive(50)
                await outlet.send(frame.sequence, frame.tensor[:1])
        except Exception:
            await asyncio.sleep(50)  # the endpoint answers all the same
REPORT = int(sys.argv[1])
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if os.fork() == 0:
        asyncio.run(echo(line.strip()))
        os._exit(0)
"""


class EchoingPeers:
    """Processes that send back what they get: forked from one that has imported what they need."""

    def __init__(self):
        read, write = os.pipe()
        self._template = subprocess.Popen(
            [sys.executable, "-c", TEMPLATE, str(write)],
            pass_fds=[write],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        os.close(write)
        self._reports = os.fdopen(read)
        self._turn = threading.Lock()

    def start(self, back):
        """The process id and the ticket of a peer that answers to the ticket `back`."""
        with self._turn:
            self._template.stdin.write(f"{back}\n")
            self._template.stdin.flush()
            pid, ticket = self._reports.readline().split()
        return int(pid), ticket

    def close(self):
        self._template.stdin.close()
        self._template.wait()
        self._reports.close()


@pytest.fixture(scope="module")
def peers():
    peers = EchoingPeers()
    yield peers
    peers.close()


@contextlib.asynccontextmanager
async def echo(peers):
    """An endpoint, the outlet to an echoing peer, the inbox for its answers, and the peer's process id."""
    async with IrohEndpoint.open() as endpoint:
        inbox = endpoint.open_inbox("back", KEY)
        pid, ticket = await asyncio.to_thread(peers.start, endpoint.ticket)
        try:
            outlet = endpoint.open_outlet(ticket, "there", KEY)
            await outlet.send(0, np.zeros(576, np.float32))
            assert (await inbox.receive(10)).sequence == 0
            yield endpoint, outlet, inbox, pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def send_until_it_fails(outlet):
    number = 0
    while True:
        number += 1
        await outlet.send(number, np.zeros(576, np.float32), 10)


async def notice(peers, how, busy, ready, pauses):
    async with echo(peers) as (endpoint, outlet, inbox, pid):
        seen = []
        endpoint.on_peer_lost(seen.append)
        await ready.wait()  # what the start of the others takes is not counted
        await asyncio.sleep(1.2)
        assert not seen
        os.kill(pid, how)
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


async def test_a_peer_that_dies_is_noticed_within_three_seconds_sending_or_not(peers):
    deaths = [(how, busy) for how in (signal.SIGKILL, signal.SIGSTOP) for busy in (True, False)]
    ready = asyncio.Barrier(len(deaths))
    async with OwnPauses.watched() as pauses, asyncio.TaskGroup() as tasks:
        for how, busy in deaths:
            tasks.create_task(notice(peers, how, busy, ready, pauses))


async def test_a_short_pause_of_the_peer_is_survived(peers):
    async with echo(peers) as (endpoint, outlet, inbox, pid):
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.0)
        for number in range(1, 10):
            await outlet.send(number, np.zeros(576, np.float32))
        os.kill(pid, signal.SIGCONT)
        assert [(await inbox.receive(10)).sequence for _ in range(9)] == list(range(1, 10))
        assert endpoint.stats().counters.peers_lost == 0


async def test_a_lost_peer_that_comes_back_can_be_reached_again(peers):
    async with echo(peers) as (endpoint, outlet, _, pid):
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(PeerLostError):
            await send_until_it_fails(outlet)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(TransportError, match="no tensor registered"):
            await endpoint.pulls.pull(outlet.ticket, "there", KEY, "nothing", 10)
