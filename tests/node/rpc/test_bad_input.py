"""Hostile bytes against a server in a process of its own: it goes on, and its memory stays bounded."""

import contextlib
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgpack
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import ShoalError
from protocol.msgpackrpc import MIB, Request, encode
from protocol.sync_client import SyncClient

HEAD = b"\x94\x00\x07\xa3RAW\x91"
"""Of a request with msgid 7, up to the first parameter."""


class Server(NamedTuple):
    process: psutil.Process
    port: int

    def rss(self) -> int:
        return int(self.process.memory_info().rss)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def answers(self) -> bool:
        with SyncClient("127.0.0.1", self.port) as client:
            return bool(client.call("ECHO", {"text": "still here"}, timeout_s=20)["text"] == "still here")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, root / "tests" / "support" / "rpc_child.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        yield Server(psutil.Process(child.pid), int(child.stdout.readline()))
        assert child.poll() is None
    finally:
        child.stdin.close()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


def announced(tag: int, length: int) -> bytes:
    return bytes([tag]) + length.to_bytes(4)


ATTACKS: dict[str, Callable[[], bytes]] = {
    # What a decoder that makes an array when it is announced would take: 60 times 65,000 times 8 bytes a connection.
    "nested arrays of many": lambda: HEAD + announced(0xDD, 65_000) * 60,
    "nested arrays within the bound": lambda: HEAD + announced(0xDD, 1_000) * 60,
    "nested maps": lambda: HEAD + (announced(0xDF, 500) + b"\xa1k") * 60,
    "deep": lambda: HEAD + b"\x91" * (2 * MIB),
    "4 GiB of bin": lambda: HEAD + announced(0xC6, (1 << 32) - 1) + bytes(2 * MIB),
    "5 GB in two": lambda: HEAD + b"\x92" + announced(0xC6, 2_500_000_000) * 2,
    "as much as is taken, never finished": lambda: HEAD + announced(0xC6, 8 * MIB - 100) + bytes(7 * MIB),
    "much, then refused": lambda: HEAD + announced(0xDD, 2) + announced(0xC6, 7 * MIB) + bytes(7 * MIB) + b"\xc1",
    "many empty maps": lambda: HEAD + announced(0xDD, 65_000) + b"\x80" * 64_999,
    "no messagepack": lambda: b"GET / HTTP/1.1\r\n" * 100_000,
    "whole messages, no rpc": lambda: b"\x90" * 20_000,
}
BOUND_MIB = {"as much as is taken, never finished": 128, "much, then refused": 128}
"""For all connections together; 64 MiB of half-received requests is what the settings allow. The others need a few."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_memory_stays_bounded(server: Server, attack: str) -> None:
    assert server.answers()
    before, highest = server.rss(), 0
    data = ATTACKS[attack]()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(server.connect()) for _ in range(24)]
        for sock in sockets:
            sock.settimeout(0.2)
            with contextlib.suppress(OSError):
                sock.sendall(data)
            highest = max(highest, server.rss())
        assert server.answers()
        highest = max(highest, server.rss())
    assert highest - before < BOUND_MIB.get(attack, 32) * MIB
    assert server.answers()
    gc.collect()


def test_a_peer_that_writes_all_before_it_reads_gets_the_error(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(HEAD + announced(0xC6, 1 << 30) + bytes(12 * MIB))
        unpacker = msgpack.Unpacker()
        while data := sock.recv(65536):
            unpacker.feed(data)
        [answer] = unpacker
    assert answer[1] == 7
    assert answer[2]["code"] == "message_too_large"


def test_a_batch_of_valid_large_requests_stays_bounded(server: Server) -> None:
    before, highest = server.rss(), 0
    request = encode(Request(7, "RAW", [{"list": [{}] * 60_000}]))
    for _ in range(3):
        with server.connect() as sock:
            sock.sendall(request * 10)
            unpacker = msgpack.Unpacker(max_buffer_size=100 * MIB)
            found = 0
            while found < 10:
                data = sock.recv(1 << 20)
                assert data
                unpacker.feed(data)
                found += sum(1 for _ in unpacker)
                highest = max(highest, server.rss())
    assert highest - before < 150 * MIB


KEYS = st.text(max_size=8) | st.binary(max_size=8) | st.integers(0, 5)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5),
)
NAMES = st.sampled_from(["text", b"text", "number", "messages", "options"])
REQUESTS = st.tuples(
    st.just(0),
    st.integers(0, 9),
    st.sampled_from(["ECHO", b"ECHO", "RAW", "X"]) | VALUES,
    st.lists(st.dictionaries(NAMES, VALUES, max_size=3) | VALUES, max_size=3) | VALUES,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=REQUESTS | VALUES, cut=st.integers(0, 60), junk=st.binary(max_size=10))
def test_any_value_gets_an_answer_or_an_end_and_the_server_goes_on(
    server: Server, value: object, cut: int, junk: bytes
) -> None:
    packed = msgpack.packb(value)
    with server.connect() as sock:
        sock.sendall(packed + encode(Request(99, "ECHO", [])))
        unpacker = msgpack.Unpacker()
        messages: list[list[object]] = []
        while not any(message[1] == 99 for message in messages):
            data = sock.recv(65536)
            if not data:
                break
            unpacker.feed(data)
            messages += list(unpacker)
        assert messages
        for message in messages:
            assert message[0] == 1
            if isinstance(message[2], dict):
                assert message[2]["code"] in {
                    "malformed_message",
                    "message_too_large",
                    "unknown_command",
                    "invalid_params",
                    "wrong_node",
                }
            else:
                assert message[2] is None
    with server.connect() as sock:
        sock.sendall(packed[:cut] + junk)


def test_it_still_answers(server: Server) -> None:
    assert server.answers()
    with SyncClient("127.0.0.1", server.port) as client:
        with pytest.raises(ShoalError) as caught:
            client.call("ECHO", {"nonsense": 1})
        assert caught.value.code == "invalid_params"
