import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgpack
import msgspec
import pytest

from node.rpc import Call, Command, RpcServer
from protocol.client import Client, call_address
from protocol.commands.common import Params, Result
from protocol.commands.nodes import CancelParams, CancelResult
from protocol.errors import (
    InsufficientDiskError,
    InvalidParamsError,
    MalformedMessageError,
    MessageTooLargeError,
    TimedOutError,
    UnknownCommandError,
    UnreachableError,
)
from protocol.ids import NodeId
from protocol.msgpackrpc import SERVER_LIMITS
from protocol.sync_client import SyncClient
from tests.support.waiting import eventually

NODE = NodeId("ab" * 32)


class WaitParams(Params, frozen=True, kw_only=True):
    seconds: float = 0.0
    label: str = ""
    key: bytes = b""


class WaitResult(Result, frozen=True, kw_only=True):
    label: str
    key: bytes


class Node:
    """A server whose requests leave a trace."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self.connections: list[Any] = []
        self.started = asyncio.Event()
        commands = {
            "WAIT": Command(WaitParams, self.wait),
            "DISK": Command(WaitParams, self.disk),
            "CANCEL": Command(CancelParams, self.cancel),
        }
        self.server = RpcServer(commands, NODE)

    async def wait(self, params: WaitParams, call: Call) -> WaitResult:
        self.connections.append(call.connection)
        self.started.set()
        call.notify("PROGRESS", {"request_id": call.request_id, "label": params.label})
        call.notify("SESSION_TOKEN", {"session": "s", "label": params.label})
        try:
            await asyncio.sleep(params.seconds)
        except asyncio.CancelledError:
            self.cancelled.append(params.label)
            raise
        return WaitResult(label=params.label, key=params.key)

    async def disk(self, params: WaitParams, call: Call) -> None:
        raise InsufficientDiskError("no room", {"free": 1})

    async def cancel(self, params: CancelParams, call: Call) -> CancelResult:
        return CancelResult(request_id=params.request_id, cancelled=self.server.cancel(params.request_id))

    @property
    def port(self) -> int:
        return self.server.port


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    found = Node()
    async with found.server.serve():
        yield found


@pytest.fixture
async def client(node: Node) -> AsyncIterator[Client]:
    async with Client.connect("127.0.0.1", node.port) as found:
        yield found


async def test_many_calls_at_once_each_get_their_own_answer(client: Client) -> None:
    async def one(n: int) -> bool:
        params = WaitParams(label=f"{n}", seconds=(n * 7 % 10) / 50, key=bytes([n]))
        answer = await client.call("WAIT", params, result_type=WaitResult)
        return answer == WaitResult(label=f"{n}", key=bytes([n]))

    assert all(await asyncio.gather(*(one(n) for n in range(100))))
    assert client._calls == {}


async def test_notifications_go_to_their_call_and_others_to_handlers(client: Client) -> None:
    heard: dict[str, list[str]] = {"a": [], "b": [], "tokens": [], "progress": []}
    client.on("SESSION_TOKEN", lambda method, params: heard["tokens"].append(params["label"]))
    client.on("PROGRESS", lambda method, params: heard["progress"].append(params["label"]))
    await asyncio.gather(
        client.call("WAIT", {"label": "a"}, on_notification=lambda method, params: heard["a"].append(params["label"])),
        client.call("WAIT", {"label": "b"}, on_notification=lambda method, params: heard["b"].append(params["label"])),
        client.call("WAIT", {"label": "c"}),
    )
    assert heard == {"a": ["a"], "b": ["b"], "tokens": ["a", "b", "c"], "progress": ["c"]}
    assert client._callbacks == {}


async def test_a_failing_callback_does_not_end_the_connection(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    def fail(method: str, params: dict[str, Any]) -> None:
        raise ZeroDivisionError

    assert (await client.call("WAIT", {"label": "a"}, on_notification=fail))["label"] == "a"
    assert "callback" in caplog.text


async def test_errors_arrive_as_their_class(client: Client) -> None:
    with pytest.raises(InsufficientDiskError, match="no room") as caught:
        await client.call("DISK")
    assert caught.value.details == {"free": 1}
    with pytest.raises(UnknownCommandError):
        await client.call("NONSENSE")


async def test_an_answer_of_another_type_is_malformed(client: Client) -> None:
    class Other(msgspec.Struct):
        missing: int

    with pytest.raises(MalformedMessageError, match="not of type Other"):
        await client.call("WAIT", result_type=Other)


async def test_a_cancelled_call_is_cancelled_on_the_node(node: Node, client: Client) -> None:
    waiting = asyncio.create_task(client.call("WAIT", {"seconds": 30, "label": "a"}))
    await node.started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await eventually(lambda: node.cancelled == ["a"])
    assert (await client.call("WAIT", {"label": "b"}))["label"] == "b"


async def test_a_call_that_runs_out_of_time_is_cancelled_on_the_node(node: Node, client: Client) -> None:
    with pytest.raises(TimedOutError, match=r"WAIT within 0\.1 s"):
        await client.call("WAIT", {"seconds": 30, "label": "a"}, timeout_s=0.1)
    await eventually(lambda: node.cancelled == ["a"])
    assert (await client.call("WAIT", {"label": "b"}))["label"] == "b"


async def test_a_lost_connection_ends_every_call(node: Node, client: Client) -> None:
    waits = [asyncio.create_task(client.call("WAIT", {"seconds": 30})) for _ in range(3)]
    await eventually(lambda: len(node.connections) == 3)
    node.connections[0]._close()
    answers = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(answer) for answer in answers] == [UnreachableError] * 3
    assert len({id(answer) for answer in answers}) == 3
    await asyncio.wait_for(client.closed.wait(), 5)
    with pytest.raises(UnreachableError):
        await client.call("WAIT")


async def test_leaving_the_client_ends_its_calls_and_the_nodes(node: Node) -> None:
    async with Client.connect("127.0.0.1", node.port) as client:
        waiting = asyncio.create_task(client.call("WAIT", {"seconds": 30, "label": "a"}))
        await node.started.wait()
    with pytest.raises(UnreachableError, match="closed here"):
        await waiting
    await eventually(lambda: node.cancelled == ["a"])


async def test_an_error_in_the_body_comes_through_as_it_is(node: Node) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Client.connect("127.0.0.1", node.port):
            raise ZeroDivisionError


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 1), ("127.0.0.1", 70_000), ("\ud800", 1), ("a" * 300, 1)])
async def test_nobody_there(host: str, port: int) -> None:
    with pytest.raises(UnreachableError):
        async with Client.connect(host, port, timeout_s=5):
            pass
    with pytest.raises(UnreachableError):
        SyncClient(host, port, timeout_s=5)


async def test_what_cannot_be_sent_is_refused_here_and_the_connection_goes_on(client: Client) -> None:
    with pytest.raises(InvalidParamsError, match="object"):
        await client.call("WAIT", {"label": object()})
    with pytest.raises(InvalidParamsError):
        await client.call("WAIT", {"label": "\ud800"})
    with pytest.raises(MessageTooLargeError):
        await client.call("WAIT", {"label": "x" * SERVER_LIMITS.max_message_bytes})
    assert (await client.call("WAIT", {"label": "b"}))["label"] == "b"


async def test_call_address(node: Node) -> None:
    answer = await call_address("127.0.0.1", node.port, "WAIT", {"label": "x"}, result_type=WaitResult, recipient=NODE)
    assert answer.label == "x"


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[int]:
    """A server that sends these bytes to whoever sent it something, and then waits for the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve() -> None:
            for answer in answers:
                with listener.accept()[0] as sock:
                    sock.settimeout(20)
                    sock.recv(65536)
                    sock.sendall(answer)
                    with contextlib.suppress(OSError):
                        while answer and sock.recv(65536):
                            pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(timeout=20)
            assert not thread.is_alive()


