"""Every command with its handler."""

from __future__ import annotations

from node.handlers.info import InfoHandlers
from node.handlers.leases import LeaseHandlers
from node.handlers.publishing import PublishHandlers
from node.handlers.sessions import SessionHandlers
from node.handlers.shards import ShardHandlers
from node.rpc import Command, Handler
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
)


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
        "UNLOAD_SHARD": Command(UnloadShardParams, shards.unload),
        "EVICT_SHARD": Command(EvictShardParams, shards.evict),
        "RENEW": Command(RenewParams, leases.renew),
        "RELEASE": Command(ReleaseParams, leases.release),
        "PUBLISH": Command(PublishParams, publishing.publish),
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
