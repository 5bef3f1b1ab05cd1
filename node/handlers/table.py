"""Every command with its handler, which takes what it needs: the parameters, the call, both or neither."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec

from node.handlers.info import InfoHandlers
from node.handlers.leases import LeaseHandlers
from node.handlers.publishing import PublishHandlers
from node.handlers.sessions import SessionHandlers
from node.handlers.shards import ShardHandlers
from node.rpc import Call, Command, Handler
from protocol.commands.leases import ReleaseParams, RenewParams
from protocol.commands.nodes import CancelParams, NodesParams, StatusParams
from protocol.commands.publishing import PublishParams
from protocol.commands.sessions import CloseSessionParams, OpenSessionParams, StartSessionParams, TokenizeParams
from protocol.commands.shards import (
    EvictShardParams,
    FetchShardParams,
    GetManifestParams,
    ListFilesParams,
    LoadShardParams,
    UnloadShardParams,
    UnpinParams,
)

P = TypeVar("P", bound=msgspec.Struct)
Answer = Awaitable[msgspec.Struct | Mapping[str, Any] | None]


def command_table(
    shards: ShardHandlers,
    leases: LeaseHandlers,
    publishing: PublishHandlers,
    info: InfoHandlers,
    sessions: SessionHandlers,
    execute_task: Handler,
) -> dict[str, Command]:
    """What the RPC server serves. `execute_task` decodes its own parameters: they are the task type's."""
    return {
        "LOAD_SHARD": Command(LoadShardParams, shards.load),
        "FETCH_SHARD": Command(FetchShardParams, shards.fetch),
        "UNLOAD_SHARD": Command(UnloadShardParams, _from_params(shards.unload)),
        "EVICT_SHARD": Command(EvictShardParams, _from_params(shards.evict)),
        "UNPIN": Command(UnpinParams, _from_params(shards.unpin)),
        "RENEW": Command(RenewParams, _from_params(leases.renew)),
        "RELEASE": Command(ReleaseParams, _from_params(leases.release)),
        "PUBLISH": Command(PublishParams, publishing.publish),
        "LIST_FILES": Command(ListFilesParams, _from_nothing(shards.list_files)),
        "GET_MANIFEST": Command(GetManifestParams, _from_params(shards.get_manifest)),
        "EXECUTE_TASK": Command(None, execute_task),
        "CANCEL": Command(CancelParams, _from_params(info.cancel)),
        "STATUS": Command(StatusParams, _from_nothing(info.status)),
        "NODES": Command(NodesParams, _from_nothing(info.nodes)),
        **session_commands(sessions),
    }


def session_commands(sessions: SessionHandlers) -> dict[str, Command]:
    """What a node needs to be a stage of somebody's pipeline."""
    return {
        "TOKENIZE": Command(TokenizeParams, _from_params(sessions.tokenize)),
        "OPEN_SESSION": Command(OpenSessionParams, sessions.open),
        "START_SESSION": Command(StartSessionParams, _from_params(sessions.start)),
        "CLOSE_SESSION": Command(CloseSessionParams, _from_params(sessions.close)),
    }


def _from_params(handler: Callable[[P], Answer]) -> Handler:
    """For a handler that needs nothing of the call."""

    @functools.wraps(handler)
    async def handle(params: P, _: Call) -> msgspec.Struct | Mapping[str, Any] | None:
        return await handler(params)

    return handle


def _from_nothing(handler: Callable[[], Answer]) -> Handler:
    """For a command without parameters."""

    @functools.wraps(handler)
    async def handle(_: msgspec.Struct, __: Call) -> msgspec.Struct | Mapping[str, Any] | None:
        return await handler()

    return handle
