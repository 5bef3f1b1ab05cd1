"""StreamingBatchDataset through a real node, from a real peer: each file comes once, and a node that dies."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from protocol.errors import UnreachableError
from tests.support.bridge.batches import SIZE, bodies, bytes_under, dataset, folder_of, name_and_body, sampled
from tests.support.daemons import Daemon, daemon, shoal
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from torch_bridge import Ranks
from torch_bridge.batches.sources.swarm import SwarmFiles
from torch_bridge.shards.sources.node import NodeSource

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),  # servers and processes of their own
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torch's own DataLoader
]
FILES = {key.rpartition("/")[2]: body for key, body in bodies(12).items()}
BYTES = sum(map(len, FILES.values()))
NAME = "org/clips"
Sources = Callable[..., SwarmFiles]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """It has published the files."""
    home = tmp_path_factory.mktemp("seed")
    folder_of(home / "set", FILES)
    done = shoal("publish", str(home / "set"), "--name", NAME, "--data-dir", str(home))
    assert done.returncode == 0, done.stderr
    with daemon(home) as node:
        wait_until(lambda: [file["state"] for file in node.files().values()] == ["seeding"] * len(FILES))
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

        def made(node: Daemon, **more: float) -> SwarmFiles:
            shards = NodeSource(f"127.0.0.1:{node.ports['rpc']}", NAME, tmp_path / "ledger", **more)
            stack.callback(shards.close)
            return SwarmFiles(shards)

        yield made


def downloaded(node: Daemon) -> int:
    """Payload bytes, from peers."""
    return int(node.call("STATUS")["swarm"]["downloaded_bytes"])


def shards_here(folder: Path) -> tuple[int, int]:
    return bytes_under(folder / "shards") if (folder / "shards").is_dir() else (0, 0)


def test_two_ranks_take_each_file_once_and_leave_nothing(trainer: Daemon, source_of: Sources, tmp_path: Path) -> None:
    def read(rank: int) -> list[Any]:
        files = dataset(source_of(trainer), tmp_path / "cache", decode=name_and_body, ranks=Ranks(rank, 2, rank, 2))
        return list(files)

    with sampled(trainer.home, shards_here) as sizes, ThreadPoolExecutor(2) as ranks:
        shares = list(ranks.map(read, range(2)))
    assert len(shares[0]) == len(shares[1]) == 6
    assert {name: body for share in shares for name, body, _ in share} == FILES
    wait_until(lambda: downloaded(trainer) >= BYTES)  # it is counted once a second
    assert downloaded(trainer) < 1.1 * BYTES
    assert SIZE < max(size for size, _ in sizes) < 10.5 * SIZE, "the bound holds at the node, beside its manifest"
    assert trainer.files() == {}
    assert trainer.call("STATUS")["leases"] == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_epochs_in_workers(trainer: Daemon, source_of: Sources, tmp_path: Path, method: str) -> None:
    source, first = source_of(trainer), min(FILES)
    assert source.read(first) == FILES[first], "the parent has a lease and a connection before its workers come"
    files = dataset(source, tmp_path / "cache", decode=name_and_body, samples_ahead=3)
    loader = DataLoader(files, batch_size=None, num_workers=2, multiprocessing_context=method)
    for epoch in range(2):
        files.set_epoch(epoch)
        found = list(loader)
        assert len(found) == len(FILES)
        assert {name: body for name, body, _ in found} == FILES
        wait_until(lambda: trainer.files() == {})
    assert downloaded(trainer) < 2.2 * BYTES


def test_a_node_that_is_killed_and_comes_back_loses_no_file(seed: Daemon, source_of: Sources, tmp_path: Path) -> None:
    with ExitStack() as stack:
        port = str(free_port())
        node = stack.enter_context(daemon(tmp_path / "trainer", "--rpc-port", port, bootstrap=seed))
        steps = iter(dataset(source_of(node), tmp_path / "cache", decode=name_and_body))
        found = [next(steps)]
        wait_until(lambda: [file["state"] for file in node.files().values()] == ["seeding"] * 8)  # two batches
        node.end(signal.SIGKILL)
        again: list[Daemon] = []

        def come_back() -> None:
            time.sleep(3)
            again.append(stack.enter_context(daemon(tmp_path / "trainer", "--rpc-port", port, bootstrap=seed)))

        starter = threading.Thread(target=come_back)
        stack.callback(starter.join)
        starter.start()  # meanwhile the files that are here are used, and given up
        found += steps
        assert {name: body for name, body, _ in found} == FILES
        assert len(found) == len(FILES)
        wait_until(lambda: again[0].files() == {})


def test_a_node_that_is_killed_and_stays_away_is_named(seed: Daemon, source_of: Sources, tmp_path: Path) -> None:
    with daemon(tmp_path / "trainer", bootstrap=seed) as node:
        steps = iter(dataset(source_of(node, reconnect_s=1.0), tmp_path / "cache"))
        found = [next(steps)]
        node.end(signal.SIGKILL)
        with pytest.raises(UnreachableError, match=r"did not come back within 1 s"):
            found += steps
    assert len(found) == len(set(found)) < len(FILES)
