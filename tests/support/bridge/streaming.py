"""What tests of streaming data sets share: numbered samples at an origin, and a training process that can be killed."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from node.cli.demo.s3_server import S3Server
from node.origin.publishing import SourceFile, missing_at, publish
from protocol.content import hash_file
from protocol.ids import ContentId, ShardId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey
from torch_bridge import O3Client, RetryPolicy
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.store import Store
from torch_bridge.shards.sources.interface import ShardSource
from torch_bridge.shards.sources.node import NodeSource
from torch_bridge.shards.sources.origin import OriginSource
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Buffering, Ordering

NAME = "tests/numbers"
ORDERING = Ordering(lanes=2, block_rows=20, window=40)
BUFFERING = Buffering(buffer_size=1, max_buffer=2)


def numbered_files(folder: Path, rows: list[int], *, row_bytes: int = 400) -> list[Path]:
    """Sample `id` of shard s, row r is 1000 s + r; random bytes beside it, so that nothing compresses."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, count in enumerate(rows):
        ids = list(range(shard * 1000, shard * 1000 + count))
        table = pa.table({"id": ids, "x": [os.urandom(row_bytes) for _ in ids]})
        paths.append(folder / f"shard_{shard:05d}.parquet")
        parquet.write_table(table, paths[-1], row_group_size=20, compression="none", use_dictionary=False)
    return paths


def publish_numbered(store: Store, paths: list[Path], name: str = NAME, *, claimed: int = 0) -> Manifest:
    """`claimed`: rows that the manifest says of each shard beyond those it has."""
    entries, files, torrents = [], {}, {}
    for number, path in enumerate(paths):
        hashed = hash_file(path)
        rows = parquet.read_metadata(path).num_rows + claimed
        entries.append(
            ShardEntry(
                shard_id=ShardId(number),
                filename=path.name,
                size=hashed.size,
                content_id=hashed.content_id,
                kind="parquet",
                rows=rows,
            )
        )
        stat = path.stat()
        files[ContentId(hashed.content_id)] = SourceFile(path, stat.st_size, stat.st_mtime_ns)
        torrents[ContentId(hashed.content_id)] = b"d1:a" + hashed.piece_layer + b"e"
    manifest = Manifest(name=name, kind="dataset", shards=tuple(entries))
    signed = sign_manifest(manifest, SigningKey.generate(), ())

    async def send() -> None:
        await publish(store.backing, signed, await missing_at(store.backing, manifest), files, torrents)

    loop_thread().run(asyncio.wait_for(send(), 60))
    return manifest


def source_of(at: dict[str, str], folder: Path) -> ShardSource:
    """Of a node where `at` says "node", of an S3 server else."""
    return NodeSource(at["node"], NAME, folder, ttl_s=float(at["ttl_s"])) if "node" in at else source_at(at, folder)


def source_at(server: S3Server | dict[str, str], folder: Path, name: str = NAME) -> OriginSource:
    """`server`: or what `address` says of it, in another process."""
    at = server if isinstance(server, dict) else address(server)
    client = O3Client(
        endpoint=at["endpoint"],
        access_key=at["access_key"],
        secret_key=at["secret_key"],
        backend="gateway",
        retry=RetryPolicy(total_s=10.0),
    )
    return OriginSource(f"o3://{at['bucket']}", folder, dataset=name, client=client)


def address(server: S3Server) -> dict[str, str]:
    return {
        "endpoint": server.endpoint,
        "access_key": server.access_key,
        "secret_key": server.secret_key,
        "bucket": server.bucket,
    }


def numbers(source: ShardSource, **more: Any) -> StreamingShardDataset:
    """Settings that keep few shards open at once."""
    settings: dict[str, Any] = {"batch_size": 8, "columns": ["id"], "ordering": ORDERING, "buffering": BUFFERING}
    return StreamingShardDataset(source, **settings | more)


def train(at: dict[str, str], folder: Path, out: Path) -> None:
    """A training process that saves each step: one line a batch, with its samples and the state after it.

    It goes on from the last whole line. RANK, WORLD_SIZE and STEP_S, how long a step takes, are those of the
    environment.
    """
    data = numbers(source_of(at, folder))
    log = out / f"rank{data.ranks.rank}.jsonl"
    if (state := last_state(out)) is not None:
        data.load_state_dict(state)
    with log.open("a") as file:
        for batch in data:
            file.write(json.dumps({"ids": batch["id"].tolist(), "state": data.state_dict()}) + "\n")
            file.flush()
            time.sleep(float(os.environ.get("STEP_S", "0.01")))


def lines(log: Path) -> list[dict[str, Any]]:
    """The whole ones."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_state(out: Path) -> dict[str, Any] | None:
    """What was saved to continue from, where something was."""
    path = out / "resume.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    train(json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
