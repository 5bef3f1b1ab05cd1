"""What a training script imports. `from torch_bridge import O3Client` loads that module and no other; torch comes with
the first of them that needs it.

core         O3Client and Store: session, credentials, buckets, retries; Ranks: which training process this is
objects      O3Dataset: a map-style data set of objects read by ranges, with a cache on disk
shards       where data shards come from (node or origin); StreamingDownloader
streaming    StreamingShardDataset: an exact order over shards, resumable; TextLoader: token batches
batches      StreamingBatchDataset: large files in batches: fetched, used, deleted
checkpoints  O3CheckpointManager; O3StorageWriter and O3StorageReader for torch.distributed.checkpoint
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_bridge.core.client import O3Client as O3Client
    from torch_bridge.core.ranks import Ranks as Ranks
    from torch_bridge.core.retry import RetryPolicy as RetryPolicy
    from torch_bridge.core.store import Store as Store

_FROM = {
    "O3Client": "core.client",
    "RetryPolicy": "core.retry",
    "Store": "core.store",
    "Ranks": "core.ranks",
    "O3Dataset": "objects.dataset",
    "WholeObjects": "objects.formats",
    "RecordFormat": "objects.formats",
    "ParquetFormat": "objects.parquet",
    "open_source": "shards.sources.factory",
    "StreamingDownloader": "shards.downloader",
    "StreamingShardDataset": "streaming.dataset",
    "Ordering": "streaming.settings",
    "Buffering": "streaming.settings",
    "TextLoader": "streaming.text_loader",
    "StreamingBatchDataset": "batches.dataset",
    "ArchiveFiles": "batches.sources.archives",
    "ArchiveLimits": "batches.sources.archives",
    "SwarmFiles": "batches.sources.swarm",
    "merge_states": "batches.journal",
    "O3CheckpointManager": "checkpoints.o3_checkpoints",
    "O3StorageWriter": "checkpoints.dcp",
    "O3StorageReader": "checkpoints.dcp",
}
"""Where each public name is."""


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FROM])
