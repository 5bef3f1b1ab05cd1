"""The hashing process: right, sturdy, and gone when it should be."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from node.formats import gguf as gguf_module
from node.formats.gguf import read_gguf
from node.formats.hyperparameters import model_sizes
from node.shards.store import hasher as hasher_module
from node.shards.store.hasher import Hasher
from protocol.content import hash_file
from protocol.errors import InvalidShardError
from tests.support.gguf.tiny_gguf import write_tiny_gguf
from tests.support.shards.parts import write_shard


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_it_hashes_and_checks_one_file_after_the_other_in_one_process(tmp_path: Path) -> None:
    hasher = Hasher()
    pids = set()
    for name in ("a.gguf", "b.parquet", "c.bin"):
        path = write_shard(tmp_path / name, 50_000)
        kind = {"a.gguf": "gguf", "b.parquet": "parquet"}.get(name, "file")
        hashed = await hasher.hash(path, kind)  # type: ignore[arg-type]
        assert hashed.content == hash_file(path)
        assert hashed.fingerprint.mtime_ns == path.stat().st_mtime_ns
        assert await hasher.check(path, kind) == hashed.fingerprint  # type: ignore[arg-type]
        pids.add(hasher.pid)
    assert len(pids) == 1
    assert hasher.hashed_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    pid = hasher.pid
    await hasher.close()
    assert pid is not None
    assert not is_alive(pid)


async def test_what_is_not_whole_is_named(tmp_path: Path) -> None:
    hasher = Hasher()
    for name, kind in (("a.gguf", "gguf"), ("b.parquet", "parquet")):
        path = write_shard(tmp_path / name)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InvalidShardError, match=name):
            await hasher.hash(path, kind)  # type: ignore[arg-type]
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidShardError, match="empty"):
        await hasher.hash(tmp_path / "empty", "file")
    with pytest.raises(OSError, match="No such file"):
        await hasher.hash(tmp_path / "nothing", "file")
    assert (await hasher.hash(write_shard(tmp_path / "good.gguf"), "gguf")).content.size
    await hasher.close()


async def test_the_sizes_of_a_model_are_read_in_the_process_and_never_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bare = write_tiny_gguf(tmp_path / "tiny.gguf"), write_shard(tmp_path / "bare.gguf")
    expected = model_sizes(read_gguf(model))
    assert expected.kv_bytes_per_token == 4 * 2 * (16 + 16) * 2  # layers, heads, key and value, 16 bits
    monkeypatch.delattr(gguf_module._Header, "read")
    hasher = Hasher()
    assert await hasher.model_sizes(model) == expected
    with pytest.raises(InvalidShardError, match=r"general\.architecture|block_count"):
        await hasher.model_sizes(bare)
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:100])
    with pytest.raises(InvalidShardError, match=r"cut\.gguf"):
        await hasher.model_sizes(tmp_path / "cut.gguf")
    await hasher.close()


async def wait_for_progress(hasher: Hasher, path: Path) -> tuple[asyncio.Task[object], int]:
    """A job that is certainly being worked on, and the process that does."""
    seen = asyncio.Event()
    task = asyncio.create_task(hasher.hash(path, "file", progress=lambda _: seen.set()))
    await seen.wait()
    assert hasher.pid is not None
    return task, hasher.pid  # type: ignore[return-value]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(50 << 20)
    return path


async def test_a_killed_process_is_started_again_and_the_file_hashed(large: Path) -> None:
    hasher = Hasher(progress_s=0.0)
    task, pid = await wait_for_progress(hasher, large)
    os.kill(pid, signal.SIGKILL)
    hashed = await task
    assert hashed.content.size == large.stat().st_size  # type: ignore[attr-defined]
    assert hasher.pid != pid
    await hasher.close()


async def test_a_file_that_kills_the_process_twice_is_invalid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hasher_module.sys, "executable", "/bin/false")
    hasher = Hasher()
    with pytest.raises(InvalidShardError, match="twice"):
        await hasher.hash(write_shard(tmp_path / "bad.gguf"), "gguf")
    await hasher.close()


async def test_a_cancelled_job_does_not_answer_the_next(large: Path, tmp_path: Path) -> None:
    hasher = Hasher(progress_s=0.0)
    task, _ = await wait_for_progress(hasher, large)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    small = write_shard(tmp_path / "small.bin")
    assert (await hasher.hash(small, "file")).content == hash_file(small)
    await hasher.close()


async def test_closing_does_not_wait_for_a_large_file(large: Path) -> None:
    hasher = Hasher(progress_s=0.0)
    task, pid = await wait_for_progress(hasher, large)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await hasher.close()
    assert not is_alive(pid)
