"""Read shards with row groups of several sizes by StreamingShardDataset, and by pyarrow alone, and print the ratio.

    python -m scripts.bench.row_groups                                  # groups of 1,000 to 262,144 rows of 1 KB
    python -m scripts.bench.row_groups --group 1000000 --rows 1000000 --shards 2 --rounds 1     # 1 GiB a group

Each round reads all shards by both, one after the other: pyarrow by `iter_batches(64)` and `to_pylist`, from front to
back; StreamingShardDataset in batches of 64 with its defaults, shuffled. The samples are random letters, which zstd
makes a third smaller. Memory is the most that pyarrow's pool held meanwhile, beside the size of a decoded row group.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from torch_bridge import StreamingShardDataset, open_source
from torch_bridge.shards.sources.interface import ShardSource

BATCH = 64
GROUPS = (1_000, 65_536, 262_144)


def written(folder: Path, shards: int, rows: int, group: int, row_bytes: int) -> Path:
    random = np.random.default_rng(0)
    folder.mkdir()
    ends = pa.py_buffer(np.arange(0, (rows + 1) * row_bytes, row_bytes, dtype=np.int64))
    for shard in range(shards):
        letters = random.integers(97, 123, (rows, row_bytes), dtype=np.uint8)
        text = pa.Array.from_buffers(pa.large_string(), rows, [None, ends, pa.py_buffer(letters)])
        path = folder / f"shard_{shard:05d}.parquet"
        pq.write_table(pa.table({"text": text}), path, row_group_size=group, compression="zstd", use_dictionary=False)
    return folder


def by_pyarrow(folder: Path) -> int:
    count = 0
    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(BATCH):
            count += len(batch.column(0).to_pylist())
    return count


def by_data_set(source: ShardSource) -> tuple[int, int]:
    """Rows, and the most bytes of pyarrow's pool."""
    count = most = 0
    before = pa.total_allocated_bytes()
    for batch in StreamingShardDataset(source, batch_size=BATCH):
        count += len(batch["text"])
        most = max(most, pa.total_allocated_bytes() - before)
    return count, most


def rate(read: Callable[[], int], expected: int) -> float:
    began = time.monotonic()
    found = read()
    if found != expected:
        raise RuntimeError(f"{found} rows came, {expected} are there")
    return found / (time.monotonic() - began)


def measured(arguments: argparse.Namespace, group: int, work: Path) -> dict[str, float]:
    rows = max(arguments.rows, group)
    folder = written(work / str(group), arguments.shards, rows, group, arguments.row_bytes)
    source, total, most = open_source(str(folder)), arguments.shards * rows, 0

    def streamed() -> int:
        nonlocal most
        count, held = by_data_set(source)
        most = max(most, held)
        return count

    rates = [(rate(lambda: by_pyarrow(folder), total), rate(streamed, total)) for _ in range(arguments.rounds)]
    ratio = statistics.median(ours / theirs for theirs, ours in rates)
    found = {
        "group_rows": group,
        "group_bytes": group * arguments.row_bytes,
        "pyarrow_rows_s": statistics.median(theirs for theirs, _ in rates),
        "rows_s": statistics.median(ours for _, ours in rates),
        "ratio": ratio,
        "most_bytes": most,
    }
    print(
        f"groups of {group} rows, {found['group_bytes'] / 1e6:.0f} MB: pyarrow {found['pyarrow_rows_s']:,.0f} rows/s, "
        f"StreamingShardDataset {found['rows_s']:,.0f}: {ratio:.2f} of it; it held {most / 1e6:.0f} MB at most",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--group", type=int, action="append", help=f"rows of a group; may be repeated; {GROUPS}")
    parser.add_argument("--rows", type=int, default=65_536, help="rows of a shard; at least one group")
    parser.add_argument("--row-bytes", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="row-groups-") as work:
        found = [measured(arguments, group, Path(work)) for group in arguments.group or GROUPS]
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
