"""Training through a node on which a person keeps shards: it deletes what it fetched itself, and nothing else."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.bridge.streaming import NAME, numbered_files, numbers
from tests.support.daemons import Daemon, daemon, shoal
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from torch_bridge.shards.sources.node import NodeSource

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),  # servers and processes of their own
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torch's own DataLoader
]
OTHER = "tests/other"
ROWS = [40, 35, 50, 32, 40, 45]
ALL = sorted(shard * 1000 + row for shard, rows in enumerate(ROWS) for row in range(rows))


@pytest.fixture
def seed(tmp_path: Path) -> Iterator[Daemon]:
    """It has published two data sets of six shards each."""
    home = tmp_path / "seed"
    for name in (NAME, OTHER):
        numbered_files(tmp_path / name, ROWS)
        done = shoal("publish", str(tmp_path / name), "--name", name, "--data-dir", str(home))
        assert done.returncode == 0, done.stderr
    with daemon(home) as node:
        wait_until(lambda: [file["state"] for file in node.files().values()] == ["seeding"] * 2 * len(ROWS))
        yield node


def address_of(node: Daemon) -> str:
    return f"127.0.0.1:{node.ports['rpc']}"


def flat(batches: Iterable[list[int]]) -> list[int]:
    """The samples, in the order of their numbers."""
    return sorted(itertools.chain.from_iterable(batches))


def states(node: Daemon) -> dict[str, dict[int, tuple[str, bool]]]:
    """By data set and shard: its state, and whether it is pinned."""
    found: dict[str, dict[int, tuple[str, bool]]] = {}
    for file in node.files().values():
        found.setdefault(file["dataset"], {})[file["shard_id"]] = file["state"], file.get("pinned", False)
    return found


SIX = {NAME: dict.fromkeys(range(len(ROWS)), ("seeding", True))}


def test_what_was_pulled_stays_and_what_training_fetched_goes_also_through_a_kill(seed: Daemon, tmp_path: Path) -> None:
    home, port = tmp_path / "trainer", str(free_port())

    def start(stack: ExitStack) -> Daemon:
        return stack.enter_context(daemon(home, "--rpc-port", port, bootstrap=seed))

    def batches_of(name: str) -> Iterator[list[int]]:
        source = NodeSource(f"127.0.0.1:{port}", name, tmp_path / f"ledger-{name.replace('/', '-')}")
        stack.callback(source.close)
        return (batch["id"].tolist() for batch in numbers(source))

    with ExitStack() as stack:
        trainer = start(stack)
        assert shoal("pull", NAME, "--node", address_of(trainer)).returncode == 0
        assert states(trainer) == SIX
        for name in (NAME, OTHER):
            assert flat(batches_of(name)) == ALL
        assert states(trainer) == SIX

        running = {name: batches_of(name) for name in (NAME, OTHER)}
        found = {name: [next(batches) for _ in range(8)] for name, batches in running.items()}
        assert any(not is_pinned for _, is_pinned in states(trainer)[OTHER].values())
        trainer.end(signal.SIGKILL)
        trainer = start(stack)
        for name, batches in running.items():
            assert flat([*found[name], *batches]) == ALL
        # Not at once if the node still looks through a file for the lease that was taken again.
        wait_until(lambda: states(trainer) == SIX)

        seed.end()
        last = stack.enter_context(daemon(tmp_path / "last", bootstrap=trainer))
        pulled = shoal("pull", NAME, "--node", address_of(last), "--json")
        assert pulled.returncode == 0, pulled.stderr
        assert {one["source"] for one in json.loads(pulled.stdout)["shards"]} == {"peers"}


def test_files_unpin_and_evict_as_a_person_types_them(seed: Daemon, tmp_path: Path) -> None:
    def typed(*command: str) -> Any:
        done = shoal(*command, "--node", address_of(seed), "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def sizes(wanted: Callable[[dict[str, Any]], bool]) -> int:
        return sum(file["size"] for file in typed("files")["files"] if wanted(file))

    assert all(file["pinned"] for file in typed("files")["files"])
    assert "12 pinned" in shoal("files", "--node", address_of(seed)).stdout
    size = sizes(lambda file: file["dataset"] == OTHER)
    ended = typed("unpin", OTHER)
    assert (ended["shard_ids"], ended["bytes"], ended["evictable_bytes"]) == ([0, 1, 2, 3, 4, 5], size, size)
    assert sizes(lambda file: not file.get("pinned")) == size
    assert "0 shards unpinned" in shoal("unpin", OTHER, "--node", address_of(seed)).stdout

    source = NodeSource(address_of(seed), OTHER, tmp_path / "ledger")
    assert flat(batch["id"].tolist() for batch in numbers(source)) == ALL
    source.close()
    assert set(states(seed)) == {NAME}, "training was past it, and nobody keeps it"

    seed.call("FETCH_SHARD", {"dataset": NAME, "shard_id": 3, "lease": "run"})
    kept = shoal("evict", NAME, "--node", address_of(seed))
    assert kept.returncode == 1
    assert "5 shards deleted" in kept.stdout
    assert "held by 1 lease" in kept.stderr
    seed.call("RELEASE", {"lease": "run"})
    assert [one["shard_id"] for one in typed("evict", NAME)["evicted"]] == [3]
    assert states(seed) == {}
    gone = shoal("evict", NAME, "--node", address_of(seed))
    assert gone.returncode == 1
    assert f"no shard of dataset {NAME} is on this node" in gone.stderr
