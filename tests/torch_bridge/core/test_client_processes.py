"""O3Client in other processes: forked ones, whose parent has used it, and spawned ones."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from node.cli.demo.s3_server import S3Server
from node.origin.settings import OriginSettings
from tests.support.bridge.o3_client import (
    BODY,
    client_of,
    counted,
    in_fork,
    read_in_every_way,
    say_what_is_read,
    served,
)
from tests.support.origins.s3_server import credentials, s3_server
from tests.support.origins.servers import hub_stand_in, raw_server
from torch_bridge import O3Client
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # servers and processes of their own


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def bucket(weed: S3Server, request: pytest.FixtureRequest) -> Iterator[Store]:
    """Used already: in this process obstore runs."""
    with client_of(weed) as client:
        store = client.bucket(weed.bucket, request.node.name.replace("[", "-").rstrip("]"))
        store.put("a", BODY)
        assert [info.key for info in store.list()] == ["a"]
        yield store


def test_a_forked_child_reads_and_writes_after_its_parent_did(bucket: Store) -> None:
    def child() -> list[str]:
        read_in_every_way(bucket)
        bucket.put("b", BODY[:500], if_absent=True)
        bucket.put("large", BODY * 9)
        bucket.delete("b")
        return [info.key for info in bucket.list()]

    assert in_fork(child) == ["a", "large"]
    # A child of a child, and the parent goes on.
    assert in_fork(lambda: read_in_every_way(bucket) + in_fork(lambda: read_in_every_way(bucket))) == "readread"
    read_in_every_way(bucket)
    assert bucket.head("large").size == 9 * len(BODY)


def test_a_fork_while_other_threads_are_in_the_middle_of_calls(bucket: Store, weed: S3Server) -> None:
    stop, failures = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            while not stop.is_set():
                assert bucket.get_range("a", 5, 900_000) == BODY[5:900_000]
                with client_of(weed) as fresh:  # opened anew, again and again
                    fresh.at(bucket.url).head("a")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert in_fork(lambda: len(bucket.get_range("a", 0, 100_000))) == 100_000
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert failures == []


def test_a_stream_that_the_parent_began_is_refused_in_the_child_and_goes_on_in_the_parent(bucket: Store) -> None:
    stream = bucket.stream("a")
    first = next(stream)

    def child() -> str:
        with pytest.raises(RuntimeError, match="process that this one was forked from"):
            list(stream)
        return read_in_every_way(bucket)

    assert in_fork(child) == "read"
    assert first + b"".join(stream) == BODY


def test_files_the_web_and_the_hub_after_a_fork(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY)
    with served(raw_server(BODY)) as web, served(hub_stand_in({"a": BODY})) as hub:
        settings = OriginSettings(hf_endpoint=f"http://127.0.0.1:{hub.port}")
        with O3Client(settings=settings) as client:
            for url in (tmp_path.as_uri(), f"{web.url}/shards", "hf://datasets/some/data"):
                store = client.at(url)
                read_in_every_way(store)
                for _ in range(2):
                    assert in_fork(lambda store=store: read_in_every_way(store)) == "read"  # type: ignore[misc]
                    # Nothing that the child did closed a connection of ours.
                    read_in_every_way(store)


def test_spawned_children_take_their_keys_from_the_environment_or_say_which(
    bucket: Store, weed: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weed.secret_key.encode() not in pickle.dumps(bucket)
    context = multiprocessing.get_context("spawn")
    found = []
    for environment in ({}, credentials(weed)):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        said = context.SimpleQueue()
        child = context.Process(target=say_what_is_read, args=(bucket, said))
        child.start()
        found.append(said.get())
        child.join(20)
    assert found[1] == "read"
    assert "AKAVE_O3_ACCESS_KEY and AKAVE_O3_SECRET_KEY" in found[0]
    assert weed.secret_key not in found[0]


class Ranges(Dataset[torch.Tensor]):
    """Ten ranges of one object."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.frombuffer(
            bytearray(self.store.get_range("a", index * 1000, index * 1000 + 1000)), dtype=torch.uint8
        )


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=[pytest.mark.slow, pytest.mark.timeout(180)])])
def test_workers_of_a_data_loader(bucket: Store, weed: S3Server, context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in credentials(weed).items():
        monkeypatch.setenv(name, value)
    loader = DataLoader(Ranges(bucket), batch_size=5, num_workers=2, multiprocessing_context=context)
    for _ in range(2 if context == "fork" else 1):
        assert b"".join(bytes(batch.numpy()) for batch in loader) == BODY[:10_000]


def test_a_stream_that_is_left_early_is_closed_first() -> None:
    closed: list[bool] = []
    numbers = loop_thread().iterate(counted(1000, closed))
    assert [next(numbers), next(numbers)] == [0, 1]
    numbers.close()
    assert closed == [True]
    assert list(loop_thread().iterate(counted(100, closed))) == list(range(100))


def test_a_blocking_call_on_the_loop_itself_says_so() -> None:
    async def call() -> None:
        loop_thread().run(call())

    with pytest.raises(RuntimeError, match="own thread"):
        loop_thread().run(call())


def test_a_program_that_closes_nothing_ends_and_says_nothing() -> None:
    program = (
        "import sys; from torch_bridge import O3Client; store = O3Client().at(sys.argv[1])\n"
        "print(len(store.get('a'))); stream = store.stream('a'); next(stream)"
    )
    with served(raw_server(BODY)) as server:
        command = [sys.executable, "-W", "always", "-c", program, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert (done.stdout, done.stderr) == (f"{len(BODY)}\n", "")
