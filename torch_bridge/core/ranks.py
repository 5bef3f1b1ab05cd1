"""Which training process this is: of all, and of those on this machine."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from protocol.errors import InvalidParamsError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This training process among all, and among those of this machine.

    Raises InvalidParamsError for a rank out of range.
    """

    rank: int
    world_size: int
    """Processes that train together."""
    local_rank: int
    local_world_size: int
    """Those of them on this machine: they share its disk."""

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size <= self.world_size):
            raise InvalidParamsError(
                f"{self}: rank must be in [0, world_size), local_rank in [0, local_world_size), local_world_size at "
                "most world_size"
            )

    @classmethod
    def found(cls) -> Ranks:
        """From torch.distributed, or the environment that torchrun sets, as they are now. Trainers such as Lightning
        set them up after data sets were made, so ask when an iteration begins. If neither says which ranks are on this
        machine, all are taken to be here: that keeps within the disk's limit.

        Raises InvalidParamsError if the environment says that there are other processes, and not which one this is.
        """
        if distributed():
            import torch.distributed as dist

            rank, world = dist.get_rank(), dist.get_world_size()
        else:
            found, world = _number("RANK"), _number("WORLD_SIZE") or 1
            if found is None and world > 1:
                raise InvalidParamsError(
                    f"WORLD_SIZE is {world} and RANK is not set, so every process would read the samples of rank 0: "
                    "call torch.distributed.init_process_group before the first batch, start by torchrun, or give "
                    "ranks=Ranks(...)"
                )
            rank = found or 0
        local_rank, local_world = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
        if local_rank is None or local_world is None:
            return cls(rank, world, rank, world)
        return cls(rank, world, local_rank, local_world)

    @classmethod
    def known(cls) -> Ranks | None:
        """The same, but None as long as nothing says which process this is."""
        return cls.found() if distributed() or "RANK" in os.environ else None


def check_not_split_again(data: object, given: Ranks | None) -> None:
    """Raises InvalidParamsError, on every rank, if the loader of a data set that gives each rank its part is being
    iterated by Accelerate, which would give the ranks parts of rank 0's: the rest would be lost without a word.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None:
        return
    loader = getattr(accelerate.GradientState(), "active_dataloader", None)
    found: Any = getattr(loader, "dataset", None)
    is_split = type(loader).__name__ == "DataLoaderDispatcher" and accelerate.PartialState().num_processes > 1
    if type(found).__name__ == "IterableDatasetShard":
        found, is_split = found.dataset, True
    if is_split and found is data and (ranks := given or Ranks.found()).world_size > 1:
        raise InvalidParamsError(
            f"accelerator.prepare() got the loader of this data set, and would split the part of rank {ranks.rank} "
            f"among the {ranks.world_size} ranks once more, so most samples would be lost: leave the loader out of "
            "prepare() and move batches to accelerator.device, or give the data set ranks=Ranks(0, 1, 0, 1), which has "
            "Accelerate split all of it"
        )


def distributed() -> bool:
    """Whether torch.distributed is set up in this process."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    try:
        return None if value is None else int(value)
    except ValueError:
        raise InvalidParamsError(f"the environment variable {name} must be a whole number, not {value!r}") from None
