"""A checkpoint goes into all objects of a training or into none; what could not be read back is not committed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from node.origin.local import FileStore
from protocol.errors import OriginCorruptError
from tests.support.bridge.training import RUN, Training, assert_same, in_folder
from torch_bridge.checkpoints import upload
from torch_bridge.checkpoints.rollback import load_all
from torch_bridge.checkpoints.upload import UnreadableCommitError


def states_of(training: Training) -> dict[str, object]:
    return {
        "model": {key: value.clone() for key, value in training.model.state_dict().items()},
        "optimizer": training.optimizer.state_dict()["param_groups"],
        "scheduler": training.scheduler.state_dict(),
        "loader": dict(training.loader),
    }


class Refuses:
    """A loader that takes no state but its own."""

    def __init__(self) -> None:
        self.state = {"mine": 1}

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state
        if state != {"mine": 1}:
            raise ValueError("another data set")


def test_if_an_optimizer_fails_the_model_is_as_it_was(tmp_path: Path) -> None:
    saved, other = Training(), Training(seed=3)
    saved.steps(2)
    other.optimizer = torch.optim.AdamW([{"params": [one]} for one in other.model.parameters()])
    other.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(other.optimizer, T_max=20)
    before = states_of(other)
    with in_folder(tmp_path) as checkpoints:
        saved.save(checkpoints, 1)
        with pytest.raises(ValueError, match="parameter groups"):
            other.load(checkpoints)
    assert_same(states_of(other), before)


@pytest.mark.parametrize("width", [32, 64])
def test_if_a_model_or_a_loader_fails_all_are_as_they_were(tmp_path: Path, width: int) -> None:
    saved, other = Training(), Training(seed=3, width=width)
    saved.steps(2)
    other.optimizer, other.scheduler = saved.optimizer, saved.scheduler
    before, loader = states_of(other), Refuses()
    wanted = {"model": other.model, "optimizer": other.optimizer, "scheduler": other.scheduler}
    with in_folder(tmp_path) as checkpoints:
        saved.save(checkpoints, 1)
        found = checkpoints.load_checkpoint(RUN)
    saved.steps(1)
    before["optimizer"], before["scheduler"] = states_of(saved)["optimizer"], states_of(saved)["scheduler"]
    with pytest.raises((RuntimeError, ValueError)):
        load_all(wanted if width == 64 else wanted | {"loader": loader}, found.state)
    assert_same(states_of(other), before)
    assert loader.state == {"mine": 1}


def test_a_warm_up_and_milestones_continue(tmp_path: Path) -> None:
    def scheduled() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3)
        steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
        return model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, steps], [3])

    def rates(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> list[float]:
        found = []
        for _ in range(8):
            optimizer.step()
            scheduler.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
        return found

    model, optimizer, scheduler = scheduled()
    optimizer.step()
    scheduler.step()
    other_model, other_optimizer, other_scheduler = scheduled()
    with in_folder(tmp_path) as checkpoints:
        checkpoints.save_checkpoint(model, optimizer, 0, run_id=RUN, scheduler=scheduler, wait=True)
        checkpoints.load_checkpoint(RUN, model=other_model, optimizer=other_optimizer, scheduler=other_scheduler)
    assert rates(other_optimizer, other_scheduler) == rates(optimizer, scheduler)


def test_a_name_that_is_no_utf_8_is_read_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"l\xf6ffel.bin")
    with in_folder(tmp_path) as checkpoints:
        for step, file in ((1, "a"), (2, name)):
            extra = {"file": file}
            checkpoints.save_checkpoint({"w": torch.ones(1)}, None, 0, run_id=RUN, step=step, extra=extra, wait=True)
        found = checkpoints.load_checkpoint(RUN)
    assert (found.step, found.extra) == (2, {"file": name})


def test_what_would_not_be_read_back_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    with in_folder(tmp_path) as checkpoints:
        training.save(checkpoints, 1)
        monkeypatch.setattr(upload, "encode_commit", lambda commit, *rest: (*_encoded(commit, *rest),))
        with pytest.raises(UnreadableCommitError, match="not committed"):
            training.save(checkpoints, 2)
        monkeypatch.undo()
        assert [one.epoch for one in checkpoints.checkpoints(RUN)] == [1]
        training.save(checkpoints, 3)
        assert checkpoints.load_checkpoint(RUN).epoch == 3


def _encoded(commit: upload.Commit, *rest: object) -> tuple[str, str, bytes]:
    """A commit whose structure lost a tensor on the way."""
    structure = {**commit.structure, "model": {"$": "tensor", "v": "model/gone"}}  # type: ignore[dict-item]
    changed = upload.replace(commit, structure=structure)
    return upload_encode(changed, *rest)  # type: ignore[arg-type]


upload_encode = upload.encode_commit


def test_a_store_that_changes_bytes_gets_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = FileStore.put

    async def damaging(self: FileStore, key: str, data: bytes, **options: object) -> object:
        if key.startswith("shards/"):
            data = data[:-1] + bytes([data[-1] ^ 1])
        return await put(self, key, data, **options)  # type: ignore[arg-type]

    training = Training()
    with in_folder(tmp_path) as checkpoints:
        monkeypatch.setattr(FileStore, "put", damaging)
        with pytest.raises(OriginCorruptError, match="other bytes"):
            training.save(checkpoints, 1)
        monkeypatch.undo()
        assert checkpoints.checkpoints(RUN) == ()
        training.save(checkpoints, 1)
        assert checkpoints.load_checkpoint(RUN).epoch == 1
