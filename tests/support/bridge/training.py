"""A training run that checkpoints are tested with: small, and with all kinds of state."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_bridge import O3CheckpointManager, O3Client

RUN = "run-1"


class Training:
    """Each step draws from all three generators, and the learning rate changes."""

    def __init__(self, seed: int = 0, width: int = 32) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 4)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        self.loader: dict[str, Any] = {"sample": 0, "shards": ["a", "b"]}

    def steps(self, count: int) -> None:
        for _ in range(count):
            scale = random.random() + float(np.random.rand())
            loss = (self.model(torch.randn(16, 8)) * scale).square().sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.loader["sample"] += 16

    @property
    def parts(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler, "loader": self.loader}

    def save(self, checkpoints: O3CheckpointManager, epoch: int, **options: Any) -> None:
        checkpoints.save_checkpoint(
            self.model, self.optimizer, epoch, **{"run_id": RUN, "wait": True} | self.parts | options
        )

    def load(self, checkpoints: O3CheckpointManager, epoch: int | None = None) -> Any:
        return checkpoints.load_checkpoint(RUN, epoch, model=self.model, optimizer=self.optimizer, **self.parts)


def assert_same(one: Any, other: Any) -> None:
    """States to the bit, and of the same types."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def assert_same_training(one: Training, other: Training) -> None:
    assert_same(one.model.state_dict(), other.model.state_dict())
    assert_same(one.optimizer.state_dict(), other.optimizer.state_dict())
    assert one.scheduler.state_dict() == other.scheduler.state_dict()
    assert one.loader == other.loader


@contextmanager
def in_folder(tmp_path: Path, **options: Any) -> Iterator[O3CheckpointManager]:
    """Checkpoints in a folder, as a test of what needs no server has them."""
    given = {"key_file": tmp_path / "keys" / "run.key", "cache_dir": tmp_path / "cache"} | options
    with O3CheckpointManager(f"file://{tmp_path}/origin", **given) as checkpoints:
        yield checkpoints


def saves_until_killed(
    environment: dict[str, Any], url: str, key_file: str, cache_dir: str, say: Any, go_on: Any
) -> None:
    """For a spawned process: one whole checkpoint, then, told to go on, another one that does not end."""
    client = O3Client(**environment)
    training = Training()
    checkpoints = O3CheckpointManager(url, client=client, key_file=key_file, cache_dir=cache_dir)
    training.save(checkpoints, 0)
    say.put("saved")
    assert go_on.wait(60)
    training.steps(2)
    training.save(checkpoints, 1, wait=False)
    say.put("sending")
    time.sleep(60)


def large_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Six tensors of 40 MiB, each of which fills a part: a save of them takes seconds."""
    return {f"weight{number}": torch.full((10 << 20,), float(10 * seed + number)) for number in range(6)}


def saves_large_until_killed(environment: dict[str, Any], url: str, key_file: str, say: Any, go_on: Any) -> None:
    """For a spawned process: one small checkpoint, then, told to go on, a large one."""
    checkpoints = O3CheckpointManager(url, client=O3Client(**environment), key_file=key_file)
    checkpoints.save_checkpoint({"weight": torch.ones(9)}, None, 0, run_id=RUN, wait=True)
    say.put("saved")
    assert go_on.wait(60)
    checkpoints.save_checkpoint(large_state(), None, 1, run_id=RUN)
    say.put("sending")
    time.sleep(60)
