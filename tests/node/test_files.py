"""Files are replaced whole, as durable as asked; no lock is left behind by a process that died."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from node.files import DataDirInUseError, Durability, FileLock, atomic_file, atomic_write, data_dir_lock
from protocol.errors import CancelledRequestError

HOLD = """
import sys, time
from pathlib import Path
from node.files import data_dir_lock
with data_dir_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(30)
"""


def test_a_second_holder_is_refused_by_process_id_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataDirInUseError, match=f"process {holder.pid}"), data_dir_lock(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(5)
        with data_dir_lock(tmp_path):
            assert (tmp_path / "lock").read_text().strip() == str(os.getpid())
    finally:
        holder.kill()
        holder.wait(5)
        holder.stdout.close()


def test_a_block_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    atomic_write(path, "old", "name")

    def fail_in_the_middle() -> None:
        with atomic_file(path, "name") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_middle()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.json"]


@pytest.mark.parametrize("durability", ["process", "contents", "name"])
def test_what_is_written_is_synced_before_it_is_named_as_its_durability_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: Durability
) -> None:
    steps: list[str] = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def noted_replace(source: Path, target: Path) -> None:
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    atomic_write(tmp_path / "new", b"bytes", durability, mode=0o600)
    assert (
        steps
        == {
            "process": ["replace"],
            "contents": ["file", "replace"],
            "name": ["file", "replace", "folder"],
        }[durability]
    )
    assert (tmp_path / "new").read_bytes() == b"bytes"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("old")
    program = (
        "import os, sys; from pathlib import Path; from node.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=False, timeout=30)
    assert path.read_text() == "old"


def test_shared_locks_go_together_and_an_exclusive_one_waits_for_them(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second, writer = FileLock(path, shared=True), FileLock(path, shared=True), FileLock(path)
    assert first.try_acquire()
    assert second.try_acquire()
    assert not writer.try_acquire()
    with pytest.raises(TimeoutError, match="locked by another process"):
        writer.acquire(timeout_s=0.1)
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledRequestError):
        writer.acquire(stop)
    first.release()
    second.release()
    with writer.held():
        assert not first.try_acquire()
    assert not writer.is_held


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    assert lock.try_acquire()
    child = os.fork()
    if not child:
        os._exit(int(lock.is_held))
    assert os.waitpid(child, 0)[1] == 0
    assert not FileLock(tmp_path / "lock").try_acquire()
    lock.release()
    assert FileLock(tmp_path / "lock").try_acquire()


def test_what_a_lock_guards_may_be_in_its_file(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    with pytest.raises(RuntimeError, match="not held"):
        _ = lock.fd
    with lock.held():
        os.pwrite(lock.fd, b"7", 0)
    assert (tmp_path / "lock").read_bytes() == b"7"
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "other", create=False).try_acquire()
    assert os.listdir(tmp_path) == ["lock"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_who_waits_without_a_limit_is_woken_and_its_forked_child_does_not_wait(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = FileLock(path), FileLock(path)
    assert first.try_acquire()
    waiting = threading.Thread(target=second.acquire)
    waiting.start()
    while second._waiting_fd is None:  # it is about to wait, or waits
        pass
    child = os.fork()
    if not child:
        os._exit(second._waiting_fd is not None or first.is_held)
    assert os.waitpid(child, 0)[1] == 0
    assert not second.is_held
    first.release()
    waiting.join(10)
    assert second.is_held
    second.release()


def test_a_folder_can_be_locked_and_nothing_is_written_into_it(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path), FileLock(tmp_path)
    assert first.try_acquire()
    assert not second.try_acquire()
    first.release()
    assert second.try_acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new", b"bytes")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