BAD_ANSWERS = [
    (b"", UnreachableError),
    (b"\xc1", MalformedMessageError),
    (b"HTTP/1.1 400 Bad Request\r\n", MalformedMessageError),
    (msgpack.packb([1, 1]), MalformedMessageError),
    (b"\x94\x01\x01\xc0\xdd\xff\xff\xff\xff", MessageTooLargeError),
    (msgpack.packb([1, None, {"code": "message_too_large", "message": "m"}, None]), MessageTooLargeError),
]


@pytest.mark.parametrize(("answer", "error"), BAD_ANSWERS)
async def test_a_bad_server_ends_the_call(answer: bytes, error: type[Exception]) -> None:
    with answering(answer, answer) as port:
        async with Client.connect("127.0.0.1", port) as client:
            with pytest.raises(error):
                await client.call("WAIT", timeout_s=10)
            with pytest.raises(error):
                await client.call("WAIT", timeout_s=10)

        def sync() -> None:
            with SyncClient("127.0.0.1", port) as sync_client:
                with pytest.raises(error):
                    sync_client.call("WAIT", timeout_s=10)
                with pytest.raises(error):
                    sync_client.call("WAIT", timeout_s=10)

        await asyncio.to_thread(sync)


async def test_answers_to_no_call_and_requests_are_ignored() -> None:
    stray = [
        [1, 99, None, 1],
        [0, 5, "WAIT", []],
        [2, "NEVER_HEARD", []],
        [2, "X", [{"request_id": "r"}]],
        [2, "X", [3]],
    ]
    with answering(b"".join(msgpack.packb(m) for m in [*stray, [1, 1, None, "yes"], [1, 1, None, "again"]])) as port:
        async with Client.connect("127.0.0.1", port) as client:
            assert await client.call("WAIT", timeout_s=10) == "yes"


