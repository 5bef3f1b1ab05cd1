"""A server in a process of its own, for tests that measure it: prints its port, ends when stdin does."""

import asyncio
import sys
from typing import Any

import msgspec

from node.rpc import Call, Command, RpcServer
from protocol.commands.common import ChatMessage, Params
from protocol.ids import NodeId

NODE = NodeId("ab" * 32)


class EchoParams(Params, frozen=True, kw_only=True):
    text: str = ""
    number: float = 0.0
    messages: tuple[ChatMessage, ...] = ()
    options: dict[str, int] = msgspec.field(default_factory=dict)


async def echo(params: EchoParams, call: Call) -> EchoParams:
    return params


async def raw(params: dict[str, Any], call: Call) -> dict[str, Any]:
    return params


async def main() -> None:
    async with RpcServer({"ECHO": Command(EchoParams, echo), "RAW": Command(None, raw)}, NODE).serve() as server:
        print(server.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


asyncio.run(main())
