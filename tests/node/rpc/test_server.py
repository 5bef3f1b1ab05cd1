import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgpack
import msgspec
import pytest

from node.clock import Clock
from node.rpc import Call, Command, RpcServer, RpcSettings
from protocol.client import Client
from protocol.commands.common import ChatMessage, Params, Result
from protocol.commands.nodes import CancelParams, CancelResult
from protocol.errors import (
    BusyError,
    CancelledRequestError,
    InternalError,
    InvalidParamsError,
    MessageTooLargeError,
    ShardNotFoundError,
    UnknownCommandError,
    UnreachableError,
    WrongNodeError,
)
from protocol.ids import NodeId
from protocol.msgpackrpc import CLIENT_LIMITS, Limits
from tests.support.clocks import MovedClock
from tests.support.waiting import eventually

NODE = NodeId("ab" * 32)
ERRORS = {
    "shard": ShardNotFoundError("there is no shard 9", {"shards": 3}),
    "bug": ZeroDivisionError("a secret"),
    "unpackable": InvalidParamsError("odd details", {"object": object()}),
}


class WaitParams(Params, frozen=True, kw_only=True):
    seconds: float = 0.0
    label: str = ""


class WaitResult(Result, frozen=True, kw_only=True):
    label: str


class FillParams(Params, frozen=True, kw_only=True):
    count: int = 1
    size: int = 0


class ChatParams(Params, frozen=True, kw_only=True):
    messages: tuple[ChatMessage, ...] = ()
    stop: tuple[str, ...] = ()
    key: bytes = b""
    options: dict[str, int] = msgspec.field(default_factory=dict)


class FailParams(Params, frozen=True, kw_only=True):
    how: str


class Peer:
    """A peer that speaks raw bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._unpacker = msgpack.Unpacker()

    def send(self, *values: Any) -> None:
        self.send_bytes(b"".join(msgpack.packb(value) for value in values))

    def send_bytes(self, data: bytes) -> None:
        self._writer.write(data)

    async def receive(self) -> Any:
        """One message, or None at the end."""
        while True:
            for message in self._unpacker:
                return message
            if not (data := await self._reader.read(65536)):
                return None
            self._unpacker.feed(data)

    async def ask(self, *value: Any) -> Any:
        self.send(list(value))
        return await self.receive()

    def pause_reading(self) -> None:
        """Leave everything unread, beyond the socket's buffers."""
        self._reader._transport.pause_reading()  # type: ignore[attr-defined]

    def close(self) -> None:
        self._writer.transport.abort()


