"""Iterations that nobody goes on with, collected in the middle of whatever a thread does: nothing waits for itself."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.bridge.batches import bodies, folder_of, only_name
from torch_bridge.batches.dataset import StreamingBatchDataset
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.origin import OriginFiles
from torch_bridge.core.closing import ClosingStack
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Buffering
from torch_bridge.streaming.text_loader import TextLoader

LIMIT_S = 8.0
"""What takes longer hangs."""
FILES = bodies(12)


class Gate:
    """The fetch of the first file passes; each other one needs the loop, once the test lets it go on."""

    def __init__(self) -> None:
        self.begun, self.go, self.waits = threading.Event(), threading.Event(), threading.Event()
        self.here: Callable[[], object] | None = None
        """Called once on a thread that fetches."""
        self._passed = 0
        self._guard = threading.Lock()

    def __call__(self, *, is_first: bool | None = None) -> None:
        """`is_first`: whether it is of the first file; None: the first call is."""
        with self._guard:
            self._passed += 1
            if self._passed == 1 if is_first is None else is_first:
                return
        self.begun.set()
        self.go.wait(LIMIT_S)
        with self._guard:
            call, self.here = self.here, None
        if call is not None:
            call()
        self.waits.set()
        # Bounded, so that a test that fails leaves a loop that goes on.
        loop_thread().submit(asyncio.sleep(0)).result(2 * LIMIT_S)


class GatedFiles(OriginFiles):
    def __init__(self, store: Any, gate: Gate) -> None:
        super().__init__(store)
        self._gate = gate

    def fetch(self, file: RemoteFile, *args: Any, **more: Any) -> Path:
        self._gate(is_first=file.key == min(FILES))  # two threads: the second file may be asked for before the first
        return super().fetch(file, *args, **more)


class GatedShards(LocalSource):
    def __init__(self, folder: Path, gate: Gate) -> None:
        super().__init__(folder)
        self._gate = gate

    def fetch(self, *args: Any, **more: Any) -> Any:
        self._gate()
        return super().fetch(*args, **more)


def batches_of(folder: Path, gate: Gate) -> Iterator[Any]:
    """Samples that are fetched by two threads."""
    origin = folder / "origin"
    store = folder_of(origin, {} if origin.exists() else FILES)
    source = GatedFiles(store, gate)
    return iter(
        StreamingBatchDataset(
            source, folder / "cache", cache_size=4, max_bytes=1 << 20, decode=only_name, concurrency=2, shuffle=False
        )
    )


def shards_of(folder: Path, gate: Gate, **more: Any) -> StreamingShardDataset:
    for shard in () if any(folder.glob("*.parquet")) else range(4):
        table = pa.table({"text": [f"shard {shard} row {row}" for row in range(20)]})
        pq.write_table(table, folder / f"shard_{shard:05d}.parquet", row_group_size=20)
    return StreamingShardDataset(GatedShards(folder, gate), batch_size=5, buffering=Buffering(buffer_size=3), **more)


def rows_of(folder: Path, gate: Gate) -> Iterator[Any]:
    return iter(shards_of(folder, gate))


def tokens_of(folder: Path, gate: Gate) -> Iterator[Any]:
    """A generator around one, which closes it when it is closed."""

    def letters(texts: list[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    return iter(TextLoader(shards_of(folder, gate), letters, bos=0, batch_rows=1, row_tokens=8, epochs=1))


def downloads_of(folder: Path, gate: Gate) -> Iterator[Any]:
    """Somebody's own generator around a downloader."""
    shards_of(folder, Gate())
    source = GatedShards(folder, gate)
    with StreamingDownloader(source) as downloader:
        for entry in source.manifest().shards:
            yield downloader.wait_for_shard(entry)


KINDS = [batches_of, rows_of, tokens_of, downloads_of]


