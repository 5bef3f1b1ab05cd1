"""Which training process this is: of all, and of those on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

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
        """From torch.distributed or the environment that torchrun sets. If neither says which ranks are on this
        machine, all are taken to be here: that keeps within the disk's limit.
        """
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        else:
            rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
        if local[0] is None or local[1] is None:
            return cls(rank, world, rank, world)
        return cls(rank, world, int(local[0]), int(local[1]))