class Node:
    """A server with commands that show what it does."""

    def __init__(self, settings: RpcSettings, clock: Clock | None = None) -> None:
        self.ended: list[str] = []
        self.started = asyncio.Event()
        self.closed_connections = 0
        commands = {
            "WAIT": Command(WaitParams, self.wait),
            "FILL": Command(FillParams, self.fill),
            "CHAT": Command(ChatParams, self.chat),
            "FAIL": Command(FailParams, self.fail),
            "FLOOD": Command(FillParams, self.flood),
            "RAW": Command(None, self.raw),
            "STUBBORN": Command(WaitParams, self.stubborn),
            "CANCEL": Command(CancelParams, self.cancel),
        }
        self.server = RpcServer(commands, NODE, settings, clock=clock)
        self.port = 0

    async def wait(self, params: WaitParams, call: Call) -> WaitResult:
        self.started.set()
        try:
            call.notify("PROGRESS", {"request_id": call.request_id, "label": params.label})
            await asyncio.sleep(params.seconds)
        finally:
            self.ended.append(params.label)
        return WaitResult(label=params.label)

    async def fill(self, params: FillParams, call: Call) -> dict[str, Any]:
        return {"data": bytes(params.size)}

    async def flood(self, params: FillParams, call: Call) -> None:
        def count() -> None:
            self.closed_connections += 1

        call.connection.on_close(count)
        call.connection.on_close(count)()  # forgotten again
        for _ in range(params.count):
            call.notify("PROGRESS", {"request_id": call.request_id, "data": bytes(params.size)})
            await asyncio.sleep(0)

    async def chat(self, params: ChatParams, call: Call) -> ChatParams:
        return params

    async def fail(self, params: FailParams, call: Call) -> object:
        if params.how in ERRORS:
            raise ERRORS[params.how]
        return object()

    async def raw(self, params: dict[str, Any], call: Call) -> dict[str, Any]:
        return {"params": params, "sender": call.sender}

    async def stubborn(self, params: WaitParams, call: Call) -> None:
        self.started.set()
        end = asyncio.get_running_loop().time() + params.seconds
        while (left := end - asyncio.get_running_loop().time()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(left)

    async def cancel(self, params: CancelParams, call: Call) -> CancelResult:
        return CancelResult(request_id=params.request_id, cancelled=self.server.cancel(params.request_id))

    @contextlib.asynccontextmanager
    async def peer(self) -> AsyncIterator[Peer]:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            yield peer
        finally:
            peer.close()

    def client(self) -> contextlib.AbstractAsyncContextManager[Client]:
        return Client.connect("127.0.0.1", self.port)


@contextlib.asynccontextmanager
async def serving(clock: Clock | None = None, **settings: Any) -> AsyncIterator[Node]:
    node = Node(replace(RpcSettings(linger_s=0.5), **settings), clock)
    async with node.server.serve() as server:
        node.port = server.port
        yield node
    assert (node.server.requests.held_bytes, node.server.requests.incoming_bytes) == (0, 0)
    assert node.server.connections == 0


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with serving() as found:
        yield found


async def test_answers_come_as_they_finish(node: Node) -> None:
    async with node.peer() as peer:
        waits = [("slow", 0.2), ("middle", 0.1), ("fast", 0.0)]
        peer.send(*([0, msgid, "WAIT", [{"label": label, "seconds": s}]] for msgid, (label, s) in enumerate(waits)))
        messages = [await peer.receive() for _ in range(6)]
    assert [m[2][0]["label"] for m in messages if m[0] == 2] == ["slow", "middle", "fast"]
    assert [m for m in messages if m[0] == 1] == [
        [1, 2, None, {"label": "fast"}],
        [1, 1, None, {"label": "middle"}],
        [1, 0, None, {"label": "slow"}],
    ]


async def test_names_and_texts_as_bin_at_any_depth(node: Node) -> None:
    params = {
        b"messages": [{b"role": b"user", "content": b"h\xc3\xa9"}],
        b"stop": [b"x"],
        b"key": b"\xff",
        b"options": {b"a": 1},
    }
    expected = {"messages": [{"role": "user", "content": "hé"}], "stop": ["x"], "key": b"\xff", "options": {"a": 1}}
    envelope = {b"request_id": b"r-1", b"to": NODE.encode(), b"from": b"me"}
    async with node.peer() as peer:
        assert await peer.ask(0, 1, b"CHAT", [params, envelope]) == [1, 1, None, expected]
        # MessagePack before 2013: raw, that is fixstr, raw16 and raw32, for text and bytes alike.
        peer.send_bytes(msgpack.packb([0, 2, b"CHAT", [{b"stop": [b"y" * 300]}]], use_bin_type=False))
        assert (await peer.receive())[3]["stop"] == ["y" * 300]
        assert await peer.ask(0, 3, "RAW", [{b"a": b"b"}, envelope]) == [
            1,
            3,
            None,
            {"params": {"a": b"b"}, "sender": "me"},
        ]


@pytest.mark.parametrize(
    ("method", "params", "code", "said"),
    [
        ("NONSENSE", [{}], "unknown_command", "details.commands"),
        ("x" * 10_000, [{}], "unknown_command", "details.commands"),
        ("WAIT", [{"seconds": "1"}], "invalid_params", "seconds"),
        ("WAIT", [{"seconds": [[[]]]}], "invalid_params", "seconds"),
        ("WAIT", [{"second": 1}], "invalid_params", "the parameters are: seconds, label"),
        ("WAIT", [{"label": b"\xff"}], "invalid_params", "UTF-8"),
        ("WAIT", [{b"\xff": 1}], "invalid_params", "UTF-8"),
        ("WAIT", [{"label": msgpack.ExtType(5, b"x")}], "invalid_params", "label"),
        ("WAIT", [{"label": msgpack.Timestamp(1)}], "invalid_params", "label"),
        ("WAIT", [3], "invalid_params", "map"),
        ("WAIT", ["seconds"], "invalid_params", "map"),
        ("WAIT", [[]], "invalid_params", "map"),
        ("RAW", [[]], "invalid_params", "map"),
        ("WAIT", [{}, 3], "invalid_params", "map"),
        ("WAIT", [{}, {"to": 3}], "invalid_params", "to"),
        ("WAIT", [{}, {"request_id": ""}], "invalid_params", "request_id"),
        ("WAIT", [{}, {"request_id": "x" * 129}], "invalid_params", "request_id"),
        ("WAIT", [{}, {}, 1], "invalid_params", "envelope"),
        ("CHAT", [{"messages": [{"role": "user"}]}], "invalid_params", "content"),
        ("FAIL", [{}], "invalid_params", "how"),
        ("WAIT", {}, "malformed_message", "method, params"),
        ("WAIT", None, "malformed_message", "method, params"),
        ("WAIT", [{1: 2}], "malformed_message", "decoded"),
    ],
)
async def test_a_bad_request_is_answered_and_the_connection_goes_on(
    node: Node, method: str, params: Any, code: str, said: str
) -> None:
    async with node.peer() as peer:
        kind, msgid, error, result = await peer.ask(0, 77, method, params)
        assert (kind, msgid, error["code"], result) == (1, 77, code, None)
        assert said in error["message"]
        assert set(error) == {"code", "message", "retryable", "details"}
        assert len(error["message"]) < 1000
        assert await peer.ask(0, 78, "FILL", [{}]) == [1, 78, None, {"data": b""}]


@pytest.mark.parametrize("params", [[], [None], [{}], [None, None], [{}, None], [{}, {}], [{}, {"later": 1}]])
async def test_params_and_envelope_may_be_left_out(node: Node, params: list[Any]) -> None:
    async with node.peer() as peer:
        assert await peer.ask(0, 1, "FILL", params) == [1, 1, None, {"data": b""}]


async def test_notifications_from_clients_are_dropped(node: Node) -> None:
    async with node.peer() as peer:
        peer.send([2, "NEVER_HEARD", [{}]], [2, b"\xff", []], [2, "WAIT", [{"label": "notified"}]], [1, 5, None, 1])
        assert await peer.ask(0, 1, "FILL", [{}]) == [1, 1, None, {"data": b""}]
    assert node.ended == []


@pytest.mark.parametrize("message", [[], [0], [9, 1], [2, 3, []], [1, "x", None, None], [[[]]]])
async def test_whole_messages_that_are_no_rpc_keep_the_connection(node: Node, message: list[Any]) -> None:
    async with node.peer() as peer:
        kind, msgid, error, _ = await peer.ask(*message)
        assert (kind, msgid, error["code"]) == (1, None, "malformed_message")
        assert await peer.ask(0, 1, "FILL", [{}]) == [1, 1, None, {"data": b""}]


async def test_an_endless_row_of_whole_messages_that_are_no_rpc_is_ended(node: Node) -> None:
    async with node.peer() as peer:
        peer.send_bytes(b"\x90" * 10_000)
        answers = 0
        while (answer := await peer.receive()) is not None:
            assert answer[2]["code"] == "malformed_message"
            answers += 1
        assert answers == 101


@pytest.mark.parametrize(
    ("data", "msgid", "code"),
    [
        (b"\xc1", None, "malformed_message"),
        (b"GET / HTTP/1.1\r\nHost: node\r\n\r\n", None, "malformed_message"),
        (b"\x94\x00\x07\xa4WAIT\x91\xc1", 7, "malformed_message"),
        (b"\x94\x00\x07\xa4WAIT\x91\xc6\xff\xff\xff\xff" + b"x" * 6_000_000, 7, "message_too_large"),
        (b"\x94\x00\x07\xa4WAIT\x91\xdd\xff\xff\xff\xff", 7, "message_too_large"),
        (b"\x94\x00\x07\xa4WAIT\x91" + b"\x91" * 300_000, 7, "message_too_large"),
        (b"\xdd\x7f\xff\xff\xff" * 100, None, "message_too_large"),
    ],
)
async def test_bytes_without_end_or_sense_are_answered_and_the_connection_closed(
    node: Node, data: bytes, msgid: int | None, code: str
) -> None:
    async with node.peer() as other, node.peer() as peer:
        peer.send_bytes(data)
        kind, found, error, _ = await peer.receive()
        assert (kind, found, error["code"]) == (1, msgid, code)
        assert await peer.receive() is None
        assert await other.ask(0, 1, "FILL", [{}]) == [1, 1, None, {"data": b""}]


async def test_nonsense_ends_what_is_in_progress_on_its_connection(node: Node) -> None:
    async with node.peer() as peer:
        peer.send([0, 1, "WAIT", [{"label": "first", "seconds": 5}]])
        await peer.receive()
        peer.send_bytes(b"\xc1")
        assert (await peer.receive())[2]["code"] == "malformed_message"
        await eventually(lambda: node.ended == ["first"])
        assert await peer.receive() is None


async def test_a_request_for_another_node_is_refused(node: Node) -> None:
    async with node.client() as client:
        with pytest.raises(WrongNodeError) as caught:
            await client.call("FILL", recipient="cd" * 32)
        assert caught.value.details == {"node_id": NODE}
        assert await client.call("FILL", recipient=NODE) == {"data": b""}


@pytest.mark.parametrize("same_connection", [True, False])
async def test_cancel_ends_a_request_of_any_connection(node: Node, same_connection: bool) -> None:
    async with node.client() as client, node.client() as other:
        waiting = asyncio.create_task(client.call("WAIT", {"seconds": 30, "label": "a"}, request_id="mine"))
        await node.started.wait()
        by = client if same_connection else other
        assert await by.call("CANCEL", {"request_id": "mine"}) == {"request_id": "mine", "cancelled": True}
        with pytest.raises(CancelledRequestError) as caught:
            await waiting
        assert caught.value.details == {"request_id": "mine"}
        assert node.ended == ["a"]
        assert await by.call("CANCEL", {"request_id": "mine"}) == {"request_id": "mine", "cancelled": False}
        assert await client.call("FILL") == {"data": b""}


async def test_cancel_does_not_end_itself(node: Node) -> None:
    async with node.client() as client:
        answer = await client.call("CANCEL", {"request_id": "same"}, request_id="same")
        assert answer == {"request_id": "same", "cancelled": False}


async def test_requests_end_with_their_connection(node: Node) -> None:
    async with node.peer() as peer:
        peer.send([0, 1, "WAIT", [{"label": "a", "seconds": 30}]], [0, 2, "WAIT", [{"label": "b", "seconds": 30}]])
        await peer.receive()
    await eventually(lambda: sorted(node.ended) == ["a", "b"])
    await eventually(lambda: node.server.connections == 0 and node.server.requests.held_bytes == 0)


async def test_too_many_requests_on_a_connection_are_busy_but_cancel_goes_through() -> None:
    async with serving(max_in_flight=3) as node, node.client() as client, node.client() as other:
        waits = [asyncio.create_task(client.call("WAIT", {"seconds": 30}, request_id=f"r{n}")) for n in range(3)]
        await eventually(lambda: node.server.requests.held_bytes and len(node.server.requests) == 3)
        with pytest.raises(BusyError) as caught:
            await client.call("FILL")
        assert caught.value.retryable
        assert await other.call("FILL") == {"data": b""}
        assert (await client.call("CANCEL", {"request_id": "r1"}))["cancelled"]
        with pytest.raises(CancelledRequestError):
            await waits[1]
        assert await client.call("FILL") == {"data": b""}
        for wait in waits:
            wait.cancel()
        await asyncio.wait(waits)


async def test_an_error_keeps_its_code_and_details(node: Node) -> None:
    async with node.client() as client:
        with pytest.raises(ShardNotFoundError, match="no shard 9") as caught:
            await client.call("FAIL", {"how": "shard"})
        assert caught.value.details == {"shards": 3}


async def test_a_bug_is_logged_once_and_not_told(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    async with node.peer() as peer:
        _, _, error, _ = await peer.ask(0, 1, "FAIL", [{"how": "bug"}, {"request_id": "r-9"}])
        assert error["code"] == "internal"
        assert error["details"] == {"request_id": "r-9"}
        assert not any(word in str(error) for word in ("ZeroDivision", "secret", "Traceback", ".py"))
        records = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(records) == 1
        assert "r-9" in records[0].message
        assert records[0].exc_info


@pytest.mark.parametrize(("how", "error"), [("object", InternalError), ("unpackable", InvalidParamsError)])
async def test_what_cannot_be_packed_is_still_answered(node: Node, how: str, error: type[Exception]) -> None:
    async with node.client() as client:
        with pytest.raises(error):
            await client.call("FAIL", {"how": how})
        assert await client.call("FILL") == {"data": b""}


async def test_an_answer_above_what_clients_take_is_an_error(node: Node) -> None:
    async with node.client() as client:
        with pytest.raises(MessageTooLargeError, match="ask for less"):
            await client.call("FILL", {"size": CLIENT_LIMITS.max_message_bytes})
        assert len((await client.call("FILL", {"size": 20_000_000}))["data"]) == 20_000_000


async def test_a_peer_that_reads_no_notifications_loses_its_connection() -> None:
    async with serving(max_unsent_bytes=1_000_000) as node, node.client() as other, node.peer() as peer:
        peer.pause_reading()
        peer.send([0, 1, "FLOOD", [{"size": 50_000, "count": 1_000_000}]])
        await eventually(lambda: node.closed_connections)
        await eventually(lambda: node.server.connections == 1)
        assert node.closed_connections == 1
        assert await other.call("FILL") == {"data": b""}


async def test_a_peer_that_reads_slowly_gets_every_notification(node: Node) -> None:
    async with node.peer() as peer:
        peer.send([0, 1, "FLOOD", [{"size": 5_000, "count": 200}]])
        kinds = []
        while not kinds or kinds[-1] != 1:
            kinds.append((await peer.receive())[0])
            await asyncio.sleep(0.001)
        assert kinds == [2] * 200 + [1]


async def test_a_peer_that_reads_no_answers_loses_its_connection() -> None:
    clock = MovedClock()
    async with serving(clock) as node, node.client() as other, node.peer() as peer:
        peer.pause_reading()
        peer.send(*([0, msgid, "FILL", [{"size": 2_000_000}]] for msgid in range(200)))
        await eventually(lambda: len(node.server.requests) > 50)
        [connection] = [c for c in node.server._connections.values() if c._calls]
        # One answer is packed at a time: the others wait as the values they are.
        assert connection._writer.transport.get_write_buffer_size() < 4_100_000
        assert await other.call("FILL") == {"data": b""}
        assert node.server.connections == 2
        # The first time-out finds that bytes have left since the answer was written.
        await clock.move_until(lambda: node.server.connections == 1, 2.1 * RpcSettings().stall_s)


async def test_a_large_answer_over_a_slow_reader_is_not_a_stall() -> None:
    clock = MovedClock()
    async with serving(clock) as node, node.peer() as peer:
        peer.send([0, 1, "FILL", [{"size": 20_000_000}]])
        received = 0
        while received < 20_000_000:
            data = await peer._reader.read(400_000)
            assert data
            received += len(data)
            await clock.move(RpcSettings().stall_s / 20)
        assert clock.now() > 1000 + 2 * RpcSettings().stall_s


async def test_a_message_that_does_not_go_on_ends_its_connection() -> None:
    clock = MovedClock()
    async with serving(clock, linger_s=0.01) as node, node.peer() as idle, node.peer() as peer:
        peer.send_bytes(b"\x94\x00\x07\xa4WA")
        await eventually(lambda: node.server.requests.incoming_bytes)
        await clock.move(RpcSettings().stall_s)
        _, msgid, error, _ = await peer.receive()
        assert (msgid, error["code"]) == (7, "malformed_message")
        assert await peer.receive() is None
        await clock.move(10 * RpcSettings().stall_s)
        assert await idle.ask(0, 1, "FILL", [{}]) == [1, 1, None, {"data": b""}]  # silence between messages is fine


async def test_what_all_connections_hold_together_is_bounded() -> None:
    limits = Limits(max_message_bytes=1_000_000, max_items=100)
    async with serving(limits=limits, max_incoming_bytes=1_500_000) as node, contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(node.peer()) for _ in range(3)]
        for peer in peers[:2]:
            peer.send_bytes(b"\x94\x00\x07\xa4WAIT\x91\xc6\x00\x0a\x00\x00" + bytes(600_000))
        await eventually(lambda: node.server.requests.incoming_bytes > 1_200_000)
        peers[2].send_bytes(b"\x94\x00\x07\xa4WAIT\x91\xc6\x00\x0a\x00\x00" + bytes(600_000))
        _, msgid, error, _ = await peers[2].receive()
        assert (msgid, error["code"], error["retryable"]) == (7, "busy", True)
        for peer in peers:
            peer.close()
        await eventually(lambda: node.server.requests.incoming_bytes == 0)


async def test_requests_in_progress_count_as_held() -> None:
    limits = Limits(max_message_bytes=1_000_000, max_items=100)
    async with serving(limits=limits, max_held_bytes=1_000_000) as node, node.client() as client:
        params = {"seconds": 30, "label": "x" * 700_000}
        waiting = asyncio.create_task(client.call("WAIT", params))
        await node.started.wait()
        with pytest.raises(BusyError, match="hold"):
            await client.call("WAIT", params)
        waiting.cancel()
        await eventually(lambda: node.server.requests.held_bytes < 10_000)
        assert await client.call("WAIT", {"label": "y" * 700_000}) == {"label": "y" * 700_000}


async def test_too_many_connections_are_turned_away() -> None:
    async with serving(max_connections=2) as node, node.client() as first, node.client():
        async with node.peer() as third:
            third.send([0, 1, "FILL", [{}]])
            _, _, error, _ = await third.receive()
            assert error["code"] == "busy"
            assert await third.receive() is None
        assert await first.call("FILL") == {"data": b""}
        await eventually(lambda: node.server.connections == 2)


async def test_shutdown_answers_what_is_in_progress() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = contextlib.AsyncExitStack()
        node = await server.enter_async_context(serving())
        client = await stack.enter_async_context(node.client())
        waiting = asyncio.create_task(client.call("WAIT", {"seconds": 30}))
        await node.started.wait()
        await server.aclose()
        with pytest.raises(CancelledRequestError):
            await waiting
        await client.closed.wait()
        with pytest.raises(UnreachableError):
            await client.call("FILL")
        with pytest.raises(UnreachableError):
            async with Client.connect("127.0.0.1", node.port):
                pass


async def test_shutdown_does_not_wait_for_a_handler_that_will_not_end(caplog: pytest.LogCaptureFixture) -> None:
    node = Node(RpcSettings(shutdown_s=0.1))
    async with contextlib.AsyncExitStack() as stack:
        async with node.server.serve() as server:
            node.port = server.port
            client = await stack.enter_async_context(node.client())
            waiting = asyncio.create_task(client.call("STUBBORN", {"seconds": 1}))
            await node.started.wait()
            before = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - before < 0.9
        assert "does not end when cancelled" in caplog.text
        await asyncio.wait([waiting])
        with contextlib.suppress(UnreachableError):
            await waiting
    await eventually(lambda: node.server.connections == 0)


async def test_an_unknown_command_lists_the_known_ones(node: Node) -> None:
    async with node.client() as client:
        with pytest.raises(UnknownCommandError) as caught:
            await client.call("status")
        assert caught.value.details["commands"] == sorted(node.server.commands)


async def test_a_port_that_is_taken_is_an_oserror(node: Node) -> None:
    with pytest.raises(OSError, match="in use"):
        async with RpcServer({}, NODE).serve(port=node.port):
            pass


async def test_an_error_in_the_body_of_serve_comes_through_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with RpcServer({}, NODE).serve():
            raise ZeroDivisionError
