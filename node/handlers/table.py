"""Every command with its handler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from node.handlers.info import InfoHandlers
from node.handlers.sessions import SessionHandlers
from node.handlers.shards import ShardHandlers
from node.rpc import Call, Command
from node.tasks.registry import TaskContext, TaskRegistry
from protocol.commands.nodes import CancelParams, NodesParams, StatusParams
from protocol.commands.sessions import CloseSessionParams, OpenSessionParams, StartSessionParams, TokenizeParams
from protocol.commands.shards import (
    EvictShardParams,
    FetchShardParams,
    GetManifestParams,
    ListFilesParams,
    LoadShardParams,
    UnloadShardParams,
)


def command_table(
    shards: ShardHandlers, info: InfoHandlers, sessions: SessionHandlers, registry: TaskRegistry, context: TaskContext
) -> dict[str, Command]:
    """What the RPC server serves."""

    async def execute_task(params: Mapping[str, Any], call: Call) -> msgspec.Struct | Mapping[str, Any]:
        return await registry.execute(context, params, call)

    return {
        "LOAD_SHARD": Command(LoadShardParams, shards.load),
        "FETCH_SHARD": Command(FetchShardParams, shards.fetch),
        "UNLOAD_SHARD": Command(UnloadShardParams, shards.unload),
        "EVICT_SHARD": Command(EvictShardParams, shards.evict),
        "LIST_FILES": Command(ListFilesParams, shards.list_files),
        "GET_MANIFEST": Command(GetManifestParams, shards.get_manifest),
        "EXECUTE_TASK": Command(None, execute_task),
        "CANCEL": Command(CancelParams, info.cancel),
        "STATUS": Command(StatusParams, info.status),
        "NODES": Command(NodesParams, info.nodes),
        "TOKENIZE": Command(TokenizeParams, sessions.tokenize),
        "OPEN_SESSION": Command(OpenSessionParams, sessions.open),
        "START_SESSION": Command(StartSessionParams, sessions.start),
        "CLOSE_SESSION": Command(CloseSessionParams, sessions.close),
    }
