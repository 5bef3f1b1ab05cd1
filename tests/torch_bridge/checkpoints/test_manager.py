"""Checkpoints of a real training in a folder: what comes back, what counts as one, and what is refused."""

from __future__ import annotations

import ast
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_bridge.checkpoints
from protocol.errors import InvalidParamsError, OriginError
from protocol.signing import SigningKey
from tests.support.bridge.o3_client import in_fork
from tests.support.bridge.training import RUN, Training, assert_same, assert_same_training, in_folder
from torch_bridge import O3CheckpointManager
from torch_bridge.checkpoints import o3_checkpoints
from torch_bridge.checkpoints.parts import DamagedPartError
from torch_bridge.checkpoints.restore import CheckpointNotFoundError
from torch_bridge.checkpoints.state import UnsayableStateError
from torch_bridge.checkpoints.upload import own_folder


def objects(tmp_path: Path, kind: str) -> list[Path]:
    return sorted(path for path in (tmp_path / "origin" / kind).rglob("*") if path.is_file())


def part_of(tmp_path: Path, checkpoints: O3CheckpointManager, member: str, place: int = 0) -> Path:
    """The file of a member's part in the checkpoint at `place`, newest first."""
    for entry in checkpoints.checkpoints(RUN)[place].manifest.manifest.shards:
        if entry.filename.startswith(member):
            return tmp_path / "origin" / "shards" / entry.content_id
    raise AssertionError(member)


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_training_after_a_restore_is_bit_equal_to_training_without(tmp_path: Path) -> None:
    uninterrupted = Training()
    uninterrupted.steps(3)
    with in_folder(tmp_path) as checkpoints:
        uninterrupted.save(checkpoints, 2, step=300, extra={"best": 0.5, "seen": ("x", 2**80)})
        uninterrupted.steps(5)
        other = Training(seed=9)
        found = other.load(checkpoints)
    assert (found.run_id, found.epoch, found.step, found.fell_back_from) == (RUN, 2, 300, ())
    assert_same(found.extra, {"best": 0.5, "seen": ("x", 2**80)})
    other.steps(5)
    assert_same_training(uninterrupted, other)


def test_random_numbers_are_left_alone_where_asked(tmp_path: Path) -> None:
    training = Training()
    with in_folder(tmp_path) as checkpoints:
        training.save(checkpoints, 0, rng=False)
        assert "rng" not in training.load(checkpoints).state
        training.save(checkpoints, 1)
        torch.manual_seed(5)
        first = torch.rand(3)
        torch.manual_seed(5)
        checkpoints.load_checkpoint(RUN, restore_rng=False)
        assert torch.equal(torch.rand(3), first)


