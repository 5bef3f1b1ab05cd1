"""StreamingShardDataset through a real node, from a real peer: one download a machine, and a node that dies."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.utils.data import DataLoader

from protocol.errors import InvalidParamsError, TimedOutError
from tests.support.bridge.streaming import NAME, lines, numbered_files, numbers
from tests.support.daemons import Daemon, daemon, shoal
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from torch_bridge.shards.sources.node import NodeSource
from torch_bridge.streaming.settings import Buffering

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),  # servers and processes of their own
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torch's own DataLoader
]
ROWS = [60, 35, 80, 52, 40, 60, 20, 75, 61, 60]
ALL = sorted(shard * 1000 + row for shard, rows in enumerate(ROWS) for row in range(rows))
ROOT = Path(__file__).resolve().parents[3]
TTL_S = 1.5
Sources = Callable[..., NodeSource]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """It has published the data set."""
    home = tmp_path_factory.mktemp("seed")
    numbered_files(home / "set", ROWS)
    done = shoal("publish", str(home / "set"), "--name", NAME, "--data-dir", str(home))
    assert done.returncode == 0, done.stderr
    with daemon(home) as node:
        wait_until(lambda: [file["state"] for file in node.files().values()] == ["seeding"] * len(ROWS))
        yield node


@pytest.fixture
def trainer(seed: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """The node of the machine that trains."""
    with daemon(tmp_path / "trainer", bootstrap=seed) as node:
        yield node


@pytest.fixture
def source_of(tmp_path: Path) -> Iterator[Sources]:
    """Makes sources of this process, and closes them."""
    with ExitStack() as stack:

        def made(node: Daemon, folder: str = "ledger", **more: float) -> NodeSource:
            source = NodeSource(address_of(node), NAME, tmp_path / folder, **more)
            stack.callback(source.close)
            return source

        yield made


def address_of(node: Daemon) -> str:
    return f"127.0.0.1:{node.ports['rpc']}"


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def ranks(
    count: int, at: dict[str, str], folder: Path, out: Path, *, step_s: float = 0.01
) -> list[subprocess.Popen[bytes]]:
    """Training processes as torchrun starts them."""
    command = [sys.executable, "-m", "tests.support.bridge.streaming", json.dumps(at), folder, out]
    world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "STEP_S": str(step_s)}
    return [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def test_two_ranks_share_one_download_and_the_last_one_past_a_shard_deletes_it(
    seed: Daemon, trainer: Daemon, tmp_path: Path
) -> None:
    most, sizes = 0, sum(file["size"] for file in seed.files().values())
    running = ranks(2, {"node": address_of(trainer), "ttl_s": "100"}, tmp_path / "ledger", tmp_path)
    try:
        while any(process.poll() is None for process in running):
            most = max(most, len(trainer.files()))
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()
    assert [process.wait() for process in running] == [0, 0]
    shares = [[line["ids"] for line in lines(tmp_path / f"rank{rank}.jsonl")] for rank in range(2)]
    assert sorted(flat(shares[0]) + flat(shares[1])) == ALL
    assert set(flat(shares[0])).isdisjoint(flat(shares[1]))
    wait_until(lambda: trainer.call("STATUS")["swarm"]["downloaded_bytes"] >= sizes)  # it is counted once a second
    assert trainer.call("STATUS")["swarm"]["downloaded_bytes"] < 1.1 * sizes
    assert 0 < most < len(ROWS)
    assert trainer.files() == {}, "also of leases that last for 100 s"
    assert len(seed.files()) == len(ROWS)


def test_a_limit_bounds_what_the_leases_of_the_run_hold_at_the_node(trainer: Daemon, source_of: Sources) -> None:
    with pytest.raises(InvalidParamsError, match="shards that the 2 readers") as refused:
        list(DataLoader(numbers(source_of(trainer), disk_limit=1), batch_size=None, num_workers=2))
    least = int(str(refused.value).partition("Give disk_limit=")[2].split()[0])
    sizes = {entry.filename: entry.size for entry in source_of(trainer).manifest().shards}
    assert max(sizes.values()) <= least < sum(sizes.values()) / 2
    data = numbers(source_of(trainer), disk_limit=least)
    most, batches = 0, []
    for batch in DataLoader(data, batch_size=None, num_workers=2):
        batches.append(batch["id"].tolist())
        most = max(most, sum(sizes[name.rpartition("/")[2]] for name in trainer.files()))
    assert sorted(flat(batches)) == ALL
    assert 0 < most <= least
    gc.collect()
    wait_until(lambda: trainer.files() == {})


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_epochs_in_persistent_workers(trainer: Daemon, source_of: Sources, method: str) -> None:
    data = numbers(source_of(trainer))
    loader = DataLoader(data, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=method)
    found, most = [], 0
    for epoch in range(2):
        data.set_epoch(epoch)
        batches = []
        for batch in loader:
            batches.append(batch["id"].tolist())
            most = max(most, len(trainer.files()))
        found.append(batches)
        wait_until(lambda: trainer.files() == {})
    assert sorted(flat(found[0])) == sorted(flat(found[1])) == ALL
    assert found[0] != found[1]
    assert most < len(ROWS)
    del loader
    gc.collect()


def test_trained_on_where_it_was_published_the_data_set_stays(seed: Daemon, source_of: Sources) -> None:
    data = numbers(source_of(seed))
    for epoch in range(2):
        data.set_epoch(epoch)
        assert sorted(flat(ids(data))) == ALL
    assert [file["state"] for file in seed.files().values()] == ["seeding"] * len(ROWS)
    assert seed.call("STATUS")["leases"] == []


def test_killed_in_an_epoch_what_it_left_at_the_node_is_deleted_by_the_next(
    trainer: Daemon, source_of: Sources, tmp_path: Path
) -> None:
    at = {"node": address_of(trainer), "ttl_s": str(TTL_S)}
    log = tmp_path / "rank0.jsonl"
    alone = flat(ids(numbers(source_of(trainer, "alone"))))
    (first,) = ranks(1, at, tmp_path / "ledger", tmp_path, step_s=0.05)
    try:
        wait_until(lambda: len(lines(log)) >= 20, timeout_s=60)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    begun = lines(log)
    left = set(trainer.files())
    assert left
    wait_until(lambda: trainer.call("STATUS")["leases"] == [])
    # It goes on late enough to be past some of what lies there.
    data = numbers(source_of(trainer))
    state = data.state_at(len(begun) + 15)
    data.load_state_dict(state)
    rest = ids(data)
    assert flat(rest) == alone[-len(flat(rest)) :]
    assert trainer.files() == {}


def test_a_node_that_is_killed_and_comes_back_loses_no_sample(seed: Daemon, source_of: Sources, tmp_path: Path) -> None:
    with ExitStack() as stack:
        port = str(free_port())
        node = stack.enter_context(daemon(tmp_path / "trainer", "--rpc-port", port, bootstrap=seed))
        data = numbers(source_of(node))
        batches = iter(data)
        found = [next(batches)["id"].tolist() for _ in range(10)]
        node.end(signal.SIGKILL)
        again = stack.enter_context(daemon(tmp_path / "trainer", "--rpc-port", port, bootstrap=seed))
        found += ids(batches)
        assert sorted(flat(found)) == ALL
        wait_until(lambda: again.files() == {})


def test_a_node_that_is_killed_and_stays_away_is_named(seed: Daemon, source_of: Sources, tmp_path: Path) -> None:
    with daemon(tmp_path / "trainer", bootstrap=seed) as node:
        source = source_of(node, reconnect_s=1.0)
        data = numbers(source, buffering=Buffering(buffer_size=1, max_buffer=1, shard_timeout_s=4.5))
        batches = iter(data)
        found = [next(batches)["id"].tolist() for _ in range(3)]
        node.end(signal.SIGKILL)
        with pytest.raises(TimedOutError, match=rf"the node at {address_of(node)} did not come back within 1 s"):
            found += ids(batches)
    assert len(found) > 2
    assert len(set(flat(found))) == len(flat(found)) < len(ALL), "what was here was given"


def test_epoch_after_epoch_takes_no_more_connections(seed: Daemon, source_of: Sources) -> None:
    """Each iteration has threads of its own."""
    data = numbers(source_of(seed))
    open_sockets = []
    for epoch in range(4):
        data.set_epoch(epoch)
        ids(data)
        connections = psutil.Process().net_connections("tcp")
        open_sockets.append(sum(bool(one.raddr) and one.raddr.port == seed.ports["rpc"] for one in connections))
    assert open_sockets[-1] <= open_sockets[0] + 1, open_sockets
