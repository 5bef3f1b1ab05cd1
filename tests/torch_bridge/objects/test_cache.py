"""The cache on disk: under its limit, whole after kill -9, shared, and of use to nobody who broke it."""

from __future__ import annotations

import logging
import os
import pickle
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.bridge.o3_client import in_fork
from torch_bridge import O3Client
from torch_bridge.objects.chunk_cache import ChunkCache, ChunkClaim
from torch_bridge.objects.dataset import O3Dataset, RecordFormat

A, B = "a" * 32, "b" * 32
"""Of chunks of two objects, the part of their names before the number."""
CHUNK = 8192
COST = 12288
"""With its header, in blocks."""


def keep(cache: ChunkCache, *names: str) -> None:
    for claim in cache.claim(dict.fromkeys(names, CHUNK)):
        cache.publish(claim, body(claim.name))


def body(name: str) -> bytes:
    return random.Random(name).randbytes(CHUNK)


def kept(cache: ChunkCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if "-" in path.name and not path.name.startswith("limit-")}


def on_disk(folder: Path) -> int:
    """Chunks and what is being written, in blocks."""
    total = 0
    for path in folder.iterdir():
        if "-" in path.name and not path.name.startswith("limit-"):
            try:
                total += -(-path.stat().st_size // 4096) * 4096
            except FileNotFoundError:
                continue
    return total


def read(cache: ChunkCache, name: str) -> bytes | None:
    chunk = cache.opened(name, CHUNK)
    return None if chunk is None else chunk.read(0, CHUNK)


def test_what_was_longest_unread_goes_and_what_is_open_stays_readable(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 3 * COST)
    for name in (f"{A}-0", f"{A}-1", f"{A}-2"):
        keep(cache, name)
        os.utime(tmp_path / name, ns=(0, int(name[-1]) + 1))
    old = cache.opened(f"{A}-0", CHUNK)  # counts as used now
    held = ChunkCache(tmp_path, 3 * COST).opened(f"{A}-1", CHUNK)
    os.utime(tmp_path / f"{A}-1", ns=(0, 2))
    keep(cache, f"{A}-3")
    assert kept(cache) == {f"{A}-0", f"{A}-3"}  # two went: a twentieth stays free for what comes next
    assert old is not None
    assert held is not None
    assert held.read(0, CHUNK) == body(f"{A}-1")


def test_a_writer_killed_in_the_middle_leaves_no_chunk_no_lock_and_no_bytes(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 3 * COST)

    def die() -> None:
        claims = cache.claim({f"{A}-0": CHUNK, f"{A}-1": CHUNK})
        assert claims[0].part is not None
        os.pwrite(claims[0].part.fd, b"half", 0)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(AssertionError, match="died"):
        in_fork(die)
    assert kept(cache) == {f"{A}-0.part", f"{A}-1.part"}
    cache.wait(f"{A}-0")  # nobody holds it
    keep(cache, f"{A}-0", f"{B}-0")
    assert read(cache, f"{A}-0") == body(f"{A}-0")
    cache.sweep()
    assert kept(cache) == {f"{A}-0", f"{B}-0"}
    assert int.from_bytes((tmp_path / "lock").read_bytes(), "little") == 2 * COST


def test_one_of_two_fetches_and_the_other_waits(tmp_path: Path) -> None:
    cache, other = ChunkCache(tmp_path, 9 * COST), ChunkCache(tmp_path, 9 * COST)
    (claim,) = cache.claim({f"{A}-0": CHUNK})
    assert other.claim({f"{A}-0": CHUNK}) == []
    seen: list[bytes | None] = []

    def wait() -> None:
        other.wait(f"{A}-0")
        seen.append(read(other, f"{A}-0"))

    thread = threading.Thread(target=wait)
    thread.start()
    assert in_fork(lambda: len(cache.claim({f"{A}-0": CHUNK}))) == 0  # nor in a forked child
    assert seen == []
    cache.publish(claim, body(f"{A}-0"))
    thread.join(10)
    assert seen == [body(f"{A}-0")]


def test_the_smallest_limit_of_the_runs_that_live_counts(tmp_path: Path) -> None:
    small, large = ChunkCache(tmp_path, 2 * COST), ChunkCache(tmp_path, 10 * COST)
    small.sweep()
    keep(large, *(f"{A}-{at}" for at in range(6)))
    assert on_disk(tmp_path) <= 2 * COST
    small.close()
    keep(large, *(f"{A}-{at}" for at in range(10)))
    assert on_disk(tmp_path) > 5 * COST
    small.sweep()
    assert on_disk(tmp_path) <= 2 * COST


def test_files_of_other_names_are_not_counted_and_not_touched(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 3 * COST)
    own = [tmp_path / name for name in ("2024-01", "my-data.parquet", "beef-1.part", "limit-of-me", f"{A}-x")]
    (tmp_path / "holiday-2024").mkdir()
    for path in own:
        path.write_bytes(bytes(COST))
        os.utime(path, ns=(0, 1))
    for number in range(6):
        keep(cache, f"{A}-{number}")
    cache.sweep()
    assert all(path.stat().st_size == COST for path in own)
    assert read(cache, f"{A}-5") == body(f"{A}-5")
    assert int.from_bytes((tmp_path / "lock").read_bytes(), "little") in (2 * COST, 3 * COST)


def test_where_there_is_no_room_a_chunk_is_read_without_the_cache(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, COST - 1)
    assert cache.claim({f"{A}-0": CHUNK}) == [ChunkClaim(f"{A}-0", CHUNK, None)]
    assert kept(cache) == set()


@pytest.mark.parametrize("damage", ["cut", "byte", "empty", "header"])
def test_a_damaged_chunk_is_found_and_goes(tmp_path: Path, damage: str) -> None:
    cache = ChunkCache(tmp_path, 9 * COST)
    keep(cache, f"{A}-0")
    data = bytearray((tmp_path / f"{A}-0").read_bytes())
    match damage:
        case "cut":
            del data[-1]
        case "byte":
            data[5000] ^= 1
        case "empty":
            data[:] = bytes(len(data))
        case _:
            data[9] ^= 1
    (tmp_path / f"{A}-0").write_bytes(data)
    assert read(cache, f"{A}-0") is None
    assert kept(cache) == set()
    keep(cache, f"{A}-0")
    assert read(cache, f"{A}-0") == body(f"{A}-0")


def write_and_read(folder: Path, seed: int) -> int:
    """Chunks by chance, until it is killed or done; AssertionError for one that is not whole."""
    cache, chance = ChunkCache(folder, 6 * COST), random.Random(seed)
    found = 0
    for _ in range(300):
        name = f"{A}-{chance.randrange(20)}"
        if (data := read(cache, name)) is None:
            for claim in cache.claim({name: CHUNK}):
                time.sleep(0.0005)
                cache.publish(claim, body(name))
        else:
            assert data == body(name)
            found += 1
    return found


def test_many_processes_some_killed_never_exceed_the_limit_nor_serve_half_a_chunk(tmp_path: Path) -> None:
    children = []
    for seed in range(5):
        if (child := os.fork()) == 0:
            status = 1
            try:
                write_and_read(tmp_path, seed)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    most, ends = 0, []
    for child in children[:2]:
        time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
    while children:
        if tmp_path.exists():
            most = max(most, on_disk(tmp_path))
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                ends.append(status)
    assert sorted(ends) in ([0] * 3 + [9] * 2, [0] * 4 + [9], [0] * 5)
    assert 0 < most <= 6 * COST
    cache = ChunkCache(tmp_path, 6 * COST)
    cache.sweep()
    assert not [name for name in kept(cache) if name.endswith(".part")]


def test_a_full_disk_costs_the_cache_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "origin"
    source.mkdir()
    data = random.Random(1).randbytes(1_000_000)
    (source / "a").write_bytes(data)

    def child() -> list[Any]:
        # The file size limit of a process stands in for a full disk: a write beyond it fails in the middle.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        seen: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("torch_bridge").addHandler(handler)
        dataset = O3Dataset(source.as_uri(), "", O3Client(), tmp_path / "cache", format=RecordFormat(1000))
        got = b"".join(dataset.__getitems__(range(1000))) == data
        return [got, [line for line in seen if "continue without it" in line], on_disk(tmp_path / "cache" / "chunks")]

    got, warnings, left = in_fork(child)
    assert got
    assert len(warnings) == 1
    assert left == 0


def test_it_travels_without_what_is_open(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 9 * COST)
    keep(cache, f"{A}-0")
    assert read(pickle.loads(pickle.dumps(cache)), f"{A}-0") == body(f"{A}-0")