@pytest.fixture(autouse=True, scope="module")
def _what_was_there_before_is_not_looked_through() -> Iterator[None]:
    """Or each collection here goes through all that torch made: half a second, some eighty times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_other_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def serving() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith(("torch_bridge-batches", "shards-"))]


def abandoned(kind: Callable[[Path, Gate], Iterator[Any]], folder: Path, gate: Gate) -> list[Any]:
    """An iteration whose threads are in a fetch, in a cycle that only the collector finds; a list that is in it."""
    steps = kind(folder, gate)
    next(steps)
    assert gate.begun.wait(LIMIT_S)
    cycle: list[Any] = [steps]
    cycle.append(cycle)
    return cycle


def all_over(folder: Path, kind: Callable[[Path, Gate], Iterator[Any]]) -> None:
    """The threads are gone, and with them whatever would stop another iteration from going through all."""
    until = time.monotonic() + LIMIT_S
    while serving() and time.monotonic() < until:
        time.sleep(0.01)
    assert not serving()
    gate = Gate()
    gate.go.set()
    assert len(list(kind(folder, gate))) >= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["collected", "dropped"])
def test_on_the_loop_thread(kind: Any, how: str, tmp_path: Path) -> None:
    gate = Gate()
    last = abandoned(kind, tmp_path, gate)
    if how == "collected":
        last = []

    async def end() -> None:
        gate.go.set()
        assert gate.waits.wait(LIMIT_S)  # a thread of the iteration needs this one now
        last.clear()
        gc.collect()

    loop_thread().submit(end()).result(LIMIT_S)
    all_over(tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_may_begin_while_it_lets_go(kind: Any, tmp_path: Path) -> None:
    gate = Gate()
    cycle = abandoned(kind, tmp_path, gate)
    del cycle
    gc.collect()
    assert serving(), "it lets go"
    threading.Timer(0.3, gate.go.set).start()
    following = Gate()
    following.go.set()
    assert len(list(kind(tmp_path, following))) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_thread_that_fetches(kind: Any, tmp_path: Path) -> None:
    gate, collected = Gate(), threading.Event()
    cycle = abandoned(kind, tmp_path, gate)

    def collect() -> None:
        gc.collect()
        collected.set()

    gate.here = collect
    del cycle
    gate.go.set()
    assert collected.wait(LIMIT_S)
    all_over(tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_thread_that_holds_what_the_threads_need(kind: Any, tmp_path: Path) -> None:
    gate, lock, collected = Gate(), threading.Lock(), threading.Event()
    cycle = abandoned(kind, tmp_path, gate)
    gate.here = lambda: lock.acquire(timeout=2 * LIMIT_S)

    def collect() -> None:
        with lock:
            gate.go.set()
            gc.collect()
        collected.set()

    del cycle
    threading.Thread(target=collect, daemon=True).start()
    assert collected.wait(LIMIT_S)
    all_over(tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_on_any_other_thread_it_is_over_when_it_was_dropped(kind: Any, tmp_path: Path) -> None:
    gate = Gate()
    gate.go.set()
    cycle = abandoned(kind, tmp_path, gate)
    steps = cycle[0]
    cycle.clear()
    steps.close()
    assert not serving()


@pytest.mark.parametrize("where", ["loop", "here"])
def test_a_stream_that_is_collected_is_closed_and_nobody_waits_for_that(where: str) -> None:
    closed = threading.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(1000):
                yield number
        finally:
            closed.set()

    def begin() -> None:
        steps = loop_thread().iterate(numbers())
        assert next(steps) == 0
        cycle: list[Any] = [steps]
        cycle.append(cycle)

    async def collect() -> None:
        gc.collect()

    begin()
    if where == "loop":
        loop_thread().submit(collect()).result(LIMIT_S)
    else:
        busy, go = threading.Event(), threading.Event()

        async def stuck() -> None:
            busy.set()
            go.wait(2 * LIMIT_S)

        loop_thread().submit(stuck())
        assert busy.wait(LIMIT_S)
        threading.Timer(LIMIT_S / 2, go.set).start()
        gc.collect()
        assert not go.is_set()
        go.set()
    assert closed.wait(LIMIT_S)


def test_what_is_held_is_let_go_of_by_its_own_process_alone_and_once() -> None:
    told: list[str] = []
    with ClosingStack(lambda: told.append("first"), lambda: told.append("last")) as held:
        if (child := os.fork()) == 0:
            held.close()
            os._exit(len(told))
        assert os.waitpid(child, 0)[1] == 0
    assert told == ["last", "first"]
    alive = weakref.ref(held)
    del held
    assert alive() is None
