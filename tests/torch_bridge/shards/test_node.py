"""Shards through a real node, from a real peer."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import CancelledRequestError, InvalidShardError, UnreachableError
from protocol.manifest import ShardEntry
from tests.support.bridge.shards import overwrite_in_the_middle, parquet_files
from tests.support.daemons import Daemon, daemon, shoal
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.sources.factory import open_source
from torch_bridge.shards.sources.interface import ShardSource
from torch_bridge.shards.sources.node import NodeSource

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # servers and processes of their own


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """It has `org/set` of three shards."""
    home = tmp_path_factory.mktemp("seed")
    parquet_files(home / "set", 3)
    done = shoal("publish", str(home / "set"), "--name", "org/set", "--data-dir", str(home))
    assert done.returncode == 0, done.stderr
    with daemon(home) as node:
        wait_until(lambda: [file["state"] for file in node.files().values()] == ["seeding"] * 3)
        yield node


@pytest.fixture(scope="module")
def trainer(seed: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("trainer"), bootstrap=seed) as node:
        yield node


@pytest.fixture
def source(trainer: Daemon, tmp_path: Path) -> Iterator[ShardSource]:
    source = open_source(f"127.0.0.1:{trainer.ports['rpc']}", "org/set", folder=tmp_path / "ledger")
    yield source
    source.close()


def leases(node: Daemon) -> dict[str, int]:
    return {one["lease"]: one["shards"] for one in node.call("STATUS")["leases"]}


def test_an_epoch_streams_through_the_node(trainer: Daemon, source: ShardSource) -> None:
    entries = source.manifest().shards
    with StreamingDownloader(source, buffer_size=1, max_buffer=1, stop_free_bytes=0) as shards:
        for entry in entries:
            assert shards.wait_for_shard(entry, 30).stat().st_size == entry.size
            shards.consumed(entry)
        assert shards.status().deleted == 3
        assert shards.status().bytes_by_source == {"peers": sum(entry.size for entry in entries)}
    assert trainer.files() == {}


def test_a_distrusted_shard_comes_anew_from_a_peer(source: ShardSource) -> None:
    with StreamingDownloader(source, [0], stop_free_bytes=0) as shards:
        path = shards.wait_for_shard(0, 30)
        right = path.read_bytes()
        overwrite_in_the_middle(path)
        shards.distrust(0, "a row group does not decode")
        assert shards.wait_for_shard(0, 30).read_bytes() == right
        shards.distrust(0, "it still does not decode")
        with pytest.raises(InvalidShardError, match="bytes that were published"):
            shards.wait_for_shard(0, 30)
        source.discard(source.manifest().shards[0])


def _fetch(source: NodeSource, entry: ShardEntry, said: Any, go_on: Any) -> None:
    said.put(str(source.fetch(entry).path))
    go_on.wait(20)
    source.close()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=[pytest.mark.slow, pytest.mark.timeout(180)])])
def test_each_process_has_a_lease_of_its_own(trainer: Daemon, source: ShardSource, method: str) -> None:
    entry = source.manifest().shards[1]
    path = source.fetch(entry).path
    context: Any = multiprocessing.get_context(method)
    said, go_on = context.Queue(), context.Event()
    child = context.Process(target=_fetch, args=(source, entry, said, go_on))
    child.start()
    assert said.get(timeout=20) == str(path)
    assert sorted(leases(trainer).values()) == [1, 1]
    assert source.discard(entry) is False, "the child still reads it"
    assert path.exists()
    go_on.set()
    child.join(20)
    assert child.exitcode == 0
    source.fetch(entry)
    assert source.discard(entry) is True
    assert not path.exists()


def test_threads_of_one_process_share_a_lease(trainer: Daemon, source: ShardSource) -> None:
    entries = source.manifest().shards
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(source.fetch, entries))
    assert list(leases(trainer).values()) == [3]
    assert all(source.discard(entry) for entry in entries)


def test_a_pickle_asks_the_same_node_for_the_same_set(source: ShardSource) -> None:
    again = pickle.loads(pickle.dumps(source))
    assert again.manifest() == source.manifest()
    assert again.folder == source.folder
    again.close()


def test_a_file_that_was_cut_off_on_the_nodes_disk_comes_anew(source: ShardSource) -> None:
    entry = source.manifest().shards[0]
    path = source.fetch(entry).path
    right = path.read_bytes()
    seen = path.stat()
    path.write_bytes(right[:-1] + b"?")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert source.fetch(entry).path.read_bytes() == right
    assert source.discard(entry)


def test_a_node_that_says_nothing_does_not_hold_up_a_stop(trainer: Daemon, source: ShardSource) -> None:
    entry = source.manifest().shards[2]
    raised: list[BaseException] = []
    stop = threading.Event()

    def fetch() -> None:
        try:
            source.fetch(entry, stop=stop)
        except CancelledRequestError as error:
            raised.append(error)

    trainer.process.send_signal(signal.SIGSTOP)
    try:
        thread = threading.Thread(target=fetch)
        thread.start()
        time.sleep(0.3)
        stop.set()
        thread.join(10)
        assert len(raised) == 1
    finally:
        trainer.process.send_signal(signal.SIGCONT)
    source.discard(entry)


def test_a_shard_that_is_discarded_while_its_lease_is_taken_again_stays_gone(
    trainer: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = leases(trainer).keys()
    with closing(NodeSource(f"127.0.0.1:{trainer.ports['rpc']}", "org/set", tmp_path, ttl_s=3.0)) as source:
        entry = source.manifest().shards[0]
        path = source.fetch(entry).path
        [lease] = leases(trainer).keys() - others
        really, takes_again, discarding, taken = source._call, threading.Event(), threading.Event(), threading.Event()

        def call(method: str, *args: Any, **more: Any) -> Any:
            if method != "FETCH_SHARD":
                return really(method, *args, **more)
            takes_again.set()
            assert discarding.wait(20)
            time.sleep(0.5)  # the discard would come first, if it could
            try:
                return really(method, *args, **more)
            finally:
                taken.set()

        monkeypatch.setattr(source, "_call", call)
        trainer.call("RELEASE", {"lease": lease})  # as after the node's restart: it knows nothing of the lease
        assert takes_again.wait(20)
        discarding.set()
        wait_until(lambda: source.discard(entry))
        assert taken.wait(20)
        assert lease not in leases(trainer)
        assert entry.filename not in trainer.files()
        assert not path.exists()


def test_a_node_that_is_restarted_is_asked_again_and_its_leases_are_taken_again(
    seed: Daemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home, port = tmp_path / "trainer", free_port()
    with ExitStack() as whole:
        with daemon(home, "--rpc-port", str(port), bootstrap=seed) as node:
            source = NodeSource(f"127.0.0.1:{port}", "org/set", tmp_path / "ledger", ttl_s=3.0, reconnect_s=60.0)
            whole.enter_context(closing(source))
            first, second, _ = source.manifest().shards
            path = source.fetch(first).path
            held = leases(node)
            assert list(held.values()) == [1]
        with caplog.at_level(logging.WARNING):
            gone = NodeSource(f"127.0.0.1:{port}", "org/set", tmp_path / "other", reconnect_s=0.5)
            with pytest.raises(UnreachableError, match=r"did not come back within 0\.5 s"):
                gone.manifest()
        threads = whole.enter_context(ThreadPoolExecutor(1))
        found = threads.submit(source.fetch, second)  # while the node is not there
        with daemon(home, "--rpc-port", str(port), bootstrap=seed) as node:
            assert found.result(60).path.exists()
            wait_until(lambda: leases(node) == dict.fromkeys(held, 2))
            assert path.exists()
            for entry in (first, second):
                # Not at once where the node still looks through the file for the lease that was taken again.
                wait_until(partial(source.discard, entry))
            assert node.files() == {}
