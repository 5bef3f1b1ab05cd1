"""StreamingShardDataset over a real S3 server: shards come, are read by several workers and ranks, and go."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from node.cli.demo.s3_server import S3Server
from protocol.errors import InvalidShardError, ShardInUseError
from tests.support.bridge.o3_client import client_of
from tests.support.bridge.streaming import (
    BUFFERING,
    ORDERING,
    address,
    lines,
    numbered_files,
    numbers,
    publish_numbered,
    source_at,
    train,
)
from tests.support.origins.s3_server import s3_server
from torch_bridge import Ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),  # daemons and servers of their own
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torch's own DataLoader
]
ROWS = [60, 35, 80, 52, 40, 60, 20, 75, 61, 60]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    paths = numbered_files(tmp_path_factory.mktemp("files"), ROWS)
    with s3_server(tmp_path_factory.mktemp("weed")) as server, client_of(server) as client:
        publish_numbered(client.bucket(server.bucket), paths)
        publish_numbered(client.bucket(server.bucket), paths[:1], "tests/claimed", claimed=3)
        yield server


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def here(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet*"))


ALL = sorted(shard * 1000 + row for shard, rows in enumerate(ROWS) for row in range(rows))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_in_persistent_workers_and_nothing_stays(server: S3Server, tmp_path: Path, workers: int) -> None:
    data = numbers(source_at(server, tmp_path))
    loader = DataLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    found, most = [], 0
    for epoch in range(2):
        data.set_epoch(epoch)
        batches = []
        for batch in loader:
            batches.append(batch["id"].tolist())
            most = max(most, len(here(tmp_path)))
        found.append(batches)
    assert sorted(flat(found[0])) == sorted(flat(found[1])) == ALL
    assert found[0] != found[1]
    assert most < len(ROWS)
    del loader
    gc.collect()
    assert here(tmp_path) == []


def test_shards_kept_behind_and_the_validation_shard_stay(server: S3Server, tmp_path: Path) -> None:
    buffering = replace(BUFFERING, keep_behind=2)
    data = numbers(source_at(server, tmp_path), validation_shard="shard_00003.parquet", buffering=buffering)
    assert sorted(flat(ids(data))) == [sample for sample in ALL if sample // 1000 != 3]
    assert len(here(tmp_path)) == 3
    assert "shard_00003.parquet" in here(tmp_path)
    assert flat(ids(data.validation_batches())) == list(range(3000, 3052))


def test_every_rank_has_as_many_batches_with_drop_last(server: S3Server, tmp_path: Path) -> None:
    ordering = replace(ORDERING, drop_last=True)
    whole = ids(numbers(source_at(server, tmp_path / "whole"), ordering=ordering))
    for ranks in (2, 3, 5):
        shares = [
            ids(numbers(source_at(server, tmp_path / "a"), ordering=ordering, ranks=Ranks(rank, ranks, rank, ranks)))
            for rank in range(ranks)
        ]
        assert {len(share) for share in shares} == {len(whole) // ranks}
        assert shares[0] == whole[: len(whole) // ranks * ranks : ranks]


def test_a_shard_damaged_on_disk_is_brought_anew(server: S3Server, tmp_path: Path) -> None:
    source = source_at(server, tmp_path)
    for entry in source.manifest().shards[:3]:
        path = source.fetch(entry).path
        seen = path.stat()
        raw = bytearray(path.read_bytes())
        raw[-200:-20] = b"\xff" * 180  # in the footer
        path.write_bytes(raw)
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert sorted(flat(ids(numbers(source)))) == ALL
    assert len(list(tmp_path.glob("*.bad-1"))) == 3


def test_rows_that_the_manifest_only_claims_are_named(server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(InvalidShardError, match=r"shard_00000\.parquet has 60 rows by its footer.*says 63"):
        ids(numbers(source_at(server, tmp_path, "tests/claimed")))


def test_a_second_loader_waits_for_the_first_ones_workers(server: S3Server, tmp_path: Path) -> None:
    data = numbers(source_at(server, tmp_path))
    loader = DataLoader(data, batch_size=None, num_workers=2)
    batches = iter(loader)
    first = next(batches)["id"].tolist()
    again = iter(loader)
    time.sleep(1.5)  # its workers ask for what those of the one before still hold
    del batches
    assert next(again)["id"].tolist() == first
    assert sorted(first + flat(ids(again))) == ALL


def test_two_iterations_at_once_are_refused_in_words(server: S3Server, tmp_path: Path) -> None:
    data = numbers(source_at(server, tmp_path))
    first, second = iter(data), iter(data)
    next(first)
    with pytest.raises(ShardInUseError, match="delete its iterator"):
        next(second)
    first.close()  # type: ignore[attr-defined]
    assert sorted(flat(ids(data))) == ALL


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_of_an_epoch_is_continued_by_the_next(server: S3Server, tmp_path: Path, workers: int) -> None:
    def loader() -> tuple[Any, StatefulDataLoader[Any]]:
        data = numbers(source_at(server, tmp_path))
        return data, StatefulDataLoader(data, batch_size=None, num_workers=workers)

    data, first = loader()
    batches = iter(first)
    count = data.order().batches
    taken = [next(batches)["id"].tolist() for _ in range(count)]
    assert sorted(flat(taken)) == ALL
    state = first.state_dict()
    del batches, first
    gc.collect()
    data, again = loader()
    again.load_state_dict(state)
    rest = []
    for epoch in range(2):
        data.set_epoch(epoch)
        rest.append(ids(again))
    assert rest[0] == []
    assert sorted(flat(rest[1])) == ALL
    assert rest[1] != taken


def test_after_an_epoch_the_data_sets_own_state_is_its_end(server: S3Server, tmp_path: Path) -> None:
    data = numbers(source_at(server, tmp_path))
    ids(data)
    state = json.loads(json.dumps(data.state_dict()))
    again = numbers(source_at(server, tmp_path))
    again.load_state_dict(state)
    again.set_epoch(0)
    assert ids(again) == []
    later = numbers(source_at(server, tmp_path))
    later.set_epoch(1)
    later.load_state_dict(state)
    second = ids(later)
    assert sorted(flat(second)) == ALL
    following = numbers(source_at(server, tmp_path))
    following.load_state_dict(state)
    assert ids(following) == second, "without set_epoch the next one begins"


def test_killed_in_an_epoch_the_rest_is_exactly_the_rest(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEP_S", "0.05")
    alone = ids(numbers(source_at(server, tmp_path / "alone")))
    folder, out = tmp_path / "shards", tmp_path / "out"
    out.mkdir()
    context = multiprocessing.get_context("fork")
    log = out / "rank0.jsonl"
    seen: list[list[int]] = []
    for kill_after in (9, 17, None):
        child = context.Process(target=train, args=(address(server), folder, out))
        child.start()
        deadline = time.monotonic() + 30
        while kill_after and len(lines(log)) < kill_after and time.monotonic() < deadline:
            time.sleep(0.002)
        if kill_after:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        child.join(30)
        assert child.exitcode == (-signal.SIGKILL if kill_after else 0)
        seen += [line["ids"] for line in lines(log)]
        (out / "resume.json").write_text(json.dumps(lines(log)[-1]["state"]))
        log.unlink()
    assert seen == alone
    assert here(folder) == [], "what a killed one left is deleted by the next"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_killed_ranks_are_continued_by_two(server: S3Server, tmp_path: Path) -> None:
    """Processes as torchrun starts them."""
    alone = ids(numbers(source_at(server, tmp_path / "alone")))
    folder, out = tmp_path / "shards", tmp_path / "out"
    out.mkdir()

    command = [sys.executable, "-m", "tests.support.bridge.streaming", json.dumps(address(server))]

    def ranks(count: int) -> list[subprocess.Popen[bytes]]:
        world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        return [
            subprocess.Popen([*command, folder, out], cwd=ROOT, env=os.environ | world | {"RANK": str(rank)})
            for rank in range(count)
        ]

    logs = [out / f"rank{rank}.jsonl" for rank in range(4)]
    running = ranks(4)
    try:
        deadline = time.monotonic() + 120
        while min(len(lines(log)) for log in logs) < 3 and time.monotonic() < deadline:
            assert all(process.poll() in (None, 0) for process in running)
            time.sleep(0.01)
    finally:
        for process in running:
            process.kill()
            process.wait(10)
    steps = min(len(lines(log)) for log in logs)
    assert steps >= 3
    seen = [lines(log)[step]["ids"] for step in range(steps) for log in logs]
    (out / "resume.json").write_text(json.dumps(lines(logs[0])[steps - 1]["state"]))
    for log in logs:
        log.unlink()
    assert [process.wait(120) for process in ranks(2)] == [0, 0]
    rest = [[line["ids"] for line in lines(log)] for log in logs[:2]]
    for step in range(len(rest[0])):
        seen += [share[step] for share in rest if step < len(share)]
    assert seen == alone
    assert here(folder) == []
