"""`verify_shard`: hash a shard on disk again and compare it with the manifest."""

from __future__ import annotations

import time

from node.rpc import Call
from node.tasks.registry import TaskContext, TaskType
from protocol.commands.tasks import VerifyShardParams, VerifyShardResult


async def verify_shard(context: TaskContext, params: VerifyShardParams, _: Call) -> VerifyShardResult:
    """Raises ShardNotFoundError if the shard is not on this node's disk."""
    await context.shards.wait_scanned()
    shard = await context.shards.select(params)
    started = time.monotonic()
    path = context.shards.path_of(shard.ref)
    found = await context.shards.verify(shard)
    return VerifyShardResult(
        valid=found == shard.entry.content_id,
        expected=shard.entry.content_id,
        found=found,
        path=str(path),
        seconds=time.monotonic() - started,
    )


VERIFY_SHARD = TaskType("verify_shard", VerifyShardParams, verify_shard)
