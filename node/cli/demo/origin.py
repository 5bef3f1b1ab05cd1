"""The second part of a demo: the seed is gone, no node has a shard, and the origin gives it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from node.cli.demo.nodes import NodeStartError, RunningNode
from node.cli.demo.s3_server import S3Server
from protocol.client import Client
from protocol.commands.shards import ShardResult

PREFIX = "demo"
_TIMEOUT_S = 30.0


def origin_url(s3: S3Server) -> str:
    """Of the demo's objects."""
    return f"o3://{s3.bucket}/{PREFIX}"


def origin_environment(s3: S3Server) -> Mapping[str, str]:
    """What a node needs to reach the origin: credentials are never flags."""
    return {
        "SHOAL_ORIGINS": origin_url(s3),
        "SHOAL_O3_ENDPOINT": s3.endpoint,
        "SHOAL_O3_BACKEND": "gateway",
        "AKAVE_O3_ACCESS_KEY": s3.access_key,
        "AKAVE_O3_SECRET_KEY": s3.secret_key,
    }


async def publish(folder: Path, home: Path, environment: Mapping[str, str]) -> None:
    """`shoal publish FOLDER --origin URL --only-origin`. Raises NodeStartError with what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "node",
        "publish",
        str(folder),
        f"--data-dir={home}",
        f"--origin={environment['SHOAL_ORIGINS']}",
        "--only-origin",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | dict(environment),
    )
    try:
        _, stderr = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise NodeStartError(f"publishing to the origin failed: {stderr.decode(errors='replace')[-1000:]}")


async def lose_shard(seed: RunningNode, holder: Client, model: str, shard_id: int) -> None:
    """Stop the seed, and evict the shard from the only other node that has it."""
    await seed.stop()
    for command in ("UNLOAD_SHARD", "EVICT_SHARD"):
        await holder.call(
            command, {"model": model, "shard_id": shard_id}, result_type=ShardResult, timeout_s=_TIMEOUT_S
        )