def test_what_the_training_does_meanwhile_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    upload = o3_checkpoints.upload

    def held_up(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return upload(*arguments)

    monkeypatch.setattr(o3_checkpoints, "upload", held_up)
    training, as_it_was = Training(), Training()
    for one in (as_it_was, training):
        one.steps(0)
    with in_folder(tmp_path) as checkpoints:
        training.save(checkpoints, 0, wait=False, extra=[training.loader])
        assert begun.wait(20)
        training.steps(3)
        go_on.set()
        checkpoints.wait()
        found = checkpoints.load_checkpoint(RUN)
    assert_same(as_it_was.model.state_dict(), found.state["model"])
    assert found.extra[0]["sample"] == 0


def test_the_order_is_epoch_step_time_and_an_epoch_can_be_asked_for(tmp_path: Path) -> None:
    training = Training()
    with in_folder(tmp_path) as checkpoints:
        for epoch, step in ((0, None), (1, 5), (1, 40), (1, 40), (0, 100)):
            training.save(checkpoints, epoch, step=step, extra=len(objects(tmp_path, "commits")))
        kept = checkpoints.checkpoints(RUN)
        assert [(one.epoch, one.step) for one in kept] == [(1, 40), (1, 40), (1, 5), (0, 100), (0, None)]
        assert kept[0].written_ms > kept[1].written_ms
        assert checkpoints.load_checkpoint(RUN).extra == 3
        assert checkpoints.load_checkpoint(RUN, 0).extra == 4
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint of epoch 7"):
            checkpoints.load_checkpoint(RUN, 7)
        assert checkpoints.latest("other") is None
        with pytest.raises(CheckpointNotFoundError, match="'other' has no checkpoint at file://"):
            checkpoints.load_checkpoint("other")


@pytest.mark.parametrize("harm", [damage, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_checkpoint_is_left_loudly_for_the_one_before(
    harm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training, before = Training(), Training()
    with in_folder(tmp_path) as checkpoints:
        training.save(checkpoints, 0)
        training.steps(1)
        training.save(checkpoints, 1)
        newest = checkpoints.checkpoints(RUN)[0]
        harm(part_of(tmp_path, checkpoints, "optimizer"))
        latest = checkpoints.latest(RUN)
        assert latest is not None
        assert latest.epoch == (1 if harm is damage else 0), "names and sizes alone are looked at"
        with pytest.raises((DamagedPartError, OriginError)):
            Training().load(checkpoints, 1)
        restored = Training(seed=3)
        with caplog.at_level(logging.WARNING):
            found = restored.load(checkpoints)
        assert found.epoch == 0
        ((key, why),) = found.fell_back_from
        assert key == newest.key
        assert why
        assert f"{newest.key} IS DAMAGED" in caplog.text
        assert_same(restored.model.state_dict(), before.model.state_dict())
        # The run goes on and comes to the same tensors: what is wrong at the origin is written again.
        restored.steps(1)
        restored.save(checkpoints, 1)
        assert Training().load(checkpoints).fell_back_from == ()


def test_nothing_is_loaded_where_no_checkpoint_is_whole(tmp_path: Path) -> None:
    training, other = Training(), Training(seed=3)
    with in_folder(tmp_path) as checkpoints:
        training.save(checkpoints, 0)
        damage(part_of(tmp_path, checkpoints, "model"))
        with pytest.raises(CheckpointNotFoundError, match="is damaged: a part of the checkpoint should be"):
            other.load(checkpoints)
    assert_same_training(other, Training(seed=3))


def test_commits_that_are_forged_copied_or_half_written_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training()
    with in_folder(tmp_path) as checkpoints, in_folder(tmp_path, key_file=tmp_path / "forger") as forger:
        training.save(checkpoints, 0)
        (ours,) = objects(tmp_path, "commits")
        training.save(forger, 5)
        said = json.loads(ours.read_bytes())
        folder = ours.parent
        ahead = f"{9:010d}-{ours.name[11:]}"
        (folder / ahead).write_bytes(ours.read_bytes())
        changed = said | {"body": said["body"].replace('"epoch":0', '"epoch":9')}
        (folder / f"{8}{ahead[1:]}").write_text(json.dumps(changed))
        (folder / f"{7}{ahead[1:]}").write_bytes(ours.read_bytes()[:500])
        (folder / f"{6}{ahead[1:]}").write_bytes(b"")
        (folder / "notes.txt").write_text("mine")
        other_run = tmp_path / "origin" / "commits" / "run-2"
        other_run.mkdir()
        shutil.copy(ours, other_run)
        with caplog.at_level(logging.WARNING):
            latest = checkpoints.latest(RUN)
        assert latest is not None
        assert latest.epoch == 0
        for why in ("not trusted", "is of run", "signature is not", "half of one", "not a commit by its name"):
            assert why in caplog.text
        assert checkpoints.latest("run-2") is None
        with in_folder(tmp_path, trusted=[checkpoints.node_id, forger.node_id]) as both:
            assert [one.epoch for one in both.checkpoints(RUN)] == [5, 0]


def test_unchanged_tensors_are_written_once(tmp_path: Path) -> None:
    training = Training()
    training.steps(1)
    with in_folder(tmp_path) as checkpoints:
        training.save(checkpoints, 0)
        before = objects(tmp_path, "shards")
        training.save(checkpoints, 1)
        assert objects(tmp_path, "shards") == before
        training.optimizer.state_dict()["state"][0]["exp_avg"].add_(1)
        training.save(checkpoints, 2)
        assert len(objects(tmp_path, "shards")) == len(before) + 1
    assert not (tmp_path / "cache").exists(), "parts go from memory; only a node wants files"


def test_a_part_that_is_cut_off_at_the_origin_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training()
    training.steps(1)
    with in_folder(tmp_path) as checkpoints:
        training.save(checkpoints, 0)
        for member in ("model", "optimizer"):
            part_of(tmp_path, checkpoints, member).write_bytes(b"cut off")
    with in_folder(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        training.save(checkpoints, 1)
        assert caplog.text.count("it is written again") == 2
        assert Training().load(checkpoints).fell_back_from == ()


def test_a_save_that_fails_says_so_at_the_next_call_with_its_own_error(tmp_path: Path) -> None:
    training = Training()
    checkpoints = O3CheckpointManager(f"file://{tmp_path}/origin", key_file=tmp_path / "key", cache_dir=tmp_path / "c")
    (tmp_path / "origin").write_text("a file, where a folder should be")
    training.save(checkpoints, 0, wait=False)
    with pytest.raises(OriginError):
        training.save(checkpoints, 1, wait=False)
    training.save(checkpoints, 1, wait=False)
    with pytest.raises(OriginError):
        checkpoints.close()
    with pytest.raises(RuntimeError, match="closed"):
        training.save(checkpoints, 2)


def test_a_save_before_waits_for_no_second_one(tmp_path: Path) -> None:
    training = Training()
    with in_folder(tmp_path) as checkpoints:
        for epoch in range(3):
            training.save(checkpoints, epoch, wait=False)
        assert len(checkpoints.checkpoints(RUN)) >= 2, "the third waited for the first two"
    with in_folder(tmp_path) as checkpoints:
        assert len(checkpoints.checkpoints(RUN)) == 3


def test_what_cannot_be_saved_or_loaded_is_refused_first(tmp_path: Path) -> None:
    training, other = Training(), Training(seed=4)
    with in_folder(tmp_path) as checkpoints:
        for run_id in ("", "../x", "a/b", ".hidden", "a" * 101, "ä"):
            with pytest.raises(InvalidParamsError, match="run id"):
                training.save(checkpoints, 0, run_id=run_id)
        with pytest.raises(InvalidParamsError, match="count from 0"):
            training.save(checkpoints, -1)
        with pytest.raises(UnsayableStateError, match="extra/f"):
            training.save(checkpoints, 0, extra={"f": print})
        checkpoints.save_checkpoint(training.model, None, 0, run_id=RUN, wait=True)
        with pytest.raises(InvalidParamsError, match="no loader and no optimizer and no scheduler"):
            other.load(checkpoints)
        assert_same_training(other, Training(seed=4))
        checkpoints.save_checkpoint({}, None, 1, run_id=RUN, extra=[1], wait=True)
        assert checkpoints.load_checkpoint(RUN).extra == [1]


def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    with in_folder(tmp_path) as checkpoints:

        def in_child() -> str:
            for call in (checkpoints.wait, checkpoints.close, lambda: checkpoints.latest(RUN)):
                with pytest.raises(RuntimeError, match="forked"):
                    call()
            return "refused"

        assert in_fork(in_child) == "refused"


def test_folders_of_killed_processes_are_cleared_away(tmp_path: Path) -> None:
    def dies() -> None:
        with own_folder(tmp_path / "cache") as folder:
            (folder / "part").write_bytes(b"x")
            os._exit(0)

    child = os.fork()
    if child == 0:
        dies()
    os.waitpid(child, 0)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with own_folder(tmp_path / "cache"):
        assert len(list((tmp_path / "cache").iterdir())) == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_key_is_no_new_identity(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(ValueError, match="restore it"):
        O3CheckpointManager(f"file://{tmp_path}", key_file=tmp_path / "key")
    with in_folder(tmp_path) as checkpoints:
        assert SigningKey.load_or_create(tmp_path / "keys" / "run.key").node_id == checkpoints.node_id


def test_nothing_in_torch_bridge_loads_pickle() -> None:
    loads = {"load", "loads", "Unpickler"}
    for path in Path(torch_bridge.checkpoints.__file__).parent.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle", "torch"):
                assert not loads & {alias.name for alias in node.names}, path
            elif isinstance(node, ast.Call):
                module, _, name = ast.unparse(node.func).rpartition(".")
                is_plain = any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords
                )
                assert is_plain or not (module in ("pickle", "dill", "cloudpickle", "torch") and name in loads), path
