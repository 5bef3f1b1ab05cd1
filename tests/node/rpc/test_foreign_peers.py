"""Against a MessagePack-RPC implementation that is not ours (aio-msgpack-rpc), both ways round."""

import asyncio
from typing import Any

import aio_msgpack_rpc
import pytest

from node.rpc import Call, Command, RpcServer
from protocol.client import Client
from protocol.commands.common import Params, Result
from protocol.errors import InternalError
from protocol.ids import NodeId


class WaitParams(Params, frozen=True, kw_only=True):
    seconds: float = 0.0


class WaitResult(Result, frozen=True, kw_only=True):
    seconds: float


async def wait(params: WaitParams, call: Call) -> WaitResult:
    await asyncio.sleep(params.seconds)
    return WaitResult(seconds=params.seconds)


async def test_a_foreign_client_calls_a_node() -> None:
    async with RpcServer({"WAIT": Command(WaitParams, wait)}, NodeId("ab" * 32)).serve() as server:
        client = aio_msgpack_rpc.Client(*await asyncio.open_connection("127.0.0.1", server.port))
        try:
            finished: list[float] = []

            async def call(seconds: float) -> None:
                answer = await client.call("WAIT", {"seconds": seconds}, {"request_id": f"r{seconds}"}, timeout=10)
                finished.append(answer["seconds"])

            await client.notify("NEVER_HEARD", 1, 2)
            await asyncio.gather(call(0.4), call(0.2), call(0.0))
            assert finished == [0.0, 0.2, 0.4]
            with pytest.raises(aio_msgpack_rpc.error.RPCResponseError) as caught:
                await client.call("WAIT", {"seconds": []}, timeout=10)
            assert caught.value.args[0]["code"] == "invalid_params"
            assert await client.call("WAIT", timeout=10) == {"seconds": 0.0}
        finally:
            client.close()


class Handler:
    def ADD(self, params: dict[str, Any], envelope: dict[str, Any]) -> int:  # noqa: N802
        return int(params["a"] + params["b"])

    def FAIL(self, params: dict[str, Any], envelope: dict[str, Any]) -> None:  # noqa: N802
        raise ValueError("a text, no map")


async def test_our_client_calls_a_foreign_server() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await aio_msgpack_rpc.Server(Handler())(reader, writer)
        finally:
            writer.transport.abort()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        async with Client.connect("127.0.0.1", listener.sockets[0].getsockname()[1]) as client:
            answers = await asyncio.gather(*(client.call("ADD", {"a": n, "b": 1}) for n in range(5)))
            assert answers == [1, 2, 3, 4, 5]
            with pytest.raises(InternalError, match="a text"):
                await client.call("FAIL", timeout_s=10)
            client_closed = client.closed
        assert client_closed.is_set()
    finally:
        listener.close()
        await asyncio.sleep(0.05)
