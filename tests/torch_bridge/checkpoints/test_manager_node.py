"""Checkpoints through real nodes: seeded after a save, restored from a peer without the origin's parts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.support.bridge.training import Training, assert_same_training, in_folder
from tests.support.daemons import daemon
from tests.support.waiting import wait_until


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_parts_are_seeded_and_come_from_a_peer_where_the_origin_lost_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training()
    training.steps(2)
    with daemon(tmp_path / "a") as saver, daemon(tmp_path / "b", bootstrap=saver) as other:
        with in_folder(tmp_path, node=f"127.0.0.1:{saver.ports['rpc']}") as checkpoints:
            training.save(checkpoints, 0)
        wait_until(lambda: [file["state"] for file in saver.files().values()] == ["seeding"] * 2)
        for part in (tmp_path / "origin" / "shards").iterdir():
            part.unlink()
        restored = Training(seed=5)
        with in_folder(tmp_path, node=f"127.0.0.1:{other.ports['rpc']}") as checkpoints:
            assert restored.load(checkpoints).fell_back_from == ()
        assert_same_training(training, restored)
        assert len(other.files()) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_node_that_is_away_costs_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    with in_folder(tmp_path, node="127.0.0.1:9") as checkpoints, caplog.at_level(logging.WARNING):
        training.save(checkpoints, 0)
        assert "is at the origin, and is not seeded by the node 127.0.0.1:9" in caplog.text
        assert training.load(checkpoints).fell_back_from == ()
        assert "does not come through the node 127.0.0.1:9" in caplog.text
