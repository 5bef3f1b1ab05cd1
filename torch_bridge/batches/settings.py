"""The settings of a StreamingBatchDataset, checked, and which consumer of how many this process is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.utils.data import get_worker_info

from protocol.errors import InvalidParamsError
from torch_bridge.batches.plan import Consumer
from torch_bridge.core.ranks import Ranks


def consumer_of(ranks: Ranks) -> Consumer:
    """This process: a DataLoader's worker, or the training process itself."""
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
    return Consumer(
        ranks.rank * workers + worker,
        ranks.world_size * workers,
        ranks.local_rank * workers + worker,
        ranks.local_world_size * workers,
    )


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """Raises InvalidParamsError for a value out of its range."""

    cache_size: int
    """Files of a batch, of all consumers of this machine together."""
    max_bytes: int
    """Of files on the disk of this machine, at any time."""
    epochs_per_subset: int = 1
    """How often each batch is used before the next comes."""
    seed: int = 0
    shuffle: bool = True
    samples_ahead: int = 0
    """Samples of a worker that may be handed over and not yet trained on."""
    concurrency: int = 4
    """Files on their way at once, of one consumer."""
    on_missing: Literal["error", "skip"] = "error"
    """What to do if a file has vanished since it was listed."""
    keep_free_bytes: int = 100_000_000
    """Free space of the disk that no download may take."""

    def __post_init__(self) -> None:
        positive = self.cache_size, self.max_bytes, self.epochs_per_subset, self.concurrency
        if min(positive) < 1 or min(self.samples_ahead, self.keep_free_bytes) < 0:
            raise InvalidParamsError(
                f"{self}: cache_size, max_bytes, epochs_per_subset and concurrency must be 1 or more, samples_ahead "
                "and keep_free_bytes 0 or more"
            )
        if self.on_missing not in ("error", "skip"):
            raise InvalidParamsError(f"on_missing is 'error' or 'skip', not {self.on_missing!r}")
