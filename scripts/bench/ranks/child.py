"""One training process of scripts.bench.ranks: reads an epoch in lock-step with the others, and writes what it saw.

python -m scripts.bench.ranks.child JSON

It says "ready" when all of them are, begins at a line on stdin, and says what it found as a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torch_bridge.core.ranks import Ranks
from torch_bridge.shards.sources.factory import open_source
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Buffering, Ordering

BATCH_SIZE = 64


@dataclass(frozen=True)
class Part:
    """What one process is told."""

    rank: int
    world: int
    local_world: int
    """Ranks that share `folder`."""
    where: str
    """A node's HOST:PORT, or an origin's URL."""
    dataset: str
    folder: str
    meeting: str
    """A file that does not exist yet, by which the processes find each other."""
    out: str
    """A .npy file for the ids of the samples that this one saw, in their order."""
    shard_rows: int
    lanes: int


def main() -> None:
    part = Part(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{part.meeting}", rank=part.rank, world_size=part.world)
    try:
        dist.barrier()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        found = read(part)
    finally:
        dist.destroy_process_group()
    sys.stdout.write(f"{json.dumps(found)}\n")


def read(part: Part) -> dict[str, Any]:
    """One epoch, opening included."""
    began = time.monotonic()
    source = open_source(part.where, part.dataset, folder=part.folder)
    local_rank = part.rank if part.local_world > 1 else 0
    data = StreamingShardDataset(
        source,
        batch_size=BATCH_SIZE,
        ranks=Ranks(part.rank, part.world, local_rank, part.local_world),
        ordering=Ordering(lanes=part.lanes, block_rows=part.shard_rows, window=part.shard_rows),
        buffering=Buffering(buffer_size=3, max_buffer=6),
    )
    steps = -(-data.order().batches // part.world)
    ids, status, first_s, met = [], None, 0.0, 0
    for batch in data:
        first_s = first_s or time.monotonic() - began
        ids.append(np.asarray(batch["id"]))
        status = data.status() or status
        meet()
        met += 1
    for _ in range(steps - met):
        meet()
    seconds = time.monotonic() - began
    np.save(Path(part.out), np.concatenate(ids) if ids else np.empty(0, np.int64))
    source.close()
    return {"seconds": seconds, "first_s": first_s, "status": asdict(status) if status else {}}


def meet() -> None:
    """As ranks do in each step, to average their gradients."""
    dist.all_reduce(torch.zeros(1))


if __name__ == "__main__":
    main()