async def test_the_sync_client(node: Node) -> None:
    def use() -> None:
        heard: list[tuple[str, str]] = []
        tokens: list[str] = []
        with SyncClient("127.0.0.1", node.port) as client:
            client.on("SESSION_TOKEN", lambda method, params: tokens.append(params["label"]))
            answer = client.call(
                "WAIT",
                WaitParams(label="a", key=b"\xff"),
                result_type=WaitResult,
                recipient=NODE,
                request_id="r-1",
                on_notification=lambda method, params: heard.append((method, params["request_id"])),
            )
            assert answer == WaitResult(label="a", key=b"\xff")
            assert heard == [("PROGRESS", "r-1")]
            assert tokens == ["a"]
            with pytest.raises(InsufficientDiskError):
                client.call("DISK")
            with pytest.raises(TimedOutError):
                client.call("WAIT", {"seconds": 30, "label": "late"}, timeout_s=0.1)
            assert client.call("WAIT", {"label": "b"})["label"] == "b"
            with pytest.raises(MessageTooLargeError):
                client.call("WAIT", {"label": "x" * SERVER_LIMITS.max_message_bytes})
            assert client.call("WAIT", {"label": "y" * 1_000_000})["label"] == "y" * 1_000_000
        with pytest.raises(UnreachableError, match="closed here"):
            client.call("WAIT")

    await asyncio.to_thread(use)
    assert node.cancelled == ["late"]


async def test_a_sync_call_that_its_callback_ends_is_cancelled_on_the_node(node: Node) -> None:
    def interrupt(method: str, params: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    def use() -> None:
        with SyncClient("127.0.0.1", node.port) as client:
            with pytest.raises(KeyboardInterrupt):
                client.call("WAIT", {"seconds": 30, "label": "a"}, on_notification=interrupt)
            assert client.call("WAIT", {"label": "b"})["label"] == "b"

    await asyncio.to_thread(use)
    assert node.cancelled == ["a"]
